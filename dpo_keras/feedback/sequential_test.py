"""An anytime-valid test of a mean: look as often as you like, and stop when you like."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field

from dpo_keras.errors import InputError, InputProblem


def log_e_value(wins: float, count: float, mean: float = 0.5) -> float:
    """Compute the log of the evidence against a mean, from n values in [0, 1] with sum S.

        E_n(m) = B(1 + S, 1 + n - S) / (m^S (1 - m)^(n - S)),   B the beta function

    This is the likelihood ratio of 0/1 values, mixed over a uniform prior of the other mean. A tie,
    0.5, and any other value in [0, 1] may enter: (q/m)^x ((1-q)/(1-m))^(1-x) is convex in x, so its
    expectation is at most 1 wherever that of x is m. Whatever the n, P(E_n ever reaches 1/α) <= α
    if every value has the mean m, given those before it (Ville's inequality).

    Args:
        wins: S, 0 to n.
        count: n.
        mean: m, 0 < m < 1.

    Example:
        >>> round(math.exp(log_e_value(9, 10)), 4)  # 2^10 9! 1! / 11!
        9.3091

    Source: the mixture of Robbins (1970), doi 10.1214/aoms/1177696786, as in arXiv 1810.08240,
    section 3.2 (two-sided beta-binomial); bounded values as in arXiv 2010.09686.
    """
    log_mixture = math.lgamma(1 + wins) + math.lgamma(1 + count - wins) - math.lgamma(2 + count)
    return log_mixture - wins * math.log(mean) - (count - wins) * math.log1p(-mean)


def confidence_interval(wins: float, count: float, alpha: float = 0.05) -> tuple[float, float]:
    """Compute the means that the values do not contradict: all m with E_n(m) < 1/α.

    With probability 1 - α the mean is in the intervals of all n at once.

    Example:
        >>> [round(end, 3) for end in confidence_interval(70, 100)]
        [0.543, 0.831]
    """
    if not count:
        return 0.0, 1.0
    limit, share = -math.log(alpha), wins / count

    def end(inside: float, outside: float) -> float:
        """Bisect: `log_e_value` rises away from the share of wins."""
        for _ in range(60):
            middle = (inside + outside) / 2
            if not 0 < middle < 1 or log_e_value(wins, count, middle) >= limit:
                outside = middle
            else:
                inside = middle
        return outside  # the interval is never too narrow

    return (0.0 if wins == 0 else end(share, 0.0)), (1.0 if wins == count else end(share, 1.0))


@dataclass
class SequentialTest:
    """Test, choice by choice, whether two things win equally often.

    Args:
        alpha: the chance, over all looks together, to call a difference where there is none.

    Attributes:
        count: values so far.
        wins: their sum.
        log_peak: the highest log e-value so far; the anytime p-value is exp(-log_peak).
        decided_after: after how many values the test was decided; None while it is not.

    Example:
        >>> test = SequentialTest()
        >>> for _ in range(9):
        ...     test.add(1.0)
        >>> test.decided_after, test.first_wins
        (8, True)
    """

    alpha: float = 0.05
    count: int = field(default=0, init=False)
    wins: float = field(default=0.0, init=False)
    log_peak: float = field(default=0.0, init=False)
    decided_after: int | None = field(default=None, init=False)
    first_wins: bool | None = field(default=None, init=False)  # None while it is not decided

    def __post_init__(self) -> None:
        """Check the rule."""
        if not 0 < self.alpha < 1:
            raise InputError(InputProblem("alpha", "must be between 0 and 1", self.alpha))

    def add(self, value: float) -> None:
        """Take the next choice: 1 the first thing wins, 0 the second, 0.5 a tie."""
        if not 0 <= value <= 1:
            raise InputError(InputProblem("value", "must be in [0, 1]", value))
        self.count += 1
        self.wins += value
        self.log_peak = max(self.log_peak, self.log_e)
        if self.decided_after is None and self.log_peak >= -math.log(self.alpha):
            self.decided_after, self.first_wins = self.count, self.wins > self.count / 2

    def extend(self, values: Iterable[float]) -> SequentialTest:
        """Take several choices in order, and return the test."""
        for value in values:
            self.add(value)
        return self

    @property
    def log_e(self) -> float:
        """The log of the evidence, at this moment, against equal chances."""
        return log_e_value(self.wins, self.count)

    @property
    def p_value(self) -> float:
        """The anytime p-value: it never rises, and is below α with probability α at most."""
        return math.exp(-self.log_peak)

    @property
    def interval(self) -> tuple[float, float]:
        """The interval, at this moment, of how often the first thing wins."""
        return confidence_interval(self.wins, self.count, self.alpha)
