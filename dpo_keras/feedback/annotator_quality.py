"""Labels of pairs and accuracy of people, each estimated from the other (Dawid and Skene, 1979)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import binomtest
from statsmodels.stats.multitest import multipletests

from dpo_keras.feedback.estimate import Estimate, share
from dpo_keras.feedback.judgement_table import FIRST, SECOND, TIE, Table


@dataclass(frozen=True)
class DawidSkene:
    """What the model found.

    Args:
        posterior: `[pairs, classes]` P(label | judgements); rows without judgements hold the prior.
        confusion: `[annotators, classes, classes]` P(answer | label).
        prior: `[classes]` P(label).
        iterations: until it stood still.
    """

    posterior: np.ndarray
    confusion: np.ndarray
    prior: np.ndarray
    iterations: int

    def accuracy(self) -> np.ndarray:
        """`[annotators]`: P(answer = label), over the labels as frequent as they are."""
        return np.einsum("acc,c->a", self.confusion, self.prior)


def dawid_skene(
    annotator: np.ndarray,
    pair: np.ndarray,
    label: np.ndarray,
    *,
    annotators: int,
    pairs: int,
    classes: int,
    smoothing: float = 1.0,
    iterations: int = 200,
    tolerance: float = 1e-6,
) -> DawidSkene:
    """Fits the model by expectation maximization.

        P(t_p = c | answers) ~ prior_c prod_{a judged p} confusion[a, c, answer(a, p)]

    Everybody starts, and is drawn toward, being right a little more often than not: with two
    judgements a pair, maximum likelihood alone would believe anything of people who judged few.
    Which of two responses is called the first means nothing where the two makers do; so the
    classes first and second share what is learned of a person, mirrored.

    Args:
        annotator: `[N]` who judged.
        pair: `[N]` what.
        label: `[N]` the answer, in [0, classes). Classes 0 and 1 are first and second.
        annotators: how many there are.
        pairs: how many there are.
        classes: 2, or 3 with ties.
        smoothing: weight of the start, in judgements per row of a confusion matrix.
        iterations: at most.
        tolerance: largest change of a posterior at which it ends.

    Example:
        >>> fit = dawid_skene(
        ...     np.array([0, 1, 2, 0, 1, 2]), np.array([0, 0, 0, 1, 1, 1]),
        ...     np.array([0, 0, 1, 1, 1, 0]), annotators=3, pairs=2, classes=2)
        >>> fit.posterior.argmax(1).tolist(), bool(fit.accuracy()[2] < 0.5)
        ([0, 1], True)
    """
    votes = np.zeros((pairs, classes))
    np.add.at(votes, (pair, label), 1.0)
    start = np.full((classes, classes), 0.3 / max(1, classes - 1))
    np.fill_diagonal(start, 0.7)
    posterior = (votes + 1.0 / classes) / (votes.sum(1, keepdims=True) + 1.0)
    mirror = np.array([1, 0, *range(2, classes)])
    confusion = np.broadcast_to(start, (annotators, classes, classes))
    judged = votes.sum(1) > 0
    prior = np.full(classes, 1 / classes)
    done = 0
    while done < iterations:
        done += 1
        prior = posterior[judged].sum(0) + 1.0 if judged.any() else np.ones(classes)
        prior = prior + prior[mirror]
        prior /= prior.sum()
        counts = np.zeros((annotators, classes, classes))
        np.add.at(counts.transpose(0, 2, 1), (annotator, label), posterior[pair])
        counts = counts + counts[:, mirror][:, :, mirror] + smoothing * start
        confusion = counts / counts.sum(2, keepdims=True)
        logs = np.tile(np.log(prior), (pairs, 1))
        np.add.at(logs, pair, np.log(confusion[annotator, :, label]))
        logs -= logs.max(1, keepdims=True)
        updated = np.exp(logs)
        updated /= updated.sum(1, keepdims=True)
        change = float(np.abs(updated - posterior).max(initial=0.0))
        posterior = updated
        if change < tolerance:
            break
    return DawidSkene(posterior, confusion, prior, done)


LEVEL = 0.01  # family-wise, over the annotators


@dataclass(frozen=True)
class Person:
    """What is known of one annotator.

    Args:
        name: theirs.
        group: theirs.
        judged: judgements of pairs, checks and repeats left out.
        skipped: pairs that they skipped.
        seconds: median time of a judgement.
        agreement: with others on the same pairs.
        accuracy: P(answer = label) by Dawid and Skene.
        left: share of decided judgements that went to the left response.
        left_p: of the binomial test against 1/2, corrected for the number of annotators.
        longer: share of decided judgements that went to the longer response.
        longer_when_differing: the same where they differ from the estimated label; without length
            bias these errors fall to both sides alike, even where longer responses are better.
        longer_p: of the binomial test of `longer_when_differing`, corrected.
        gold: share of hidden checks that they passed.
        repeats: share of repeated pairs that they answered as before.
    """

    name: str
    group: str | None
    judged: int
    skipped: int
    seconds: Estimate
    agreement: Estimate
    accuracy: Estimate
    left: Estimate
    left_p: float | None
    longer: Estimate
    longer_when_differing: Estimate
    longer_p: float | None
    gold: Estimate
    repeats: Estimate

    def as_dict(self) -> dict[str, Any]:
        """Everything as plain values, for JSON."""
        found = {}
        for name in self.__dataclass_fields__:
            value = getattr(self, name)
            found[name] = value.as_dict() if isinstance(value, Estimate) else value
        return found

    def findings(self) -> list[str]:
        """What is wrong with their answers, as sentences; none where nothing stands out."""
        said = []
        if self.left_p is not None and self.left_p < LEVEL and self.left.value is not None:
            side = "left" if self.left.value > 0.5 else "right"
            rate = max(self.left.value, 1 - self.left.value)
            said.append(
                f"{self.name} has a position bias: chose the {side} response in {rate:.0%} of "
                f"{self.left.count:,} decided pairs (p {_p(self.left_p)})."
            )
        said += self._length_finding()
        if self.gold.high is not None and self.gold.high < 0.8:
            said.append(
                f"{self.name} passed {self.gold.value:.0%} of {self.gold.count} hidden checks."
            )
        if self.repeats.high is not None and self.repeats.high < 0.7:
            said.append(
                f"{self.name} answered {self.repeats.value:.0%} of {self.repeats.count} repeated "
                "pairs as before."
            )
        return said

    def _length_finding(self) -> list[str]:
        rate, errors = self.longer.value, self.longer_when_differing.value
        if self.longer_p is None or self.longer_p >= LEVEL or rate is None or errors is None:
            return []
        # Both must say so: errors lean to the short side where all others prefer the long one.
        if (rate - 0.5) * (errors - 0.5) <= 0:
            return []
        return [
            f"{self.name} has a length bias: chose the {'longer' if rate > 0.5 else 'shorter'} "
            f"response in {max(rate, 1 - rate):.0%} of {self.longer.count:,} decided pairs, "
            f"against the estimated labels (p {_p(self.longer_p)})."
        ]


def _p(value: float) -> str:
    return f"= {value:.2g}" if value >= 1e-4 else "< 0.0001"


def describe_people(table: Table, fit: DawidSkene) -> list[Person]:
    """Looks at each annotator who has judged or skipped.

    Args:
        table: all judgements, checks and repeats too.
        fit: of the judgements without them.
    """
    work = table.work()
    present = [
        number
        for number in range(len(table.annotators))
        if (table.annotator == number).any() or table.skipped[number]
    ]
    tests = [_tests(work, fit, number) for number in present]
    corrected = [_holm([test[column] for test in tests]) for column in (2, 5)]
    return [
        _person(table, work, fit, number, test, corrected[0][place], corrected[1][place])
        for place, (number, test) in enumerate(zip(present, tests, strict=True))
    ]


def _tests(work: Table, fit: DawidSkene, number: int) -> tuple[Any, ...]:
    """Counts and p-values of position and length: left, n, p, longer, n, p, among-differing, n."""
    mine = work.keep((work.annotator == number) & (work.label <= SECOND))
    left = int(((mine.label == FIRST) == mine.first_on_left).sum())
    left_p = binomtest(left, len(mine), 0.5).pvalue if len(mine) else None
    lengths = work.lengths[mine.pair]
    differ = lengths[:, 0] != lengths[:, 1]
    longer = (mine.label == FIRST) == (lengths[:, 0] > lengths[:, 1])
    # Only pairs with a label to differ from, which needs somebody else.
    label = fit.posterior[mine.pair][:, :TIE].argmax(1)
    against = differ & (label != mine.label)
    long_errors = int(longer[against].sum())
    errors = int(against.sum())
    longer_p = binomtest(long_errors, errors, 0.5).pvalue if errors else None
    return left, len(mine), left_p, int(longer[differ].sum()), int(differ.sum()), longer_p, (
        long_errors, errors,
    )  # fmt: skip


def _holm(values: list[float | None]) -> list[float | None]:
    known = [value for value in values if value is not None]
    if not known:
        return values
    corrected = iter(multipletests(known, method="holm")[1])
    return [None if value is None else float(next(corrected)) for value in values]


def _person(
    table: Table,
    work: Table,
    fit: DawidSkene,
    number: int,
    test: tuple[Any, ...],
    left_p: float | None,
    longer_p: float | None,
) -> Person:
    mine = work.keep(work.annotator == number)
    times = mine.seconds[np.isfinite(mine.seconds)]
    left, decided, _, longer, with_lengths, _, (long_errors, errors) = test
    checks = table.keep((table.annotator == number) & (table.gold >= 0))
    same, again = _repeats(table.keep(table.annotator == number))
    return Person(
        name=table.annotators[number],
        group=table.groups[number],
        judged=len(mine),
        skipped=int(table.skipped[number]),
        seconds=Estimate(float(np.median(times)), count=len(times))
        if len(times)
        else Estimate(None, reason="no time is known"),
        agreement=_agreement(work, number),
        accuracy=Estimate(float(fit.accuracy()[number]), count=len(mine))
        if len(mine)
        else Estimate(None, reason="nothing was judged"),
        left=share(left, decided, "no pair was decided"),
        left_p=left_p,
        longer=share(longer, with_lengths, "no decided pair has responses of different lengths"),
        longer_when_differing=share(
            long_errors, errors, "no answer differs from the estimated label"
        ),
        longer_p=longer_p,
        gold=share(
            int((checks.label == checks.gold).sum()), len(checks), "no hidden check was judged"
        ),
        repeats=share(same, again, "no pair was shown again"),
    )


def _agreement(work: Table, number: int) -> Estimate:
    counts = work.counts()
    mine = work.annotator == number
    pair, label = work.pair[mine], work.label[mine]
    others = counts[pair].sum(1) - 1
    agreeing = counts[pair, label] - 1
    reason = "nobody else judged the same pairs"
    return share(int(agreeing.sum()), int(others.sum()), reason)


def _repeats(mine: Table) -> tuple[int, int]:
    before = dict(
        zip(mine.pair[~mine.repeat].tolist(), mine.label[~mine.repeat].tolist(), strict=True)
    )
    again = zip(mine.pair[mine.repeat].tolist(), mine.label[mine.repeat].tolist(), strict=True)
    pairs = [(before[pair], label) for pair, label in again if pair in before]
    return sum(one == other for one, other in pairs), len(pairs)
