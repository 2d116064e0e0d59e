"""What people answered: an append-only log, in which the last entry of a presentation holds."""

from __future__ import annotations

import math
import sqlite3
from dataclasses import dataclass

from dpo_keras.errors import InputError
from dpo_keras.feedback.assignment import Settings, take
from dpo_keras.feedback.database import Database

CHOICES = ("left", "right", "tie", "both_bad", "skip")
LONGEST_REASON = 2_000
LONGEST_TIME = 86_400.0


class Conflict(InputError):
    """The judgement does not fit what is in the store; the page fetches anew and goes on."""


@dataclass(frozen=True, slots=True)
class Receipt:
    """Says that a judgement, or its undoing, is on the disk.

    Args:
        judgement: the entry in the log.
        presentation: what was judged.
        again: it was there before: this was a repeated submission.
    """

    judgement: int
    presentation: int
    again: bool = False


@dataclass(frozen=True, slots=True)
class Given:
    """A judgement as it was sent. See `Store.submit`."""

    presentation: int
    choice: str
    key: str
    strength: int | None = None
    reason: str | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        """Checks every rule."""
        problems = []
        if not _is_whole(self.presentation):
            problems.append(f"presentation must be a whole number, got {self.presentation!r:.60}.")
        if self.choice not in CHOICES:
            problems.append(f"choice must be one of {', '.join(CHOICES)}, got {self.choice!r:.60}.")
        problems += key_problems(self.key)
        if self.strength is not None:
            if not _is_whole(self.strength) or not 1 <= self.strength <= 3:
                problems.append(f"strength must be 1, 2 or 3, got {self.strength!r:.60}.")
            elif self.choice not in ("left", "right"):
                problems.append(f"strength goes with left or right, got {self.choice!r:.60}.")
        if self.reason is not None and not (
            isinstance(self.reason, str)
            and len(self.reason) <= LONGEST_REASON
            # JSON may spell half of a character, which no file can hold.
            and not any("\ud800" <= letter <= "\udfff" for letter in self.reason)
        ):
            problems.append(f"reason must be valid text of {LONGEST_REASON:,} characters at most.")
        if self.seconds is not None and not (
            isinstance(self.seconds, int | float)
            and not isinstance(self.seconds, bool)
            and math.isfinite(self.seconds)
            and self.seconds >= 0
        ):
            problems.append(f"seconds must be finite and >= 0, got {self.seconds!r:.60}.")
        if problems:
            raise InputError(problems)


def key_problems(key: object) -> list[str]:
    """The rules that a submission's key breaks.

    Args:
        key: from the browser.
    """
    if isinstance(key, str) and 1 <= len(key) <= 100 and key.isascii():
        return []
    return [f"key must be 1 to 100 ASCII characters, got {key!r:.60}."]


def submit(
    connection: sqlite3.Connection, settings: Settings, now: float, annotator: int, given: Given
) -> Receipt:
    """Appends a judgement. Runs inside a transaction; see `Store.submit`."""
    earlier = _by_key(connection, annotator, given.presentation, given.key, undo=False)
    if earlier is not None:
        return earlier
    row = _own(connection, annotator, given.presentation)
    if row["state"] in ("judged", "skipped"):
        raise Conflict(
            "this pair was judged before (in another tab?); the first answer holds. Undo takes it "
            "back."
        )
    skip = given.choice == "skip"
    if row["state"] == "released" and not row["repeat"]:
        # The lease ended, the pair may have gone to others.
        if not skip:
            _check_place(row, settings)
            take(connection, row["pair"], 1)
    elif skip and not row["repeat"]:
        take(connection, row["pair"], -1)
    sides = row["first"], row["second"]
    left, right = sides if row["first_on_left"] else sides[::-1]
    winner = {"left": left, "right": right}.get(given.choice)
    verdict = given.choice if winner is None else "prefer"
    seconds = None if given.seconds is None else min(float(given.seconds), LONGEST_TIME)
    entry = connection.execute(
        "INSERT INTO judgements (presentation, verdict, winner, strength, reason, seconds, at, key)"
        " VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
        (
            row["id"],
            verdict,
            winner,
            given.strength,
            (given.reason or "").strip() or None,
            seconds,
            now,
            given.key,
        ),
    ).lastrowid
    connection.execute(
        "UPDATE presentations SET state = ?, entry = ? WHERE id = ?",
        ("skipped" if skip else "judged", entry, row["id"]),
    )
    return Receipt(entry or 0, row["id"])


def undo(
    connection: sqlite3.Connection,
    settings: Settings,
    now: float,
    annotator: int,
    presentation: int,
    key: str,
) -> Receipt:
    """Appends an undo. Runs inside a transaction; see `Store.undo`."""
    problems = key_problems(key)
    if not _is_whole(presentation):
        problems.append(f"presentation must be a whole number, got {presentation!r:.60}.")
    if problems:
        raise InputError(problems)
    earlier = _by_key(connection, annotator, presentation, key, undo=True)
    if earlier is not None:
        return earlier
    row = _own(connection, annotator, presentation)
    if row["state"] not in ("judged", "skipped"):
        raise Conflict("there is no judgement of this pair to take back.")
    if row["state"] == "skipped" and not row["repeat"]:
        _check_place(row, settings)
        take(connection, row["pair"], 1)
    entry = connection.execute(
        "INSERT INTO judgements (presentation, verdict, at, key) VALUES (?, 'undo', ?, ?)",
        (row["id"], now, key),
    ).lastrowid
    connection.execute(
        "UPDATE presentations SET state = 'leased', expires = ?, entry = ? WHERE id = ?",
        (now + settings.lease_seconds, entry, row["id"]),
    )
    return Receipt(entry or 0, row["id"])


def last_judged(database: Database, annotator: int) -> int | None:
    """What an undo would take back. See `Store.last_judged`."""
    rows = database.rows(
        "SELECT id FROM presentations WHERE annotator = ? AND state IN ('judged', 'skipped') "
        "ORDER BY entry DESC LIMIT 1",
        (annotator,),
    )
    return rows[0]["id"] if rows else None


def _own(connection: sqlite3.Connection, annotator: int, presentation: int) -> sqlite3.Row:
    row = connection.execute(
        "SELECT p.*, pairs.first, pairs.second, pairs.taken, pairs.gold FROM presentations p "
        "JOIN pairs ON pairs.id = p.pair WHERE p.id = ? AND p.annotator = ?",
        (presentation, annotator),
    ).fetchone()
    if row is None:
        raise Conflict("this pair was not given to you; the page fetches one that was.")
    return row


def _check_place(row: sqlite3.Row, settings: Settings) -> None:
    if row["gold"] is None and row["taken"] >= settings.overlap:
        raise Conflict(
            "the pair waited too long, and others have judged it in the meantime; it is done."
        )


def _by_key(
    connection: sqlite3.Connection, annotator: int, presentation: int, key: str, *, undo: bool
) -> Receipt | None:
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


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**63
