"""Judgements as preference pairs for training, and rankings as they were made."""

import itertools
import json
import os
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.annotator_quality import DawidSkene, fit_labels
from dpo_keras.feedback.assignment import in_order
from dpo_keras.feedback.candidates import stored_prompt
from dpo_keras.feedback.judgements import BOTH_BAD, FIRST, SECOND, TIE, Table, read_table
from dpo_keras.feedback.store import Store
from dpo_keras.preferences import Message, PreferencePair
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text


@dataclass(frozen=True)
class Exported:
    """Preference pairs, and what was left out."""

    pairs: list[PreferencePair]  # ready for `write_preferences` or training
    dropped: dict[str, int] = field(default_factory=dict)  # how many were left out, by reason


def to_pairs(
    store: Store,
    *,
    label: str = "vote_share",
    ties: str = "half",
    weights: str = "none",
    both_bad: str = "drop",
) -> Exported:
    """Turn the judgements of a store into preference pairs.

    Hidden checks, repeats and skips are never exported.

    Args:
        store: the open store.
        label: "each" makes one pair of each judgement, so that annotators can be held out. The
            others make one of all judgements of a pair: "majority", "vote_share" (a tie is half a
            vote for each, and a judge's 0.75 three quarters of one) or "dawid_skene" (the
            posterior; half a tie's goes to each response).
        ties: "half" keeps pairs without a preference as 0.5, "drop" leaves them out.
        weights: "quality" weighs a pair by the mean information of its annotators: their
            Dawid-Skene accuracy a gives (2a - 1)², relative to the mean over all judgements, so
            that guessing weighs nothing. "none" weighs all alike.
        both_bad: "half" takes judgements that both are bad as ties, "drop" leaves them out.

    Returns:
        Pairs. `annotator` is the person, or all people of a pair joined by "+"; `group` is that of
        the candidates, or of the annotators where the candidates have none and they share one.

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
    options: tuple[tuple[str, str, Iterable[str]], ...] = (
        ("label", label, LABELLERS),
        ("ties", ties, ("half", "drop")),
        ("weights", weights, ("none", "quality")),
        ("both_bad", both_bad, ("half", "drop")),
    )
    problems = [
        InputProblem(name, f"must be one of {', '.join(allowed)}", value)
        for name, value, allowed in options
        if value not in allowed
    ]
    if problems:
        raise InputError(problems)
    table = read_table(store.database)
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
    weight = _information(work, fit) if weights == "quality" else np.ones(len(work))
    texts = {row["id"]: row for row in store.database.rows(_TEXTS)}
    pairs = []
    for rows in _rows_of_pairs(work, label):
        pair = int(work.pair[rows[0]])
        votes = _votes(work, rows)
        preference = float(LABELLERS[label](votes, fit.posterior[pair]))
        if abs(preference - 0.5) < 1e-9 and ties == "drop":
            dropped["ties"] += 1
            continue
        text = texts[int(work.pairs[pair])]
        pairs.append(_preference_pair(preference, work, rows, text, float(weight[rows].mean())))
    if not pairs:
        raise InputError("every pair is a tie, and ties=drop leaves none; give ties=half.")
    return Exported(pairs, {name: count for name, count in dropped.items() if count})


def _rows_of_pairs(work: Table, label: str) -> list[np.ndarray]:
    """Return the rows of the judgements that each exported pair rests on."""
    if label == "each":
        return [np.array([row]) for row in range(len(work))]
    order = np.argsort(work.pair, kind="stable")
    return np.split(order, np.flatnonzero(np.diff(work.pair[order])) + 1)


def _votes(work: Table, rows: np.ndarray) -> np.ndarray:
    """Count the votes for first, second and tie; a judge may split its own between the two."""
    votes = np.zeros(3)
    label, preference = np.minimum(work.label[rows], TIE), work.preference[rows]
    np.add.at(votes, label, preference)
    decided = label < TIE
    np.add.at(votes, 1 - label[decided], 1 - preference[decided])
    return votes


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


# Each takes the votes for first, second and tie, and Dawid and Skene's posterior of the same.
LABELLERS: dict[str, Callable[[np.ndarray, np.ndarray], float]] = {
    "each": _vote_share,
    "majority": _majority,
    "vote_share": _vote_share,
    "dawid_skene": _posterior,
}


_TEXTS = """
SELECT p.id, q.content AS prompt, q.name, q.grp, a.content AS first, b.content AS second
FROM pairs p JOIN prompts q ON q.id = p.prompt
JOIN responses a ON a.id = p.first JOIN responses b ON b.id = p.second
"""


def _information(work: Table, fit: DawidSkene) -> np.ndarray:
    """Weigh each judgement by what its annotator's answers tell, 1 on average."""
    information = np.maximum(0.0, 2 * fit.accuracy() - 1) ** 2
    weight = information[work.annotator]
    # With a mean of 1 the learning rate keeps its meaning.
    return weight / weight.mean() if weight.mean() > 0 else np.ones(len(work))


def _preference_pair(
    preference: float, work: Table, rows: np.ndarray, text: sqlite3.Row, weight: float
) -> PreferencePair:
    """Make a pair of P(first is better) and the judgements in `rows`."""
    prompt, images = stored_prompt(text["prompt"])
    responses = [text["first"], text["second"]]
    if not isinstance(prompt, str):
        prompt = tuple(map(Message.from_dict, prompt))
        responses = [(Message("assistant", response),) for response in responses]
    better = FIRST if preference >= 0.5 else SECOND
    groups = {work.groups[number] for number in work.annotator[rows]}
    strengths = work.strength[rows][work.label[rows] == better]
    strengths = strengths[strengths > 0]
    better_on_left = bool(work.first_on_left[rows[0]]) == (better == FIRST)
    return PreferencePair(
        prompt,
        responses[better],
        responses[1 - better],
        preference=max(preference, 1 - preference),
        weight=weight,
        annotator="+".join(sorted({work.annotators[number] for number in work.annotator[rows]})),
        group=text["grp"] or (groups.pop() if len(groups) == 1 else None),
        id=text["name"],
        margin=float(strengths.mean()) if len(strengths) and preference != 0.5 else None,
        # Only one judgement has a side.
        swapped=len(rows) == 1 and not better_on_left,
        images=images,
    )


_RANKED = """
SELECT p.ranking, p.first_on_left, c.verdict, c.winner, pairs.first, pairs.second, q.content,
  q.name, q.grp, a.name AS annotator
FROM current c JOIN presentations p ON p.id = c.presentation JOIN pairs ON pairs.id = p.pair
JOIN prompts q ON q.id = pairs.prompt JOIN annotators a ON a.id = p.annotator
WHERE p.ranking IS NOT NULL AND c.verdict IN ('prefer', 'tie') ORDER BY p.ranking, p.id
"""


def to_rankings(store: Store) -> list[dict[str, JSON]]:
    """Return the rankings of people, as records that `read_preferences` takes.

    Returns:
        Records with `prompt`, `responses` (in the order in which they were shown), `ranking` (the
        rank of each, 1 for the best; where some tie, `scores` in its place) and `annotator`; `id`
        and `group` where the prompt has them.
    """
    texts = {row["id"]: row["content"] for row in store.database.rows("SELECT * FROM responses")}
    found = []
    judged = store.database.rows(_RANKED)
    for _, group in itertools.groupby(judged, lambda row: row["ranking"]):
        rows = list(group)
        order = in_order(rows)
        ranks = [1 + _beaten_by(response, rows) for response in order]
        ties = len(set(ranks)) < len(ranks)
        record = {
            "prompt": stored_prompt(rows[0]["content"])[0],
            "responses": [texts[response] for response in order],
            "ranking": None if ties else ranks,
            "scores": [-rank for rank in ranks] if ties else None,
            "annotator": rows[0]["annotator"],
            "id": rows[0]["name"],
            "group": rows[0]["grp"],
        }
        found.append({name: value for name, value in record.items() if value is not None})
    return found


def write_rankings(store: Store, path: str | os.PathLike[str]) -> int:
    """Write `to_rankings` as JSON lines; return how many.

    Raises InputError where the file's name does not end in .jsonl, or the store has no rankings.
    """
    if not os.fspath(path).endswith(".jsonl"):
        rule = "must end in .jsonl: rankings are written as JSON lines"
        raise InputError(InputProblem("PAIRS", rule, os.fspath(path)))
    found = to_rankings(store)
    if not found:
        hint = "People rank where the page was served with --rank."
        raise InputError(InputProblem("store", "has no rankings", hint=hint))
    write_text(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in found))
    return len(found)


def _beaten_by(response: int, rows: Sequence[sqlite3.Row]) -> int:
    """Count the responses that are better than one."""
    return sum(
        row["winner"] not in (None, response)
        for row in rows
        if response in (row["first"], row["second"])
    )
