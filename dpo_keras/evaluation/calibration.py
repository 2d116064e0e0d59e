"""Calibration: whether P(chosen) agrees with how often people prefer the chosen response."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import starmap

import numpy as np
from numpy.typing import ArrayLike

from dpo_keras.evaluation.statistics import mean, share
from dpo_keras.utils import JSON
from dpo_keras.utils.intervals import Estimate, undefined

BINS = 10
LEAST_PAIRS = 5  # the share of fewer says nothing, whatever its place in a plot suggests
_DRAWS = 200


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs of similar confidence.

    Attributes:
        low: lower edge of the confidence.
        high: upper edge.
        confidence: mean confidence of its pairs.
        agreement: how often people agree with the model's preference, among its pairs.
        weight: the bin's share of all weight.
    """

    low: float
    high: float
    confidence: Estimate
    agreement: Estimate
    weight: float

    def as_dict(self) -> dict[str, JSON]:
        """Return the bin, ready for JSON."""
        means = {"confidence": self.confidence.as_dict(), "agreement": self.agreement.as_dict()}
        return {"low": self.low, "high": self.high, "weight": self.weight, **means}


@dataclass(frozen=True, slots=True)
class Calibration:
    """How well the model's confidence agrees with people.

    Every figure is about the response that the model prefers, because the order of two responses
    is arbitrary: (P, y) in one order is (1 - P, 1 - y) in the other.

    Attributes:
        bins: the reliability curve, confidence in [0.5, 1].
        merged_bins: the same for plots: neighbours are merged until each holds `LEAST_PAIRS`.
        expected_calibration_error: sum over bins of weight · |confidence - agreement|.
        chance_level: 95th percentile of this error if calibration is perfect, for as many pairs.
        brier: mean (P - y)²; 0.25 for P = 0.5 and certain labels.
        log_loss: mean -y log P - (1 - y) log(1 - P), in nats.
        label_entropy: the lowest log loss that these labels allow; 0 if all are certain.
        confidence: mean of max(P, 1 - P).
        agreement: mean probability that people prefer what the model prefers; 0.5 for P = 0.5.
        overconfidence: confidence - agreement; negative if right more often than it says.
        note: a warning for readers of these figures, or "".
    """

    bins: tuple[Bin, ...]
    merged_bins: tuple[Bin, ...]
    expected_calibration_error: Estimate
    chance_level: Estimate
    brier: Estimate
    log_loss: Estimate
    label_entropy: Estimate
    confidence: Estimate
    agreement: Estimate
    overconfidence: Estimate
    note: str = ""

    @property
    def figures(self) -> dict[str, Estimate]:
        """All figures by name."""
        fields = {name: getattr(self, name) for name in self.__slots__}
        return {name: value for name, value in fields.items() if isinstance(value, Estimate)}

    def as_dict(self) -> dict[str, JSON]:
        """Return figures, bins and note, ready for JSON."""
        figures = {name: figure.as_dict() for name, figure in self.figures.items()}
        bins = {
            name: [b.as_dict() for b in getattr(self, name)] for name in ("bins", "merged_bins")
        }
        return {**figures, **bins, "note": self.note}


def calibrate(
    llr: ArrayLike,
    preference: ArrayLike,
    weight: ArrayLike | None = None,
    clusters: ArrayLike | None = None,
    *,
    bins: int = BINS,
    note: str = "",
) -> Calibration:
    """Compute the calibration of P(chosen) = sigmoid(llr).

    Args:
        llr: `[N]` log-likelihood ratios, S(chosen) - S(rejected), in nats.
        preference: `[N]` y in [0, 1], the probability that people prefer the chosen response.
        weight: `[N]`, >= 0; equal by default.
        clusters: `[N]` integers, equal for dependent pairs (one prompt).
        bins: number of bins of equal width between the confidences 0.5 and 1.
        note: kept with the result.

    Returns:
        The figures. Swapping a pair (-llr, 1 - y) changes none of them.

    Example:
        >>> import math
        >>> found = calibrate([math.log(4)] * 10, [1.0] * 7 + [0.0] * 3)  # says 0.8, is 0.7
        >>> round(found.expected_calibration_error.value, 6), round(found.overconfidence.value, 6)
        (0.1, 0.1)
        >>> round(found.brier.value, 6)  # 0.7 · 0.2² + 0.3 · 0.8²
        0.22

    References:
        Naeini et al. (2015), AAAI (expected calibration error); Bröcker and Smith (2007), Weather
        and Forecasting 22 (consistency resampling, here for `chance_level`).
    """
    llr = np.asarray(llr, np.float64)
    # Infinities become NaN, which the arithmetic below passes on without a warning; `mean` then
    # reports how many values are not finite.
    llr = np.where(np.isfinite(llr), llr, np.nan)
    label = np.asarray(preference, np.float64)
    weight = np.ones(len(llr)) if weight is None else np.asarray(weight, np.float64)
    clusters = np.arange(len(llr)) if clusters is None else np.asarray(clusters)
    size = np.abs(llr)
    confidence = 1 / (1 + np.exp(-size))
    agreement = np.select([llr > 0, llr < 0, llr == 0], [label, 1 - label, 0.5], np.nan)
    # -log P of the preferred and of the other response, exact for any size.
    sure, unsure = np.log1p(np.exp(-size)), size + np.log1p(np.exp(-size))
    usable = (weight > 0) & np.isfinite(llr)
    place = np.zeros(len(llr), np.int64)
    place[usable] = np.minimum((confidence[usable] - 0.5) * 2 * bins, bins - 1).astype(np.int64)
    gap = mean(confidence - agreement, weight, clusters)
    if gap.value is None:
        error = chance = undefined(gap.reason or "", gap.count)
    else:
        shares, inside = weight[usable] / weight[usable].sum(), place[usable]
        gaps = shares * (confidence - agreement)[usable]
        error = Estimate(_binned(gaps, inside, bins), count=gap.count)
        chance = _chance_level(confidence[usable], label[usable], shares, inside, bins)
    probability = np.where(llr > 0, confidence, 1 - confidence)
    edges = np.linspace(0.5, 1.0, bins + 1).tolist()
    total = max(float(weight[usable].sum()), 1e-300)

    def reliability(first: int, last: int) -> Bin:
        low, high = edges[first], edges[last + 1]
        rows = usable & (place >= first) & (place <= last)
        given = (weight[rows], clusters[rows])
        absent = f"no pair has a confidence of {low:g} to {high:g}"
        accuracy = share(agreement[rows], *given, absent=absent)
        confident = mean(confidence[rows], *given, absent=absent)
        return Bin(low, high, confident, accuracy, float(weight[rows].sum()) / total)

    return Calibration(
        bins=tuple(reliability(number, number) for number in range(bins)),
        merged_bins=tuple(
            starmap(reliability, _merged(np.bincount(place[usable], minlength=bins)))
        ),
        expected_calibration_error=error,
        chance_level=chance,
        brier=mean((probability - label) ** 2, weight, clusters),
        log_loss=mean(agreement * sure + (1 - agreement) * unsure, weight, clusters),
        label_entropy=mean(_entropy(label), weight, clusters),
        confidence=mean(confidence, weight, clusters),
        agreement=share(agreement, weight, clusters),
        overconfidence=gap,
        note=note,
    )


def _merged(counts: np.ndarray) -> list[tuple[int, int]]:
    """Return the first and the last of the bins to merge, so that each group has enough pairs."""
    groups: list[tuple[int, int]] = []
    first = 0
    for last in range(len(counts)):
        if counts[first : last + 1].sum() >= LEAST_PAIRS:
            groups.append((first, last))
            first = last + 1
    if first < len(counts):  # too few are left: they go to the group before
        begin = groups.pop()[0] if groups and counts[first:].any() else first
        groups.append((begin, len(counts) - 1))
    return groups


def _binned(values: np.ndarray, place: np.ndarray, bins: int) -> float:
    return float(np.abs(np.bincount(place, values, minlength=bins)).sum())


def _chance_level(
    confidence: np.ndarray, label: np.ndarray, shares: np.ndarray, place: np.ndarray, bins: int
) -> Estimate:
    count = len(label)
    if ((label != 0) & (label != 1)).any():
        # The variance of a vote share depends on the number of voters, which is unknown.
        return undefined("some preferences are soft", count)
    random = np.random.default_rng(0)
    errors = [
        _binned(shares * (confidence - (random.random(count) < confidence)), place, bins)
        for _ in range(_DRAWS)
    ]
    return Estimate(float(np.quantile(errors, 0.95)), count=count)


def _entropy(label: np.ndarray) -> np.ndarray:
    inside = np.clip(label, 1e-12, 1 - 1e-12)
    value = -inside * np.log(inside) - (1 - inside) * np.log1p(-inside)
    return np.where((label == 0) | (label == 1), 0.0, value)
