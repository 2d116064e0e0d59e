"""A measured value with its 95 % interval, or the reason why there is none: never NaN."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dpo_keras.utils import JSON

Z = 1.959963984540054
"""The 97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value with its 95 % interval, or the reason why there is none.

    Args:
        value: the value; None where it is undefined.
        low: lower end of the interval; None where there is none.
        high: upper end.
        count: number of pairs, responses or judgements that the value was taken over.
        reason: why `value` is None.

    Example:
        >>> print(Estimate(0.9123, 0.8741, 0.9402, count=250))
        0.912 (0.874 to 0.940)
        >>> f"{Estimate(0.9123, 0.8741, 0.9402):.0%}"
        '91% (87% to 94%)'
        >>> print(undefined("no pair was judged by two people"))
        undefined: no pair was judged by two people
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        """Return the value and its interval, in three decimals or four digits."""
        return format(self, "")

    def __format__(self, spec: str) -> str:
        """Return the value and its interval, each number in the format `spec`."""
        if self.value is None:
            return f"undefined: {self.reason}"
        value, low, high = (
            None if v is None else format(v, spec) if spec else short(v)
            for v in (self.value, self.low, self.high)
        )
        return f"{value}" if low is None or high is None else f"{value} ({low} to {high})"

    def as_dict(self) -> dict[str, JSON]:
        """Return the fields that are set, ready for JSON."""
        found = {"value": self.value, "low": self.low, "high": self.high, "count": self.count}
        kept = {name: v for name, v in found.items() if v is not None or name == "value"}
        return kept if self.reason is None else {**kept, "reason": self.reason}

    @classmethod
    def from_dict(cls, record: dict[str, JSON]) -> Estimate:
        """Return the estimate that `as_dict` was called on."""
        return cls(**record)


def undefined(reason: str, count: int = 0) -> Estimate:
    """Return an estimate without a value."""
    return Estimate(None, count=count, reason=reason)


def short(value: float) -> str:
    """Format a number for people: three decimals, or a few digits where it is large or tiny."""
    size = abs(value)
    if size >= 10:
        return f"{value:.4g}" if size < 1e6 else f"{value:.3g}"
    return f"{value:.3f}" if size >= 0.001 or size == 0 else f"{value:.2g}"


def wilson_interval(share: float, count: float) -> tuple[float, float]:
    """Compute Wilson's 95 % interval of a share.

        centre = (p + z²/2n) / (1 + z²/n),   half width = z/(1 + z²/n) · sqrt(p(1-p)/n + z²/4n²)

    Wilson (1927), JASA 22: 209-212. Weighted shares need a fractional count, which scipy's does not
    take, and the core depends on neither scipy nor statsmodels.
    """
    z2 = Z * Z / count
    centre = (share + z2 / 2) / (1 + z2)
    half = Z / (1 + z2) * math.sqrt(share * (1 - share) / count + z2 / (4 * count))
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def wilson(successes: float, count: int, reason: str = "there is nothing to count") -> Estimate:
    """Estimate a share of successes; undefined for `reason` where `count` is 0."""
    if not count:
        return undefined(reason)
    share = successes / count
    return Estimate(share, *wilson_interval(share, count), count)
