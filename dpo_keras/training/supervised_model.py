"""Supervised fine-tuning on chosen responses: the usual step before preference training."""

from dataclasses import replace

import keras
import numpy as np
import tensorflow as tf
from keras import ops

from dpo_keras.batching import Batch, Ragged, TokenizedPairs, UndecidedLayout
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.auxiliary_loss import keeps_auxiliary_loss
from dpo_keras.training.distribution import sum_over_replicas
from dpo_keras.training.metrics import MetricSums, with_auxiliary_loss
from dpo_keras.training.policy_trainer import PolicyTrainer
from dpo_keras.utils import JSON, Tensor


@keras.saving.register_keras_serializable("dpo_keras")
class SupervisedModel(PolicyTrainer):
    """Train a policy on the chosen responses, by the mean negative log-likelihood of their tokens.

        loss = - sum_pairs w sum_t log pi(y_t | x, y_<t) / sum_pairs w |y|

    The mean is over the response tokens of the whole global batch, so that accumulating
    micro-batches and spreading rows over replicas change nothing (transformers#35856).

    Args:
        policy: as `DPOModel` takes.
        dropout: whether the policy's dropout is active. On by default, as usual in fine-tuning.
        remat: gradient checkpointing: recompute transformer blocks in the backward pass. Needs
            `dropout=False` where the policy has dropout.
        auxiliary_loss: `"keep"` or `"drop"`, as `DPOModel` takes it.

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
        self,
        policy: keras.Model,
        dropout: bool = True,
        remat: bool = False,
        auxiliary_loss: str = "keep",
        **kwargs: object,
    ):
        super().__init__(policy, dropout=dropout, remat=remat, **kwargs)
        self.auxiliary_loss = auxiliary_loss
        self.has_auxiliary_loss = keeps_auxiliary_loss(policy, auxiliary_loss)

    def train_step(self, batch: Batch) -> MetricSums:
        """Update the policy on the chosen responses of one batch."""

        def step_loss() -> tuple[Tensor, MetricSums]:
            return _step_loss(self, batch, training=self.dropout)

        gradients, sums = self.gradients(step_loss)
        norm = self.update(gradients, weight=sums["loss"][1])
        return self.report(batch, {**sums, "grad_norm": (norm, 1.0)})

    def test_step(self, batch: Batch) -> MetricSums:
        """Measure the policy on one batch."""
        return self.report(batch, _step_loss(self, batch, training=False)[1])

    def metric_names(self) -> list[str]:
        """Return `loss`, in nats per token, and `chosen_logps`, in nats per response."""
        further = ["auxiliary_loss"] if self.has_auxiliary_loss else []
        return ["loss", "chosen_logps", *further]

    def get_config(self) -> dict[str, JSON]:
        """Return what the model is rebuilt from."""
        return {**super().get_config(), "auxiliary_loss": self.auxiliary_loss}

    def call(self, batch: Batch, training: bool = False) -> dict[str, Tensor]:
        """Return log-probs and lengths of the responses, `[rows * pairs, 2]`."""
        scored = self.scorer(batch, training and self.dropout)
        return {"policy": scored["logps"], "lengths": scored["lengths"]}


def worth_imitating(tokenized: TokenizedPairs) -> TokenizedPairs:
    """Return the pairs whose chosen response a warm-up learns: of rated ones the desirable."""
    if tokenized.rated is None:
        return tokenized
    rows = np.flatnonzero(tokenized.preference > 0.5)
    if not len(rows):
        rule = "must hold a desirable response to warm up on, got none"
        raise InputError(InputProblem("pairs", rule))
    return tokenized.take(rows)


def chosen_alone(tokenized: TokenizedPairs) -> TokenizedPairs:
    """Return pairs with empty rejected responses, so that packed rows hold nothing else."""
    nothing = Ragged(np.zeros(0, np.int32), np.zeros(len(tokenized) + 1, np.int64))
    return replace(tokenized, rejected=nothing, others=(), reference=None, identity=None)


def supervised_dataset(preferences: tf.data.Dataset) -> tf.data.Dataset:
    """Drop the rejected sequences from the batches of `dpo_keras.preference_dataset`.

    Packed rows keep their places; pack `chosen_alone` pairs instead.
    """

    def chosen(batch: Batch) -> Batch:
        numbers = batch["responses"][:, None, :, 0] if "responses" in batch else tf.constant([0])
        # In TensorFlow, on which pipelines run, whatever Keras runs on.
        owner = batch["owner"]
        mine = (owner >= 0) & tf.reduce_any(owner[..., None] == numbers, axis=-1)
        return {
            **batch,
            "source": tf.where(mine, batch["source"], 0),
            "token_ids": batch["token_ids"][:, :1],
            "padding_mask": batch["padding_mask"][:, :1],
            "owner": tf.where(mine, batch["owner"], -1),
        }

    dataset = preferences.map(chosen).with_options(preferences.options())
    undecided = UndecidedLayout.of(preferences)
    if undecided is None:
        return dataset
    return undecided.with_pairs(chosen_alone(undecided.tokenized)).attached_to(dataset)


def _step_loss(model: SupervisedModel, batch: Batch, training: bool) -> tuple[Tensor, MetricSums]:
    collected: list[Tensor] | None = [] if model.has_auxiliary_loss else None
    scored = model.scorer(batch, training, collected=collected)
    return with_auxiliary_loss(*_mean_nll(batch, scored), collected)


def _mean_nll(batch: Batch, scored: dict[str, Tensor]) -> tuple[Tensor, MetricSums]:
    weight = ops.reshape(batch["weight"], (-1,))
    logps = scored["logps"][:, 0]
    tokens = ops.cast(scored["lengths"][:, 0], "float32")
    total = ops.sum(ops.where(weight > 0, weight * logps, 0.0))
    count = ops.sum(weight * tokens)
    loss = -total / ops.maximum(sum_over_replicas(count), 1e-12)
    return loss, {
        "loss": (-total, count),
        "chosen_logps": (ops.stop_gradient(total), ops.sum(weight)),
    }
