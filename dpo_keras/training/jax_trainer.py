"""`fit` and `evaluate` on JAX, on one device or on the mesh of a `keras.distribution`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras
import numpy as np
import tensorflow as tf
from jax import lax
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError
from dpo_keras.training.distribution import Worker
from dpo_keras.training.mesh import check_split
from dpo_keras.training.metrics import COUNTS, STOP, MetricSums, means, means_by_name
from dpo_keras.training.step_trainer import (
    Gradients,
    Step,
    StepFunction,
    StepLoss,
    StepTrainer,
    stacked_sums,
)
from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import (
    ValuesInPlace,
    data_axis_size,
    of_each_process,
    own_part_of_rows,
    state_variables,
    whole_on_each_device,
)
from dpo_keras.utils.keras_internals import set_values


class JaxTrainer(StepTrainer):
    """Steps as pure functions of all variables, which XLA compiles whole.

    `train_step` is the same code as on TensorFlow: while it is traced, every variable has the value
    that the step was given, and what it assigns is the step's result. On a mesh the arrays' own
    sharding tells XLA how to split the work, so that there is one replica, which has all rows.
    """

    hooks = ("_symbolic_build", "_get_jax_state", *StepTrainer.hooks)
    compiles_whole_steps = True

    def __init__(self, **kwargs: object):
        super().__init__(**kwargs)
        # Sums and what their rounding has lost, in place of float64, which JAX leaves out.
        self._totals: tuple[Tensor, Tensor] | None = None
        self._total_names: list[str] = []

    def gradients(self, step_loss: StepLoss) -> tuple[Gradients, MetricSums]:
        """Return gradients and what is logged, see `StepTrainer.gradients`."""
        variables, every = self.trainable_variables, state_variables(self)
        read: set[int] = set()
        assigned: list[keras.Variable] = []

        def scaled_loss(values: Sequence[Tensor]) -> tuple[Tensor, tuple[MetricSums, list[Tensor]]]:
            with ValuesInPlace(zip(variables, values, strict=True)) as scope:
                loss, sums = step_loss()
                loss = self.optimizer.scale_loss(loss)
            read.update(scope.read)
            changes = scope.assigned(every)  # such as the seeds of dropout
            assigned[:] = [variable for variable, _ in changes]
            return loss, (sums, [value for _, value in changes])

        found = jax.grad(scaled_loss, has_aux=True)([variable.value for variable in variables])
        gradients, (sums, changes) = found
        for variable, value in zip(assigned, changes, strict=True):
            variable.assign(value)
        # A weight that the loss does not read has no gradient; a gradient of 0 would let it decay.
        used = [(g, v) for g, v in zip(gradients, variables, strict=True) if id(v) in read]
        if not used:
            raise InputError("policy has no trainable weights that the loss depends on.")
        return used, sums

    @property
    def replicas(self) -> int:
        """The number of devices along which the rows of a batch are split."""
        return data_axis_size()

    @property
    def devices_of_rows(self) -> int:
        """The number of devices along which the rows that this process makes are split."""
        return self.replicas // (1 if self.worker is None else self.worker[1])

    @property
    def worker(self) -> Worker | None:
        """Which of the processes along the data axis this is, and how many there are."""
        return own_part_of_rows()

    def own_rows(self, make: Callable[[Worker | None], tf.data.Dataset]) -> tf.data.Dataset:
        """Return a dataset for `fit` of this process' rows, see `StepTrainer.own_rows`."""
        return make(self.worker)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configure training, see `StepTrainer.compile`; refuse a mesh that splits nothing."""
        check_split(self.variables)
        super().compile(*args, **kwargs)

    def reset_metrics(self) -> None:
        """Start all means anew; Keras calls it at the start of an epoch."""
        self._totals = None

    def get_metrics_result(self) -> dict[str, Tensor]:
        """Return the means since the last reset, by name."""
        if self._totals is None:
            return {}
        return means_by_name(self._total_names, means(self._totals[0]))

    def counts(self) -> dict[str, float]:
        """Return the number of tokens and of pairs since the last reset."""
        sums = [] if self._totals is None else jax.device_get(self._totals[0])[:, 0]
        totals = dict(zip(self._total_names, sums, strict=False))
        return {name: float(totals.get(name, 0.0)) for name in COUNTS}

    def train_on_batch(self, x: Batch, *args: Any, **kwargs: Any) -> Any:
        """Train on one batch, of NumPy, JAX or a `tf.data` dataset."""
        return super().train_on_batch(_arrays(x), *args, **kwargs)

    def test_on_batch(self, x: Batch, *args: Any, **kwargs: Any) -> Any:
        """Measure one batch, see `train_on_batch`."""
        return super().test_on_batch(_arrays(x), *args, **kwargs)

    def predict_on_batch(self, x: Batch) -> Any:
        """Score one batch, see `train_on_batch`."""
        return super().predict_on_batch(_arrays(x))

    def _symbolic_build(self, iterator: object = None, data_batch: object = None) -> None:
        """Do nothing: the policy is built already (reason 5 of `StepTrainer`)."""

    def _get_jax_state(self, **kinds: bool) -> tuple[Any, ...]:
        """Return no state to the loops of `fit` and `evaluate`.

        Here variables hold their values between steps, so that callbacks can read and set them.
        """
        if not kinds.get("metrics_variables"):
            return tuple(super()._get_jax_state(**kinds))
        return ((),) * (4 if kinds.get("optimizer_variables") else 3)

    def _apply(self, gradients: Sequence[Tensor], variables: Sequence[keras.Variable]) -> None:
        """Apply gradients; where losses are scaled, only finite ones.

        Keras' own branches assign to variables, which a compiled branch on JAX must not.
        """
        optimizer = self.optimizer
        if not isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            super()._apply(gradients, variables)
            return
        state = state_variables(self)
        scale = ops.convert_to_tensor(optimizer.dynamic_scale)
        count = ops.convert_to_tensor(optimizer.step_counter)

        def applied(values: list[Tensor]) -> list[Tensor]:
            with ValuesInPlace(zip(state, values, strict=True)) as scope:
                optimizer.inner_optimizer.apply([g / scale for g in gradients], variables)
                return [scope.get_current_value(variable) for variable in state]

        finite = optimizer.check_finite(gradients)
        values = [variable.value for variable in state]
        after = lax.cond(finite, applied, lambda values: values, values)
        for variable, value in zip(state, after, strict=True):
            variable.assign(value)
        grows = count == optimizer.dynamic_growth_steps - 1
        larger = ops.where(grows, 2.0 * scale, scale)
        optimizer.dynamic_scale.assign(ops.where(finite, larger, 0.5 * scale))
        optimizer.step_counter.assign(ops.where(ops.logical_and(finite, ~grows), count + 1, 0))

    def _step_function(self, step: Step, further_names: list[str]) -> StepFunction:
        names, variables = self._names(further_names), state_variables(self)
        training = step == self.train_step

        def one_step(
            values: list[Tensor], totals: tuple[Tensor, Tensor], batch: Batch, stop: Tensor
        ) -> tuple[list[Tensor], tuple[Tensor, Tensor], list[Tensor], dict[str, Tensor]]:
            with ValuesInPlace(zip(variables, values, strict=True)) as scope:
                sums = stacked_sums({**step(batch), STOP: (ops.max(stop), 1.0)}, names)
                after = [scope.get_current_value(v) for v in variables] if training else []
            totals = _added(totals, sums)
            return after, totals, means(sums), means_by_name(names, means(totals[0]))

        if not self.run_eagerly and self.jit_compile:
            shardings = [v.value.sharding for v in variables] if training else []
            whole = whole_on_each_device()
            one_step = jax.jit(
                one_step,
                donate_argnums=(0,) if training else (),
                out_shardings=None if whole is None else (shardings, whole, whole, whole),
            )
        zeros = jnp.zeros((len(names), 2), "float32")

        def function(state: Any, iterator: Any) -> tuple[dict[str, Tensor], Any]:
            stop, logs = of_each_process(self._stop()), None
            for number in range(self.steps_per_execution):
                try:
                    batch = next(iterator)
                except StopIteration:
                    if number == 0:
                        raise
                    break
                # train_on_batch and test_on_batch wrap their dict as (x, y, sample_weight)
                batch = batch[0] if isinstance(batch, tuple) else batch
                totals = self._totals or (zeros, zeros)
                values = [variable.value for variable in variables]
                after, self._totals, measured, logs = one_step(values, totals, batch, stop)
                set_values(variables if training else [], after)
                self.step_logs = dict(zip(names, measured, strict=True))
                if number == 0:
                    self.first_step_logs = self.step_logs
            self._total_names = names
            return logs or {}, state

        return function


def _arrays(batch: Batch) -> Any:
    return {
        name: value if ops.is_tensor(value) else np.asarray(value) for name, value in batch.items()
    }


def _added(totals: tuple[Tensor, Tensor], sums: Tensor) -> tuple[Tensor, Tensor]:
    """Add to sums what a step measured, by Kahan's summation: as exact as in double precision."""
    total, lost = totals
    term = sums - lost
    # XLA must not simplify (total + term) - total to term.
    barrier: Callable[[Tensor], Tensor] = lax.optimization_barrier
    added = barrier(total + term)
    return added, (added - total) - term
