"""One objective, put together: score -> loss in its form -> weight -> likelihood."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from keras import ops

from dpo_keras.losses.numerics import Tensor
from dpo_keras.losses.objectives import Objective, keyword_only
from dpo_keras.losses.penalties import nll
from dpo_keras.losses.scores import Outputs


def pick(function: Callable[..., Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Pick the settings that a function takes; what is not set keeps the function's default.

    Example:
        >>> from dpo_keras.losses import links
        >>> pick(links.simpo, {"beta": 0.1, "gamma": 1.0})
        {'gamma': 1.0}
    """
    return {name: settings[name] for name in keyword_only(function) if name in settings}


def objective_scores(objective: Objective, outputs: Outputs, settings: Mapping[str, Any]) -> Tensor:
    """Give an objective's scores `[N, 2]`."""
    return objective.score(outputs, **pick(objective.score, settings))


def objective_loss(
    objective: Objective,
    preference: Tensor,
    outputs: Outputs,
    settings: Mapping[str, Any],
    shortfall: Tensor | None = None,
) -> Tensor:
    """Give an objective's loss for each pair.

    Args:
        objective: a line of the table.
        preference: `[N]`, y in [0, 1].
        outputs: as `prepare_outputs` made them.
        settings: `beta`, `label_smoothing` and the options, by name.
        shortfall: `[N, 2]`, what `dpo_positive` takes off the LLR; None for nothing.

    Returns:
        `[N]`.

    Example:
        >>> from keras import ops
        >>> from dpo_keras.losses.objectives import OBJECTIVES
        >>> outputs = {"policy": ops.convert_to_tensor([[2.0, -2.0]])}
        >>> float(objective_loss(OBJECTIVES["slic"], ops.ones(1), outputs, {"beta": 0.125})[0])
        0.5
    """
    scores = objective_scores(objective, outputs, settings)
    offset = ops.zeros_like(scores)
    if settings.get("margin"):
        offset = offset + outputs["margin"][:, None]
    if shortfall is not None and objective.takes_penalty("dpo_positive"):
        offset = offset + shortfall
    loss = objective.loss
    value = objective.form(loss, preference, scores, outputs, offset, pick(loss, settings))
    if settings.get("wpo") and "wpo" in objective.options:
        value = value * wpo_weight(outputs, settings.get("wpo_max_weight"))
    if objective.nll:
        weight = objective.nll
        weight = settings.get(weight, 1.0) if isinstance(weight, str) else weight
        value = value + weight * nll(preference, scores, outputs)
    return value


def wpo_weight(outputs: Outputs, bound: float | None = None) -> Tensor:
    """Give w⁺w⁻, w = exp(mean of log p_t - log Σ p²): how much a pair is the policy's own style.

    arXiv 2406.11827. One where every token is as likely as a draw from the policy would be on
    average; no gradient.

    Args:
        outputs: `wpo_log_weight` `[N, 2]`, log w.
        bound: upper bound of the product, or None.

    Returns:
        `[N]`.

    Example:
        >>> from keras import ops
        >>> float(wpo_weight({"wpo_log_weight": ops.zeros((1, 2))})[0])
        1.0
    """
    log_weight = ops.sum(outputs["wpo_log_weight"], axis=-1)
    # log p - log Σ p² is below log of the vocabulary: only faulty input comes near this bound.
    weight = ops.exp(ops.minimum(log_weight, 60.0))
    return weight if bound is None else ops.minimum(weight, bound)
