"""Annotators of known quality."""

import numpy as np

from dpo_keras.feedback.judgements import FIRST, SECOND, Table


def table_of(annotator, pair, label, *, annotators, pairs, lengths=None, left=None, **changes):
    """A table of plain judgements; what is not given is as plain as can be."""
    count = len(label)
    columns = {
        "annotators": tuple(annotators),
        "groups": (None,) * len(annotators),
        "judges": np.zeros(len(annotators), bool),
        "skipped": np.zeros(len(annotators), int),
        "pairs": np.arange(1, pairs + 1),
        "lengths": np.full((pairs, 2), 10) if lengths is None else lengths,
        "makers": [("a", "b")] * pairs,
        "prompts": np.arange(pairs),
        "responses": np.arange(2 * pairs).reshape(pairs, 2),
        "annotator": np.asarray(annotator),
        "pair": np.asarray(pair),
        "label": np.asarray(label),
        "first_on_left": np.ones(count, bool) if left is None else left,
        "seconds": np.full(count, 3.0),
        "strength": np.zeros(count, int),
        "preference": np.ones(count),
        "repeat": np.zeros(count, bool),
        "gold": np.full(count, -1),
    }
    return Table(**{**columns, **changes})


ACCURACIES = {"ann": 0.95, "bob": 0.8, "eve": 0.6}


def simulated(pairs=400, seed=0, longer_is_better=0.5, biased=True):
    """`ann`, `bob` and `eve` are right so often; `lee` clicks left, `lou` prefers the longer.

    Returns the table and the truth.
    """
    random = np.random.default_rng(seed)
    truth = random.integers(0, 2, pairs)
    lengths = random.integers(50, 400, (pairs, 2))
    lengths[:, 1] += lengths[:, 0] == lengths[:, 1]
    agrees = random.random(pairs) < longer_is_better
    longer = np.where(agrees, truth, 1 - truth)
    lengths = np.where((lengths.argmax(1) == longer)[:, None], lengths, lengths[:, ::-1])
    names = [*ACCURACIES, *(["lee", "lou"] if biased else [])]
    annotator, pair, label, left = [], [], [], []
    for number, name in enumerate(names):
        on_left = random.random(pairs) < 0.5
        if name == "lee":
            given = np.where(on_left, FIRST, SECOND)
        elif name == "lou":
            given = lengths.argmax(1)
        else:
            right = random.random(pairs) < ACCURACIES[name]
            given = np.where(right, truth, 1 - truth)
        annotator += [number] * pairs
        pair += range(pairs)
        label += given.tolist()
        left += on_left.tolist()
    table = table_of(
        annotator, pair, label, annotators=names, pairs=pairs, lengths=lengths,
        left=np.array(left),
    )  # fmt: skip
    return table, truth
