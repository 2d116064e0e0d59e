"""Means, shares and their changes, each an `Estimate` with a 95 % interval.

Pairs that share a prompt are not independent. Intervals are therefore robust to dependence within
clusters (prompts): the variance of a mean is that of the sums of its clusters, and the Wilson
interval of a share is taken at the number of independent items that would have this variance.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import ArrayLike

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.intervals import Estimate, Z, undefined, wilson_interval
from dpo_keras.utils.text import did_you_mean


def mean(
    values: ArrayLike,
    weight: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    *,
    of: str = "pair",
    absent: str = "",
) -> Estimate:
    """Compute a weighted mean and its interval, mean ± 1.96 standard errors.

        mean = sum w v / sum w,   variance = C/(C-1) sum_c (sum_{i in c} w_i (v_i - mean))^2 / W^2

    Dependent items have equal `clusters`; one cluster alone has no interval. The mean is undefined
    if no item (called `of` in the reason; `absent` where there is none) has weight, or a value is
    not finite.
    """
    items = _weighted_items(values, weight, clusters, of, absent)
    if isinstance(items, Estimate):
        return items
    value, w, cluster = items
    centre = float(w @ value) / float(w.sum())
    w = w / w.sum()
    sums = np.bincount(cluster, w * (value - centre))
    if len(sums) < 2:
        return Estimate(centre, count=len(value))
    reach = Z * math.sqrt(float(sums @ sums) * len(sums) / (len(sums) - 1))
    return Estimate(centre, centre - reach, centre + reach, len(value))


def share(
    values: ArrayLike,
    weight: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    *,
    of: str = "pair",
    absent: str = "",
) -> Estimate:
    """Compute a weighted share of successes and its Wilson interval.

    A value is 1 for a success, 0 for a failure, 0.5 for a tie. The interval is taken at the
    effective number of items: Kish's (sum w)² / sum w² (1965, Survey Sampling), divided by the
    factor by which dependence within clusters widens the variance. If all values are equal, this
    factor is unknown, and each cluster counts as one item.
    """
    items = _weighted_items(values, weight, clusters, of, absent)
    if isinstance(items, Estimate):
        return items
    value, w, cluster = items
    p = float(w @ value) / float(w.sum())
    w = w / w.sum()
    deviation = w * (value - p)
    independent = float(deviation @ deviation)
    if independent > 0:
        sums = np.bincount(cluster, deviation)
        count = 1 / float(w @ w) / max(1.0, float(sums @ sums) / independent)
    else:
        totals = np.bincount(cluster, w)
        count = 1 / float(totals @ totals)
    return Estimate(p, *wilson_interval(p, count), len(value))


class PerItem(NamedTuple):
    """What a figure was computed from, `[N]` each, and whether it is a share or a mean."""

    values: np.ndarray
    weight: np.ndarray
    clusters: np.ndarray
    share: bool


class Measurement(Protocol):
    """Figures of items, which are pairs or responses."""

    @property
    def figures(self) -> Mapping[str, Estimate]:
        """The figures by name."""

    def __len__(self) -> int: ...

    def difference_from(self, other: Measurement) -> str:
        """Return why the two cannot be compared item by item, or ""."""

    def per_item(self, name: str) -> PerItem | None:
        """Return what a figure was computed from, or None if it is not a mean over items."""


def change(before: Measurement, after: Measurement, name: str) -> Estimate:
    """Compute the change of a figure, paired item by item.

    Pairing removes the variance between easy and hard items, so that smaller changes are seen.

        mean:  mean of (after - before) ± 1.96 standard errors
        share: after - before, with Newcombe's interval for paired shares

    Args:
        before: `HeldOut` or `Samples` of one policy.
        after: the same kind, of another policy.
        name: a name in `after.figures`.

    Returns:
        after - before. It is undefined if the two are about different pairs or prompts. It has no
        interval if the figure is not a mean over items.

    Raises:
        InputError: the two are of different kinds, or the name is unknown.

    Example:
        >>> from dpo_keras.evaluation import Samples
        >>> def judged(*found):
        ...     rows = [{"prompt": str(i), "response": "", "tokens": 0, "ended": True,
        ...              "verdict": {"preferred": v}} for i, v in enumerate(found)]
        ...     return Samples(rows, {"preferred": share(found)})
        >>> before, after = judged(True, False, False, False), judged(True, True, True, False)
        >>> change(before, after, "preferred").value
        0.5

    References:
        Newcombe (1998), Statistics in Medicine 17: 2635-2650.
    """
    if name not in after.figures:
        rule = f"must be one of {', '.join(after.figures)}"
        raise InputError(InputProblem("name", rule, name, did_you_mean(name, after.figures)))
    if type(before) is not type(after):
        raise InputError(
            "before and after must both be HeldOut or both be Samples; got "
            f"{type(before).__name__} and {type(after).__name__}."
        )
    reason = after.difference_from(before)
    if reason:
        return undefined(reason, len(after))
    old, new = before.per_item(name), after.per_item(name)
    if old is None or new is None or name not in before.figures:
        first, last = before.figures.get(name), after.figures[name]
        if first is None:
            return undefined("it was not measured before")
        if first.value is None or last.value is None:
            return undefined(first.reason or last.reason or "")
        return Estimate(last.value - first.value, count=last.count)
    if new.share:
        together = correlation(old.values, new.values, new.weight)
        return share_difference(before.figures[name], after.figures[name], together)
    return mean(new.values.astype(np.float64) - old.values, new.weight, new.clusters)


def share_difference(before: Estimate, after: Estimate, correlation: float) -> Estimate:
    """Compute the difference of two shares of the same items, whose outcomes correlate.

    The interval is that of `change`'s source, method 10 without its correction.
    """
    ends = _ends(before, after)
    if isinstance(ends, Estimate):
        return ends
    (old, old_low, old_high), (new, new_low, new_high) = ends

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * correlation * one * other + other * other, 0.0))

    difference = new - old
    down = reach(new - new_low, old_high - old)
    up = reach(new_high - new, old - old_low)
    return Estimate(difference, difference - down, difference + up, after.count)


def average(one: Estimate, other: Estimate) -> Estimate:
    """Compute the mean of two independent shares; its interval stays within [0, 1].

    Square and add: Zou and Donner (2008), Statistics in Medicine 27: 1693-1702.
    """
    count = one.count + other.count
    ends = _ends(one, other)
    if isinstance(ends, Estimate):
        return undefined(ends.reason or "", count)
    (a, a_low, a_high), (b, b_low, b_high) = ends
    value = (a + b) / 2
    low = value - 0.5 * math.hypot(a - a_low, b - b_low)
    high = value + 0.5 * math.hypot(a_high - a, b_high - b)
    return Estimate(value, low, high, count)


def correlation(one: ArrayLike, other: ArrayLike, weight: ArrayLike | None = None) -> float:
    """Compute Pearson's weighted correlation; 0 if one side is constant or nothing has weight."""
    x, y = np.asarray(one, np.float64), np.asarray(other, np.float64)
    w = np.ones(len(x)) if weight is None else np.asarray(weight, np.float64)
    if not w.any():
        return 0.0
    w = w / w.sum()
    x, y = x - w @ x, y - w @ y
    scale = math.sqrt(float(w @ x**2) * float(w @ y**2))
    return float(w @ (x * y)) / scale if scale > 0 else 0.0


def percentiles(values: ArrayLike, weight: ArrayLike, wanted: Sequence[float]) -> dict[str, float]:
    """Compute weighted percentiles: the smallest values up to which the weight reaches a share."""
    value, w = np.asarray(values, np.float64), np.asarray(weight, np.float64)
    value, w = value[w > 0], w[w > 0]
    order = np.argsort(value, kind="stable")
    reached = np.cumsum(w[order]) / w.sum()
    # Rounding in the sum must not push a percentile one value up.
    places = np.searchsorted(reached, np.asarray(wanted) / 100 - 1e-9)
    found = value[order][np.minimum(places, len(value) - 1)]
    return {f"{p:g}": float(v) for p, v in zip(wanted, found, strict=True)}


def _ends(*figures: Estimate) -> list[tuple[float, float, float]] | Estimate:
    """Return (value, low, high) of each figure, or why one has none."""
    ends = []
    for figure in figures:
        if figure.value is None or figure.low is None or figure.high is None:
            return undefined(figure.reason or "a share has no interval", figure.count)
        ends.append((figure.value, figure.low, figure.high))
    return ends


def _weighted_items(
    values: ArrayLike, weight: ArrayLike | None, clusters: ArrayLike | None, of: str, absent: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | Estimate:
    """Return values, weights and clusters (numbered from 0) of items of weight, or why none."""
    value = np.asarray(values, np.float64)
    if not len(value):
        return undefined(absent or f"there is no {of}")
    w = np.ones(len(value)) if weight is None else np.asarray(weight, np.float64)
    used = w > 0
    count = int(used.sum())
    if not count:
        return undefined(f"every {of} has weight 0")
    broken = int((~np.isfinite(value[used])).sum())
    if broken:
        return undefined(f"of {broken} of {count} {of}s the value is not finite", count)
    if clusters is None:
        numbers = np.arange(count)
    else:
        numbers = np.unique(np.asarray(clusters)[used], return_inverse=True)[1].reshape(-1)
    return value[used], w[used], numbers
