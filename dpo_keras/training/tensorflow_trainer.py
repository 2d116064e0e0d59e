"""`fit` and `evaluate` on TensorFlow, for any `tf.distribute` strategy."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import keras
import tensorflow as tf
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError
from dpo_keras.training.default_callbacks import ReleasesTracing, Throughput
from dpo_keras.training.distribution import OneStep, next_steps, sum_over_replicas
from dpo_keras.training.fit_interface import ShortProgress, with_defaults
from dpo_keras.training.metrics import COUNTS, STOP, MetricSums, means, means_by_name, step_counts
from dpo_keras.utils import Tensor, keras_internals
from dpo_keras.utils.garbage_collection import frozen_graphs
from dpo_keras.utils.keras_half_precision import (
    scaling_losses,
    update_in_float32,
)

Gradients: TypeAlias = list[tuple[Tensor, keras.Variable]]
Step: TypeAlias = Callable[[Batch], MetricSums]
StepFunction: TypeAlias = Callable[[object], dict[str, Tensor]]
StepLoss: TypeAlias = Callable[[], tuple[Tensor, MetricSums]]
"""Returns this replica's share of a step's loss (the shares add up to it), and what is logged."""


class TensorflowTrainer(keras.Model):
    """A `keras.Model` whose steps are exact over replicas, micro-batches and uneven batches.

    A subclass writes `train_step` and `test_step` from `gradients`, `update` and `report`, and
    names what they measure in `metric_names`. The rest of Keras' interface stays: `compile`,
    `fit`, `evaluate`, `predict`, callbacks, saving. Keras' own trainer is not enough:

    1. It divides each replica's loss by the number of replicas. Packed rows hold different numbers
       of pairs, so here each share is divided by the weight of all pairs of the global batch.
    2. It clips gradients before it sums them over the replicas. Here the sum comes first.
    3. It averages metrics of batches. Here steps return sums and weights, added up in float64.
    4. It weighs all micro-batches alike, see `WeighedAccumulation` (transformers#35856).
    5. It averages the first batch over the replicas to build the model, which fails on integers
       and dicts (keras#20329).
    6. It fails late on `jit_compile` under several replicas (keras#17187) and on parameter servers
       (keras#18624). Both are refused here with the reason.

    A trainer for another backend offers the same methods on that backend.

    Attributes:
        step_logs: what the latest step measured, hidden names included.
        first_step_logs: the same of the first of the steps in one execution.
        stop_requested: returns whether this process was asked to stop; see `StopTogether`.
    """

    def __init__(self, **kwargs: object):
        if isinstance(tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy):
            raise InputError(
                "Keras 3 cannot train on parameter servers (keras#18624). Use dpo_keras.legacy."
                f"{type(self).__name__} with a tf-keras policy, or another strategy."
            )
        keras_internals.check_trainer_hooks()
        super().__init__(**kwargs)
        self.accumulation: keras_internals.WeighedAccumulation | None = None
        self._totals: Tensor = None
        self._total_names: list[str] = []
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
        variables = self.trainable_variables
        # Frozen weights are not watched, or TensorFlow would lay out their gradients too.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in variables])
            loss, sums = step_loss()
            loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, variables)
        used = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        if not used:
            raise InputError("policy has no trainable weights that the loss depends on.")
        summed = sum_over_replicas([tf.convert_to_tensor(gradient) for gradient, _ in used])
        return [(gradient, v) for gradient, (_, v) in zip(summed, used, strict=True)], sums

    def update(self, gradients: Gradients, weight: Tensor) -> Tensor:
        """Let the optimizer clip, accumulate and apply gradients; return their norm before that.

        Micro-batches are averaged by `weight`, that of this replica's pairs.
        """
        # A model may have weights of several dtypes, and sums of squares need float32.
        values = [tf.cast(gradient, "float32") for gradient, _ in gradients]
        scale = getattr(self.optimizer, "dynamic_scale", 1.0)
        norm = tf.linalg.global_norm(values) / ops.cast(scale, "float32")
        if self.accumulation is not None:
            self.accumulation.weigh(sum_over_replicas(tf.convert_to_tensor(weight)))
        self.optimizer.apply(values, [variable for _, variable in gradients])
        return norm

    def report(self, batch: Batch, sums: MetricSums) -> MetricSums:
        """Return what a step hands over: its sums, and how many tokens and pairs it had."""
        return {**sums, **step_counts(batch)}

    # -- Keras' interface ------------------------------------------------------------------

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        loss: Any = None,
        *,
        jit_compile: bool | str = "auto",
        **kwargs: object,
    ) -> None:
        """Configure training as `keras.Model.compile` does; `jit_compile="auto"` means False.

        XLA must know all shapes: it compiles each bucket of lengths anew, and runs attention of
        packed batches over whole rows instead of trees.
        """
        jit_compile = False if jit_compile == "auto" else jit_compile
        if kwargs.get("auto_scale_loss", True):
            optimizer = scaling_losses(optimizer, keras_internals.all_layers(self))
        super().compile(optimizer, loss, jit_compile=jit_compile, **kwargs)
        keras_internals.leave_gradient_sums_to_caller(self.optimizer)
        keras_internals.skip_zero_weight_decay(self.optimizer)
        keras_internals.use_adam_kernel(self.optimizer)
        update_in_float32(self.optimizer)
        with self.distribute_strategy.scope():
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

    def reset_metrics(self) -> None:
        """Start all means anew; Keras calls it at the start of an epoch."""
        self._totals = None

    def get_metrics_result(self) -> dict[str, Tensor]:
        """Return the means since the last reset, by name."""
        sums = self._totals
        return {} if sums is None else means_by_name(self._total_names, means(sums))

    def counts(self) -> dict[str, float]:
        """Return the number of tokens and of pairs since the last reset."""
        sums = [] if self._totals is None else self._totals[:, 0].numpy()
        totals = dict(zip(self._total_names, sums, strict=False))
        return {name: float(totals.get(name, 0.0)) for name in COUNTS}

    def steps_taken(self) -> int:
        """Return the number of steps since the optimizer was made, micro-batches included."""
        return int(ops.convert_to_numpy(keras_internals.micro_steps(self.optimizer)))

    def make_train_function(self, force: bool = False) -> StepFunction:
        """Return the function that `fit` calls with an iterator."""
        if self.train_function is None or force:
            self.train_function = self._step_function(self.train_step, ["grad_norm"])
        return self.train_function

    def make_test_function(self, force: bool = False) -> StepFunction:
        """Return the function that `evaluate` calls with an iterator."""
        if self.test_function is None or force:
            self.test_function = self._step_function(self.test_step, [])
        return self.test_function

    def _maybe_symbolic_build(self, iterator: object = None, data_batch: object = None) -> None:
        """Do nothing: the policy is built already (reason 5)."""

    def _flatten_metrics_in_order(self, logs: dict[str, Tensor]) -> list[Tensor]:
        return [logs[name] for name in self.metric_names() if name in logs]

    # -- steps as graphs -------------------------------------------------------------------

    def _step_function(self, step: Step, further_names: list[str]) -> StepFunction:
        names = [*self.metric_names(), *further_names, *COUNTS, STOP]
        one_step = self._step_over_replicas(step, names)
        several = self.steps_per_execution > 1 and not self.run_eagerly
        options = {"reduce_retracing": True, "autograph": False}
        if not self.run_eagerly:
            one_step = tf.function(one_step, jit_compile=self.jit_compile, **options)

        def next_step(iterator: tf.data.Iterator, stop: Tensor) -> tuple[Tensor, ...]:
            sums = one_step(iterator.get_next(), stop)
            return sums, sums, tf.cast(sums, "float64"), 1

        from_iterator = next_step
        if several:
            from_iterator = next_steps(one_step, self.steps_per_execution, len(names))
        if not self.run_eagerly:
            from_iterator = tf.function(from_iterator, **options)

        def function(iterator: Any) -> dict[str, Tensor]:
            stop = tf.constant(float(self.stop_requested is not None and self.stop_requested()))
            if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
                first, last, totals, count = from_iterator(iterator, stop)
                if several and int(count) == 0:
                    raise StopIteration
            else:  # train_on_batch and test_on_batch wrap their dict as (x, y, sample_weight)
                first = last = one_step(next(iterator)[0], stop)
                totals = tf.cast(last, "float64")
            self._total_names = names
            self._totals = totals if self._totals is None else self._totals + totals
            self.first_step_logs = self.step_logs = dict(zip(names, means(first), strict=True))
            if last is not first:
                self.step_logs = dict(zip(names, means(last), strict=True))
            return self.get_metrics_result()

        return function

    def _step_over_replicas(self, step: Step, names: list[str]) -> OneStep:
        strategy = self.distribute_strategy
        if self.jit_compile and strategy.num_replicas_in_sync > 1:
            raise InputError(
                "jit_compile=True under a strategy of several replicas is broken in TensorFlow "
                "(keras#17187). Use jit_compile=False."
            )

        def stacked_step(batch: Batch, stop: Tensor) -> Tensor:
            sums = {**step(batch), STOP: (stop, 1.0)}
            return tf.stack([tf.stack([ops.cast(v, "float32") for v in sums[n]]) for n in names])

        def one_step(batch: Batch, stop: Tensor) -> Tensor:
            shares = strategy.run(stacked_step, args=(batch, stop))
            return strategy.reduce(tf.distribute.ReduceOp.SUM, shares, axis=None)

        return one_step
