"""`fit` and `evaluate` of tf-keras for a model that trains another model, its policy."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any, TypeAlias

import keras
import tensorflow as tf
import tf_keras

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.legacy.tf_keras_policy import PolicyCall
from dpo_keras.scoring import ResponseScorer
from dpo_keras.training.default_callbacks import Throughput
from dpo_keras.training.distribution import replica_count, sum_over_replicas
from dpo_keras.training.metrics import COUNTS, MetricSums, means_by_name, step_counts
from dpo_keras.training.step_trainer import Gradients, StepLoss
from dpo_keras.utils import JSON, Tensor
from dpo_keras.utils.keras_internals import tf_keras_steps_per_execution

Callback: TypeAlias = keras.callbacks.Callback | tf_keras.callbacks.Callback
Callbacks: TypeAlias = Callback | Iterable[Callback] | tf_keras.callbacks.CallbackList | None


def adapted(callback: Callback) -> tf_keras.callbacks.Callback:
    """Return a callback of tf-keras that calls one of Keras 3; one of tf-keras as it is.

    It has the hooks that the other one has and no more, because tf-keras refuses callbacks with
    hooks for batches on parameter servers.
    """
    if not isinstance(callback, keras.callbacks.Callback):
        return callback

    def hook(name: str) -> Callable[..., None]:
        return lambda self, *args, **kwargs: getattr(callback, name)(*args, **kwargs)

    base, kind, theirs = keras.callbacks.Callback, type(callback), tf_keras.callbacks.Callback
    hooks = [name for name in dir(base) if name.startswith("on_") and hasattr(theirs, name)]
    used = [name for name in hooks if getattr(kind, name) is not getattr(base, name)]
    methods = {name: hook(name) for name in ["set_model", "set_params", *used]}
    return type(kind.__name__, (theirs,), methods)()


def adapted_all(callbacks: Callbacks, first: Iterable[Callback] = ()) -> Callbacks:
    """Adapt what `fit(callbacks=…)` takes (one, several or None), behind the `first` ones."""
    if isinstance(callbacks, tf_keras.callbacks.CallbackList):
        return callbacks
    given = callbacks if isinstance(callbacks, Iterable) else [callbacks]
    return [adapted(callback) for callback in [*first, *given] if callback is not None]


class StepSums(tf_keras.metrics.Metric):
    """Weighted sums with their weights, by name, in one variable.

    Sums can be added over steps, replicas and asynchronous workers; means cannot.
    """

    def __init__(self, names: list[str], name: str | None = None, dtype: str = "float64"):
        super().__init__(name=name, dtype=dtype)
        self.names = names
        table = {"shape": (len(names), 2), "initializer": "zeros"}
        self.totals = self.add_weight("totals", **table)
        self.first = self.add_weight("first", **table)
        self.last = self.add_weight("last", **table)
        self.steps = self.add_weight("steps", shape=(), initializer="zeros")

    def update_state(self, sums: MetricSums) -> Tensor:
        """Add one step of one replica."""
        share = tf.stack([tf.stack([tf.cast(v, self.dtype) for v in sums[n]]) for n in self.names])
        first = tf.where(tf.equal(self.steps, 0.0), share, tf.zeros_like(share))
        with tf.control_dependencies([first]):
            self.first.assign_add(first)
            self.last.assign(share)
            self.steps.assign_add(1.0)
            return self.totals.assign_add(share)

    def result(self) -> dict[str, Tensor]:
        """Return what is logged: averages since the last reset."""
        means = self.means(self.totals)
        return means_by_name(list(means), list(means.values()))

    def means(self, table: tf.Variable) -> dict[str, Tensor]:
        """Return averages by name, hidden ones included, of `totals`, `first` or `last`."""
        values = tf.cast(tf.convert_to_tensor(table), tf.float32)
        means = tf.unstack(tf.math.divide_no_nan(values[:, 0], values[:, 1]), num=len(self.names))
        return dict(zip(self.names, means, strict=True))

    def reset_state(self) -> None:
        """Set all sums to 0."""
        for variable in (self.totals, self.first, self.last, self.steps):
            variable.assign(tf.zeros(variable.shape, variable.dtype))

    def save_own_variables(self, store: JSON) -> None:
        """Save and load nothing: the sums of an epoch are no part of a model."""

    load_own_variables = save_own_variables


class PolicyTrainer(tf_keras.Model):
    """A `tf_keras.Model` that trains another model, its policy.

    Subclasses write `train_step` and `test_step` from `gradients`, `update` and `report`, and name
    what they measure in `metric_names`, as those of `dpo_keras.training.PolicyTrainer` do.
    """

    has_auxiliary_loss = False  # losses of the policy's own layers are those of KerasHub's models

    def __init__(self, policy: tf_keras.Model, dropout: bool = False, **options: object):
        call = PolicyCall(policy)
        # Labels and weights stay float32 whatever the policy computes in.
        super().__init__(autocast=False, **options)
        self.policy = policy
        self.dropout = dropout
        self.scorer = ResponseScorer(call, plain=True)
        # Metrics, which tf-keras would save as parts of the model.
        self._held = SimpleNamespace()
        self.built = True

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
            rule = "has no trainable weights that the loss depends on"
            raise InputError(InputProblem("policy", rule))
        dense = [tf.convert_to_tensor(gradient) for gradient, _ in used]
        # Summed here, so that clipping and the norm see the gradient of the whole batch.
        dense = sum_over_replicas(unscaled(dense))
        return [(gradient, v) for gradient, (_, v) in zip(dense, used, strict=True)], sums

    def update(self, gradients: Gradients, weight: Tensor) -> Tensor:
        """Update the weights, and return the norm of the gradient before it is clipped."""
        summed = {"experimental_aggregate_gradients": False} if replica_count() > 1 else {}
        self.optimizer.apply_gradients(gradients, **summed)
        return tf.cast(tf.linalg.global_norm([gradient for gradient, _ in gradients]), tf.float32)

    def report(self, batch: Batch, sums: MetricSums) -> dict[str, Tensor]:
        """Add a step (of training, where it has a gradient) to the averages, and return them."""
        step_sums = self._held.train if "grad_norm" in sums else self._held.test
        step_sums.update_state({**sums, **step_counts(batch)})
        return step_sums.result()

    def compile(
        self, optimizer: str | tf_keras.optimizers.Optimizer = "adamw", **options: Any
    ) -> None:
        """Configure training as `tf_keras.Model.compile` does, without its losses and metrics."""
        useless = sorted({"metrics", "weighted_metrics", "loss_weights"} & set(options))
        problems = [
            InputProblem(name, f"in compile({name}=…) has no effect here", hint="Leave it out.")
            for name in useless
        ]
        kind = type(optimizer)
        if kind.__module__.partition(".")[0] == "keras":
            rule = f"must be one of tf_keras.optimizers, got {kind.__name__} of Keras 3"
            problems.append(InputProblem("optimizer", rule))
        if problems:
            raise InputError(problems)
        super().compile(optimizer, **options)
        names, held = self.metric_names(), self._held
        with self.distribute_strategy.scope():
            # Now, not in the first step: a model saved before it must load as well.
            if hasattr(self.optimizer, "build"):
                self.optimizer.build(self.trainable_variables)
            held.train = StepSums([*names, "grad_norm", *COUNTS], name="train")
            held.test = StepSums([*names, *COUNTS], name="test")
            held.current = held.train

    @property
    def metrics(self) -> list[tf_keras.metrics.Metric]:
        """What `reset_metrics` resets."""
        return [self._held.train, self._held.test] if hasattr(self._held, "train") else []

    @property
    def metrics_names(self) -> list[str]:
        """Names in the order in which `evaluate` returns their averages."""
        return list(self._held.test.result())

    def get_metrics_result(self) -> dict[str, Tensor]:
        """Return averages since the last reset, by name."""
        return self._held.current.result()

    def default_callbacks(self) -> list[Callback]:
        """Return the callbacks that every `fit` has, in front of the user's."""
        return [Throughput()]

    def fit(self, *args: Any, callbacks: Callbacks = None, **options: Any) -> Any:
        """Train as `tf_keras.Model.fit` does, on a dataset of dict batches.

        Callbacks may be those of tf-keras, of Keras 3, or `dpo_keras.callbacks`. Of this package's
        own, `RunCheckpoint` and `SampleResponses` are for Keras 3; make checkpoints with
        `tf_keras.callbacks.BackupAndRestore`. On parameter servers there is no check of the first
        batch, no rate of tokens, and no callback for batches.
        """
        own = [] if self._on_parameter_servers() else self.default_callbacks()
        return super().fit(*args, callbacks=adapted_all(callbacks, own), **options)

    def evaluate(self, *args: Any, callbacks: Callbacks = None, **options: Any) -> Any:
        """Evaluate as `tf_keras.Model.evaluate` does."""
        before, self._held.current = self._held.current, self._held.test
        try:
            return super().evaluate(*args, callbacks=adapted_all(callbacks), **options)
        finally:
            self._held.current = before

    def _on_parameter_servers(self) -> bool:
        return isinstance(self.distribute_strategy, tf.distribute.ParameterServerStrategy)

    def get_config(self) -> dict[str, JSON]:
        """Return name, policy and dropout."""
        return {"name": self.name, "policy": serialized(self.policy), "dropout": self.dropout}

    @classmethod
    def from_config(cls, config: dict[str, JSON], custom_objects: JSON = None) -> PolicyTrainer:
        """Rebuild the model, and the models in it, that `get_config` describes."""
        load = tf_keras.saving.deserialize_keras_object
        models = {n: load(v, custom_objects) for n, v in config.items() if isinstance(v, dict)}
        return cls(**{**config, **models})

    def get_build_config(self) -> None:
        """Return None: the model is built with its policy."""

    @property
    def steps_per_execution(self) -> int:
        """Steps in one call."""
        return tf_keras_steps_per_execution(self)

    @property
    def first_step_logs(self) -> dict[str, Tensor]:
        """What the first training step since the last reset measured, hidden names included."""
        return self._held.train.means(self._held.train.first)

    @property
    def step_logs(self) -> dict[str, Tensor]:
        """What the latest training step measured, hidden names included."""
        return self._held.train.means(self._held.train.last)

    def steps_taken(self) -> int:
        """Return the number of updates since the optimizer was made."""
        return int(tf.convert_to_tensor(self.optimizer.iterations))

    def counts(self) -> dict[str, float]:
        """Return tokens and pairs trained on since the last reset."""
        totals = tf.convert_to_tensor(self._held.train.totals)[:, 0]
        sums = dict(zip(self._held.train.names, totals, strict=True))
        return {name: float(sums[name]) for name in COUNTS}


def serialized(model: tf_keras.Model) -> dict[str, JSON]:
    """Return a model's configuration, without how it was compiled."""
    config = tf_keras.saving.serialize_keras_object(model)
    config.pop("compile_config", None)
    return config
