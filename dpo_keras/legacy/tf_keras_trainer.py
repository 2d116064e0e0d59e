"""Callbacks of Keras 3, this package's own included, in the `fit` of tf-keras."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import keras
import tensorflow as tf
import tf_keras

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError
from dpo_keras.legacy.tf_keras_policy import PolicyCall
from dpo_keras.scoring import ResponseScorer
from dpo_keras.training.default_callbacks import Throughput
from dpo_keras.training.distribution import sum_over_replicas
from dpo_keras.training.metrics import COUNTS, MetricSums, means_by_name, step_counts
from dpo_keras.training.tensorflow_trainer import Gradients, StepLoss
from dpo_keras.utils.keras_internals import tf_keras_steps_per_execution
from dpo_keras.utils.tensors import Tensor

_HOOKS = [
    name
    for name in dir(keras.callbacks.Callback)
    if name.startswith("on_") and hasattr(tf_keras.callbacks.Callback, name)
]


def adapted(callback: Any) -> Any:
    """A callback of tf-keras that hands on to one of Keras 3.

    It has the hooks that the other one has and no more, because tf-keras refuses callbacks with
    hooks for batches under a parameter server.

    Args:
        callback: of either.

    Returns:
        The same where it is one of tf-keras.

    Example:
        >>> class Counts(keras.callbacks.Callback):
        ...     def on_epoch_end(self, epoch, logs=None): print(epoch, logs)
        >>> adapted(Counts()).on_epoch_end(3, {"loss": 0.5})
        3 {'loss': 0.5}
    """
    if not isinstance(callback, keras.callbacks.Callback):
        return callback

    def hook(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: getattr(callback, name)(*args, **kwargs)

    base = keras.callbacks.Callback
    used = [n for n in _HOOKS if getattr(type(callback), n) is not getattr(base, n)]
    names = ["set_model", "set_params", *used]
    kind = type(
        type(callback).__name__, (tf_keras.callbacks.Callback,), {n: hook(n) for n in names}
    )
    return kind()


def adapted_all(callbacks: Any) -> list[Any]:
    """What `fit(callbacks=…)` takes (one, several or None), each of them adapted."""
    given = callbacks if isinstance(callbacks, Iterable) else [callbacks]
    return [adapted(callback) for callback in given if callback is not None]


class StepSums(tf_keras.metrics.Metric):
    """Weighted sums with their weights, by name: one variable for all of them.

    Sums are what can be added over steps, replicas and asynchronous workers.

    Args:
        names: what is measured.

    Example:
        >>> sums = StepSums(["loss", "pairs"])
        >>> for _ in range(2):
        ...     _ = sums.update_state({"loss": (6.0, 3.0), "pairs": (3.0, 1.0)})
        >>> {name: float(value) for name, value in sums.result().items()}, sums.total("pairs")
        ({'loss': 2.0}, 6.0)
    """

    def __init__(self, names: list[str], **options: Any):
        super().__init__(dtype=options.pop("dtype", "float64"), **options)
        self.names = list(names)
        table = {"shape": (len(names), 2), "initializer": "zeros"}
        self.totals = self.add_weight("totals", **table)
        self.first = self.add_weight("first", **table)
        self.last = self.add_weight("last", **table)
        self.steps = self.add_weight("steps", shape=(), initializer="zeros")

    def update_state(self, sums: dict[str, Any]) -> Any:
        """Adds one step of one replica.

        Args:
            sums: `{name: (weighted sum, weight)}`.
        """
        share = tf.stack([tf.stack([tf.cast(v, self.dtype) for v in sums[n]]) for n in self.names])
        first = tf.where(tf.equal(self.steps, 0.0), share, tf.zeros_like(share))
        with tf.control_dependencies([first]):
            self.first.assign_add(first)
            self.last.assign(share)
            self.steps.assign_add(1.0)
            return self.totals.assign_add(share)

    def result(self) -> dict[str, Any]:
        """Averages since the last reset, of what is logged."""
        means = self.means(self.totals)
        return means_by_name(list(means), list(means.values()))

    def means(self, table: Any) -> dict[str, Any]:
        """Averages by name, hidden ones included.

        Args:
            table: `totals`, or `first` or `last`: the first or the latest step alone.
        """
        table = tf.cast(tf.convert_to_tensor(table), tf.float32)
        means = tf.unstack(tf.math.divide_no_nan(table[:, 0], table[:, 1]), num=len(self.names))
        return dict(zip(self.names, means, strict=True))

    def total(self, name: str) -> float:
        """The sum of one name since the last reset."""
        return float(tf.convert_to_tensor(self.totals)[self.names.index(name), 0])

    def reset_state(self) -> None:
        """Starts anew."""
        for variable in (self.totals, self.first, self.last, self.steps):
            variable.assign(tf.zeros(variable.shape, variable.dtype))


class _Held:
    """Holds what tf-keras would take for parts of the model: metrics, loss, reference."""

    train: StepSums
    test: StepSums
    current: StepSums
    reference: Any
    loss: Any


class PolicyTrainer(tf_keras.Model):
    """A `tf_keras.Model` that trains another model, its policy.

    Subclasses write `train_step` and `test_step` from `gradients`, `update` and `report`, and name
    what they measure in `metric_names`, as those of `dpo_keras.training.PolicyTrainer` do.

    Args:
        policy: a tf-keras model from `{"token_ids", "padding_mask"}`, or from token ids alone, to
            logits `[batch, length, vocabulary]`.
        dropout: whether the policy's dropout is active while it trains.
    """

    def __init__(self, policy: tf_keras.Model, dropout: bool = False, **options: Any):
        call = PolicyCall(policy)
        # Labels and weights stay float32 whatever the policy computes in.
        super().__init__(autocast=False, **options)
        self.policy = policy
        self.dropout = dropout
        self.scorer = ResponseScorer(call, plain=True)
        self._held = _Held()
        self.built = True

    # -- one step --------------------------------------------------------------------------

    def metric_names(self) -> list[str]:
        """Return the names that both steps measure, in the order in which they are logged."""
        raise NotImplementedError(f"{type(self).__name__} must define metric_names.")

    def gradients(self, step_loss: StepLoss) -> tuple[Gradients, MetricSums]:
        """Differentiate the loss of a step, and sum its gradients over the replicas."""
        variables = self.trainable_variables
        scaled = getattr(self.optimizer, "get_scaled_loss", lambda value: value)
        unscaled = getattr(self.optimizer, "get_unscaled_gradients", lambda values: values)
        with tf.GradientTape() as tape:
            loss, sums = step_loss()
            loss = scaled(loss)
        gradients = tape.gradient(loss, variables)
        used = [(g, v) for g, v in zip(gradients, variables, strict=True) if g is not None]
        if not used:
            raise InputError("policy has no trainable weights that the loss depends on.")
        dense = [tf.convert_to_tensor(gradient) for gradient, _ in used]
        # Summed here, so that clipping sees the gradient of the whole batch, and so does the norm.
        dense = sum_over_replicas(unscaled(dense))
        return [(gradient, v) for gradient, (_, v) in zip(dense, used, strict=True)], sums

    def update(self, gradients: Gradients, weight: Tensor) -> Tensor:
        """Update the weights, and return the norm of the gradient before it is clipped."""
        replicas = tf.distribute.get_strategy().num_replicas_in_sync
        summed = {"experimental_aggregate_gradients": False} if replicas > 1 else {}
        self.optimizer.apply_gradients(gradients, **summed)
        return tf.cast(tf.linalg.global_norm([gradient for gradient, _ in gradients]), tf.float32)

    def report(self, batch: Batch, sums: MetricSums) -> dict[str, Tensor]:
        """Add a step to the averages, and return them."""
        # Only a training step has a gradient.
        held = self._held.train if "grad_norm" in sums else self._held.test
        held.update_state({**sums, **step_counts(batch)})
        return held.result()

    # -- fit's machinery -------------------------------------------------------------------

    def compile(self, optimizer: Any = "adamw", **options: Any) -> None:
        """As `tf_keras.Model.compile`, without Keras losses and metrics.

        Raises:
            InputError: an optimizer of Keras 3, or metrics that would never be updated.
        """
        useless = sorted({"metrics", "weighted_metrics", "loss_weights"} & set(options))
        problems = [f"compile({name}=…) has no effect here; leave it out." for name in useless]
        if type(optimizer).__module__.partition(".")[0] == "keras":
            problems.append(
                f"optimizer must be one of tf_keras.optimizers, got {type(optimizer).__name__} of "
                "Keras 3."
            )
        if problems:
            raise InputError(problems)
        super().compile(optimizer, **options)
        names = self.metric_names()
        with self.distribute_strategy.scope():
            # Now, not in the first step: a model saved before it must load as well.
            if hasattr(self.optimizer, "build"):
                self.optimizer.build(self.trainable_variables)
            held = self._held
            held.train = StepSums([*names, "grad_norm", *COUNTS], name="train")
            held.test = StepSums([*names, *COUNTS], name="test")
            held.current = held.train

    @property
    def metrics(self) -> list[Any]:
        """What `reset_metrics` resets."""
        return [self._held.train, self._held.test] if hasattr(self._held, "train") else []

    @property
    def metrics_names(self) -> list[str]:
        """Names in the order in which `evaluate` returns their averages."""
        return list(self._held.test.result())

    def get_metrics_result(self) -> dict[str, Any]:
        """Averages since the last reset, by name."""
        return self._held.current.result()

    def default_callbacks(self) -> list[Any]:
        """Callbacks that every `fit` has, in front of the user's."""
        return [Throughput()]

    def fit(self, x: Any = None, y: Any = None, *, callbacks: Any = None, **options: Any) -> Any:
        """As `tf_keras.Model.fit`, on a dataset of dict batches.

        Callbacks may be those of tf-keras, of Keras 3, or `dpo_keras.callbacks`. Of this package's
        own, `RunCheckpoint` and `SampleResponses` are for Keras 3; checkpoints are made by
        `tf_keras.callbacks.BackupAndRestore`. On parameter servers there is no first batch to
        look at, no rate of tokens, and no callback for batches.
        """
        own = [] if self._on_parameter_servers() else self.default_callbacks()
        if not isinstance(callbacks, tf_keras.callbacks.CallbackList):
            callbacks = adapted_all([*own, *adapted_all(callbacks)])
        return super().fit(x, y, callbacks=callbacks, **options)

    def evaluate(self, *args: Any, **options: Any) -> Any:
        """As `tf_keras.Model.evaluate`."""
        if not isinstance(options.get("callbacks"), tf_keras.callbacks.CallbackList):
            options["callbacks"] = adapted_all(options.get("callbacks"))
        with self._measuring(self._held.test):
            return super().evaluate(*args, **options)

    @contextmanager
    def _measuring(self, sums: StepSums) -> Iterator[None]:
        before, self._held.current = self._held.current, sums
        try:
            yield
        finally:
            self._held.current = before

    def _on_parameter_servers(self) -> bool:
        return isinstance(self.distribute_strategy, tf.distribute.ParameterServerStrategy)

    # -- what this package's callbacks look at -----------------------------------------------

    @property
    def steps_per_execution(self) -> int:
        """Steps in one call."""
        return tf_keras_steps_per_execution(self)

    @property
    def first_step_logs(self) -> dict[str, Any]:
        """What the first training step since the last reset measured, hidden names included."""
        return self._held.train.means(self._held.train.first)

    @property
    def step_logs(self) -> dict[str, Any]:
        """What the latest training step measured, hidden names included."""
        return self._held.train.means(self._held.train.last)

    def steps_taken(self) -> int:
        """Updates since the optimizer was made."""
        return int(tf.convert_to_tensor(self.optimizer.iterations))

    def counts(self) -> dict[str, float]:
        """Tokens and pairs trained on since the last reset."""
        return {name: self._held.train.total(name) for name in COUNTS}

    # -- saving ----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Name, policy and dropout."""
        policy = tf_keras.saving.serialize_keras_object(self.policy)
        policy.pop("compile_config", None)
        return {"name": self.name, "policy": policy, "dropout": self.dropout}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> Any:
        """Rebuilds the model."""
        config = dict(config)
        policy = tf_keras.saving.deserialize_keras_object(config.pop("policy"), custom_objects)
        return cls(policy, **config)

    def get_build_config(self) -> None:
        """Nothing: the model is built with its policy."""
