"""`fit` and `evaluate` on TensorFlow, for any `tf.distribute` strategy."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError
from dpo_keras.training.distribution import (
    OneStep,
    Worker,
    next_steps,
    per_worker,
    sum_over_replicas,
)
from dpo_keras.training.metrics import COUNTS, STOP, MetricSums, means, means_by_name
from dpo_keras.training.step_trainer import (
    Gradients,
    Step,
    StepFunction,
    StepLoss,
    StepTrainer,
    stacked_sums,
)
from dpo_keras.utils import Tensor, keras_internals


class TensorflowTrainer(StepTrainer):
    """Steps with a gradient tape, over the replicas of a strategy, as graphs.

    Keras' own trainer fails late on `jit_compile` under several replicas (keras#17187) and on
    parameter servers (keras#18624). Both are refused here with the reason.
    """

    hooks = ("_maybe_symbolic_build", *StepTrainer.hooks)

    def __init__(self, **kwargs: object):
        if isinstance(tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy):
            raise InputError(
                "Keras 3 cannot train on parameter servers (keras#18624). Use dpo_keras.legacy."
                f"{type(self).__name__} with a tf-keras policy, or another strategy."
            )
        super().__init__(**kwargs)
        self._totals: Tensor = None
        self._total_names: list[str] = []

    def gradients(self, step_loss: StepLoss) -> tuple[Gradients, MetricSums]:
        """Return gradients and what is logged, see `StepTrainer.gradients`."""
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

    @property
    def replicas(self) -> int:
        """The number of replicas of the strategy."""
        return int(self.distribute_strategy.num_replicas_in_sync)

    @property
    def static_shapes(self) -> bool:
        """Whether every shape in a step must be static: under XLA and on TPUs."""
        tpu = isinstance(self.distribute_strategy, tf.distribute.TPUStrategy)
        return super().static_shapes or tpu

    def own_rows(self, make: Callable[[Worker | None], tf.data.Dataset]) -> Any:
        """Return each worker's own rows, see `per_worker`."""
        return per_worker(self.distribute_strategy, make)

    def variable_scope(self) -> contextlib.AbstractContextManager[object]:
        """Return the strategy's scope."""
        scope: contextlib.AbstractContextManager[object] = self.distribute_strategy.scope()
        return scope

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

    def _prepare_optimizer(self) -> None:
        keras_internals.leave_gradient_sums_to_caller(self.optimizer)
        keras_internals.use_adam_kernel(self.optimizer)

    def _maybe_symbolic_build(self, iterator: object = None, data_batch: object = None) -> None:
        """Do nothing: the policy is built already (reason 5 of `StepTrainer`)."""

    def _step_function(self, step: Step, further_names: list[str]) -> StepFunction:
        names = self._names(further_names)
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
            stop = tf.constant(self._stop())
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
            return stacked_sums({**step(batch), STOP: (stop, 1.0)}, names)

        def one_step(batch: Batch, stop: Tensor) -> Tensor:
            shares = strategy.run(stacked_step, args=(batch, stop))
            return strategy.reduce(tf.distribute.ReduceOp.SUM, shares, axis=None)

        return one_step
