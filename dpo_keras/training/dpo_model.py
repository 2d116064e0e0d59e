"""Direct Preference Optimization as a `keras.Model`."""

from typing import Any

import keras

from dpo_keras.batching import Batch
from dpo_keras.losses import DPOLoss
from dpo_keras.scoring.lora import (
    AdapterState,
    adapter_config,
    restore_adapters,
    serialized_policy,
)
from dpo_keras.scoring.references import FrozenCopy, Reference, make_reference
from dpo_keras.training.default_callbacks import StartsAtReference
from dpo_keras.training.shared_recipes import PreferenceRecipe, check_has_reference, loss_from
from dpo_keras.training.tensorflow_trainer import PolicyTrainer


@keras.saving.register_keras_serializable("dpo_keras")
class DPOModel(PreferenceRecipe, PolicyTrainer):
    r"""Trains a policy on preference pairs, against a reference.

    For a prompt x with responses y_1 (chosen) and y_2 (rejected):

        S(y)  = beta (log pi(y | x) - log pi_ref(y | x))       the score, an implicit reward
        P     = softmax(S(y_1), S(y_2))
        LLR   = log P(y_1) - log P(y_2) = S(y_1) - S(y_2)
        loss  = -[p log P(y_1) + (1 - p) log P(y_2)] + penalties

    with p the probability that people prefer y_1. Each step averages the loss over the weights of
    all pairs in the global batch.

    Args:
        policy: a KerasHub causal language model (with LoRA or without), or any Keras model from
            `{"token_ids", "padding_mask"}` to logits `[batch, length, vocabulary]`.
        reference: `"auto"` (fresh LoRA adapters: the base model under them, at no cost; otherwise
            a frozen copy), `"frozen_copy"`, `"adapters_off"`, `"cached"` (log-probs come with the
            batches, see `dpo_keras.cache_reference`), `"none"` (for losses without reference), or
            a model with the policy's vocabulary. It is state of this model: saved, loaded, and
            never confused with the policy.
        dropout: whether the policy's dropout is active in training. Off by default.
        remat: gradient checkpointing: compute transformer blocks anew in the backward pass.

    Raises:
        InputError: a policy or a reference that cannot be used.

    Example:
        >>> import keras_hub, dpo_keras
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=64, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> policy = keras_hub.models.GPT2CausalLM(backbone)
        >>> model = DPOModel(policy, reference="auto")
        >>> model.compile(optimizer="adam", loss=dpo_keras.DPOLoss("sigmoid", beta=0.1))
        >>> model.reference.mode
        'frozen_copy'

    References:
        Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7.
    """

    preference_loss: DPOLoss | None = None  # the one that it was compiled with

    def __init__(
        self,
        policy: keras.Model,
        reference: str | keras.Model = "auto",
        dropout: bool = False,
        remat: bool = False,
        **kwargs: Any,
    ):
        super().__init__(policy, dropout=dropout, remat=remat, **kwargs)
        self.reference: Reference = make_reference(policy, reference)
        self._may_drop_reference = isinstance(reference, str) and reference == "auto"
        # The name puts it behind `policy` in the order in which Keras loads.
        self.policy_adapters = AdapterState(policy) if adapter_config(policy) else None

    # -- log-probs -------------------------------------------------------------------------

    def reference_logps(self, batch: Batch) -> Any:
        """Log pi_ref(y | x) of each response, `[rows * pairs, 2]` float32; None without one."""
        return self.reference.logps(self.scorer, batch)

    def outputs(self, batch: Batch, training: bool = False) -> dict[str, Any]:
        """As `loss_outputs`, by a name that tf-keras has for something else."""
        return self.loss_outputs(batch, training)

    # -- the loss --------------------------------------------------------------------------

    def compile(
        self,
        optimizer: Any = "adamw",
        loss: Any = "sigmoid",
        *,
        jit_compile: bool | str = "auto",
        **kwargs: Any,
    ) -> None:
        """Configures training.

        Args:
            optimizer: any Keras optimizer or its name.
            loss: a `DPOLoss`, or the name of one with its defaults.
            jit_compile: XLA; `"auto"` means False.
            **kwargs: as `keras.Model.compile`: `steps_per_execution`, `run_eagerly`,
                `auto_scale_loss`.

        Raises:
            InputError: a loss that is no DPOLoss, or needs a reference where there is none.
        """
        loss = loss_from(loss)
        if self._may_drop_reference and not loss.needs_reference:
            self._drop_reference()
        self._may_drop_reference = False
        check_has_reference(loss, self.reference.mode)
        if isinstance(self.reference, FrozenCopy):
            self.reference.check(self.policy)
        self.preference_loss = loss
        with self.distribute_strategy.scope():
            # Held here, so that a loss's own variables are saved with the model.
            self.objective_state = loss.state
        super().compile(optimizer, loss, jit_compile=jit_compile, **kwargs)

    def _drop_reference(self) -> None:
        # A loss without reference shall not pay for the copy that "auto" made. Dropped once and
        # never made again: a copy of weights trained since would be another reference.
        self._tracker.untrack(self.reference)
        self.reference = make_reference(self.policy, "none")

    def default_callbacks(self) -> list[keras.callbacks.Callback]:
        """As every trainer's, and the check that the first loss is that of an equal reference."""
        return [StartsAtReference(), *super().default_callbacks()]

    # -- saving ----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Policy, reference, adapters: all that a saved model is rebuilt from."""
        reference: Any = self.reference.mode
        if reference == "model":
            reference = serialized_policy(self.reference.model)
        return {
            **super().get_config(),
            "policy": serialized_policy(self.policy),
            "reference": reference,
            "adapters": adapter_config(self.policy),
            "dropout": self.dropout,
            "remat": self.scorer.remat,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "DPOModel":
        """Rebuilds the model that `get_config` describes, adapters enabled."""
        config = dict(config)
        policy = keras.saving.deserialize_keras_object(config.pop("policy"), custom_objects)
        restore_adapters(policy, config.pop("adapters", None))
        reference = config.pop("reference")
        if isinstance(reference, dict):
            reference = keras.saving.deserialize_keras_object(reference, custom_objects)
        return cls(policy, reference, **config)

    def get_compile_config(self) -> dict[str, Any]:
        """Optimizer and loss, serialized."""
        if not self.compiled:
            return {}
        return {
            "optimizer": keras.saving.serialize_keras_object(self.optimizer),
            "loss": keras.saving.serialize_keras_object(self.preference_loss),
            "jit_compile": self.jit_compile,
            "steps_per_execution": self.steps_per_execution,
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as the saved model was, the optimizer's state included."""
        if config:
            self.compile(**keras.saving.deserialize_keras_object(config))
