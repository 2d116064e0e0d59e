"""The log of judgements, to which entries are only added, and the judgements that hold as arrays.

The last entry of a presentation holds; an undo is an entry too.
"""

import math
import sqlite3
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Self

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.assignment import Settings, in_sides, is_judge, take_place
from dpo_keras.feedback.database import Database, has_lone_surrogate
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened

CHOICES = ("left", "right", "tie", "both_bad", "skip")
MAX_REASON = 2_000  # characters
MAX_SECONDS = 86_400.0

FIRST, SECOND, TIE, BOTH_BAD = range(4)
LABELS = ("first", "second", "tie", "both bad")


class Conflict(InputError):  # noqa: N818  # a public name
    """The judgement does not fit what is in the store; the page fetches anew and goes on."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Confirms that a judgement, or its undoing, is on the disk."""

    judgement: int  # the entry in the log
    presentation: int  # what was judged
    again: bool = False  # the submission was a repetition; the entry was there before


@dataclass(frozen=True, slots=True)
class Submission:
    """A judgement as it was sent."""

    presentation: int  # what was shown
    choice: str  # "left", "right", "tie", "both_bad" or "skip"
    key: str  # unique to this judgement; a repeated key returns the first receipt again
    strength: int | None = None  # 1 (slightly) to 3 (much better), for "left" and "right"
    reason: str | None = None  # in words, 2,000 characters at most
    seconds: float | None = None  # time the person took
    preference: float | None = None  # a judge's P(the chosen one is better), for "left" and "right"

    def __post_init__(self) -> None:
        """Check every rule: the values come from a browser and may have any type."""
        problems = _problems({name: getattr(self, name) for name in _RULES})
        if self.choice in ("tie", "both_bad", "skip") and self.strength is not None:
            problems.append(InputProblem("strength", "goes with left or right", self.choice))
        if self.choice not in ("left", "right") and self.preference is not None:
            problems.append(InputProblem("preference", "goes with left or right", self.choice))
        if problems:
            raise InputError(problems)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63


def _is_reason(value: object) -> bool:
    return isinstance(value, str) and len(value) <= MAX_REASON and not has_lone_surrogate(value)


def _is_preference(value: object) -> bool:
    return isinstance(value, int | float) and 0.5 < value <= 1


def _is_time(value: object) -> bool:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return 0 <= value < math.inf


_RULES: dict[str, tuple[Callable[[JSON], bool], str]] = {
    "presentation": (_is_whole, "must be a whole number"),
    "choice": (lambda value: value in CHOICES, f"must be one of {', '.join(CHOICES)}"),
    "key": (
        lambda value: isinstance(value, str) and 1 <= len(value) <= 100 and value.isascii(),
        "must be 1 to 100 ASCII characters",
    ),
    "strength": (lambda value: _is_whole(value) and 1 <= value <= 3, "must be 1, 2 or 3"),
    "reason": (_is_reason, f"must be valid text of {MAX_REASON:,} characters at most"),
    "seconds": (_is_time, "must be finite and >= 0"),
    "preference": (_is_preference, "must be above 0.5 and at most 1"),
}


def _problems(values: Mapping[str, object]) -> list[InputProblem]:
    optional = ("strength", "reason", "seconds", "preference")
    return [
        InputProblem(name, f"{_RULES[name][1]}, got {_shown(value)}")
        for name, value in values.items()
        if not (value is None and name in optional) and not _RULES[name][0](value)
    ]


def _shown(value: object) -> str:
    # The text of a list or mapping that is nested deep cannot be made.
    nested = isinstance(value, list | dict)
    return type(value).__name__ if nested else shortened(repr(value), 60)


def submit(
    connection: sqlite3.Connection,
    settings: Settings,
    now: float,
    annotator: int,
    submission: Submission,
) -> Receipt:
    """Append a judgement, in a transaction."""
    earlier = _receipt_of(
        connection, annotator, submission.presentation, submission.key, undo=False
    )
    if earlier is not None:
        return earlier
    row = _presentation_of(connection, annotator, submission.presentation)
    if row["state"] in ("judged", "skipped"):
        raise Conflict(
            "this pair was judged before (in another tab?); the first answer holds. Undo takes it "
            "back."
        )
    skip = submission.choice == "skip"
    if row["state"] == "released" and not row["repeat"]:
        # The lease ended; the pair may have gone to others.
        if not skip:
            _check_free_place(connection, row, settings)
            take_place(connection, row["pair"], annotator, 1)
    elif skip and not row["repeat"]:
        take_place(connection, row["pair"], annotator, -1)
    left, right = in_sides(row)
    winner = {"left": left, "right": right}.get(submission.choice)
    verdict = submission.choice if winner is None else "prefer"
    reason = (submission.reason or "").strip() or None
    # A whole number of hundreds of digits is no float.
    seconds = None if submission.seconds is None else float(min(submission.seconds, MAX_SECONDS))
    entry = (
        submission.key, now, verdict, winner, submission.strength, reason, seconds,
        submission.preference,
    )  # fmt: skip
    return _append(connection, row, "skipped" if skip else "judged", row["expires"], entry)


def undo(
    connection: sqlite3.Connection,
    settings: Settings,
    now: float,
    annotator: int,
    presentation: int,
    key: str,
) -> Receipt:
    """Append an undo and lease the pair to its annotator again, in a transaction."""
    problems = _problems({"presentation": presentation, "key": key})
    if problems:
        raise InputError(problems)
    earlier = _receipt_of(connection, annotator, presentation, key, undo=True)
    if earlier is not None:
        return earlier
    row = _presentation_of(connection, annotator, presentation)
    if row["state"] not in ("judged", "skipped"):
        raise Conflict("there is no judgement of this pair to take back.")
    if row["state"] == "skipped" and not row["repeat"]:
        _check_free_place(connection, row, settings)
        take_place(connection, row["pair"], annotator, 1)
    entry = (key, now, "undo", None, None, None, None, None)
    return _append(connection, row, "leased", now + settings.lease_seconds, entry)


def _append(
    connection: sqlite3.Connection,
    row: sqlite3.Row,
    state: str,
    expires: float,
    entry: tuple[object, ...],
) -> Receipt:
    """Append an entry to the log, and change the presentation that it judges."""
    number = connection.execute(
        "INSERT INTO judgements (presentation, key, at, verdict, winner, strength, reason, seconds,"
        " preference) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
        (row["id"], *entry),
    ).lastrowid
    connection.execute(
        "UPDATE presentations SET state = ?, expires = ?, entry = ? WHERE id = ?",
        (state, expires, number, row["id"]),
    )
    return Receipt(number or 0, row["id"])


def _receipt_of(
    connection: sqlite3.Connection, annotator: int, presentation: int, key: str, *, undo: bool
) -> Receipt | None:
    """Return the receipt of an earlier entry with this key; None if the key is new."""
    row = connection.execute(
        "SELECT j.id, j.verdict, j.presentation, p.annotator FROM judgements j "
        "JOIN presentations p ON p.id = j.presentation WHERE j.key = ?",
        (key,),
    ).fetchone()
    if row is None:
        return None
    same = row["annotator"] == annotator and row["presentation"] == presentation
    if not same or (row["verdict"] == "undo") != undo:
        raise Conflict("key was used for another judgement; the page makes a new one each time.")
    return Receipt(row["id"], row["presentation"], again=True)


def _presentation_of(
    connection: sqlite3.Connection, annotator: int, presentation: int
) -> sqlite3.Row:
    row = connection.execute(
        "SELECT p.*, pairs.first, pairs.second, pairs.taken, pairs.gold FROM presentations p "
        "JOIN pairs ON pairs.id = p.pair WHERE p.id = ? AND p.annotator = ?",
        (presentation, annotator),
    ).fetchone()
    if row is None:
        raise Conflict("this pair was not given to you; the page fetches one that was.")
    return row


def _check_free_place(connection: sqlite3.Connection, row: sqlite3.Row, settings: Settings) -> None:
    full = row["gold"] is None and row["taken"] >= settings.overlap
    if full and not is_judge(connection, row["annotator"]):
        raise Conflict(
            "the pair waited too long, and others have judged it in the meantime; it is done."
        )


@dataclass(frozen=True)
class Table:
    """The judgements that hold, skips left out, as arrays of N judgements and of P pairs."""

    annotators: tuple[str, ...]  # names
    groups: tuple[str | None, ...]  # of the annotators
    judges: np.ndarray  # bool: which annotators are programs
    skipped: np.ndarray  # how many pairs each annotator skipped

    pairs: np.ndarray  # [P] ids
    lengths: np.ndarray  # [P, 2] characters of the first and second response
    makers: list[tuple[str | None, str | None]]  # [P, 2] labels
    prompts: np.ndarray  # [P] ids
    responses: np.ndarray  # [P, 2] ids

    annotator: np.ndarray  # [N] index into `annotators`
    pair: np.ndarray  # [N] index into `pairs`
    label: np.ndarray  # [N] FIRST, SECOND, TIE or BOTH_BAD
    first_on_left: np.ndarray  # [N] bool
    seconds: np.ndarray  # [N] NaN where the time is not known
    strength: np.ndarray  # [N] 1 to 3, 0 where it was not given
    preference: np.ndarray  # [N] P(the preferred one is better): a judge's, else 1
    repeat: np.ndarray  # [N] bool: the pair was shown to the same person again
    gold: np.ndarray  # [N] FIRST or SECOND where the answer is known, else -1

    def __len__(self) -> int:
        return len(self.label)

    def keep(self, mask: np.ndarray) -> Self:
        """Return the table with the judgements where `mask`, `[N]` bool, is true."""
        return replace(self, **{name: getattr(self, name)[mask] for name in _TYPES})

    def work(self) -> Self:
        """Return the judgements that become preferences: no hidden checks, no repeats."""
        return self.keep(~self.repeat & (self.gold < 0))

    def counts(self) -> np.ndarray:
        """Count how often each pair got each label, `[P, 4]`."""
        counts = np.zeros((len(self.pairs), len(LABELS)), np.int64)
        np.add.at(counts, (self.pair, self.label), 1)
        return counts


# The arrays of `Table` with one entry per judgement, and their types.
_TYPES = {
    "annotator": np.int64,
    "pair": np.int64,
    "label": np.int64,
    "first_on_left": np.bool_,
    "seconds": np.float64,
    "strength": np.int64,
    "preference": np.float64,
    "repeat": np.bool_,
    "gold": np.int64,
}
_JUDGED = f"""
SELECT p.annotator, p.pair, p.first_on_left, p.repeat,
  c.seconds, coalesce(c.strength, 0) AS strength, coalesce(c.preference, 1.0) AS preference,
  CASE WHEN c.verdict = 'tie' THEN {TIE} WHEN c.verdict = 'both_bad' THEN {BOTH_BAD}
    WHEN c.winner = q.first THEN {FIRST} ELSE {SECOND} END AS label,
  CASE WHEN q.gold IS NULL THEN -1 WHEN q.gold = q.first THEN {FIRST} ELSE {SECOND} END AS gold
FROM current c JOIN presentations p ON p.id = c.presentation JOIN pairs q ON q.id = p.pair
WHERE c.verdict <> 'skip' ORDER BY c.id
"""
_PAIRS = """
SELECT p.id, p.prompt, p.first, p.second, length(a.content) AS first_length,
  length(b.content) AS second_length, a.maker AS first_maker, b.maker AS second_maker
FROM pairs p JOIN responses a ON a.id = p.first JOIN responses b ON b.id = p.second ORDER BY p.id
"""
_ANNOTATORS = """
SELECT id, name, grp, judge, (SELECT count(*) FROM presentations p
  WHERE p.annotator = annotators.id AND p.state = 'skipped') AS skipped FROM annotators ORDER BY id
"""


def read_table(database: Database) -> Table:
    """Read the judgements that hold."""
    annotators, pairs = database.rows(_ANNOTATORS), database.rows(_PAIRS)
    judged = database.rows(_JUDGED)
    columns: dict[str, np.ndarray] = {
        name: np.array([row[name] for row in judged], dtype)
        for name, dtype in _TYPES.items()  # a time that is None becomes NaN
    }

    def two_columns(first: str, second: str) -> np.ndarray:
        return np.array([(row[first], row[second]) for row in pairs], np.int64).reshape(-1, 2)

    ids = np.array([row["id"] for row in pairs], np.int64)
    annotator_ids = np.array([row["id"] for row in annotators], np.int64)
    columns["pair"] = np.searchsorted(ids, columns["pair"])
    columns["annotator"] = np.searchsorted(annotator_ids, columns["annotator"])
    return Table(
        annotators=tuple(row["name"] for row in annotators),
        groups=tuple(row["grp"] for row in annotators),
        judges=np.array([row["judge"] for row in annotators], np.bool_),
        skipped=np.array([row["skipped"] for row in annotators], np.int64),
        pairs=ids,
        lengths=two_columns("first_length", "second_length"),
        makers=[(row["first_maker"], row["second_maker"]) for row in pairs],
        prompts=np.array([row["prompt"] for row in pairs], np.int64),
        responses=two_columns("first", "second"),
        **columns,
    )
