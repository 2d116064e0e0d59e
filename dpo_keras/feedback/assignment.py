"""Which pair an annotator sees next: leases, overlap, sides, hidden checks and repeats."""

import itertools
import math
import random
import sqlite3
from collections import Counter
from collections.abc import Iterable, Iterator
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
        ranking: show 3 to 5 responses of a prompt at once, to be ranked, and not pair by pair.

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
    ranking: bool = False

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
    """What one person sees: a pair, or a ranking. It does not tell makers, repeats or checks."""

    id: int  # a judgement names it
    prompt: JSON  # text, or a list of role/content mappings
    left: str
    right: str
    images: tuple[Image, ...] = ()
    further: tuple[str, ...] = ()  # of a ranking: the responses after these two

    @property
    def responses(self) -> tuple[str, ...]:
        """All responses, in the order in which they are shown."""
        return self.left, self.right, *self.further


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a round is, in judgements of pairs, without checks and repeats."""

    judged: int
    wanted: int


_HELD = """
SELECT p.id, p.ranking, p.first_on_left, q.content AS prompt, a.content AS first,
  b.content AS second
FROM presentations p JOIN pairs ON pairs.id = p.pair JOIN prompts q ON q.id = pairs.prompt
JOIN responses a ON a.id = pairs.first JOIN responses b ON b.id = pairs.second
WHERE p.annotator = :annotator AND p.state = 'leased' AND coalesce(p.ranking, p.id) IN (
  SELECT DISTINCT coalesce(h.ranking, h.id) FROM presentations h
  WHERE h.annotator = :annotator AND h.state = 'leased' ORDER BY 1 LIMIT :count)
ORDER BY coalesce(p.ranking, p.id), p.id
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
# A prompt of which every two responses are a pair, and none of these was given to the person.
_OPEN_RANKING = """
SELECT prompt FROM pairs WHERE gold IS NULL AND taken < :overlap
  AND (SELECT count(*) FROM responses r WHERE r.prompt = pairs.prompt) BETWEEN 3 AND 5
  AND (SELECT 2 * count(*) FROM pairs s WHERE s.prompt = pairs.prompt)
    = (SELECT count(*) * (count(*) - 1) FROM responses r WHERE r.prompt = pairs.prompt)
  AND NOT EXISTS (SELECT 1 FROM pairs s
    WHERE s.prompt = pairs.prompt AND s.gold IS NULL AND s.taken >= :overlap)
  AND NOT EXISTS (SELECT 1 FROM pairs s JOIN presentations p ON p.pair = s.id
    WHERE s.prompt = pairs.prompt AND p.annotator = :annotator AND p.state <> 'released')
ORDER BY taken DESC, shuffle LIMIT 1
"""
# A judge takes each pair once, checks among them; those that people have judged come first.
_UNJUDGED = """
SELECT id FROM pairs WHERE NOT EXISTS (
  SELECT 1 FROM presentations p WHERE p.pair = pairs.id AND p.annotator = :annotator
  AND p.state <> 'released')
ORDER BY taken DESC, shuffle LIMIT :count
"""


def hand_out(
    connection: sqlite3.Connection,
    settings: Settings,
    now: float,
    chance: random.Random,
    annotator: int,
    count: int,
) -> list[Presentation]:
    """Renew an annotator's leases and add new ones up to `count`, in a transaction."""
    _release_expired(connection, now, except_of=annotator)
    expires = now + settings.lease_seconds
    _renew(connection, settings, now, annotator)
    held = connection.execute(
        "SELECT count(DISTINCT coalesce(ranking, id)) FROM presentations "
        "WHERE annotator = ? AND state = 'leased'",
        (annotator,),
    ).fetchone()[0]
    if settings.ranking and not is_judge(connection, annotator):
        while held < count and _lease_ranking(
            connection, settings, (now, expires), chance, annotator
        ):
            held += 1
    for pair, repeat in _chosen(connection, settings, chance, annotator, count - held):
        # A person who gets a released pair back sees the same sides as before.
        connection.execute(
            "INSERT INTO presentations "
            "(pair, annotator, repeat, first_on_left, state, shown, expires) "
            "VALUES (?, ?, ?, ?, 'leased', ?, ?) ON CONFLICT (pair, annotator, repeat) DO UPDATE "
            "SET state = 'leased', expires = excluded.expires, ranking = NULL",
            (pair, annotator, repeat, chance.getrandbits(1), now, expires),
        )
        if not repeat:
            take_place(connection, pair, annotator, 1)
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
    rows = connection.execute(_HELD, {"annotator": annotator, "count": count}).fetchall()
    groups = itertools.groupby(rows, lambda row: row["ranking"] or row["id"])
    return [_presentation(number, list(pairs)) for number, pairs in groups]


def _presentation(number: int, rows: list[sqlite3.Row]) -> Presentation:
    """Make a presentation of its pairs: one, or all of a ranking."""
    left, right, *further = in_order(rows)
    prompt, images = stored_prompt(rows[0]["prompt"])
    return Presentation(number, prompt, left, right, images, tuple(further))


def in_order(rows: Iterable[sqlite3.Row]) -> list[Any]:
    """Return what `first` and `second` of the pairs of a ranking hold, in the order shown."""
    wins: Counter[Any] = Counter()
    for left, right in map(in_sides, rows):
        wins[left] += 1
        wins[right] += 0
    return sorted(wins, key=lambda response: -wins[response])


def _lease_ranking(
    connection: sqlite3.Connection,
    settings: Settings,
    times: tuple[float, float],
    chance: random.Random,
    annotator: int,
) -> bool:
    """Give a person all pairs of a prompt, to be ranked; False where there is no such prompt."""
    values = {"annotator": annotator, "overlap": settings.overlap}
    found = connection.execute(_OPEN_RANKING, values).fetchone()
    if found is None:
        return False
    pairs = connection.execute(
        "SELECT id, first, second FROM pairs WHERE prompt = ? ORDER BY id", (found["prompt"],)
    ).fetchall()
    responses = sorted({response for pair in pairs for response in (pair["first"], pair["second"])})
    place = dict(zip(responses, chance.sample(range(len(responses)), len(responses)), strict=True))
    numbers = []
    for pair in pairs:
        on_left = place[pair["first"]] < place[pair["second"]]
        row = connection.execute(
            "INSERT INTO presentations (pair, annotator, first_on_left, state, shown, expires) "
            "VALUES (?, ?, ?, 'leased', ?, ?) ON CONFLICT (pair, annotator, repeat) DO UPDATE SET "
            "state = 'leased', expires = excluded.expires, first_on_left = excluded.first_on_left "
            "RETURNING id",
            (pair["id"], annotator, on_left, *times),
        ).fetchone()
        numbers.append(row["id"])
        take_place(connection, pair["id"], annotator, 1)
    connection.executemany(
        "UPDATE presentations SET ranking = ? WHERE id = ?", [(min(numbers), n) for n in numbers]
    )
    return True


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


def take_place(connection: sqlite3.Connection, pair: int, annotator: int, change: int) -> None:
    """Count a place of a pair as used (`change` 1) or as free again (-1); a judge needs none."""
    connection.execute(
        "UPDATE pairs SET taken = taken + ? "
        "WHERE id = ? AND NOT (SELECT judge FROM annotators WHERE id = ?)",
        (change, pair, annotator),
    )


def _release_expired(connection: sqlite3.Connection, now: float, except_of: int) -> None:
    """End expired leases so that abandoned pairs return; the present annotator keeps theirs."""
    _release(connection, "expires < ? AND annotator <> ?", (now, except_of))


def release_all(connection: sqlite3.Connection, annotator: int) -> None:
    """End the leases of a person who will not come back, in a transaction."""
    _release(connection, "annotator = ?", (annotator,))


def _release(connection: sqlite3.Connection, which: str, values: tuple[object, ...]) -> None:
    released = connection.execute(
        f"SELECT id, pair, annotator, repeat FROM presentations WHERE state = 'leased' AND {which}",
        values,
    ).fetchall()
    for row in released:
        connection.execute("UPDATE presentations SET state = 'released' WHERE id = ?", (row["id"],))
        if not row["repeat"]:
            take_place(connection, row["pair"], row["annotator"], -1)


def _chosen(
    connection: sqlite3.Connection,
    settings: Settings,
    chance: random.Random,
    annotator: int,
    count: int,
) -> Iterator[tuple[int, int]]:
    """Yield new pairs for an annotator; a person's next one depends on the last."""
    if is_judge(connection, annotator):
        values = {"annotator": annotator, "count": max(count, 0)}
        for row in connection.execute(_UNJUDGED, values).fetchall():
            yield row["id"], 0
        return
    for _ in range(count):
        choice = _choose(connection, settings, chance, annotator)
        if choice is None:
            return
        yield choice


def is_judge(connection: sqlite3.Connection, annotator: int) -> bool:
    """Tell whether an annotator is a program."""
    query = "SELECT 1 FROM annotators WHERE id = ? AND judge"
    return connection.execute(query, (annotator,)).fetchone() is not None


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
