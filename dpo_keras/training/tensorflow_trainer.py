"""Gradient accumulation that weighs each micro-batch by its pairs.

Keras averages the gradients of micro-batches, each a mean over its own pairs, so that a pair in a
small micro-batch counts for more. Packed rows hold different numbers of pairs, and the last batch
of an epoch is short. Here, with g_i the mean gradient of micro-batch i and w_i the weight of its
pairs, an update uses

    g = (sum_i w_i g_i) / (sum_i w_i),

which is the gradient of all the pairs in one batch.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError
from dpo_keras.scoring import check_packing
from dpo_keras.scoring.scorer import ResponseScorer
from dpo_keras.training.default_callbacks import ReleasesTracing, Throughput
from dpo_keras.training.distribution import sum_over_replicas
from dpo_keras.training.measures import Sums
from dpo_keras.training.shared_recipes import Recipe
from dpo_keras.training.steps import step_counts
from dpo_keras.utils.keras_internals import sum_gradients_ourselves, update_in_one_pass


class WeighedAccumulation(keras.layers.Layer):
    """Changes a Keras optimizer with `gradient_accumulation_steps` to weigh its micro-batches.

    Args:
        optimizer: the optimizer; one that scales its loss is looked into.
    """

    def __init__(self, optimizer: Any, **kwargs: Any):
        super().__init__(trainable=False, **kwargs)
        self.built = True
        self._weight: Any = None
        # In a checkpoint, since a run may stop between two micro-batches.
        self.total = self.add_weight(
            name="total",
            shape=(),
            initializer="zeros",
            trainable=False,
            aggregation="only_first_replica",
        )
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        steps = inner.gradient_accumulation_steps
        apply, clip = inner._backend_apply_gradients, inner._clip_gradients

        def weighed_apply(gradients: Any, variables: Any) -> None:
            # Here and not before: a step that loss scaling skips does not come so far.
            weight = self._weight
            self.total.assign_add(weight)
            apply([gradient * weight for gradient in gradients], variables)
            ended = ops.equal((inner._iterations + 1) % steps, 0)
            self.total.assign(ops.where(ended, 0.0, self.total))

        def weighed_clip(gradients: Any) -> Any:
            # Keras hands the sum over micro-batches, divided by their number.
            share = steps / ops.maximum(ops.convert_to_tensor(self.total), 1e-12)
            return clip([gradient * ops.cast(share, gradient.dtype) for gradient in gradients])

        inner._backend_apply_gradients, inner._clip_gradients = weighed_apply, weighed_clip

    def weigh(self, weight: Any) -> None:
        """Says how much the micro-batch weighs whose gradients are applied next.

        Args:
            weight: scalar, the weight of its pairs over all replicas.
        """
        self._weight = tf.cast(weight, "float32")


def accumulates(optimizer: Any) -> bool:
    """Whether an optimizer gathers several gradients before it takes a step.

    Example:
        >>> accumulates(keras.optimizers.SGD()), accumulates(
        ...     keras.optimizers.SGD(gradient_accumulation_steps=4))
        (False, True)
    """
    return bool(getattr(optimizer, "inner_optimizer", optimizer).gradient_accumulation_steps)


COUNTS = ("tokens", "pairs")
# In how many replicas a stop was asked for: reduced with the metrics, so that all stop at one step.
STOP = "stop"


class PolicyTrainer(Recipe, keras.Model):
    """A `keras.Model` that trains another model, its policy.

    Subclasses say what the loss is, in `measure` (see `Recipe`). Everything that may be averaged
    is returned as a weighted sum with its weight, since only sums can be added over replicas.

    Args:
        policy: a KerasHub causal language model, or any Keras model from
            `{"token_ids", "padding_mask"}` to logits `[batch, length, vocabulary]`.
        dropout: whether the policy's dropout is active while it trains. Off by default: noise in
            log pi that log pi_ref does not have drowns the signal of the first steps.
        remat: gradient checkpointing: whether transformer blocks are computed anew in the backward
            pass. Much less memory, about a quarter more time.
    """

    def __init__(
        self, policy: keras.Model, dropout: bool = False, remat: bool = False, **kwargs: Any
    ):
        if not isinstance(policy, keras.Model):
            raise InputError(
                f"policy must be a keras.Model, got {type(policy).__name__}. Load one with "
                "keras_hub.models.CausalLM.from_preset(…)."
            )
        if isinstance(tf.distribute.get_strategy(), tf.distribute.ParameterServerStrategy):
            raise InputError(
                "Keras 3 cannot train on parameter servers (keras#18624). Use dpo_keras.legacy."
                f"{type(self).__name__} with a tf-keras policy, or another strategy."
            )
        super().__init__(**kwargs)
        if not policy.built:
            # A subclassed model has no weights to train or copy before its first call.
            policy({key: tf.ones((1, 2), "int32") for key in ("token_ids", "padding_mask")})
        if remat and dropout and _drops_out(policy):
            raise InputError(
                "remat=True needs dropout=False: what is computed again would be dropped anew, and "
                "the gradient be that of another network."
            )
        self.policy = policy
        self.dropout = dropout
        self.scorer = ResponseScorer(policy, remat=remat)
        self.accumulation: WeighedAccumulation | None = None
        self._packing_checked = False
        self._totals: Any = None
        self._total_names: list[str] = []
        self.step_logs: dict[str, Any] = {}
        self.first_step_logs: dict[str, Any] = {}
        self.stop_requested: Callable[[], bool] | None = None
        self.train_function: Any = None
        self.test_function: Any = None
        self.built = True

    # -- one step --------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> Sums:
        """One update; returns this replica's share of each metric: its sum and its weight."""
        variables = self.trainable_variables
        # Frozen weights are not watched, or TensorFlow would lay out their gradients too.
        with tf.GradientTape(watch_accessed_variables=False) as tape:
            tape.watch([variable.value for variable in variables])
            loss, sums = self.measure(batch, training=True)
            loss = self.optimizer.scale_loss(loss)
        gradients = tape.gradient(loss, variables)
        used = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        if not used:
            raise InputError("policy has no trainable weights that the loss depends on.")
        gradients = sum_over_replicas([tf.convert_to_tensor(gradient) for gradient, _ in used])
        scale = getattr(self.optimizer, "dynamic_scale", 1.0)
        norm = tf.linalg.global_norm(gradients) / ops.cast(scale, "float32")
        if self.accumulation is not None:
            self.accumulation.weigh(sum_over_replicas(tf.convert_to_tensor(sums["loss"][1])))
        self.optimizer.apply(gradients, [variable for _, variable in used])
        one = ops.ones_like(norm)
        return {**sums, "grad_norm": (norm, one), **step_counts(batch)}

    def test_step(self, batch: Batch) -> Sums:
        """Metrics of one batch, nothing updated."""
        return {**self.measure(batch, training=False)[1], **step_counts(batch)}

    # -- fit's machinery -------------------------------------------------------------------

    def reset_metrics(self) -> None:
        """Starts all averages anew; Keras calls it at the start of an epoch."""
        self._totals = None

    def get_metrics_result(self) -> dict[str, Any]:
        """Averages since the last reset, by name."""
        if self._totals is None:
            return {}
        means = tf.unstack(tf.math.divide_no_nan(self._totals[:, 0], self._totals[:, 1]))
        logs = zip(self._total_names, means, strict=True)
        hidden = {*COUNTS, STOP, *self.hidden_names()}
        means_by_name = {name: mean for name, mean in logs if name not in hidden}
        return {**means_by_name, **self.derived_metrics(means_by_name)}

    def counts(self) -> dict[str, float]:
        """Tokens and pairs since the last reset."""
        if self._totals is None:
            return dict.fromkeys(COUNTS, 0.0)
        return {
            name: float(total)
            for name, total in zip(self._total_names, self._totals[:, 0], strict=True)
            if name in COUNTS
        }

    def _flatten_metrics_in_order(self, logs: dict[str, Any]) -> Any:
        return [logs[name] for name in self.metric_names() if name in logs]

    def compile(
        self,
        optimizer: Any = "adamw",
        loss: Any = None,
        *,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """As `keras.Model.compile`; `jit_compile="auto"` means False.

        Each bucket of lengths is another shape, and XLA compiles each shape anew. Packed batches
        have one shape, but XLA's needs to be known while it compiles, so that attention runs over
        whole rows instead of trees.
        """
        jit_compile = False if jit_compile == "auto" else jit_compile
        super().compile(optimizer, loss, jit_compile=jit_compile, **kwargs)
        tpu = isinstance(self.distribute_strategy, tf.distribute.TPUStrategy)
        self.scorer.static = bool(jit_compile) or tpu
        sum_gradients_ourselves(self.optimizer)
        update_in_one_pass(self.optimizer)
        with self.distribute_strategy.scope():
            if accumulates(self.optimizer):
                self.accumulation = WeighedAccumulation(self.optimizer)
            # Now, not in the first step: a model saved before it must load as well.
            self.optimizer.build(self.trainable_variables)
        self.train_function = self.test_function = self.predict_function = None

    def steps_taken(self) -> int:
        """Steps since the optimizer was made, micro-batches included."""
        # The public `iterations` counts updates, not the micro-batches before the first one.
        taken: Any = getattr(self.optimizer, "inner_optimizer", self.optimizer)
        return int(ops.convert_to_numpy(taken._iterations))

    def default_callbacks(self) -> list[keras.callbacks.Callback]:
        """Callbacks that every `fit` has, in front of the user's."""
        return [ReleasesTracing(), Throughput()]

    def fit(self, *args: Any, callbacks: Any = None, **kwargs: Any) -> Any:
        """As `keras.Model.fit`, on a dataset of dict batches.

        `tokens_per_second` and `pairs_per_second` are added to the logs of each epoch.
        """
        if not isinstance(callbacks, keras.callbacks.CallbackList):
            given = callbacks if isinstance(callbacks, list | tuple) else [callbacks]
            callbacks = [*self.default_callbacks(), *(c for c in given if c is not None)]
        self._check_packing(args[0] if args else kwargs.get("x"))
        # Keras warns that it cannot shuffle a tf.data dataset, unless it is told not to.
        return super().fit(*args, callbacks=callbacks, **{"shuffle": False, **kwargs})

    def evaluate(self, *args: Any, **kwargs: Any) -> Any:
        """As `keras.Model.evaluate`, on a dataset of dict batches."""
        self._check_packing(args[0] if args else kwargs.get("x"))
        return super().evaluate(*args, **kwargs)

    def _check_packing(self, dataset: Any) -> None:
        # Once, before the first packed batch: that this model is the same packed.
        if "tree" in (getattr(dataset, "element_spec", None) or {}) and not self._packing_checked:
            check_packing(self.scorer)
            self._packing_checked = True

    def _maybe_symbolic_build(self, iterator: Any = None, data_batch: Any = None) -> None:
        # Keras would average the first batch over replicas, which fails on integers and dicts
        # (keras#20329) and costs a batch. The policy is built already.
        return

    def make_train_function(self, force: bool = False) -> Callable[..., Any]:
        """The function that `fit` calls with an iterator."""
        if self.train_function is None or force:
            names = [*self.metric_names(), "grad_norm", *self.hidden_names(), *COUNTS, STOP]
            self.train_function = self._step_function(self.train_step, names)
        return self.train_function

    def make_test_function(self, force: bool = False) -> Callable[..., Any]:
        """The function that `evaluate` calls with an iterator."""
        if self.test_function is None or force:
            names = [*self.metric_names(), *self.hidden_names(), *COUNTS, STOP]
            self.test_function = self._step_function(self.test_step, names)
        return self.test_function

    def _step_function(
        self, step: Callable[[Batch], Sums], names: list[str]
    ) -> Callable[..., dict[str, Any]]:
        strategy = self.distribute_strategy
        if self.jit_compile and strategy.num_replicas_in_sync > 1:
            raise InputError(
                "jit_compile=True under a strategy of several replicas is broken in TensorFlow "
                "(keras#17187). Use jit_compile=False."
            )

        def stacked_step(batch: Batch, stop: Any) -> Any:
            sums = {**step(batch), STOP: (stop, 1.0)}
            return tf.stack([tf.stack([ops.cast(v, "float32") for v in sums[n]]) for n in names])

        def one_step(batch: Batch, stop: Any) -> Any:
            shares = strategy.run(stacked_step, args=(batch, stop))
            return strategy.reduce(tf.distribute.ReduceOp.SUM, shares, axis=None)

        def next_step(iterator: Any, stop: Any) -> tuple[Any, Any, Any, int]:
            sums = one_step(iterator.get_next(), stop)
            return sums, sums, tf.cast(sums, "float64"), 1

        def next_steps(iterator: Any, stop: Any) -> tuple[Any, Any, Any, Any]:
            def more(count: Any, batch: Any, *_: Any) -> Any:
                return tf.logical_and(count < self.steps_per_execution, batch.has_value())

            def body(count: Any, batch: Any, first: Any, _: Any, totals: Any) -> Any:
                sums = one_step(batch.get_value(), stop)
                first = tf.where(count == 0, sums, first)
                full = count + 1 >= self.steps_per_execution
                following = tf.cond(full, lambda: batch, iterator.get_next_as_optional)
                return count + 1, following, first, sums, totals + tf.cast(sums, "float64")

            shape = (len(names), 2)
            batch, zeros = iterator.get_next_as_optional(), tf.zeros(shape)
            state = (tf.constant(0), batch, zeros, zeros, tf.zeros(shape, "float64"))
            count, _, first, sums, totals = tf.while_loop(more, body, state)
            return first, sums, totals, count

        several = self.steps_per_execution > 1 and not self.run_eagerly
        from_iterator = next_steps if several else next_step
        if not self.run_eagerly:
            options = {"reduce_retracing": True, "autograph": False}
            one_step = tf.function(one_step, jit_compile=self.jit_compile, **options)
            from_iterator = tf.function(from_iterator, **options)

        def function(iterator: Any) -> dict[str, Any]:
            stop = tf.constant(float(self.stop_requested is not None and self.stop_requested()))
            if isinstance(iterator, tf.data.Iterator | tf.distribute.DistributedIterator):
                first, sums, totals, count = from_iterator(iterator, stop)
                if several and int(count) == 0:
                    raise StopIteration
            else:  # train_on_batch and test_on_batch wrap their dict as (x, y, sample_weight)
                first = sums = one_step(next(iterator)[0], stop)
                totals = tf.cast(sums, "float64")
            self._total_names = names
            self._totals = totals if self._totals is None else self._totals + totals
            self.first_step_logs = _named_means(names, first)
            self.step_logs = self.first_step_logs if first is sums else _named_means(names, sums)
            return self.get_metrics_result()

        return function


def _named_means(names: list[str], sums: Any) -> dict[str, Any]:
    means = tf.unstack(tf.math.divide_no_nan(sums[:, 0], sums[:, 1]))
    return dict(zip(names, means, strict=True))


def _drops_out(policy: keras.Model) -> bool:
    layers = policy._flatten_layers()
    return any(isinstance(v, keras.layers.Dropout) and v.rate > 0 for v in layers)
