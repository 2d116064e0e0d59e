"""The quality of a round: agreement among people, strengths of policies, quality of annotators."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import choix
import krippendorff
import numpy as np
from scipy.sparse.csgraph import connected_components
from statsmodels.stats.inter_rater import cohens_kappa, fleiss_kappa

from dpo_keras.feedback.annotator_quality import (
    AnnotatorQuality,
    DawidSkene,
    assess_annotators,
    fit_labels,
)
from dpo_keras.feedback.judgements import FIRST, LABELS, SECOND, Table, read_table
from dpo_keras.feedback.store import Store
from dpo_keras.utils import JSON
from dpo_keras.utils.intervals import Estimate, undefined, wilson

NAMES = {
    "raw_agreement": "Raw agreement",
    "cohen_kappa": "Cohen's kappa",
    "fleiss_kappa": "Fleiss' kappa",
    "krippendorff_alpha": "Krippendorff's alpha",
}
_NO_OVERLAP = "no pair was judged by two people"
_ONE_LABEL = "every judgement gave the same answer, so agreement by chance is certain"


@dataclass(frozen=True)
class PolicyStrengths:
    """Bradley-Terry strengths of the policies that made the responses."""

    estimates: dict[str, Estimate]  # by the policy's label, in alphabetical order
    wins: np.ndarray  # [k, k] how often the row's policy beats the column's


@dataclass(frozen=True)
class Quality:
    """The quality of a round."""

    counts: dict[str, int]  # pairs, judged pairs, judgements, skips, checks, repeats
    labels: dict[str, int]  # how often each label was given
    agreement: dict[str, Estimate]  # see `agreement_figures`
    contradicted: Estimate  # share of shared pairs where one prefers the first, one the second
    cycles: Estimate  # share of prompts with a circle of preferences
    people: list[AnnotatorQuality]
    strengths: PolicyStrengths
    fit: DawidSkene  # labels; rows as in `table.pairs`
    table: Table  # the judgements that all of this was computed from

    def findings(self) -> list[str]:
        """Return what to look at before training on these judgements, as sentences."""
        found = [finding for person in self.people for finding in person.findings()]
        alpha = self.agreement["krippendorff_alpha"]
        if alpha.high is not None and alpha.high < 0.4:
            found.append(
                f"Agreement is low: Krippendorff's alpha is {alpha:.2f}. Look at the guidelines, "
                "and at pairs on which people differ."
            )
        if self.counts["judgements"] and alpha.value is None and alpha.count == 0:
            found.append(
                "Agreement cannot be measured, since no pair was judged by two people: give "
                "--overlap 2."
            )
        return found

    def as_dict(self) -> dict[str, JSON]:
        """Return everything but the table as plain values, for JSON."""
        policies = self.strengths.estimates
        votes = self.table.work().counts().tolist()
        posterior = self.fit.posterior.round(6).tolist()
        return {
            "counts": self.counts,
            "labels": self.labels,
            "agreement": {name: figure.as_dict() for name, figure in self.agreement.items()},
            "contradicted": self.contradicted.as_dict(),
            "cycles": self.cycles.as_dict(),
            "people": [person.as_dict() for person in self.people],
            "policies": {name: strength.as_dict() for name, strength in policies.items()},
            "wins": {"names": list(policies), "row_beats_column": self.strengths.wins.tolist()},
            "pairs": [
                {"pair": pair, "votes": votes[row], "dawid_skene": posterior[row]}
                for row, pair in enumerate(self.table.pairs.tolist())
                if sum(votes[row])
            ],
            "findings": self.findings(),
        }


def assess(store: Store, *, resamples: int = 500) -> Quality:
    """Measure how good the judgements of a store are.

    Args:
        store: the open store.
        resamples: number of bootstrap samples for the intervals.

    Returns:
        The figures; `dpo_keras.feedback.quality_report` writes them for people.
    """
    return assess_table(read_table(store.database), resamples=resamples)


def assess_table(table: Table, *, resamples: int = 500) -> Quality:
    """Measure how good the judgements of a table are."""
    work = table.work()
    counts = work.counts()
    shared = counts[counts.sum(1) >= 2]
    contradicted = (shared[:, [FIRST, SECOND]] > 0).all(1)
    fit = fit_labels(table)
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
        contradicted=wilson(int(contradicted.sum()), len(shared), _NO_OVERLAP),
        cycles=cycles(work),
        people=assess_annotators(table, fit),
        strengths=policy_strengths(work, resamples),
        fit=fit,
        table=table,
    )


def overview(store: Store) -> Mapping[str, JSON]:
    """Return what the administrator's page shows of a round's quality."""
    quality = assess(store, resamples=100)
    figures = [{"label": NAMES[name], **e.as_dict()} for name, e in quality.agreement.items()]
    return {"figures": figures, "findings": quality.findings()}


def agreement_figures(table: Table, resamples: int = 500) -> dict[str, Estimate]:
    """Measure agreement on the labels first, second, tie and both bad; intervals resample pairs.

    Cohen's kappa takes two people, Fleiss' kappa the pairs judged by equally many. Krippendorff's
    alpha is nominal. The table holds no checks and repeats.
    """
    counts = table.counts()
    judges = counts.sum(1)
    shared = counts[judges >= 2]
    usual = np.bincount(judges[judges >= 2]).argmax() if len(shared) else 0
    return {
        "raw_agreement": _over_pairs(shared, _raw_agreement, resamples),
        "cohen_kappa": _cohen_kappa(table, resamples),
        "fleiss_kappa": _over_pairs(shared[shared.sum(1) == usual], _fleiss_kappa, resamples),
        "krippendorff_alpha": _over_pairs(shared, _krippendorff_alpha, resamples),
    }


def _raw_agreement(counts: np.ndarray) -> float | None:
    """Return the share of comparisons of two people that agree, sum n(n-1) / sum N(N-1)."""
    total = counts.sum(1)
    return float((counts * (counts - 1)).sum() / (total * (total - 1)).sum())


def _fleiss_kappa(counts: np.ndarray) -> float | None:
    return None if (counts.sum(0) > 0).sum() < 2 else float(fleiss_kappa(counts))


def _krippendorff_alpha(counts: np.ndarray) -> float | None:
    used = counts.sum(0) > 0
    if used.sum() < 2:
        return None
    return float(krippendorff.alpha(value_counts=counts[:, used], level_of_measurement="nominal"))


def _cohen_kappa(table: Table, resamples: int) -> Estimate:
    present = np.unique(table.annotator)
    if len(present) != 2:
        return undefined(f"it compares exactly two people, {len(present)} have judged")
    answers = np.full((len(table.pairs), 2), -1)
    answers[table.pair, np.searchsorted(present, table.annotator)] = table.label
    both = answers[(answers >= 0).all(1)]

    def kappa(answers: np.ndarray) -> float | None:
        square = np.zeros((len(LABELS), len(LABELS)))
        np.add.at(square, (answers[:, 0], answers[:, 1]), 1)
        if (square.sum(0) + square.sum(1) > 0).sum() < 2:
            return None
        return float(cohens_kappa(square, return_results=False))

    return _over_pairs(both, kappa, resamples)


def _over_pairs(
    pairs: np.ndarray, statistic: Callable[[np.ndarray], float | None], resamples: int
) -> Estimate:
    """Estimate a statistic of pairs, one per row, with a bootstrap interval."""
    if not len(pairs):
        return undefined(_NO_OVERLAP)
    value = statistic(pairs)
    if value is None:
        return undefined(_ONE_LABEL, len(pairs))
    interval = _bootstrap(lambda rows: statistic(pairs[rows]), len(pairs), resamples)
    low, high = (None, None) if interval is None else interval.tolist()
    return Estimate(value, low, high, len(pairs))


def _bootstrap(
    statistic: Callable[[np.ndarray], float | np.ndarray | None], units: int, resamples: int
) -> np.ndarray | None:
    """Return the interval of a statistic; None if over a tenth of the resamples have no value."""
    random = np.random.default_rng(0)
    drawn = (statistic(random.integers(0, units, units)) for _ in range(resamples))
    found = [np.asarray(value) for value in drawn if value is not None]
    if units < 2 or len(found) < 0.9 * resamples or not found:
        return None
    return np.quantile(found, [0.025, 0.975], axis=0)


def cycles(table: Table) -> Estimate:
    """Estimate the share of prompts whose majority goes in a circle: A > B, B > C, C > A."""
    counts = table.counts()
    found = asked = 0
    for prompt in np.unique(table.prompts):
        pairs = np.flatnonzero((table.prompts == prompt) & (counts.sum(1) > 0))
        responses, places = np.unique(table.responses[pairs], return_inverse=True)
        if len(responses) < 3 or len(pairs) < 3:
            continue
        asked += 1
        beats = np.zeros((len(responses), len(responses)))
        votes = counts[pairs][:, [FIRST, SECOND]]
        for (first, second), (wins, losses) in zip(places.reshape(-1, 2), votes, strict=True):
            if wins != losses:
                beats[(first, second) if wins > losses else (second, first)] = 1
        # A circle is a strong component of more than one response.
        components = connected_components(beats, directed=True, connection="strong")[0]
        found += components < len(responses)
    if not asked:
        return undefined("no prompt has three responses that were compared")
    return Estimate(found / asked, count=asked)


def policy_strengths(table: Table, resamples: int = 500) -> PolicyStrengths:
    """Fit Bradley-Terry strengths to the makers of responses; a tie is half a win for each.

        P(i beats j) = exp(s_i) / (exp(s_i) + exp(s_j)),   sum s = 0

    Intervals resample prompts. The table holds no checks and repeats.
    """
    names = sorted({name for pair in table.makers for name in pair if name})
    number = {name: index for index, name in enumerate(names)}
    makers = np.array([[number.get(name or "", -1) for name in pair] for pair in table.makers], int)
    sides = makers.reshape(-1, 2)[table.pair]
    compared = (sides >= 0).all(1) & (sides[:, 0] != sides[:, 1])
    first, second = sides[compared].T
    label = table.label[compared]
    win = np.where(label == FIRST, 1.0, np.where(label == SECOND, 0.0, 0.5))
    prompts, prompt = np.unique(table.prompts[table.pair[compared]], return_inverse=True)
    # Wins by prompt, so that a resample of prompts is a sum.
    wins = np.zeros((len(prompts), len(names), len(names)))
    np.add.at(wins, (prompt, first, second), win)
    np.add.at(wins, (prompt, second, first), 1 - win)
    total = wins.sum(0)
    values = _bradley_terry(total)
    if values is None:
        reason = _why_no_strengths(total)
        return PolicyStrengths({name: undefined(reason) for name in names}, total)
    interval = _bootstrap(lambda rows: _bradley_terry(wins[rows].sum(0)), len(prompts), resamples)
    low, high = [[None] * len(names)] * 2 if interval is None else interval.tolist()
    comparisons = (total.sum(1) + total.sum(0)).astype(int).tolist()
    estimates = map(Estimate, values.tolist(), low, high, comparisons)
    return PolicyStrengths(dict(zip(names, estimates, strict=True)), total)


def _why_no_strengths(wins: np.ndarray) -> str:
    if len(wins) < 2:
        return "the candidates name fewer than two makers"
    if not wins.sum():
        return "no two makers were compared"
    return (
        "one or more policies won (or lost) every comparison with the rest, or were never "
        "compared with them, so that no finite strength fits"
    )


def _bradley_terry(wins: np.ndarray) -> np.ndarray | None:
    """Fit strengths to `[k, k]` wins; None where no finite strengths fit."""
    if len(wins) < 2 or connected_components(wins > 0, directed=True, connection="strong")[0] > 1:
        return None
    values = choix.ilsr_pairwise_dense(wins)
    return values - values.mean()
