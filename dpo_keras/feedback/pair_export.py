"""Judgements as preference pairs for training."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.feedback.annotator_quality import DawidSkene
from dpo_keras.feedback.judgement_table import BOTH_BAD, FIRST, SECOND, TIE, Table, read_table
from dpo_keras.feedback.quality import fit_labels
from dpo_keras.feedback.store import Store
from dpo_keras.preferences import Message, PreferencePair

TIES = ("half", "drop")
WEIGHTS = ("none", "quality")
_CERTAIN = 1e-9


@dataclass(frozen=True)
class Exported:
    """Preference pairs, and what was left out.

    Args:
        pairs: ready for `write_preferences` or training.
        dropped: how many were left out, by reason.
    """

    pairs: list[PreferencePair]
    dropped: dict[str, int] = field(default_factory=dict)


def to_pairs(
    store: Store,
    *,
    label: str = "vote_share",
    ties: str = "half",
    weights: str = "none",
    both_bad: str = "drop",
) -> Exported:
    """Turns the judgements of a store into preference pairs.

    Hidden checks, repeats and skips are never exported.

    Args:
        store: open.
        label: "each" makes one pair of each judgement, so that annotators can be held out;
            the others make one of all judgements of a pair: "majority", "vote_share" (a tie is
            half a vote for each) or "dawid_skene" (the posterior, half a tie's to each).
        ties: "half" keeps pairs without a preference as 0.5, "drop" leaves them out.
        weights: "quality" weighs a pair by the mean information of its annotators, their
            Dawid-Skene accuracy a as (2a - 1)^2 relative to the mean over all judgements, so that
            guessing weighs nothing; "none" weighs all alike.
        both_bad: "half" takes judgements that both are bad as ties, "drop" leaves them out.

    Returns:
        Pairs; `annotator` is the person, or all of a pair joined by "+"; `group` is that of the
        candidates, or of the annotators where the candidates have none and they share one.

    Raises:
        InputError: naming every option that is not one of its values; or nothing is left.

    Example:
        >>> import tempfile
        >>> from dpo_keras.feedback import Candidates, Response, open_store
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = open_store(f"{folder.name}/feedback.sqlite", create=True)
        >>> _ = store.add([Candidates("2 + 2 =", (Response(" 4"), Response(" 5")))])
        >>> ann, token = store.add_annotator("ann")
        >>> shown = store.next(ann.id)[0]
        >>> _ = store.submit(ann.id, shown.id, "left" if shown.left == " 4" else "right", key="k")
        >>> [(p.chosen, p.preference, p.annotator) for p in to_pairs(store).pairs]
        [(' 4', 1.0, 'ann')]
        >>> store.close(); folder.cleanup()
    """
    options = (
        ("label", label, ("each", *LABELLERS)),
        ("ties", ties, TIES),
        ("weights", weights, WEIGHTS),
        ("both_bad", both_bad, ("half", "drop")),
    )
    problems = [
        f"{name} must be one of {', '.join(allowed)}, got {value!r}."
        for name, value, allowed in options
        if value not in allowed
    ]
    if problems:
        raise InputError(problems)
    table = read_table(store)
    fit = fit_labels(table)
    work = table.work()
    dropped: Counter[str] = Counter()
    if both_bad == "drop":
        dropped["both bad"] = int((work.label == BOTH_BAD).sum())
        work = work.keep(work.label != BOTH_BAD)
    if not len(work):
        raise InputError(
            "the store holds no judgement that can become a pair: nothing was judged yet, or all "
            "of it was skipped or both bad."
        )
    weight = _weights(work, fit, weights)
    texts = _texts(store)
    made = _each(work) if label == "each" else _merged(work, fit, LABELLERS[label])
    pairs = []
    for one in made:
        if abs(one.preference - 0.5) < _CERTAIN and ties == "drop":
            dropped["ties"] += 1
            continue
        pairs.append(_pair(one, work, texts, float(weight[one.rows].mean())))
    if not pairs:
        raise InputError("every pair is a tie, and ties=drop leaves none; give ties=half.")
    return Exported(pairs, {name: count for name, count in dropped.items() if count})


@dataclass(frozen=True)
class _Made:
    """A pair in the making: P(first is better), and the judgements it rests on."""

    pair: int
    preference: float
    rows: np.ndarray
    single: bool


def _each(work: Table) -> Iterator[_Made]:
    value = {FIRST: 1.0, SECOND: 0.0}
    for row in range(len(work)):
        preference = value.get(int(work.label[row]), 0.5)
        yield _Made(int(work.pair[row]), preference, np.array([row]), single=True)


def _merged(
    work: Table, fit: DawidSkene, labeller: Callable[[np.ndarray, np.ndarray], float]
) -> Iterator[_Made]:
    order = np.argsort(work.pair, kind="stable")
    for rows in np.split(order, np.flatnonzero(np.diff(work.pair[order])) + 1):
        pair = int(work.pair[rows[0]])
        votes = np.bincount(np.minimum(work.label[rows], TIE), minlength=3)
        preference = float(labeller(votes, fit.posterior[pair]))
        yield _Made(pair, preference, rows, single=len(rows) == 1)


def _majority(votes: np.ndarray, posterior: np.ndarray) -> float:
    first, second, tie = votes
    if first == second or tie > max(first, second):
        return 0.5
    return 1.0 if first > second else 0.0


def _vote_share(votes: np.ndarray, posterior: np.ndarray) -> float:
    return (votes[FIRST] + votes[TIE] / 2) / votes.sum()


def _posterior(votes: np.ndarray, posterior: np.ndarray) -> float:
    tie = posterior[TIE] if len(posterior) > TIE else 0.0
    return posterior[FIRST] + tie / 2


LABELLERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "majority": _majority,
    "vote_share": _vote_share,
    "dawid_skene": _posterior,
}


def _weights(work: Table, fit: DawidSkene, weights: str) -> np.ndarray:
    if weights == "none":
        return np.ones(len(work))
    information = np.maximum(0.0, 2 * fit.accuracy() - 1) ** 2
    mine = information[work.annotator]
    # The mean weight stays 1, so that the learning rate means what it meant.
    return mine / mine.mean() if mine.mean() > 0 else np.ones(len(work))


def _texts(store: Store) -> dict[int, dict[str, Any]]:
    rows = store.database.rows(
        "SELECT p.id, q.content AS prompt, q.name, q.grp, a.content AS first, b.content AS second "
        "FROM pairs p JOIN prompts q ON q.id = p.prompt "
        "JOIN responses a ON a.id = p.first JOIN responses b ON b.id = p.second"
    )
    return {row["id"]: dict(row) for row in rows}


def _pair(
    made: _Made, work: Table, texts: dict[int, dict[str, Any]], weight: float
) -> PreferencePair:
    text = texts[int(work.pairs[made.pair])]
    prompt = json.loads(text["prompt"])
    sides = [text["first"], text["second"]]
    if not isinstance(prompt, str):
        prompt = tuple(Message(turn["role"], turn["content"]) for turn in prompt)
    responses: list[Any] = sides
    if not isinstance(prompt, str):
        responses = [(Message("assistant", side),) for side in sides]
    better = 0 if made.preference >= 0.5 else 1
    names = sorted({work.annotators[number] for number in work.annotator[made.rows]})
    groups = {work.groups[number] for number in work.annotator[made.rows]}
    shared = groups.pop() if len(groups) == 1 else None
    strengths = work.strength[made.rows][work.label[made.rows] == (FIRST, SECOND)[better]]
    strengths = strengths[strengths > 0]
    on_left = bool(work.first_on_left[made.rows[0]]) == (better == 0)
    return PreferencePair(
        prompt,
        responses[better],
        responses[1 - better],
        preference=max(made.preference, 1 - made.preference),
        weight=weight,
        annotator="+".join(names),
        group=text["grp"] or shared,
        id=text["name"],
        margin=float(strengths.mean()) if len(strengths) and made.preference != 0.5 else None,
        # Only one judgement has a side.
        swapped=made.single and not on_left,
    )
