"""How good each annotator's answers are, and the labels of pairs, estimated from each other."""

from dataclasses import dataclass, replace

import numpy as np
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from dpo_keras.feedback.judgements import FIRST, SECOND, TIE, Table
from dpo_keras.utils import JSON
from dpo_keras.utils.intervals import Estimate, undefined, wilson

LEVEL = 0.01  # family-wise error rate over the annotators


@dataclass(frozen=True)
class DawidSkene:
    """A fit of the model of Dawid and Skene (1979), J. R. Statist. Soc. C 28: 20-28."""

    posterior: np.ndarray  # [pairs, classes] P(label | judgements); the prior without judgements
    confusion: np.ndarray  # [annotators, classes, classes] P(answer | label)
    prior: np.ndarray  # [classes] P(label)

    def accuracy(self) -> np.ndarray:
        """Return P(answer = label) of each annotator, averaged over the prior, `[annotators]`."""
        return np.einsum("acc,c->a", self.confusion, self.prior)


def dawid_skene(
    annotator: np.ndarray,  # [N] who judged
    pair: np.ndarray,  # [N] what
    label: np.ndarray,  # [N] the answer, in [0, classes); 0 and 1 are first and second
    *,
    annotators: int,
    pairs: int,
    classes: int,  # 2, or 3 with ties
    smoothing: float = 1.0,  # weight of the prior, in judgements per row of a confusion matrix
    iterations: int = 200,  # at most
    tolerance: float = 1e-6,  # largest change of a posterior at which the fit ends
) -> DawidSkene:
    """Fit the model of Dawid and Skene by expectation maximization.

        P(t_p = c | answers) ∝ prior_c · prod_{a judged p} confusion[a, c, answer(a, p)]

    A weak prior draws everybody toward being right a little more often than not: with two
    judgements a pair, maximum likelihood alone would believe anything of people who judged few.
    Which of two responses is called the first is arbitrary, so the classes first and second share,
    mirrored, what is learned of a person.
    """
    votes = np.zeros((pairs, classes))
    np.add.at(votes, (pair, label), 1.0)
    judged = votes.sum(1) > 0
    mirror = np.array([1, 0, *range(2, classes)])
    start = np.full((classes, classes), 0.3 / max(1, classes - 1))
    np.fill_diagonal(start, 0.7)
    posterior = (votes + 1.0 / classes) / (votes.sum(1, keepdims=True) + 1.0)
    confusion = np.broadcast_to(start, (annotators, classes, classes))
    prior = np.full(classes, 1 / classes)
    for _ in range(iterations):
        # Maximization: the prior and the confusion matrices, given the labels.
        prior = posterior[judged].sum(0) + 1.0 if judged.any() else np.ones(classes)
        prior = prior + prior[mirror]
        prior /= prior.sum()
        counts = np.zeros((annotators, classes, classes))
        np.add.at(counts.transpose(0, 2, 1), (annotator, label), posterior[pair])
        counts = counts + counts[:, mirror][:, :, mirror] + smoothing * start
        confusion = counts / counts.sum(2, keepdims=True)
        # Expectation: the labels, given both.
        logs = np.tile(np.log(prior), (pairs, 1))
        np.add.at(logs, pair, np.log(confusion[annotator, :, label]))
        logs -= logs.max(1, keepdims=True)
        updated = np.exp(logs)
        updated /= updated.sum(1, keepdims=True)
        change = float(np.abs(updated - posterior).max(initial=0.0))
        posterior = updated
        if change < tolerance:
            break
    return DawidSkene(posterior, confusion, prior)


def fit_labels(table: Table) -> DawidSkene:
    """Fit the labels first, second and tie (or both bad); checks and repeats are left out."""
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


@dataclass(frozen=True)
class AnnotatorQuality:
    """The quality of one annotator's answers.

    The p-values are of binomial tests against 1/2, corrected for the number of annotators.
    """

    name: str
    group: str | None
    judge: bool  # a program
    judged: int  # judgements of pairs, without checks and repeats
    skipped: int
    seconds: Estimate  # median time of a judgement
    agreement: Estimate  # with others on the same pairs
    accuracy: Estimate  # P(answer = label) by Dawid and Skene
    left: Estimate  # share of decided judgements that went to the left response
    left_p: float | None
    longer: Estimate  # share of decided judgements that went to the longer response
    # The same where they differ from the estimated label. Without length bias these errors fall to
    # both sides alike, even where longer responses are better.
    longer_when_differing: Estimate
    longer_p: float | None  # of `longer_when_differing`
    gold: Estimate  # share of hidden checks that they passed
    repeats: Estimate  # share of repeated pairs that they answered as before

    def as_dict(self) -> dict[str, JSON]:
        """Return all fields as plain values, for JSON."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return {n: v.as_dict() if isinstance(v, Estimate) else v for n, v in values.items()}

    def findings(self) -> list[str]:
        """Return what is wrong with their answers, as sentences."""
        found = []
        left = self.left.value
        if self.left_p is not None and self.left_p < LEVEL and left is not None:
            side, rate = ("left", left) if left > 0.5 else ("right", 1 - left)
            found.append(
                f"{self.name} has a position bias: chose the {side} response in {rate:.0%} of "
                f"{self.left.count:,} decided pairs ({p_value(self.left_p)})."
            )
        found += self._length_finding()
        if self.gold.high is not None and self.gold.high < 0.8:
            found.append(
                f"{self.name} passed {self.gold.value:.0%} of {self.gold.count} hidden checks."
            )
        if self.repeats.high is not None and self.repeats.high < 0.7:
            found.append(
                f"{self.name} answered {self.repeats.value:.0%} of {self.repeats.count} repeated "
                "pairs as before."
            )
        return found

    def _length_finding(self) -> list[str]:
        rate, errors = self.longer.value, self.longer_when_differing.value
        if self.longer_p is None or self.longer_p >= LEVEL or rate is None or errors is None:
            return []
        # Both must agree: errors lean to the short side where all others prefer the long one.
        if (rate - 0.5) * (errors - 0.5) <= 0:
            return []
        return [
            f"{self.name} has a length bias: chose the {'longer' if rate > 0.5 else 'shorter'} "
            f"response in {max(rate, 1 - rate):.0%} of {self.longer.count:,} decided pairs, "
            f"against the estimated labels ({p_value(self.longer_p)})."
        ]


def p_value(p: float) -> str:
    """Write a p-value, as in "p = 0.03"."""
    return f"p = {p:.2g}" if p >= 1e-4 else "p < 0.0001"


def assess_annotators(table: Table, fit: DawidSkene) -> list[AnnotatorQuality]:
    """Assess each annotator who has judged or skipped; `fit` is that of `fit_labels`."""
    counts = table.work().counts()
    found = [
        _assess_annotator(table, counts, fit, number)
        for number in range(len(table.annotators))
        if (table.annotator == number).any() or table.skipped[number]
    ]
    left = _holm_corrected([annotator.left_p for annotator in found])
    longer = _holm_corrected([annotator.longer_p for annotator in found])
    return [
        replace(annotator, left_p=left_p, longer_p=longer_p)
        for annotator, left_p, longer_p in zip(found, left, longer, strict=True)
    ]


def _holm_corrected(p_values: list[float | None]) -> list[float | None]:
    known = [p for p in p_values if p is not None]
    if not known:
        return p_values
    corrected = iter(multipletests(known, method="holm")[1])
    return [None if p is None else float(next(corrected)) for p in p_values]


def _assess_annotator(
    table: Table, counts: np.ndarray, fit: DawidSkene, number: int
) -> AnnotatorQuality:
    """Assess one annotator; the p-values are not corrected yet."""
    everything = table.keep(table.annotator == number)
    judged = everything.work()
    times = judged.seconds[np.isfinite(judged.seconds)]
    checks = everything.keep(everything.gold >= 0)
    again = everything.keep(everything.repeat)
    shown = everything.keep(~everything.repeat)
    earlier = dict(zip(shown.pair.tolist(), shown.label.tolist(), strict=True))
    repeats = zip(again.pair.tolist(), again.label.tolist(), strict=True)
    same = [earlier[pair] == label for pair, label in repeats if pair in earlier]
    # How often others gave the same label to the pairs that this annotator judged.
    others = counts[judged.pair].sum(1) - 1
    agreeing = counts[judged.pair, judged.label] - 1
    # Position and length bias show in the judgements that prefer one response.
    decided = judged.keep(judged.label <= SECOND)
    left = (decided.label == FIRST) == decided.first_on_left
    lengths = table.lengths[decided.pair]
    longer = (decided.label == FIRST) == (lengths[:, 0] > lengths[:, 1])
    comparable = lengths[:, 0] != lengths[:, 1]
    differing = comparable & (fit.posterior[decided.pair][:, :TIE].argmax(1) != decided.label)
    return AnnotatorQuality(
        name=table.annotators[number],
        group=table.groups[number],
        judge=bool(table.judges[number]),
        judged=len(judged),
        skipped=int(table.skipped[number]),
        seconds=Estimate(float(np.median(times)), count=len(times))
        if len(times)
        else undefined("no time is known"),
        agreement=wilson(
            int(agreeing.sum()), int(others.sum()), "nobody else judged the same pairs"
        ),
        accuracy=Estimate(float(fit.accuracy()[number]), count=len(judged))
        if len(judged)
        else undefined("nothing was judged"),
        left=_share(left, "no pair was decided"),
        left_p=_coin_test(left),
        longer=_share(longer[comparable], "no decided pair has responses of different lengths"),
        longer_when_differing=_share(
            longer[differing], "no answer differs from the estimated label"
        ),
        longer_p=_coin_test(longer[differing]),
        gold=_share(checks.label == checks.gold, "no hidden check was judged"),
        repeats=wilson(sum(same), len(same), "no pair was shown again"),
    )


def _share(successes: np.ndarray, reason: str) -> Estimate:
    return wilson(int(successes.sum()), len(successes), reason)


def _coin_test(successes: np.ndarray) -> float | None:
    """Return the p-value of the binomial test against 1/2; None without data."""
    if not len(successes):
        return None
    return float(binomtest(int(successes.sum()), len(successes), 0.5).pvalue)
