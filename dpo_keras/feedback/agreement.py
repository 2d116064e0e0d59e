"""How far people agree: raw agreement, kappas and Krippendorff's alpha, from known libraries."""

from __future__ import annotations

from collections.abc import Callable

import krippendorff
import numpy as np
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa

from dpo_keras.feedback.estimate import Estimate, bootstrap
from dpo_keras.feedback.table import LABELS, Table

_NO_OVERLAP = "no pair was judged by two people"
_ONE_LABEL = "every judgement gave the same answer, so agreement by chance is certain"


def agreement_figures(table: Table, resamples: int = 500) -> dict[str, Estimate]:
    """Agreement on the labels first, second, tie and both bad.

    Args:
        table: judgements without checks and repeats.
        resamples: bootstrap samples of pairs for the intervals.

    Returns:
        `raw_agreement`, `cohen_kappa` (two people), `fleiss_kappa` (pairs judged by equally many
        people), `krippendorff_alpha` (nominal), each with its interval or the reason why there is
        no value.
    """
    counts = table.counts()
    shared = counts[counts.sum(1) >= 2]
    return {
        "raw_agreement": _over_pairs(shared, _raw, resamples),
        "cohen_kappa": _cohen(table, resamples),
        "fleiss_kappa": _fleiss(shared, resamples),
        "krippendorff_alpha": _over_pairs(shared, _alpha, resamples),
    }


def _over_pairs(
    counts: np.ndarray, statistic: Callable[[np.ndarray], float | None], resamples: int
) -> Estimate:
    if not len(counts):
        return Estimate(None, reason=_NO_OVERLAP)
    value = statistic(counts)
    if value is None:
        return Estimate(None, count=len(counts), reason=_ONE_LABEL)
    interval = bootstrap(lambda rows: statistic(counts[rows]), len(counts), resamples)
    low, high = interval or (None, None)
    return Estimate(value, low, high, len(counts))


def _raw(counts: np.ndarray) -> float | None:
    """Share of comparisons between two people that agree: sum n(n-1) / sum N(N-1)."""
    total = counts.sum(1)
    return float((counts * (counts - 1)).sum() / (total * (total - 1)).sum())


def _alpha(counts: np.ndarray) -> float | None:
    used = counts.sum(0) > 0
    if used.sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts[:, used], level_of_measurement="nominal"))


def _fleiss(shared: np.ndarray, resamples: int) -> Estimate:
    if not len(shared):
        return Estimate(None, reason=_NO_OVERLAP)
    people = shared.sum(1)
    usual = int(np.bincount(people).argmax())
    return _over_pairs(shared[people == usual], _fleiss_value, resamples)


def _fleiss_value(counts: np.ndarray) -> float | None:
    return None if (counts.sum(0) > 0).sum() < 2 else float(fleiss_kappa(counts))


def _cohen(table: Table, resamples: int) -> Estimate:
    present = np.unique(table.annotator)
    if len(present) != 2:
        return Estimate(None, reason=f"it compares exactly two people, {len(present)} have judged")
    answers = np.full((len(table.pairs), 2), -1)
    answers[table.pair, np.searchsorted(present, table.annotator)] = table.label
    both = answers[(answers >= 0).all(1)]
    if not len(both):
        return Estimate(None, reason=_NO_OVERLAP)

    def kappa(rows: np.ndarray) -> float | None:
        square = np.zeros((len(LABELS), len(LABELS)))
        np.add.at(square, (both[rows, 0], both[rows, 1]), 1)
        if (square.sum(0) + square.sum(1) > 0).sum() < 2:
            return None
        return float(cohens_kappa(square, return_results=False))

    value = kappa(np.arange(len(both)))
    if value is None:
        return Estimate(None, count=len(both), reason=_ONE_LABEL)
    interval = bootstrap(kappa, len(both), resamples)
    low, high = interval or (None, None)
    return Estimate(value, low, high, len(both))
