"""What a step minimises and logs, for models of Keras 3 and of tf-keras alike."""

from typing import Any

import tensorflow as tf
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.losses import DPOLoss
from dpo_keras.training.distribution import gather_over_replicas, sum_over_replicas
from dpo_keras.training.measures import Sums, metric_sums


def preference_step(
    loss: DPOLoss, batch: Batch, outputs: dict[str, Any], training: bool
) -> tuple[Any, Sums]:
    """The preference loss of a step and all that is logged, of this replica's pairs.

        loss = sum_pairs w l / sum_pairs w, the divisor over all replicas

    Args:
        loss: what is minimised.
        batch: the batch contract of `dpo_keras.batching`.
        outputs: from `loss_outputs`.
        training: whether the loss's own variables take a step.

    Returns:
        This replica's share of the loss (the replicas' shares add up to it), and
        `{name: (weighted sum, weight)}`.
    """
    replicas = tf.distribute.get_strategy().num_replicas_in_sync
    preference = ops.reshape(batch["preference"], (-1,))
    together = loss.batchwise and replicas > 1
    if together:
        # A pair's loss depends on all pairs of the step: every replica computes the whole of it
        # and contributes its part.
        entropy = outputs["entropy"]
        rest = {name: value for name, value in outputs.items() if name != "entropy"}
        outputs = gather_over_replicas({**rest, "preference": preference})
        preference = outputs.pop("preference")
        outputs["entropy"] = entropy
    terms = loss.terms(preference, outputs)
    all_reduce = None if together else sum_over_replicas
    share = loss.combine(terms, outputs["weight"], outputs, training, all_reduce)
    sums = metric_sums(loss, terms, preference, outputs, batch)
    return share / replicas if together else share, sums


def supervised_step(batch: Batch, scored: dict[str, Any]) -> tuple[Any, Sums]:
    """The mean negative log-likelihood of the chosen responses' tokens, over the global batch.

    Args:
        batch: the batch contract.
        scored: what a `ResponseScorer` found.

    Returns:
        This replica's share of the loss, and `{name: (weighted sum, weight)}`.
    """
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


def step_counts(batch: Batch) -> Sums:
    """Tokens that the policy computes on, padding left out, and pairs."""
    real = ops.cast(ops.any(batch["weight"] > 0, axis=-1), "float32")[:, None, None]
    tokens = ops.sum(real * ops.cast(batch["padding_mask"], "float32"))
    pairs = ops.sum(ops.cast(batch["weight"] > 0, "float32"))
    return {"tokens": (tokens, 1.0), "pairs": (pairs, 1.0)}
