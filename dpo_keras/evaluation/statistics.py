"""Figures that know how sure they are: means and shares with 95 % intervals, never NaN.

Pairs about one prompt go wrong together, so intervals count prompts ("clusters") where that
matters: the variance of a mean is that of its clusters' sums, and a share's Wilson interval is
taken at the number of independent pairs that would have had this variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Z = 1.959963984540054  # the normal's 97.5 % quantile


@dataclass(frozen=True, slots=True)
class Figure:
    """A measured value with its 95 % interval, or the reason why there is none.

    Args:
        value: the value; None where it is undefined.
        low: lower end of the interval; None where there is none.
        high: upper end.
        count: pairs, responses or whatever else the value was taken over.
        reason: why `value` is None.

    Example:
        >>> print(Figure(0.9123, 0.8741, 0.9402, count=250))
        0.912 (0.874 to 0.940)
        >>> print(undefined("no pair has a longer chosen response"))
        undefined: no pair has a longer chosen response
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        """The value, then its interval."""
        if self.value is None:
            return f"undefined: {self.reason}"
        text = short(self.value)
        if self.low is None or self.high is None:
            return text
        return f"{text} ({short(self.low)} to {short(self.high)})"

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set, ready for JSON.

        Example:
            >>> Figure(0.5, count=3).as_dict()
            {'value': 0.5, 'count': 3}
        """
        found = {"value": self.value, "low": self.low, "high": self.high, "count": self.count}
        kept = {name: v for name, v in found.items() if v is not None or name == "value"}
        return kept if self.reason is None else {**kept, "reason": self.reason}

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Figure:
        """The figure that `as_dict` was called on.

        Args:
            record: what `as_dict` returned.
        """
        return cls(**record)


def undefined(reason: str, count: int = 0) -> Figure:
    """A figure without a value.

    Args:
        reason: why.
        count: what it was to be taken over.
    """
    return Figure(None, count=count, reason=reason)


def short(value: float) -> str:
    """A number as people read it: three decimals, or four digits where it is large or tiny.

    Example:
        >>> [short(v) for v in (0.5, 12.3456, -1234.5, 0.00012, 0.0)]
        ['0.500', '12.35', '-1234', '0.00012', '0.000']
    """
    size = abs(value)
    if size >= 10:
        return f"{value:.4g}" if size < 1e6 else f"{value:.3g}"
    return f"{value:.3f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def mean(
    values: Any, weight: Any = None, clusters: Any = None, *, of: str = "pair", absent: str = ""
) -> Figure:
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
    if isinstance(data, Figure):
        return data
    values, weight, clusters = data
    centre = float(weight @ values) / float(weight.sum())
    weight = weight / weight.sum()
    sums = np.bincount(clusters, weight * (values - centre))
    if len(sums) < 2:
        return Figure(centre, count=len(values))
    spread = Z * math.sqrt(float(sums @ sums) * len(sums) / (len(sums) - 1))
    return Figure(centre, centre - spread, centre + spread, len(values))


def share(
    values: Any, weight: Any = None, clusters: Any = None, *, of: str = "pair", absent: str = ""
) -> Figure:
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
    if isinstance(data, Figure):
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
    return Figure(p, *wilson(p, count), len(values))


def wilson(p: float, count: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share.

    Args:
        p: the share found, in [0, 1].
        count: number of items, > 0; need not be whole.

    Returns:
        (low, high), within [0, 1].

    Example:
        >>> [round(end, 4) for end in wilson(1.0, 10)]  # 10 / (10 + 1.96²) to 1
        [0.7225, 1.0]
    """
    z2 = Z * Z / count
    centre = (p + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(p * (1 - p) / count + z2 / (4 * count))
    return min(max(0.0, centre - half), p), max(min(1.0, centre + half), p)


def share_difference(before: Figure, after: Figure, correlation: float) -> Figure:
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
    return Figure(difference, difference - down, difference + up, after.count)


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
) -> tuple[np.ndarray, np.ndarray, np.ndarray] | Figure:
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
