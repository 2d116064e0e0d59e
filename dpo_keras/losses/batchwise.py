"""Losses of a whole batch: one pair's value depends on the other pairs (AOT).

AOT asks that the margins of the batch, taken as a distribution, dominate the reference's: the k-th
smallest of one is compared with the k-th smallest of the other (arXiv 2406.05882). The value of a
comparison is handed back to the pair that holds the k-th place, so that weights and groups still
speak of pairs; the mean over the batch is the paper's.

Rows of weight zero (`outputs["weight"]`, where given) are padding and take no place in the order.
Pairs with y < ½ are turned around first, since a margin has to point toward the preferred response;
a tie (y = ½) has no such direction and is taken as it is written.

Example:
    >>> from keras import ops
    >>> outputs = {"policy": ops.convert_to_tensor([[3.0, 0.0], [1.0, 0.0]]),
    ...            "reference": ops.convert_to_tensor([[0.0, 0.0], [1.0, 0.0]])}
    >>> print(ops.convert_to_numpy(aot(ops.ones(2), None, outputs, beta=1.0)).round(4))
    [0.1269 0.3133]
"""

from __future__ import annotations

from keras import ops

from dpo_keras.losses.links import sigmoid
from dpo_keras.losses.numerics import Tensor
from dpo_keras.losses.scores import Outputs


def toward_preferred(preference: Tensor, values: Tensor) -> Tensor:
    """Turn the two columns `[N, 2]` around where the second response is preferred."""
    return ops.where((preference < 0.5)[:, None], values[:, ::-1], values)


def rank_partners(values: Tensor, others: Tensor, outputs: Outputs) -> Tensor:
    """Give, for each entry of `values` `[N]`, the entry of `others` `[N]` of the same rank."""
    if "weight" in outputs:
        # Padding goes to the end of both orders, so it only ever meets padding.
        last = 1.0 + ops.maximum(ops.max(values), ops.max(others))
        padding = outputs["weight"] == 0
        values = ops.where(padding, last, values)
        others = ops.where(padding, last, others)
    rank = ops.argsort(ops.argsort(values))
    return ops.take(ops.take(others, ops.argsort(others)), rank)


def dominance(preference: Tensor, gap: Tensor, label_smoothing: float) -> Tensor:
    """Give the cross-entropy of the gaps `[N]`, the label turned as the columns were."""
    decided = ops.maximum(preference, 1.0 - preference)
    return decided * sigmoid(gap, label_smoothing=label_smoothing) + (1.0 - decided) * sigmoid(
        -gap, label_smoothing=label_smoothing
    )


def aot(
    preference: Tensor,
    scores: Tensor,
    outputs: Outputs,
    *,
    beta: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Give -(1-ε) log σ(βδ) - ε log σ(-βδ), δ = sort(π⁺ - π⁻) - sort(ref⁺ - ref⁻).

    Args:
        preference: `[N]`, y in [0, 1].
        scores: not used.
        outputs: `policy`, `reference` `[N, 2]`; `weight` `[N]` where there is padding.
        beta: strength of the tie to the reference.
        label_smoothing: ε in [0, ½).

    Returns:
        `[N]`, in nats.
    """
    del scores
    policy = toward_preferred(preference, outputs["policy"])
    reference = toward_preferred(preference, outputs["reference"])
    margin = policy[:, 0] - policy[:, 1]
    partner = rank_partners(margin, reference[:, 0] - reference[:, 1], outputs)
    return dominance(preference, beta * (margin - partner), label_smoothing)


def aot_unpaired(
    preference: Tensor, scores: Tensor, outputs: Outputs, *, label_smoothing: float = 0.0
) -> Tensor:
    """Give -(1-ε) log σ(δ) - ε log σ(-δ), δ = sort(S⁺) - sort(S⁻).

    Args:
        preference: `[N]`, y in [0, 1].
        scores: `[N, 2]`, in nats.
        outputs: `weight` `[N]` where there is padding.
        label_smoothing: ε in [0, ½).

    Returns:
        `[N]`, in nats.

    Example:
        >>> from keras import ops
        >>> scores = ops.convert_to_tensor([[3.0, 1.0], [0.0, 2.0]])
        >>> print(ops.convert_to_numpy(aot_unpaired(ops.ones(2), scores, {})).round(4))
        [0.3133 1.3133]
    """
    ordered = toward_preferred(preference, scores)
    partner = rank_partners(ordered[:, 0], ordered[:, 1], outputs)
    return dominance(preference, ordered[:, 0] - partner, label_smoothing)
