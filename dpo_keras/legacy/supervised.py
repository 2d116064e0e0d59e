"""Supervised fine-tuning of a tf-keras policy on chosen responses."""

from typing import Any

import tf_keras

from dpo_keras.legacy.policy_trainer import PolicyTrainer
from dpo_keras.training.shared_recipes import SupervisedRecipe


@tf_keras.saving.register_keras_serializable("dpo_keras")
class SupervisedModel(SupervisedRecipe, PolicyTrainer):
    """`dpo_keras.SupervisedModel` for tf-keras: the same loss, metrics and batches.

    Args:
        policy: a tf-keras model from token ids (and mask) to logits.
        dropout: whether the policy's dropout is active. On by default, as usual in fine-tuning.

    Example:
        >>> policy = tf_keras.Sequential(
        ...     [tf_keras.Input((None,), dtype="int32"), tf_keras.layers.Embedding(9, 9)])
        >>> model = SupervisedModel(policy)
        >>> model.compile("adam")
        >>> model.metrics_names
        ['loss', 'chosen_logps']
    """

    def __init__(self, policy: tf_keras.Model, dropout: bool = True, **options: Any):
        super().__init__(policy, dropout=dropout, **options)
