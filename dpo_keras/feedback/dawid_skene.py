"""Labels of pairs and accuracy of people, each estimated from the other (Dawid and Skene, 1979)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
