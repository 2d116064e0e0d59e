"""The optimizer of a training, and its learning rate over the steps."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any, TypeAlias

import keras
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON, Tensor
from dpo_keras.utils.text import did_you_mean, nearest

Schedule: TypeAlias = keras.optimizers.schedules.LearningRateSchedule

SCHEDULES: dict[str, Callable[[float, int], float | Schedule]] = {
    "constant": lambda rate, steps: rate,
    "linear": lambda rate, steps: keras.optimizers.schedules.PolynomialDecay(rate, steps, 0.0),
    "cosine": keras.optimizers.schedules.CosineDecay,
}


def make_optimizer(  # noqa: PLR0913 (keyword options, one for each of the configuration's)
    steps: int,
    *,
    optimizer: str = "adamw",
    optimizer_options: Mapping[str, JSON] | None = None,
    learning_rate: float = 5e-6,
    schedule: str = "constant",
    schedule_options: Mapping[str, JSON] | None = None,
    warmup_fraction: float = 0.0,
    weight_decay: float = 0.0,
    clip_norm: float | None = 1.0,
    gradient_accumulation: int = 1,
) -> keras.optimizers.Optimizer:
    """Make a Keras optimizer with the usual choices.

    Args:
        steps: calls of `train_step` in all; micro-batches count one each.
        optimizer: any of Keras' optimizers by its name, such as "adamw", "lion" or "sgd".
        optimizer_options: its further arguments, such as `{"beta_2": 0.98}`.
        learning_rate: the highest learning rate.
        schedule: "constant", "linear" or "cosine" down to 0 at the last step, or any of Keras'
            schedules by its name, such as "ExponentialDecay".
        schedule_options: arguments of a schedule of Keras. `initial_learning_rate` is
            `learning_rate`, and `decay_steps` is what the rise leaves of the steps, unless given.
        warmup_fraction: share of the steps in which the rate rises from 0.
        weight_decay: decoupled weight decay; not applied to biases and norms.
        clip_norm: bound on the norm of the whole gradient, or None.
        gradient_accumulation: micro-batches per update.

    Returns:
        The optimizer.

    Raises:
        InputError: an unknown name, or an argument that the optimizer or the schedule refuses.

    Example:
        >>> optimizer = make_optimizer(100, learning_rate=1e-3, schedule="linear")
        >>> round(float(optimizer.learning_rate), 6)
        0.001
        >>> make_optimizer(100, optimizer="sgd", optimizer_options={"momentum": 0.9}).name
        'sgd'
    """
    kind = _named("optimizer", optimizer, _keras_classes(keras.optimizers, "Optimizer"))
    rising = int(round(steps * warmup_fraction))
    rate: Any = _rate(learning_rate, schedule, schedule_options or {}, max(steps - rising, 1))
    if rising:
        # Keras' own schedules may begin elsewhere than at the learning rate.
        peak = learning_rate if schedule in SCHEDULES else float(rate(0))
        rate = _Rise(rate, peak, rising)
    accumulation = gradient_accumulation if gradient_accumulation > 1 else None
    ours = {
        "learning_rate": ("learning_rate", rate),
        "weight_decay": ("weight_decay", weight_decay),
        "global_clipnorm": ("clip_norm", clip_norm),
        "gradient_accumulation_steps": ("gradient_accumulation", accumulation),
    }
    options = dict(optimizer_options or {})
    if clip_norm is not None and (other := {"clipnorm", "clipvalue"} & options.keys()):
        rule = "cannot go with clip_norm"
        argument = f"optimizer_options.{min(other)}"
        raise InputError(InputProblem(argument, rule, clip_norm, "Set clip_norm to null."))
    made = _made("optimizer_options", kind, options, ours)
    made.exclude_from_weight_decay(var_names=["bias", "gamma", "beta", "scale", "norm"])
    return made


def _rate(
    learning_rate: float, schedule: str, options: Mapping[str, JSON], steps: int
) -> float | Schedule:
    """Return the rate over the steps after its rise."""
    if schedule in SCHEDULES:
        if options:
            rule = f"has no effect with schedule={schedule!r}"
            hint = "Keras' schedules take arguments: CosineDecay, PolynomialDecay and others."
            raise InputError(InputProblem("schedule_options", rule, dict(options), hint))
        return SCHEDULES[schedule](learning_rate, steps)
    kinds = _keras_classes(keras.optimizers.schedules, "LearningRateSchedule")
    kind = _named("schedule", schedule, kinds, SCHEDULES)
    taken = inspect.signature(kind).parameters
    lengths = {name: steps for name in ("decay_steps", "first_decay_steps") if name in taken}
    ours = {"initial_learning_rate": ("learning_rate", learning_rate)}
    return _made("schedule_options", kind, {**lengths, **options}, ours)


def _keras_classes(module: ModuleType, base: str) -> dict[str, type]:
    """Return the public classes of a module of Keras that can be used by name."""
    abstract = {base, "LossScaleOptimizer", "MultiOptimizer"}  # the two wrap others
    return {
        name: value
        for name, value in sorted(vars(module).items())
        if isinstance(value, type)
        and issubclass(value, getattr(module, base))
        and name not in abstract
    }


def _named(
    argument: str, name: str, known: Mapping[str, type], further: Iterable[str] = ()
) -> type:
    """Return the class of a name, written as the class or as Keras' identifiers are."""
    wanted = str(name).replace("_", "").lower()
    for known_name, kind in known.items():
        if known_name.lower() == wanted:
            return kind
    names = [*further, *known]
    alike = {known_name.lower(): known_name for known_name in names}
    near = nearest(wanted, alike)
    hint = f"Did you mean {alike[near]!r}?" if near else ""
    raise InputError(InputProblem(argument, f"must be one of {', '.join(names)}", name, hint))


def _made(
    argument: str,
    kind: type,
    options: Mapping[str, JSON],
    ours: Mapping[str, tuple[str, JSON]],
) -> Any:
    """Call a class of Keras with `options`, and with `ours`: (our name of it, its value)."""
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(kind).parameters.items()
        if parameter.kind is not parameter.VAR_KEYWORD
    }
    taken = [name for name in parameters if name not in ours]
    problems = []
    for name, value in options.items():
        place = f"{argument}.{name}"
        if name in ours:
            hint = f"Give {ours[name][0]} instead."
            problems.append(InputProblem(place, "is set already", hint=hint))
        elif name not in parameters:
            near = did_you_mean(name, taken)
            hint = f"{near[:1].upper()}{near[1:]} It takes: {', '.join(taken)}.".strip()
            rule = f"is not an argument of {kind.__name__}"
            problems.append(InputProblem(place, rule, value, hint))
        elif rule := _type_rule(parameters[name].default, value):
            problems.append(InputProblem(place, rule, value))
    for name in taken:
        if parameters[name].default is inspect.Parameter.empty and name not in options:
            problems.append(InputProblem(f"{argument}.{name}", f"is needed by {kind.__name__}"))
    if problems:
        raise InputError(problems)
    given = {name: value for name, (_, value) in ours.items() if name in parameters}
    try:
        return kind(**given, **options)
    except (TypeError, ValueError) as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0]
        rule = f": {kind.__name__} refuses {dict(options)}: {reason}"
        raise InputError(InputProblem(argument, rule)) from error


def _type_rule(default: object, value: JSON) -> str:
    """Say what a value must be to be of its default's type; Keras would fail on it much later."""
    if isinstance(default, bool):
        return "" if isinstance(value, bool) else "must be true or false"
    number = isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30
    return "must be a finite number" if isinstance(default, int | float) and not number else ""


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
