"""A figure with its interval, or the reason why there is none: never NaN."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True, slots=True)
class Estimate:
    """A measured value with its 95 % interval, or the reason why there is none.

    Args:
        value: None where it is undefined.
        low: lower end of the interval; None where there is none.
        high: upper end.
        count: judgements, pairs or comparisons that it was taken over.
        reason: why `value` is None.

    Example:
        >>> print(Estimate(0.52, 0.4, 0.64, count=80))
        0.52 (0.40 to 0.64)
        >>> print(Estimate(None, reason="no pair was judged by two people"))
        undefined: no pair was judged by two people
    """

    value: float | None
    low: float | None = None
    high: float | None = None
    count: int = 0
    reason: str | None = None

    def __str__(self) -> str:
        """The value and its interval in two decimals."""
        if self.value is None:
            return f"undefined: {self.reason}"
        if self.low is None or self.high is None:
            return f"{self.value:.2f}"
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"

    def as_dict(self) -> dict[str, Any]:
        """The fields that are set, for JSON."""
        fields = {"low": self.low, "high": self.high, "reason": self.reason}
        kept = {name: value for name, value in fields.items() if value is not None}
        return {"value": self.value, "count": self.count, **kept}


def share(successes: int, count: int, reason: str) -> Estimate:
    """A share with Wilson's interval.

    Args:
        successes: of `count`.
        count: may be 0.
        reason: why there is no share where `count` is 0.

    Example:
        >>> print(share(9, 10, "nothing was tried"))
        0.90 (0.60 to 0.98)
    """
    if count == 0:
        return Estimate(None, reason=reason)
    from statsmodels.stats.proportion import proportion_confint

    low, high = proportion_confint(successes, count, method="wilson")
    return Estimate(successes / count, float(low), float(high), count)


def bootstrap(
    statistic: Callable[[np.ndarray], float | None], units: int, resamples: int, seed: int = 0
) -> tuple[float, float] | None:
    """The percentile interval of a statistic over resampled units.

    Args:
        statistic: of the indices of a resample; None where it is undefined for it.
        units: how many there are.
        resamples: how many to draw.
        seed: of the draws.

    Returns:
        The 2.5 and 97.5 percentiles; None where one resample in ten is undefined.
    """
    random = np.random.default_rng(seed)
    drawn = (statistic(random.integers(0, units, units)) for _ in range(resamples))
    found = [value for value in drawn if value is not None]
    if units < 2 or len(found) < 0.9 * resamples or not found:
        return None
    low, high = np.quantile(found, [0.025, 0.975])
    return float(low), float(high)
