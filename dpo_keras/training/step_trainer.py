"""What the trainers of all backends share: steps that return sums, and Keras' interface."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import tensorflow as tf
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.training.default_callbacks import ReleasesTracing, Throughput
from dpo_keras.training.distribution import Worker, sum_over_replicas
from dpo_keras.training.fit_interface import ShortProgress, with_defaults
from dpo_keras.training.metrics import COUNTS, STOP, MetricSums, step_counts
from dpo_keras.utils import Tensor, keras_internals
from dpo_keras.utils.garbage_collection import frozen_graphs
from dpo_keras.utils.keras_half_precision import scaling_losses, update_in_float32

Gradients: TypeAlias = list[tuple[Tensor, keras.Variable]]
Step: TypeAlias = Callable[[Batch], MetricSums]
StepFunction: TypeAlias = Callable[..., Any]
StepLoss: TypeAlias = Callable[[], tuple[Tensor, MetricSums]]
"""Returns this replica's share of a step's loss (the shares add up to it), and what is logged."""


class StepTrainer(keras.Model):
    """A `keras.Model` whose steps are exact over replicas, micro-batches and uneven batches.

    A subclass writes `train_step` and `test_step` from `gradients`, `update` and `report`, and
    names what they measure in `metric_names`. The rest of Keras' interface stays: `compile`,
    `fit`, `evaluate`, `predict`, callbacks, saving. Keras' own trainers are not enough:

    1. They divide each replica's loss by the number of replicas. Packed rows hold different numbers
       of pairs, so here each share is divided by the weight of all pairs of the global batch.
    2. They clip gradients before they sum them over the replicas. Here the sum comes first.
    3. They average metrics of batches. Here steps return sums and weights, added up in double
       precision.
    4. They weigh all micro-batches alike, see `WeighedAccumulation` (transformers#35856).
    5. They build the model from the first batch, which fails on integers and dicts (keras#20329).

    `TensorflowTrainer` and `JaxTrainer` have what is left: `gradients`, and how a step is compiled
    and run.

    Attributes:
        step_logs: what the latest step measured, hidden names included.
        first_step_logs: the same of the first of the steps in one execution.
        stop_requested: returns whether this process was asked to stop; see `StopTogether`.
    """

    hooks: tuple[str, ...] = ("_flatten_metrics_in_order",)
    """Methods that `keras.Model.fit` and `evaluate` call and that are overridden here."""
    compiles_whole_steps = False
    """Whether `jit_compile="auto"` means True."""

    def __init__(self, **kwargs: object):
        keras_internals.check_trainer_hooks(self.hooks)
        super().__init__(**kwargs)
        self.accumulation: keras_internals.WeighedAccumulation | None = None
        self.step_logs: dict[str, Tensor] = {}
        self.first_step_logs: dict[str, Tensor] = {}
        self.stop_requested: Callable[[], bool] | None = None
        self.train_function: StepFunction | None = None
        self.test_function: StepFunction | None = None

    # -- for subclasses --------------------------------------------------------------------

    def metric_names(self) -> list[str]:
        """Return the names that both steps measure, in the order in which they are logged."""
        raise NotImplementedError(f"{type(self).__name__} must define metric_names.")

    def train_step(self, batch: Batch) -> MetricSums:
        """Take one step, and return this replica's `report` with `grad_norm` in it."""
        raise NotImplementedError(f"{type(self).__name__} must define train_step.")

    def test_step(self, batch: Batch) -> MetricSums:
        """Measure one batch, and return this replica's `report`."""
        raise NotImplementedError(f"{type(self).__name__} must define test_step.")

    def gradients(self, step_loss: StepLoss) -> tuple[Gradients, MetricSums]:
        """Return the gradients of a step's loss, summed over replicas, and what is logged.

        The gradients are scaled where the optimizer scales losses.
        """
        raise NotImplementedError

    def update(self, gradients: Gradients, weight: Tensor) -> Tensor:
        """Let the optimizer clip, accumulate and apply gradients; return their norm before that.

        Micro-batches are averaged by `weight`, that of this replica's pairs.
        """
        # A model may have weights of several dtypes, and sums of squares need float32.
        values = [ops.cast(gradient, "float32") for gradient, _ in gradients]
        scale = getattr(self.optimizer, "dynamic_scale", 1.0)
        squares = [ops.sum(ops.square(value)) for value in values]
        norm = ops.sqrt(ops.sum(ops.stack(squares))) / ops.cast(scale, "float32")
        if self.accumulation is not None:
            self.accumulation.weigh(sum_over_replicas(ops.convert_to_tensor(weight)))
        self._apply(values, [variable for _, variable in gradients])
        return norm

    def report(self, batch: Batch, sums: MetricSums) -> MetricSums:
        """Return what a step hands over: its sums, and how many tokens and pairs it had."""
        return {**sums, **step_counts(batch)}

    @property
    def replicas(self) -> int:
        """The number of replicas that share the rows of a batch."""
        return 1

    @property
    def static_shapes(self) -> bool:
        """Whether every shape in a step must be static, as XLA needs."""
        return bool(self.jit_compile)

    @property
    def devices_of_rows(self) -> int:
        """The number of devices among which the rows of a dataset must be split evenly."""
        return 1

    @property
    def worker(self) -> Worker | None:
        """Which part of the rows of every dataset this process makes; None: all rows."""
        return None

    def own_rows(self, make: Callable[[Worker | None], tf.data.Dataset]) -> Any:
        """Return a dataset for `fit` of which every process makes only its own rows.

        `make` gets the argument `worker` of `preference_dataset`; None makes all rows.
        """
        return make(None)

    def variable_scope(self) -> contextlib.AbstractContextManager[object]:
        """Return the scope in which further variables of this model are made."""
        return contextlib.nullcontext()

    # -- Keras' interface ------------------------------------------------------------------

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        loss: Any = None,
        *,
        jit_compile: bool | str = "auto",
        **kwargs: object,
    ) -> None:
        """Configure training as `keras.Model.compile` does.

        On TensorFlow `jit_compile="auto"` means False: XLA must know all shapes, compiles each
        bucket of lengths anew, and runs attention of packed batches over whole rows instead of
        trees. On JAX, which has nothing else, it means True, unless `run_eagerly` is.
        """
        if jit_compile == "auto":
            jit_compile = self.compiles_whole_steps and not kwargs.get("run_eagerly", False)
        if kwargs.get("auto_scale_loss", True):
            optimizer = scaling_losses(optimizer, keras_internals.all_layers(self))
        super().compile(optimizer, loss, jit_compile=jit_compile, **kwargs)
        keras_internals.skip_zero_weight_decay(self.optimizer)
        self._prepare_optimizer()
        update_in_float32(self.optimizer)
        with self.variable_scope():
            if keras_internals.inner_optimizer(self.optimizer).gradient_accumulation_steps:
                self.accumulation = keras_internals.WeighedAccumulation(self.optimizer)
            # Now, not in the first step: a model saved before it must load as well.
            self.optimizer.build(self.trainable_variables)
        self.train_function = self.test_function = self.predict_function = None

    def default_callbacks(self) -> list[keras.callbacks.Callback]:
        """Return the callbacks that every `fit` has, in front of the user's."""
        return [ReleasesTracing(), Throughput(), ShortProgress()]

    def fit(self, *args: object, callbacks: object = None, **kwargs: object) -> Any:
        """Train as `keras.Model.fit` does, on dict batches; tokens per second are logged, too."""
        callbacks = with_defaults(callbacks, self.default_callbacks())
        # Keras warns that it cannot shuffle a tf.data dataset, unless it is told not to.
        with frozen_graphs():
            return super().fit(*args, callbacks=callbacks, **{"shuffle": False, **kwargs})

    def counts(self) -> dict[str, float]:
        """Return the number of tokens and of pairs since the last reset."""
        raise NotImplementedError

    def steps_taken(self) -> int:
        """Return the number of steps since the optimizer was made, micro-batches included."""
        return int(ops.convert_to_numpy(keras_internals.micro_steps(self.optimizer)))

    def make_train_function(self, force: bool = False) -> StepFunction:
        """Return the function that `fit` calls."""
        if self.train_function is None or force:
            self.train_function = self._step_function(self.train_step, ["grad_norm"])
        return self.train_function

    def make_test_function(self, force: bool = False) -> StepFunction:
        """Return the function that `evaluate` calls."""
        if self.test_function is None or force:
            self.test_function = self._step_function(self.test_step, [])
        return self.test_function

    def _apply(self, gradients: Sequence[Tensor], variables: Sequence[keras.Variable]) -> None:
        self.optimizer.apply(gradients, variables)

    def _prepare_optimizer(self) -> None:
        """Change a compiled optimizer to what this backend's steps need."""

    def _step_function(self, step: Step, further_names: list[str]) -> StepFunction:
        raise NotImplementedError

    def _names(self, further: list[str]) -> list[str]:
        return [*self.metric_names(), *further, *COUNTS, STOP]

    def _stop(self) -> float:
        return float(self.stop_requested is not None and self.stop_requested())

    def _flatten_metrics_in_order(self, logs: dict[str, Tensor]) -> list[Tensor]:
        return [logs[name] for name in self.metric_names() if name in logs]


def stacked_sums(sums: MetricSums, names: list[str]) -> Tensor:
    """Return what a step measured as one tensor `[names, 2]`."""
    return ops.stack([ops.stack([ops.cast(v, "float32") for v in sums[n]]) for n in names])
