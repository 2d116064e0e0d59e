"""The optimizer of a training, and its learning rate over the steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeAlias

import keras
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON, Tensor

Schedule: TypeAlias = keras.optimizers.schedules.LearningRateSchedule

SCHEDULES: dict[str, Callable[[float, int], float | Schedule]] = {
    "constant": lambda rate, steps: rate,
    "linear": lambda rate, steps: keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0),
    "cosine": keras.optimizers.schedules.CosineDecay,
}


def make_optimizer(
    steps: int,
    *,
    learning_rate: float = 5e-6,
    schedule: str = "constant",
    warmup_fraction: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    gradient_accumulation: int = 1,
) -> keras.optimizers.Optimizer:
    """Make AdamW with the usual choices.

    Args:
        steps: calls of `train_step` in all; micro-batches count one each.
        learning_rate: the highest learning rate.
        schedule: `"constant"`, or `"linear"` or `"cosine"` down to 0 at the last step.
        warmup_fraction: share of the steps in which the rate rises from 0.
        weight_decay: decoupled weight decay; not applied to biases and norms.
        clip_norm: bound on the norm of the whole gradient, or None.
        gradient_accumulation: micro-batches per update.

    Returns:
        The optimizer.

    Raises:
        InputError: an unknown schedule.

    Example:
        >>> optimizer = make_optimizer(100, learning_rate=1e-3, schedule="linear")
        >>> round(float(optimizer.learning_rate), 6)
        0.001
    """
    rising = int(round(steps * warmup_fraction))
    falling = max(steps - rising, 1)
    if schedule not in SCHEDULES:
        rule = f"must be one of {', '.join(SCHEDULES)}"
        raise InputError(InputProblem("schedule", rule, schedule))
    rate = SCHEDULES[schedule](learning_rate, falling)
    if rising:
        rate = _Rise(rate, learning_rate, rising)
    optimizer = keras.optimizers.AdamW(
        rate,
        weight_decay=weight_decay,
        global_clipnorm=clip_norm,
        gradient_accumulation_steps=gradient_accumulation if gradient_accumulation > 1 else None,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale", "norm"])
    return optimizer


@keras.saving.register_keras_serializable("dpo_keras")
class _Rise(keras.optimizers.schedules.LearningRateSchedule):
    """A linear rise from 0, then another schedule."""

    def __init__(self, then: float | Schedule, learning_rate: float, steps: int):
        self.then, self.learning_rate, self.steps = then, learning_rate, steps

    def __call__(self, step: Tensor) -> Tensor:
        step = ops.cast(step, "float32")
        # The first step is not taken at rate 0, where it would change nothing.
        rise = self.learning_rate * (step + 1.0) / self.steps
        then = self.then(step - self.steps) if callable(self.then) else self.then
        return ops.where(step < self.steps, rise, then)

    def get_config(self) -> dict[str, JSON]:
        then = keras.saving.serialize_keras_object(self.then)
        return {"then": then, "learning_rate": self.learning_rate, "steps": self.steps}

    @classmethod
    def from_config(cls, config: dict[str, JSON]) -> _Rise:
        then = keras.saving.deserialize_keras_object(config["then"])
        return cls(then, config["learning_rate"], config["steps"])
