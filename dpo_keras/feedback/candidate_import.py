"""Candidates into the store: prompts, their responses, and every two of them as a pair to judge."""

from __future__ import annotations

import hashlib
import json
import random
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dpo_keras.feedback.candidate_files import Candidates, Response
from dpo_keras.preferences import Message


@dataclass(frozen=True, slots=True)
class Imported:
    """What a candidates file added.

    Args:
        pairs: new pairs.
        known: pairs that were there before.
        gold: of the new ones, checks with a known answer.
        identical: responses left out because they equal another one of their prompt.
        empty: responses left out because there is nothing in them.
        alone: prompts without two different responses.
    """

    pairs: int = 0
    known: int = 0
    gold: int = 0
    identical: int = 0
    empty: int = 0
    alone: int = 0

    def summary(self) -> str:
        """What was added and left out, as a sentence.

        Example:
            >>> Imported(pairs=3, gold=1, empty=2).summary()
            '3 new pairs (1 with a known answer), 0 known; left out: 0 identical and 2 empty
             responses, 0 prompts without two different responses'
        """
        return (
            f"{self.pairs:,} new pairs ({self.gold:,} with a known answer), {self.known:,} known; "
            f"left out: {self.identical:,} identical and {self.empty:,} empty responses, "
            f"{self.alone:,} prompts without two different responses"
        )


def add(
    connection: sqlite3.Connection, chance: random.Random, candidates: Iterable[Candidates]
) -> Imported:
    """Adds pairs to be judged; those already there are left as they are.

    Args:
        connection: in a transaction.
        chance: of the order in which pairs come.
        candidates: every two different responses of a prompt become a pair.

    Returns:
        What was added and what was left out.
    """
    counts = dict.fromkeys(Imported.__slots__, 0)
    for one in candidates:
        usable = one.usable()
        empty = sum(not response.text.strip() for response in one.responses)
        counts["empty"] += empty
        counts["identical"] += len(one.responses) - empty - len(usable)
        counts["alone"] += len(usable) < 2
        if len(usable) >= 2:
            _add_pairs(connection, chance, one, counts)
    return Imported(**counts)


def _add_pairs(
    connection: sqlite3.Connection, chance: random.Random, one: Candidates, counts: dict[str, int]
) -> None:
    content = json.dumps(_plain(one.prompt), ensure_ascii=False, sort_keys=True)
    prompt = _identify(
        connection,
        "INSERT INTO prompts (hash, content, name, grp) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (_hash(content), content, one.id, one.group),
        "SELECT id FROM prompts WHERE hash = ?",
        (_hash(content),),
    )
    better = None if one.gold is None else one.responses[one.gold].text.strip()
    rows = {}
    for response in one.usable():
        rows[response.text] = _identify(
            connection,
            "INSERT INTO responses (prompt, hash, content, maker, setting) "
            "VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (prompt, _hash(response.text), response.text, response.maker, _setting(response)),
            "SELECT id FROM responses WHERE prompt = ? AND hash = ?",
            (prompt, _hash(response.text)),
        )
    for first, second in one.pairs():
        gold = next((rows[r.text] for r in (first, second) if r.text.strip() == better), None)
        one_id, other_id = sorted((rows[first.text], rows[second.text]))
        added = connection.execute(
            "INSERT INTO pairs (prompt, first, second, gold, shuffle) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING",
            (prompt, one_id, other_id, gold, chance.random()),
        ).rowcount
        counts["pairs"] += added
        counts["known"] += 1 - added
        counts["gold"] += added if gold is not None else 0


def _identify(
    connection: sqlite3.Connection, insert: str, values: Any, select: str, keys: Any
) -> int:
    connection.execute(insert, values)
    return connection.execute(select, keys).fetchone()[0]


def _plain(prompt: str | tuple[Message, ...]) -> Any:
    return prompt if isinstance(prompt, str) else [turn.as_dict() for turn in prompt]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _setting(response: Response) -> str | None:
    if response.setting is None:
        return None
    return json.dumps(response.setting, ensure_ascii=False, sort_keys=True, default=str)
