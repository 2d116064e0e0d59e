"""From a batch to what the loss needs, and from that to what is logged: pure functions."""

from typing import Any, Protocol

from keras import ops

from dpo_keras.batching.collate import Batch
from dpo_keras.errors import InputError
from dpo_keras.losses import (
    DPOLoss,
    kl_to_reference,
    log_likelihood_ratio,
    preference_probabilities,
)
from dpo_keras.scoring.scorer import ResponseScorer, sum_by_owner

Sums = dict[str, tuple[Any, Any]]


class ScoresResponses(Protocol):
    """Anything that gives reference log-probs: `Reference`, or its counterpart for tf-keras."""

    def scored(self, scorer: ResponseScorer, batch: Batch, shared: bool = False) -> dict[str, Any]:
        """`logps` `[N, 2]` and, with `shared`, `shared_logps`; nothing where there is none."""


def loss_outputs(
    needs: frozenset[str],
    scorer: ResponseScorer,
    reference: ScoresResponses,
    batch: Batch,
    training: bool = False,
) -> dict[str, Any]:
    """Scores a batch under policy and reference, and no more than the loss asks for.

    Args:
        needs: `DPOLoss.needs`.
        scorer: the policy's.
        reference: run only where `needs` names it.
        batch: the batch contract of `dpo_keras.batching`.
        training: whether the policy's dropout is active.

    Returns:
        `policy`, `reference` `[N, 2]` float32 (no `reference` where there is none), `lengths`
        `[N, 2]` int32, `entropy` scalar (mean over response tokens), `weight` `[N]`, and what else
        `needs` names; N = rows * pairs.

    Raises:
        InputError: the pairs lack a column that the loss needs.
    """
    shared, weighted = "policy_shared" in needs, "wpo_log_weight" in needs
    batch = scorer.prepared(batch)
    under_reference: dict[str, Any] = {}
    if "reference" in needs:
        under_reference = reference.scored(scorer, batch, shared)
    statistics = ("entropy", *(["log_squared_norm"] if weighted else []))
    scored = scorer(batch, training, statistics, shared)
    tokens = ops.maximum(ops.sum(ops.cast(batch["owner"] >= 0, "float32")), 1.0)
    outputs = {
        "policy": scored["logps"],
        "lengths": scored["lengths"],
        "entropy": ops.sum(scored["entropy"]) / tokens,
        "weight": ops.reshape(batch["weight"], (-1,)),
    }
    if "logps" in under_reference:
        outputs["reference"] = under_reference["logps"]
    if shared:
        outputs["policy_shared"] = scored["shared_logps"]
        outputs["reference_shared"] = under_reference["shared_logps"]
    if weighted:
        outputs["wpo_log_weight"] = wpo_log_weight(batch, scored)
    for name in ("margin", "group"):
        if name in batch:
            outputs[name] = ops.reshape(batch[name], (-1,))
    missing = sorted({"margin", "group"} & needs - set(outputs))
    if missing:
        raise InputError(
            f"the loss needs {' and '.join(missing)} of every pair, and the pairs have none. "
            "Give the records those columns."
        )
    return outputs


def outputs_of(model: Any, batch: Batch, training: bool = False) -> dict[str, Any]:
    """As `loss_outputs`, of a `DPOModel` of Keras 3 or of tf-keras.

    Args:
        model: the model; before it is compiled, all that has a reference is scored under it.
        batch: the batch contract of `dpo_keras.batching`.
        training: whether dropout is active, where the model's own may be.

    Returns:
        What `loss_outputs` returns.
    """
    loss = model.preference_loss
    needs = frozenset({"reference"}) if loss is None else loss.needs
    return loss_outputs(needs, model.scorer, model.reference, batch, training and model.dropout)


def predictions(loss: DPOLoss | None, outputs: dict[str, Any]) -> dict[str, Any]:
    """Scores and preferences: what `predict` returns.

    Args:
        loss: what the model was compiled with; None scores as the default loss does.
        outputs: from `loss_outputs`.

    Returns:
        `probabilities` `[N, 2]`, `llr` `[N]`, `scores` `[N, 2]`, and `outputs` without `entropy`
        and `weight`.
    """
    scores = (loss or DPOLoss()).scores(outputs)
    return {
        "probabilities": preference_probabilities(scores),
        "llr": log_likelihood_ratio(scores),
        "scores": scores,
        **{name: v for name, v in outputs.items() if name not in ("entropy", "weight")},
    }


def wpo_log_weight(batch: Batch, scored: dict[str, Any]) -> Any:
    """Mean over a response's tokens of log p_t - log sum p^2 (arXiv 2406.11827), no gradient.

    Args:
        batch: the batch contract.
        scored: `token_logps`, `log_squared_norm` `[rows, slots]`, `lengths` `[N, 2]`.

    Returns:
        `[N, 2]`, in nats.
    """
    values = scored["token_logps"] - scored["log_squared_norm"]
    sums = sum_by_owner(values, batch["owner"], batch["weight"].shape[1])
    return ops.stop_gradient(sums / ops.maximum(ops.cast(scored["lengths"], "float32"), 1.0))


def metric_names(loss: DPOLoss) -> list[str]:
    """The names that `metric_sums` returns and users see, `loss` first."""
    names = ["loss", *loss.term_names(), "reward_accuracy", "reward_margin"]
    names += ["chosen_reward", "rejected_reward", "chosen_logps", "rejected_logps"]
    names += ["kl"] if loss.needs_reference else []
    return [*names, "entropy", *group_names(loss)]


def group_names(loss: DPOLoss) -> list[str]:
    """`group_loss/0`, `group_loss/1`, …, where the loss is robust over groups."""
    groups = (loss.options.get("group_robust") or {}).get("groups", 0)
    return [f"group_loss/{number}" for number in range(groups)]


def worst_group(means: dict[str, Any]) -> dict[str, Any]:
    """`worst_group_loss`, where there are losses of groups among the averages."""
    losses = [mean for name, mean in means.items() if name.startswith("group_loss/")]
    return {"worst_group_loss": ops.max(ops.stack(losses))} if losses else {}


def metric_sums(
    loss: DPOLoss, terms: dict[str, Any], preference: Any, outputs: dict[str, Any], batch: Batch
) -> Sums:
    """All that is logged, as weighted sums with their weights.

    Args:
        loss: what is minimised.
        terms: its terms, each `[N]`.
        preference: `[N]`.
        outputs: from `loss_outputs`.
        batch: where `outputs` came from.

    Returns:
        `{name: (sum, weight)}` for `metric_names(loss)`, and `at_reference` where the loss has a
        reference: what the preference loss would be if the policy were its reference.
    """
    weight = outputs["weight"]
    total = ops.sum(weight)
    scores = loss.scores(outputs)
    margin = log_likelihood_ratio(scores)
    values = {
        "loss": sum(terms.values()),
        **terms,
        "reward_margin": margin,
        "chosen_reward": scores[:, 0],
        "rejected_reward": scores[:, 1],
        "chosen_logps": outputs["policy"][:, 0],
        "rejected_logps": outputs["policy"][:, 1],
    }
    if loss.needs_reference:
        values["kl"] = kl_to_reference(outputs)
        values["at_reference"] = _at_reference(loss, preference, outputs)
    sums = {name: (_weighted(weight, value), total) for name, value in values.items()}
    decided = weight * ops.cast(preference != 0.5, "float32")
    # A tie in scores is half right: before training every pair is one.
    right = 0.5 * (1.0 + ops.sign(margin) * ops.sign(preference - 0.5))
    sums["reward_accuracy"] = (ops.sum(decided * right), ops.sum(decided))
    tokens = ops.sum(ops.cast(batch["owner"] >= 0, "float32"))
    sums["entropy"] = (outputs["entropy"] * tokens, tokens)
    for number, name in enumerate(group_names(loss)):
        member = weight * ops.cast(outputs["group"] == number, "float32")
        sums[name] = (_weighted(member, values["loss"]), ops.sum(member))
    return sums


def _weighted(weight: Any, values: Any) -> Any:
    # A row that is padding may hold anything: 0 * inf must not reach the sum.
    return ops.stop_gradient(ops.sum(ops.where(weight > 0, weight * values, 0.0)))


def _at_reference(loss: DPOLoss, preference: Any, outputs: dict[str, Any]) -> Any:
    same = {**outputs, "reference": outputs["policy"]}
    if "policy_shared" in outputs:
        same["reference_shared"] = outputs["policy_shared"]
    return loss.terms(preference, same)["preference_loss"]
