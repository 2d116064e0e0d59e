"""Which pair a person sees next: leases, overlap, sides, hidden checks and repeats."""

import math
import random
import sqlite3
from dataclasses import dataclass
from typing import Any

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.candidates import stored_prompt
from dpo_keras.preferences import Image
from dpo_keras.utils import JSON


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
        """Check every rule."""
        problems = []
        for name in ("overlap", "repeat_distance"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(InputProblem(name, "must be a whole number >= 1", value))
        if not 0 < self.lease_seconds < math.inf:
            rule = "must be finite and > 0"
            problems.append(InputProblem("lease_seconds", rule, self.lease_seconds))
        for name in ("gold_share", "repeat_share"):
            if not 0 <= getattr(self, name) <= 0.5:
                problems.append(InputProblem(name, "must be in [0, 0.5]", getattr(self, name)))
        if problems:
            raise InputError(problems)


@dataclass(frozen=True, slots=True)
class Presentation:
    """A pair as one person sees it. It does not tell makers, repeats or checks."""

    id: int  # a judgement names it
    prompt: JSON  # text, or a list of role/content mappings
    left: str
    right: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a round is, in judgements of pairs, without checks and repeats."""

    judged: int
    wanted: int


_HELD = """
SELECT p.id, p.first_on_left, q.content AS prompt, a.content AS first, b.content AS second
FROM presentations p JOIN pairs ON pairs.id = p.pair JOIN prompts q ON q.id = pairs.prompt
JOIN responses a ON a.id = pairs.first JOIN responses b ON b.id = pairs.second
WHERE p.annotator = ? AND p.state = 'leased' ORDER BY p.id LIMIT ?
"""
# Pairs that somebody has begun come first, so that pairs become complete.
_OPEN_PAIR = """
SELECT id FROM pairs WHERE gold IS NULL AND taken < :overlap AND NOT EXISTS (
  SELECT 1 FROM presentations p WHERE p.pair = pairs.id AND p.annotator = :annotator
  AND p.repeat = 0 AND p.state <> 'released')
ORDER BY taken DESC, shuffle LIMIT 1
"""
_UNSEEN_CHECK = """
SELECT id FROM pairs WHERE gold IS NOT NULL AND NOT EXISTS (
  SELECT 1 FROM presentations p WHERE p.pair = pairs.id AND p.annotator = :annotator
  AND p.state <> 'released')
ORDER BY shuffle LIMIT 1
"""
_REPEATABLE = """
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
    """Renew a person's leases and add new ones up to `count`, in a transaction."""
    _release_expired(connection, now, except_of=annotator)
    expires = now + settings.lease_seconds
    _renew(connection, settings, now, annotator)
    held = connection.execute(
        "SELECT count(*) FROM presentations WHERE annotator = ? AND state = 'leased'", (annotator,)
    ).fetchone()[0]
    while held < count:
        choice = _choose(connection, settings, chance, annotator)
        if choice is None:
            break
        pair, repeat = choice
        # A person who gets a released pair back sees the same sides as before.
        connection.execute(
            "INSERT INTO presentations "
            "(pair, annotator, repeat, first_on_left, state, shown, expires) "
            "VALUES (?, ?, ?, ?, 'leased', ?, ?) ON CONFLICT (pair, annotator, repeat) DO UPDATE "
            "SET state = 'leased', expires = excluded.expires",
            (pair, annotator, repeat, chance.getrandbits(1), now, expires),
        )
        if not repeat:
            take_place(connection, pair, 1)
        held += 1
    return _held(connection, annotator, count)


def _renew(connection: sqlite3.Connection, settings: Settings, now: float, annotator: int) -> None:
    # Leases with more than half their time left stay as they are: nothing to write.
    expires = now + settings.lease_seconds
    connection.execute(
        "UPDATE presentations SET expires = ? "
        "WHERE annotator = ? AND state = 'leased' AND expires < ?",
        (expires, annotator, expires - settings.lease_seconds / 2),
    )


def _held(connection: sqlite3.Connection, annotator: int, count: int) -> list[Presentation]:
    presentations = []
    for row in connection.execute(_HELD, (annotator, count)):
        left, right = in_sides(row)
        prompt, images = stored_prompt(row["prompt"])
        presentations.append(Presentation(row["id"], prompt, left, right, images))
    return presentations


def held(
    connection: sqlite3.Connection, settings: Settings, now: float, annotator: int, count: int
) -> list[Presentation]:
    """Renew a person's leases and return up to `count` of them, in a transaction."""
    _renew(connection, settings, now, annotator)
    return _held(connection, annotator, count)


def in_sides(row: sqlite3.Row) -> tuple[Any, Any]:
    """Return `first` and `second` of a row in the order left, right."""
    first, second = row["first"], row["second"]
    return (first, second) if row["first_on_left"] else (second, first)


def take_place(connection: sqlite3.Connection, pair: int, change: int) -> None:
    """Count a place of a pair as used (`change` 1) or as free again (-1)."""
    connection.execute("UPDATE pairs SET taken = taken + ? WHERE id = ?", (change, pair))


def _release_expired(connection: sqlite3.Connection, now: float, except_of: int) -> None:
    """End expired leases so that abandoned pairs return; the present annotator keeps theirs."""
    _release(connection, "expires < ? AND annotator <> ?", (now, except_of))


def release_all(connection: sqlite3.Connection, annotator: int) -> None:
    """End the leases of a person who will not come back, in a transaction."""
    _release(connection, "annotator = ?", (annotator,))


def _release(connection: sqlite3.Connection, which: str, values: tuple[object, ...]) -> None:
    released = connection.execute(
        f"SELECT id, pair, repeat FROM presentations WHERE state = 'leased' AND {which}", values
    ).fetchall()
    for row in released:
        connection.execute("UPDATE presentations SET state = 'released' WHERE id = ?", (row["id"],))
        if not row["repeat"]:
            take_place(connection, row["pair"], -1)


def _choose(
    connection: sqlite3.Connection, settings: Settings, chance: random.Random, annotator: int
) -> tuple[int, int] | None:
    """Choose a person's next pair and whether it is a repeat (0 or 1); None if none is open."""
    values = {"annotator": annotator, "overlap": settings.overlap}
    draw = chance.random()
    if draw < settings.gold_share:
        check = connection.execute(_UNSEEN_CHECK, values).fetchone()
        if check is not None:
            return check["id"], 0
    elif draw < settings.gold_share + settings.repeat_share:
        judged = connection.execute(_REPEATABLE, values).fetchall()
        # The latest pairs are still in the person's mind.
        if len(judged) > settings.repeat_distance:
            return chance.choice(judged[: len(judged) - settings.repeat_distance])["id"], 1
    pair = connection.execute(_OPEN_PAIR, values).fetchone()
    if pair is None and _owes_check(connection, settings, annotator):
        pair = connection.execute(_UNSEEN_CHECK, values).fetchone()
    return None if pair is None else (pair["id"], 0)


def _owes_check(connection: sqlite3.Connection, settings: Settings, annotator: int) -> bool:
    """Return whether chance brought too few checks, as it may in a short round."""
    seen, checks = connection.execute(
        "SELECT count(*), count(pairs.gold) FROM presentations p "
        "JOIN pairs ON pairs.id = p.pair WHERE p.annotator = ? AND p.state <> 'released'",
        (annotator,),
    ).fetchone()
    return checks < math.ceil(settings.gold_share * seen)
