"""How far people agree: raw agreement, kappas and Krippendorff's alpha, from known libraries."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import krippendorff
import numpy as np
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa

from dpo_keras.feedback.annotator_quality import DawidSkene, Person, dawid_skene, describe_people
from dpo_keras.feedback.estimate import Estimate, bootstrap, share
from dpo_keras.feedback.judgement_table import LABELS, SECOND, TIE, Table, read_table
from dpo_keras.feedback.policy_strengths import cycles, policy_strengths
from dpo_keras.feedback.store import Store

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


NAMES = {
    "raw_agreement": "Raw agreement",
    "cohen_kappa": "Cohen's kappa",
    "fleiss_kappa": "Fleiss' kappa",
    "krippendorff_alpha": "Krippendorff's alpha",
}


@dataclass(frozen=True)
class Quality:
    """How good a round is.

    Args:
        counts: pairs, judged pairs, judgements, skips, checks, repeats.
        labels: how often each label was given.
        agreement: see `agreement_figures`.
        contradicted: share of pairs judged twice or more on which one person preferred the first
            and another the second response.
        cycles: share of prompts with a circle of preferences.
        people: each annotator.
        strengths: see `policy_strengths`.
        fit: labels by Dawid and Skene; rows as `table.pairs`.
        table: what all of it was taken from.
    """

    counts: dict[str, int]
    labels: dict[str, int]
    agreement: dict[str, Estimate]
    contradicted: Estimate
    cycles: Estimate
    people: list[Person]
    strengths: dict[str, Any]
    fit: DawidSkene
    table: Table

    def findings(self) -> list[str]:
        """What to look at before training on these judgements, as sentences."""
        found = [finding for person in self.people for finding in person.findings()]
        alpha = self.agreement["krippendorff_alpha"]
        if alpha.high is not None and alpha.high < 0.4:
            found.append(
                f"Agreement is low: Krippendorff's alpha is {alpha}. Look at the guidelines, and "
                "at pairs on which people differ."
            )
        if self.counts["judgements"] and alpha.value is None and alpha.count == 0:
            found.append(
                "Agreement cannot be measured, since no pair was judged by two people: give "
                "--overlap 2."
            )
        return found

    def as_dict(self) -> dict[str, Any]:
        """Everything but the table as plain values, for JSON."""
        strengths = self.strengths
        return {
            "counts": self.counts,
            "labels": self.labels,
            "agreement": {name: one.as_dict() for name, one in self.agreement.items()},
            "contradicted": self.contradicted.as_dict(),
            "cycles": self.cycles.as_dict(),
            "people": [person.as_dict() for person in self.people],
            "policies": {name: one.as_dict() for name, one in strengths["policies"].items()},
            "wins": {"names": strengths["names"], "row_beats_column": strengths["wins"]},
            "pairs": [
                {"pair": int(pair), "votes": votes, "dawid_skene": [round(p, 6) for p in posterior]}
                for pair, votes, posterior in zip(
                    self.table.pairs,
                    self.table.work().counts().tolist(),
                    self.fit.posterior.tolist(),
                    strict=True,
                )
                if sum(votes)
            ],
            "findings": self.findings(),
        }


def assess(store: Store, *, resamples: int = 500) -> Quality:
    """Measures how good the judgements of a store are.

    Args:
        store: open.
        resamples: bootstrap samples for the intervals.
    """
    return assess_table(read_table(store), resamples=resamples)


def assess_table(table: Table, *, resamples: int = 500) -> Quality:
    """Measures how good judgements are.

    Args:
        table: from `read_table`.
        resamples: bootstrap samples for the intervals.
    """
    work = table.work()
    counts = work.counts()
    fit = fit_labels(table)
    twice = counts[counts.sum(1) >= 2]
    split = (twice[:, : SECOND + 1] > 0).all(1)
    return Quality(
        counts={
            "pairs": len(table.pairs),
            "judged_pairs": int((counts.sum(1) > 0).sum()),
            "judgements": len(work),
            "skips": int(table.skipped.sum()),
            "checks": int((table.gold >= 0).sum()),
            "repeats": int(table.repeat.sum()),
        },
        labels=dict(zip(LABELS, counts.sum(0).tolist(), strict=True)),
        agreement=agreement_figures(work, resamples),
        contradicted=share(int(split.sum()), len(twice), "no pair was judged by two people"),
        cycles=cycles(work),
        people=describe_people(table, fit),
        strengths=policy_strengths(work, resamples),
        fit=fit,
        table=table,
    )


def fit_labels(table: Table) -> DawidSkene:
    """Dawid-Skene labels first, second and tie (both bad is one) of all pairs.

    Args:
        table: all judgements; checks and repeats are left out.
    """
    work = table.work()
    label = np.minimum(work.label, TIE)
    return dawid_skene(
        work.annotator,
        work.pair,
        label,
        annotators=len(table.annotators),
        pairs=len(table.pairs),
        # Without any tie a class for it would only take probability from the others.
        classes=3 if (label == TIE).any() else 2,
    )


def overview(store: Store) -> Mapping[str, Any]:
    """What the administrator's page shows of a round's quality.

    Args:
        store: open.
    """
    found = assess(store, resamples=100)
    figures = [{"label": NAMES[name], **one.as_dict()} for name, one in found.agreement.items()]
    return {"figures": figures, "findings": found.findings()}
