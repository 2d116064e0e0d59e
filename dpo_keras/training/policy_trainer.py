"""A trainer of a policy: its scorer, its adapters, its layout of batches, its saving."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import keras
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring import check_packing, lora
from dpo_keras.scoring.batch_layout import laid_out, scoring_models
from dpo_keras.scoring.model_inputs import TextRows, check_images, model_inputs
from dpo_keras.scoring.scorer import ResponseScorer
from dpo_keras.training.default_callbacks import ReleasesTracing
from dpo_keras.training.fit_interface import (
    ShortProgress,
    check_batches,
    check_rows,
    with_defaults,
)
from dpo_keras.utils import JSON, keras_internals
from dpo_keras.utils.backends import uses_jax
from dpo_keras.utils.garbage_collection import frozen_graphs
from dpo_keras.utils.keras_half_precision import warn_of_lost_updates

# The one place where the backend's trainer is chosen.
if TYPE_CHECKING or not uses_jax():
    from dpo_keras.training.tensorflow_trainer import TensorflowTrainer as BackendTrainer
else:
    from dpo_keras.training.jax_trainer import JaxTrainer as BackendTrainer


class PolicyTrainer(BackendTrainer):
    """A trainer whose weights are those of another model, its policy.

    Args:
        policy: a KerasHub causal language model, or any Keras model from
            `{"token_ids", "padding_mask"}` to logits `[batch, length, vocabulary]`.
        dropout: whether the policy's dropout is active in training. Off by default: noise in
            log pi that log pi_ref does not have hides the signal of the first steps.
        remat: gradient checkpointing: recompute transformer blocks in the backward pass. Takes
            much less memory and about a quarter more time.
    """

    def __init__(
        self, policy: keras.Model, dropout: bool = False, remat: bool = False, **kwargs: object
    ):
        if not isinstance(policy, keras.Model):
            rule = f"must be a keras.Model, got {type(policy).__name__}"
            hint = "Load one with dpo_keras.load_model(…)."
            raise InputError(InputProblem("policy", rule, hint=hint))
        super().__init__(**kwargs)
        if not policy.built:
            # A subclassed model has no weights to train or copy before its first call.
            ones = ops.ones((1, 2), "int32")
            policy(model_inputs(policy, TextRows(ones, ones)))
        layers = keras_internals.all_layers(policy)
        drops = any(isinstance(layer, keras.layers.Dropout) and layer.rate > 0 for layer in layers)
        if remat and dropout and drops:
            hint = "Recomputed dropout is drawn anew, so the gradient is that of another network."
            raise InputError(InputProblem("remat", "needs dropout=False", hint=hint))
        self.policy, self.dropout = policy, dropout
        # The name puts it behind `policy` in the order in which Keras loads.
        self.policy_adapters = lora.AdapterState(policy) if lora.adapter_config(policy) else None
        self.scorer = ResponseScorer(policy, remat=remat)
        self._packing_checked = False
        self.built = True

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Configure training, see `StepTrainer.compile`."""
        super().compile(*args, **kwargs)
        self.scorer.static = self.static_shapes

    def fit(self, x: object = None, *args: object, **kwargs: object) -> Any:
        """Train, see `StepTrainer.fit`."""
        x = self._batches(x)
        held_out = self._batches(kwargs.pop("validation_data", None), "validation_data")
        if self.optimizer is not None:
            warn_of_lost_updates(self.optimizer, self.trainable_variables)
        lora.warn_of_frozen_kernels(self.policy)
        return super().fit(x, *args, **kwargs | {"validation_data": held_out})

    def evaluate(self, x: object = None, *args: object, **kwargs: object) -> Any:
        """Evaluate as `keras.Model.evaluate` does, on a dataset of dict batches."""
        x = self._batches(x)
        defaults = [ReleasesTracing(), ShortProgress()]
        callbacks = with_defaults(kwargs.pop("callbacks", None), defaults)
        with frozen_graphs():
            return super().evaluate(x, *args, callbacks=callbacks, **kwargs)

    def predict(self, x: object, *args: object, **kwargs: object) -> Any:
        """Score as `keras.Model.predict` does; of `batching="auto"` the batches of an iteration."""
        check_batches(x)
        return super().predict(x, *args, **kwargs)

    def get_config(self) -> dict[str, JSON]:
        """Return what the model is rebuilt from."""
        return {
            **super().get_config(),
            "policy": lora.serialized_policy(self.policy),
            "adapters": lora.adapter_config(self.policy),
            "dropout": self.dropout,
            "remat": self.scorer.remat,
        }

    @classmethod
    def from_config(cls, config: dict[str, JSON], custom_objects: JSON = None) -> PolicyTrainer:
        """Rebuild the model that `get_config` describes."""
        config = dict(config)
        policy = lora.restored_policy(config.pop("policy"), custom_objects)
        lora.restore_adapters(policy, config.pop("adapters", None))
        return cls(policy, **config)

    def _batches(self, given: Any, argument: str = "x") -> Any:
        """Return the batches to run: `given`, or packed rows where it leaves the choice to us."""
        check_batches(given, argument)
        dataset: Any = laid_out(given, scoring_models(self), self.replicas, self._check_packing)
        check_rows(dataset, self.devices_of_rows, argument)
        check_images(self.scorer.body, getattr(dataset, "element_spec", None) or {})
        return dataset

    def _check_packing(self) -> None:
        if not self._packing_checked:  # once, before the first packed batch
            check_packing(self.scorer)
            self._packing_checked = True
