"""Which pairs to ask about first: at random, or those from which a judgement teaches most."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.text import did_you_mean


@dataclass(frozen=True)
class Pool:
    """What is known of N pairs that nobody has judged.

    No selection depends on which response of a pair is called the first.
    """

    probabilities: np.ndarray | None = None  # [N] P(first is better)
    committee: np.ndarray | None = None  # [M, N] the same under M >= 2 models
    embeddings: np.ndarray | None = None  # [N, d] of the first response less that of the second


def select_pairs(selection: str, count: int, pool: Pool, size: int, seed: int = 0) -> np.ndarray:
    """Choose the pairs whose judgement is worth most, best first.

        random        a sample without replacement
        uncertain     P nearest to 1/2, where its entropy is highest
        disagreement  highest variance of P over a committee of models
        diverse       greedy k-centre: next is the pair farthest from those chosen, by
                      d(u, v) = min(|u - v|, |u + v|), as a pair has no order

    Pairs of equal worth come in a random order.

    Args:
        selection: one of `SELECTIONS`.
        count: pairs to choose; all, where there are fewer.
        pool: `uncertain` needs its probabilities, `disagreement` its committee, `diverse` its
            embeddings.
        size: N, the pairs there are.
        seed: of the random order. The same one gives the same choice.

    Returns:
        `[min(count, N)]` int: indices of pairs.

    Raises:
        InputError: an unknown selection, a negative count, or a pool without what the selection
            needs, in another shape, or with values out of range.

    Example:
        >>> pool = Pool(probabilities=np.array([0.9, 0.5, 0.2, 0.45]))
        >>> select_pairs("uncertain", 2, pool, size=4)
        array([1, 3])

    Source: arXiv 2402.08114 (uncertain), 1708.00489 (diverse).
    """
    if selection not in _NEEDS:
        rule = f"must be one of {', '.join(SELECTIONS)}"
        hint = did_you_mean(selection, SELECTIONS)
        raise InputError(InputProblem("selection", rule, selection, hint))
    if count < 0:
        raise InputError(InputProblem("count", "must be 0 or more", count))
    order = np.random.default_rng(seed).permutation(size)
    field = _NEEDS[selection]
    if field is None:
        return order[:count]
    values = _checked(selection, field, getattr(pool, field), size)
    if field == "embeddings":
        return order[_k_centre(values[order], min(count, size))]
    worth = _WORTH[selection](values)[order]
    return order[np.argsort(-worth, kind="stable")[:count]]


def _nearness_to_half(probabilities: np.ndarray) -> np.ndarray:
    return -np.abs(probabilities - 0.5)  # orders as the entropy does, which rounds near 1/2


def _variance(committee: np.ndarray) -> np.ndarray:
    return committee.var(axis=0)


_WORTH: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "uncertain": _nearness_to_half,
    "disagreement": _variance,
}
_NEEDS = {
    "random": None,
    "uncertain": "probabilities",
    "disagreement": "committee",
    "diverse": "embeddings",
}
SELECTIONS = tuple(_NEEDS)


def _k_centre(points: np.ndarray, count: int) -> np.ndarray:
    """Choose `count` of `[N, d]` points, each the farthest from those before it."""
    squares = np.einsum("nd,nd->n", points, points)
    nearest = np.full(len(points), np.inf)
    chosen = np.zeros(count, int)
    for place in range(count):
        chosen[place] = index = int(nearest.argmax())  # the first of equals: `points` are shuffled
        apart = squares + squares[index] - 2 * np.abs(points @ points[index])
        nearest = np.minimum(nearest, np.maximum(apart, 0))
        nearest[index] = -1  # for good: rounding may leave it a distance of its own
    return chosen


def _checked(selection: str, field: str, values: np.ndarray | None, size: int) -> np.ndarray:
    """Return what a selection needs, as float64, once it has kept every rule."""
    argument = f"pool.{field}"
    if values is None:
        raise InputError(InputProblem(argument, f"must be given for selection {selection!r}."))
    values = np.asarray(values, np.float64)
    shape = {"probabilities": f"[{size}]", "committee": f"[M >= 2, {size}]"}.get(
        field, f"[{size}, d]"
    )
    pairs_axis = 1 if field == "committee" else 0
    right = values.ndim == (1 if field == "probabilities" else 2)
    if not right or values.shape[pairs_axis] != size or (pairs_axis and len(values) < 2):
        raise InputError(InputProblem(argument, f"must have shape {shape}", values.shape))
    if not np.isfinite(values).all():
        raise InputError(InputProblem(argument, "must be finite; it holds NaN or infinite values."))
    if field != "embeddings" and values.size and not (0 <= values.min() <= values.max() <= 1):
        wrong = values[(values < 0) | (values > 1)][0]
        raise InputError(InputProblem(argument, "must be in [0, 1]", float(wrong)))
    return values
