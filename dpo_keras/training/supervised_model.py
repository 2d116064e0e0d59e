"""Supervised fine-tuning on chosen responses: the usual step before preference training."""

from dataclasses import replace
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dpo_keras.batching import Batch, Ragged, TokenizedPairs
from dpo_keras.scoring.lora import serialized_policy
from dpo_keras.training.shared_recipes import SupervisedRecipe
from dpo_keras.training.tensorflow_trainer import PolicyTrainer


@keras.saving.register_keras_serializable("dpo_keras")
class SupervisedModel(SupervisedRecipe, PolicyTrainer):
    """Trains a policy to give the chosen responses, by their tokens' mean negative log-likelihood.

        loss = - sum_pairs w sum_t log pi(y_t | x, y_<t) / sum_pairs w |y|

    The mean is over the response tokens of the whole global batch, so that accumulating
    micro-batches and spreading rows over replicas change nothing (transformers#35856).

    Args:
        policy: as `DPOModel` takes.
        dropout: whether the policy's dropout is active. On by default, as usual in fine-tuning.
        remat: gradient checkpointing: compute transformer blocks anew in the backward pass. With
            dropout, not possible: it would be drawn twice.

    Example:
        >>> import keras_hub
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=64, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> model = SupervisedModel(keras_hub.models.GPT2CausalLM(backbone))
        >>> model.compile(optimizer="adam")

    References:
        The fine-tuning stage of Rafailov et al., arXiv 2305.18290, section 3.
    """

    def __init__(
        self, policy: keras.Model, dropout: bool = True, remat: bool = False, **kwargs: Any
    ):
        super().__init__(policy, dropout=dropout, remat=remat, **kwargs)

    def get_config(self) -> dict[str, Any]:
        """Policy and dropout."""
        return {
            **super().get_config(),
            "policy": serialized_policy(self.policy),
            "dropout": self.dropout,
            "remat": self.scorer.remat,
        }

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "SupervisedModel":
        """Rebuilds the model."""
        policy = keras.saving.deserialize_keras_object(config.pop("policy"), custom_objects)
        return cls(policy, **config)


def chosen_alone(tokenized: TokenizedPairs) -> TokenizedPairs:
    """The chosen responses as trees of one branch, so that packed rows hold nothing else.

    Args:
        tokenized: the pairs.

    Returns:
        The same pairs with rejected responses of no token.
    """
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(len(tokenized) + 1, np.int64))
    return replace(tokenized, rejected=nothing, reference=None, identity=None)


def supervised_dataset(preferences: tf.data.Dataset) -> tf.data.Dataset:
    """The chosen responses of a preference dataset, alone.

    Args:
        preferences: from `dpo_keras.preference_dataset`.

    Returns:
        The same batches without the rejected sequences, so that nothing is computed for them.
        (Packed rows keep their places; pack `chosen_alone` pairs instead.)
    """

    def chosen(batch: Batch) -> Batch:
        mine = batch["owner"] % 2 == 0
        return {
            **batch,
            "source": tf.where(mine, batch["source"], 0),
            "token_ids": batch["token_ids"][:, :1],
            "padding_mask": batch["padding_mask"][:, :1],
            "owner": tf.where(mine, batch["owner"], -1),
        }

    options = preferences.options()
    return preferences.map(chosen).prefetch(tf.data.AUTOTUNE).with_options(options)
