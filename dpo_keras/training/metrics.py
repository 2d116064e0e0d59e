"""What a step logs, as weighted sums: only sums can be added over steps, replicas and workers."""

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.losses import DPOLoss, Outputs, kl_to_reference
from dpo_keras.losses.bradley_terry import NEVER
from dpo_keras.losses.unpaired_objectives import kl_baseline
from dpo_keras.scoring.auxiliary_loss import auxiliary_loss
from dpo_keras.scoring.scorer import compared_tokens
from dpo_keras.training.distribution import replica_count, sum_over_replicas
from dpo_keras.utils import Tensor

MetricSums: TypeAlias = dict[str, tuple[Tensor, Tensor]]
"""Name -> (weighted sum, sum of weights)."""

COUNTS = ("tokens", "pairs")
"""Sums of which the total is of interest, not the mean."""

STOP = "stop"
"""Number of replicas that were asked to stop: summed with the metrics, all learn of it at once."""

HIDDEN = frozenset({"at_reference", STOP, *COUNTS})
"""Names that callbacks read and that are not logged."""


def preference_metric_names(loss: DPOLoss) -> list[str]:
    """Return the names that `preference_sums` measures, `loss` first."""
    names = ["loss", *loss.term_names(), "reward_accuracy"]
    if loss.unpaired:
        names += ["desirable_reward", "undesirable_reward", "desirable_logps", "undesirable_logps"]
        names += ["reference_point"]
    else:
        names += ["reward_margin", "chosen_probability", "chosen_reward", "rejected_reward"]
        names += ["chosen_logps", "rejected_logps"] if loss.of_policies else []
    names += ["entropy"] if loss.of_policies else []
    names += ["kl"] if loss.needs_reference else []
    names += _group_names(loss)
    return [*names, "at_reference"] if loss.needs_reference else names


def preference_sums(
    loss: DPOLoss,
    batch: Batch,
    outputs: Outputs,
    preference: Tensor,
    scores: Tensor,
    probabilities: Tensor,
    llr: Tensor,
    terms: Mapping[str, Tensor],
) -> MetricSums:
    """Return the sums of `preference_metric_names(loss)` over N pairs, of `[N]` or `[N, 2]` each.

    `at_reference` is the preference loss that a policy equal to its reference would have.
    """
    weight = outputs["weight"]
    values = {"loss": sum(terms.values()), **terms}
    if not loss.unpaired:
        values |= {
            "reward_margin": llr,
            "chosen_probability": probabilities[:, 0],
            "chosen_reward": scores[:, 0],
            "rejected_reward": scores[:, 1],
            "chosen_logps": outputs["policy"][:, 0],
            "rejected_logps": outputs["policy"][:, 1],
        }
    if loss.needs_reference:
        values["kl"] = kl_to_reference(outputs)
        values["at_reference"] = _loss_at_reference(loss, preference, outputs)
    total = ops.sum(weight)
    sums: MetricSums = {name: (_weighted(weight, v), total) for name, v in values.items()}
    decided = weight * ops.cast(preference != 0.5, "float32")
    right = _share_right(scores, preference)
    if loss.unpaired:
        # What a rated response is compared with is the reference point, not the other column.
        baseline = kl_baseline(scores, outputs)
        right = 0.5 * (1.0 + ops.sign(scores[:, 0] - baseline) * ops.sign(preference - 0.5))
        sums["reference_point"] = (ops.stop_gradient(baseline / loss.beta) * total, total)
        sums |= _rated_sums(preference, weight, scores[:, 0], outputs["policy"][:, 0])
    sums["reward_accuracy"] = (ops.sum(decided * right), ops.sum(decided))
    tokens = ops.sum(ops.cast(compared_tokens(batch), "float32"))
    sums["entropy"] = (outputs["entropy"] * tokens, tokens)
    for number, name in enumerate(_group_names(loss)):
        member = weight * ops.cast(outputs["group"] == number, "float32")
        sums[name] = (_weighted(member, values["loss"]), ops.sum(member))
    return sums


def _share_right(scores: Tensor, preference: Tensor) -> Tensor:
    """Compute the share of a pair's (one) or a ranking's ordered pairs that scores order alike.

    A tie of scores is half right: before training every pair is one.
    """
    columns = scores.shape[-1]
    if columns == 2:
        return 0.5 * (1.0 + ops.sign(scores[:, 0] - scores[:, 1]) * ops.sign(preference - 0.5))
    differences = scores[:, :, None] - scores[:, None, :]
    ordered = ops.triu(ops.ones((columns, columns), scores.dtype), 1)
    compared = ordered * ops.cast(scores > 0.5 * NEVER, scores.dtype)[:, None, :]
    right = ops.sum(compared * 0.5 * (1.0 + ops.sign(differences)), axis=(1, 2))
    return right / ops.maximum(ops.sum(compared, axis=(1, 2)), 1.0)


def _rated_sums(desirable: Tensor, weight: Tensor, rewards: Tensor, logps: Tensor) -> MetricSums:
    """Return rewards and log-probs of the desirable and of the undesirable responses."""
    sums: MetricSums = {}
    for name, share in (("desirable", desirable), ("undesirable", 1.0 - desirable)):
        counted = weight * share
        for what, values in (("reward", rewards), ("logps", logps)):
            sums[f"{name}_{what}"] = (_weighted(counted, values), ops.sum(counted))
    return sums


def with_auxiliary_loss(
    loss: Tensor, sums: MetricSums, collected: list[Tensor] | None
) -> tuple[Tensor, MetricSums]:
    """Add to a step's loss, and to what is logged of it, what the policy's layers collected.

    None: the policy adds no losses, or training drops them.
    """
    if collected is None:
        return loss, sums
    share = auxiliary_loss(collected, sum_over_replicas, replica_count())
    total = sum_over_replicas(ops.stop_gradient(share))
    summed, weight = sums["loss"]
    added = {"loss": (summed + weight * total, weight), "auxiliary_loss": (weight * total, weight)}
    return loss + share, {**sums, **added}


def step_counts(batch: Batch) -> MetricSums:
    """Count the tokens that the policy computes on, without padding, and the pairs."""
    real = ops.cast(ops.any(batch["weight"] > 0, axis=-1), "float32")[:, None, None]
    tokens = ops.sum(real * ops.cast(batch["padding_mask"], "float32"))
    pairs = ops.sum(ops.cast(batch["weight"] > 0, "float32"))
    return {"tokens": (tokens, 1.0), "pairs": (pairs, 1.0)}


def means(sums: Tensor) -> list[Tensor]:
    """Return the means of rows of (sum, weight); 0 where the weight is."""
    return list(ops.unstack(ops.divide_no_nan(sums[:, 0], sums[:, 1])))


def means_by_name(names: Sequence[str], means: Sequence[Tensor]) -> dict[str, Tensor]:
    """Name the means that are logged, with those made of others.

    These are `worst_group_loss`, where groups have losses, and `reward_margin` of rated responses.
    """
    logged = {n: mean for n, mean in zip(names, means, strict=True) if n not in HIDDEN}
    logged = with_margin(logged)
    groups = [mean for name, mean in logged.items() if name.startswith("group_loss/")]
    return {**logged, "worst_group_loss": ops.max(ops.stack(groups))} if groups else logged


def with_margin(logged: dict[str, Tensor]) -> dict[str, Tensor]:
    """Add the `reward_margin` of rated responses: the difference of two means, not a mean."""
    if "desirable_reward" not in logged:
        return logged
    margin = logged["desirable_reward"] - logged["undesirable_reward"]
    return {**logged, "reward_margin": margin}


def _group_names(loss: DPOLoss) -> list[str]:
    groups = (loss.group_robust or {}).get("groups", 0)
    return [f"group_loss/{number}" for number in range(groups)]


def _weighted(weight: Tensor, values: Tensor) -> Tensor:
    # A row of padding may hold anything: 0 * inf must not reach the sum.
    return ops.stop_gradient(ops.sum(ops.where(weight > 0, weight * values, 0.0)))


def _loss_at_reference(loss: DPOLoss, preference: Tensor, outputs: Outputs) -> Tensor:
    same: Outputs = {**outputs, "reference": outputs["policy"]}
    if "policy_shared" in outputs:
        same["reference_shared"] = outputs["policy_shared"]
    return loss.terms(preference, same)["preference_loss"]
