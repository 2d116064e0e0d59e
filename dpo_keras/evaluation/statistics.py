"""Estimates that know how sure they are: means and shares with 95 % intervals, never NaN.

Pairs about one prompt go wrong together, so intervals count prompts ("clusters") where that
matters: the variance of a mean is that of its clusters' sums, and a share's Wilson interval is
taken at the number of independent pairs that would have had this variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dpo_keras.utils.intervals import Estimate, Z, undefined, wilson_interval


def mean(
    values: Any, weight: Any = None, clusters: Any = None, *, of: str = "pair", absent: str = ""
) -> Estimate:
    """Weighted mean, with an interval that is robust to dependence within clusters.

        mean = sum w v / sum w,   variance = C/(C-1) sum_c (sum_{i in c} w_i (v_i - mean))^2 / W^2

    Args:
        values: `[N]`.
        weight: `[N]`, >= 0; equal by default. Items of weight 0 do not count.
        clusters: `[N]` integers, equal where items depend on one another; all apart by default.
        of: what an item is, for reasons.
        absent: the reason where there are no items.

    Returns:
        The mean and mean ± 1.96 standard errors (no interval from a single cluster); undefined
        where nothing has weight or a value is not finite.

    Example:
        >>> print(mean([1.0, 2.0, 3.0, 4.0]))  # 2.5 ± 1.96 * sqrt(5 / 3 / 4)
        2.500 (1.235 to 3.765)
        >>> print(mean([1.0, 2.0, 3.0, 4.0], clusters=[0, 0, 1, 1]).low.__round__(3))
        0.54
    """
    data = _items(values, weight, clusters, of, absent)
    if isinstance(data, Estimate):
        return data
    values, weight, clusters = data
    centre = float(weight @ values) / float(weight.sum())
    weight = weight / weight.sum()
    sums = np.bincount(clusters, weight * (values - centre))
    if len(sums) < 2:
        return Estimate(centre, count=len(values))
    spread = Z * math.sqrt(float(sums @ sums) * len(sums) / (len(sums) - 1))
    return Estimate(centre, centre - spread, centre + spread, len(values))


def share(
    values: Any, weight: Any = None, clusters: Any = None, *, of: str = "pair", absent: str = ""
) -> Estimate:
    """Weighted share of successes, with the Wilson interval.

    The interval is taken at the effective number of items: Kish's (sum w)² / sum w², divided by
    how much dependence within clusters widens the variance (where all items agree that cannot be
    seen, and each cluster counts as one item).

    Args:
        values: `[N]` in [0, 1]: 1 a success, 0 a failure, 0.5 a tie.
        weight: `[N]`, >= 0; equal by default.
        clusters: `[N]` integers, equal where items depend on one another; all apart by default.
        of: what an item is, for reasons.
        absent: the reason where there are no items.

    Returns:
        The share and its interval within [0, 1]; undefined where nothing has weight.

    Example:
        >>> print(share([1, 1, 1, 0]))
        0.750 (0.301 to 0.954)
        >>> print(share([]))
        undefined: there is no pair

    References:
        Wilson (1927), JASA 22: 209-212. Kish (1965), Survey Sampling.
    """
    data = _items(values, weight, clusters, of, absent)
    if isinstance(data, Estimate):
        return data
    values, weight, clusters = data
    p = float(weight @ values) / float(weight.sum())
    weight = weight / weight.sum()
    apart = float((weight * (values - p)) @ (weight * (values - p)))
    if apart > 0:
        sums = np.bincount(clusters, weight * (values - p))
        count = 1 / float(weight @ weight) / max(1.0, float(sums @ sums) / apart)
    else:
        totals = np.bincount(clusters, weight)
        count = 1 / float(totals @ totals)
    return Estimate(p, *wilson_interval(p, count), len(values))


def share_difference(before: Estimate, after: Estimate, correlation: float) -> Estimate:
    """Difference of two shares of the same items, with Newcombe's interval.

    Args:
        before: a share with its interval.
        after: the other.
        correlation: of the two outcomes of an item, over items; 0 where it is undefined.

    Returns:
        after - before.

    Example:
        >>> print(share_difference(share([1, 0] * 20), share([1, 1] * 20), 0.0))
        0.500 (0.328 to 0.648)

    References:
        Newcombe (1998), Statistics in Medicine 17: 2635-2650, method 10 without its correction.
    """
    for figure in (before, after):
        if figure.value is None or figure.low is None or figure.high is None:
            return undefined(figure.reason or "a share has no interval", figure.count)
    assert before.value is not None and before.low is not None and before.high is not None
    assert after.value is not None and after.low is not None and after.high is not None

    def reach(one: float, other: float) -> float:
        return math.sqrt(max(one * one - 2 * correlation * one * other + other * other, 0.0))

    difference = after.value - before.value
    down = reach(after.value - after.low, before.high - before.value)
    up = reach(after.high - after.value, before.value - before.low)
    return Estimate(difference, difference - down, difference + up, after.count)


def correlation(one: Any, other: Any, weight: Any = None) -> float:
    """Pearson's weighted correlation; 0 where one of the two does not vary.

    Example:
        >>> correlation([0, 1, 2], [1, 3, 5]), correlation([0, 1], [1, 1])
        (1.0, 0.0)
    """
    one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
    weight = np.ones(len(one)) if weight is None else np.asarray(weight, np.float64)
    weight = weight / weight.sum()
    one, other = one - weight @ one, other - weight @ other
    scale = math.sqrt(float(weight @ one**2) * float(weight @ other**2))
    return float(weight @ (one * other)) / scale if scale > 0 else 0.0


def percentiles(values: Any, weight: Any, wanted: Sequence[float]) -> dict[str, float]:
    """Weighted percentiles: the smallest value with at least that share of the weight up to it.

    Args:
        values: `[N]`, finite, N >= 1.
        weight: `[N]`, >= 0, not all 0.
        wanted: percentiles in [0, 100].

    Returns:
        `{percentile: value}`.

    Example:
        >>> percentiles([3.0, 1.0, 2.0, 9.0], [1, 1, 1, 0], (0, 50, 100))
        {'0': 1.0, '50': 2.0, '100': 3.0}
    """
    values, weight = np.asarray(values, np.float64), np.asarray(weight, np.float64)
    values, weight = values[weight > 0], weight[weight > 0]
    order = np.argsort(values, kind="stable")
    reached = np.cumsum(weight[order]) / weight.sum()
    # Rounding in the sum must not push a percentile one value up.
    places = np.searchsorted(reached, np.asarray(wanted) / 100 - 1e-9)
    found = values[order][np.minimum(places, len(values) - 1)]
    return {f"{p:g}": float(v) for p, v in zip(wanted, found, strict=True)}


def _items(
    values: Any, weight: Any, clusters: Any, of: str, absent: str
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | Estimate:
    """Items of weight, their weights and clusters numbered from 0; or why there is none."""
    values = np.asarray(values, np.float64)
    if not len(values):
        return undefined(absent or f"there is no {of}")
    weight = np.ones(len(values)) if weight is None else np.asarray(weight, np.float64)
    used = weight > 0
    if not used.any():
        return undefined(f"every {of} has weight 0")
    broken = int((~np.isfinite(values[used])).sum())
    if broken:
        found = f"of {broken} of {int(used.sum())} {of}s the value is not finite"
        return undefined(found, int(used.sum()))
    if clusters is None:
        numbers = np.arange(int(used.sum()))
    else:
        numbers = np.unique(np.asarray(clusters)[used], return_inverse=True)[1].reshape(-1)
    return values[used], weight[used], numbers
