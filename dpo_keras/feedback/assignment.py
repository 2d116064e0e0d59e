"""Who is shown what: leases, overlap, sides, and hidden checks."""

from __future__ import annotations

import json
import math
import random
import sqlite3
from dataclasses import dataclass
from typing import Any

from dpo_keras.errors import InputError
from dpo_keras.feedback.database import Database


@dataclass(frozen=True, slots=True)
class Settings:
    """How pairs are handed out.

    Args:
        overlap: how many people judge each pair, >= 1; 2 or more lets agreement be measured.
        lease_seconds: how long a pair waits for the person it was given to, > 0.
        gold_share: share of presentations that check a known answer, in [0, 0.5].
        repeat_share: share of presentations that show an earlier pair again, in [0, 0.5].
        repeat_distance: how many other pairs lie between the two, >= 1.

    Raises:
        InputError: naming every value that breaks a rule.

    Example:
        >>> Settings(overlap=0, gold_share=2)
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: overlap must be a whole number >= 1, got 0.
        gold_share must be in [0, 0.5], got 2.
    """

    overlap: int = 2
    lease_seconds: float = 1800.0
    gold_share: float = 0.05
    repeat_share: float = 0.03
    repeat_distance: int = 10

    def __post_init__(self) -> None:
        """Checks every rule."""
        problems = []
        for name in ("overlap", "repeat_distance"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name} must be a whole number >= 1, got {value!r}.")
        if not 0 < self.lease_seconds < float("inf"):
            problems.append(f"lease_seconds must be finite and > 0, got {self.lease_seconds!r}.")
        for name in ("gold_share", "repeat_share"):
            if not 0 <= getattr(self, name) <= 0.5:
                problems.append(f"{name} must be in [0, 0.5], got {getattr(self, name)!r}.")
        if problems:
            raise InputError(problems)


@dataclass(frozen=True, slots=True)
class Presentation:
    """A pair as one person sees it. Nothing in it tells makers, repeats or checks.

    Args:
        id: the presentation; a judgement names it.
        prompt: text, or role/content mappings.
        left: the response on the left.
        right: the other one.
    """

    id: int
    prompt: Any
    left: str
    right: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a round is.

    Args:
        judged: judgements of pairs, checks and repeats left out.
        wanted: how many of them the round needs.
    """

    judged: int
    wanted: int


_SHOWN = """
SELECT p.id, p.first_on_left, q.content AS prompt, a.content AS first, b.content AS second
FROM presentations p JOIN pairs ON pairs.id = p.pair JOIN prompts q ON q.id = pairs.prompt
JOIN responses a ON a.id = pairs.first JOIN responses b ON b.id = pairs.second
WHERE p.annotator = ? AND p.state = 'leased' ORDER BY p.id LIMIT ?
"""
# Pairs that somebody has begun come first, so that pairs become complete.
_OPEN = """
SELECT id FROM pairs WHERE gold IS NULL AND taken < :overlap AND NOT EXISTS (
  SELECT 1 FROM presentations p WHERE p.pair = pairs.id AND p.annotator = :annotator
  AND p.repeat = 0 AND p.state <> 'released')
ORDER BY taken DESC, shuffle LIMIT 1
"""
_CHECK = """
SELECT id FROM pairs WHERE gold IS NOT NULL AND NOT EXISTS (
  SELECT 1 FROM presentations p WHERE p.pair = pairs.id AND p.annotator = :annotator
  AND p.state <> 'released')
ORDER BY shuffle LIMIT 1
"""
_AGAIN = """
SELECT p.pair AS id FROM presentations p JOIN pairs ON pairs.id = p.pair
WHERE p.annotator = :annotator AND p.state = 'judged' AND p.repeat = 0 AND pairs.gold IS NULL
  AND NOT EXISTS (SELECT 1 FROM presentations r WHERE r.pair = p.pair
    AND r.annotator = :annotator AND r.repeat = 1 AND r.state <> 'released')
ORDER BY p.id
"""


def hand_out(
    connection: sqlite3.Connection,
    settings: Settings,
    now: float,
    chance: random.Random,
    annotator: int,
    count: int,
) -> list[Presentation]:
    """Renews a person's leases and fills them up. Runs inside a transaction; see `Store.next`."""
    release_expired(connection, now, besides=annotator)
    expires = now + settings.lease_seconds
    # Leases that are still long stay as they are: nothing to write.
    connection.execute(
        "UPDATE presentations SET expires = ? "
        "WHERE annotator = ? AND state = 'leased' AND expires < ?",
        (expires, annotator, expires - settings.lease_seconds / 2),
    )
    held = connection.execute(
        "SELECT count(*) FROM presentations WHERE annotator = ? AND state = 'leased'", (annotator,)
    ).fetchone()[0]
    while held < count:
        choice = _choose(connection, settings, chance, annotator)
        if choice is None:
            break
        pair, repeat = choice
        # Who comes back to a pair that had been taken from them sees it as before.
        connection.execute(
            "INSERT INTO presentations "
            "(pair, annotator, repeat, first_on_left, state, shown, expires) "
            "VALUES (?, ?, ?, ?, 'leased', ?, ?) ON CONFLICT (pair, annotator, repeat) DO UPDATE "
            "SET state = 'leased', expires = excluded.expires",
            (pair, annotator, repeat, chance.getrandbits(1), now, expires),
        )
        if not repeat:
            take(connection, pair, 1)
        held += 1
    rows = connection.execute(_SHOWN, (annotator, count)).fetchall()
    return [_presentation(row) for row in rows]


def take(connection: sqlite3.Connection, pair: int, change: int) -> None:
    """Counts a place of a pair as in use, or as free again.

    Args:
        connection: in a transaction.
        pair: its id.
        change: 1 or -1.
    """
    connection.execute("UPDATE pairs SET taken = taken + ? WHERE id = ?", (change, pair))


def release_expired(connection: sqlite3.Connection, now: float, besides: int) -> None:
    """Ends leases that are over, so that abandoned pairs return.

    Args:
        connection: in a transaction.
        now: seconds since the epoch.
        besides: this annotator is here and keeps theirs.
    """
    over = connection.execute(
        "SELECT id, pair, repeat FROM presentations "
        "WHERE state = 'leased' AND expires < ? AND annotator <> ?",
        (now, besides),
    ).fetchall()
    for row in over:
        connection.execute("UPDATE presentations SET state = 'released' WHERE id = ?", (row["id"],))
        if not row["repeat"]:
            take(connection, row["pair"], -1)


def _choose(
    connection: sqlite3.Connection, settings: Settings, chance: random.Random, annotator: int
) -> tuple[int, int] | None:
    """The next pair for a person and whether it is a repeat; None where nothing is open."""
    values = {"annotator": annotator, "overlap": settings.overlap}
    drawn = chance.random()
    if drawn < settings.gold_share:
        found = connection.execute(_CHECK, values).fetchone()
        if found is not None:
            return found["id"], 0
    elif drawn < settings.gold_share + settings.repeat_share:
        found = connection.execute(_AGAIN, values).fetchall()
        # The latest ones are still in the person's mind.
        earlier = found[: len(found) - settings.repeat_distance]
        if len(found) > settings.repeat_distance:
            return chance.choice(earlier)["id"], 1
    found = connection.execute(_OPEN, values).fetchone()
    if found is not None:
        return found["id"], 0
    return _missing_check(connection, settings, values)


def _missing_check(
    connection: sqlite3.Connection, settings: Settings, values: dict[str, int]
) -> tuple[int, int] | None:
    """A check still owed at the end of a short round, where chance brought too few."""
    seen, checks = connection.execute(
        "SELECT count(*), count(pairs.gold) FROM presentations p "
        "JOIN pairs ON pairs.id = p.pair WHERE p.annotator = :annotator AND p.state <> 'released'",
        values,
    ).fetchone()
    if checks >= math.ceil(settings.gold_share * seen):
        return None
    found = connection.execute(_CHECK, values).fetchone()
    return None if found is None else (found["id"], 0)


def progress(database: Database, settings: Settings) -> Progress:
    """Counts what is done. See `Store.progress`."""
    judged, checks = database.rows(
        "SELECT count(*), count(pairs.gold) FROM presentations p JOIN pairs ON pairs.id = p.pair "
        "WHERE p.state = 'judged' AND p.repeat = 0"
    )[0]
    pairs = database.rows("SELECT count(*) FROM pairs WHERE gold IS NULL")[0][0]
    return Progress(judged - checks, pairs * settings.overlap)


def done_by(database: Database, annotator: int) -> int:
    """Counts a person's answers. See `Store.done_by`."""
    return database.rows(
        "SELECT count(*) FROM presentations WHERE annotator = ? AND state IN ('judged', 'skipped')",
        (annotator,),
    )[0][0]


def may_return(database: Database, annotator: int) -> bool:
    """Looks for leases that may come free. See `Store.may_return`."""
    return bool(
        database.rows(
            "SELECT 1 FROM presentations p JOIN pairs ON pairs.id = p.pair "
            "WHERE p.state = 'leased' AND p.annotator <> :annotator AND p.repeat = 0 "
            "AND pairs.gold IS NULL AND NOT EXISTS (SELECT 1 FROM presentations o "
            "WHERE o.pair = p.pair AND o.annotator = :annotator AND o.repeat = 0 "
            "AND o.state <> 'released') LIMIT 1",
            {"annotator": annotator},
        )
    )


def _presentation(row: sqlite3.Row) -> Presentation:
    sides = row["first"], row["second"]
    left, right = sides if row["first_on_left"] else sides[::-1]
    return Presentation(row["id"], json.loads(row["prompt"]), left, right)
