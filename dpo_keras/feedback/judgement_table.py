"""The judgements that hold, as arrays."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dpo_keras.feedback.store import Store

FIRST, SECOND, TIE, BOTH_BAD = range(4)
LABELS = ("first", "second", "tie", "both bad")


@dataclass(frozen=True)
class Table:
    """Judgements, one an entry of each array; skips are counted apart.

    Args:
        annotators: names, in the order of `annotator`.
        groups: theirs.
        skipped: how many pairs each skipped.
        pairs: ids, in the order of `pair`.
        lengths: `[pairs, 2]` characters of the first and second response.
        makers: `[pairs, 2]` labels, or None.
        prompts: `[pairs]` ids of prompts.
        responses: `[pairs, 2]` ids.
        annotator: `[N]` index into `annotators`.
        pair: `[N]` index into `pairs`.
        label: `[N]` FIRST, SECOND, TIE or BOTH_BAD.
        first_on_left: `[N]` bool.
        seconds: `[N]`, NaN where the time is not known.
        strength: `[N]`, 0 where it was not said.
        repeat: `[N]` bool: the pair was shown to the same person again.
        gold: `[N]` FIRST or SECOND where the answer is known, else -1.
    """

    annotators: tuple[str, ...]
    groups: tuple[str | None, ...]
    skipped: np.ndarray
    pairs: np.ndarray
    lengths: np.ndarray
    makers: list[tuple[str | None, str | None]]
    prompts: np.ndarray
    responses: np.ndarray
    annotator: np.ndarray
    pair: np.ndarray
    label: np.ndarray
    first_on_left: np.ndarray
    seconds: np.ndarray
    strength: np.ndarray
    repeat: np.ndarray
    gold: np.ndarray

    def __len__(self) -> int:
        """Judgements."""
        return len(self.label)

    def keep(self, mask: np.ndarray) -> Table:
        """The same table with some of the judgements.

        Args:
            mask: `[N]` bool.
        """
        names = ("annotator", "pair", "label", "first_on_left", "seconds", "strength", "repeat")
        kept: dict[str, Any] = {name: getattr(self, name)[mask] for name in (*names, "gold")}
        return replace(self, **kept)

    def work(self) -> Table:
        """Without hidden checks and repeats: the judgements that become preferences."""
        return self.keep(~self.repeat & (self.gold < 0))

    def counts(self) -> np.ndarray:
        """`[pairs, 4]`: how often each label was given."""
        counts = np.zeros((len(self.pairs), len(LABELS)), np.int64)
        np.add.at(counts, (self.pair, self.label), 1)
        return counts


def read_table(store: Store) -> Table:
    """Reads what holds in a store.

    Args:
        store: open.
    """
    rows = store.database.rows
    people = rows("SELECT id, name, grp FROM annotators ORDER BY id")
    position = {row["id"]: index for index, row in enumerate(people)}
    skipped = np.zeros(len(people), np.int64)
    for row in rows(
        "SELECT annotator, count(*) FROM presentations WHERE state = 'skipped' GROUP BY annotator"
    ):
        skipped[position[row[0]]] = row[1]
    pairs = rows(
        "SELECT p.id, p.prompt, p.first, p.second, length(a.content) AS one, "
        "length(b.content) AS two, a.maker AS maker, b.maker AS other FROM pairs p "
        "JOIN responses a ON a.id = p.first JOIN responses b ON b.id = p.second ORDER BY p.id"
    )
    place = {row["id"]: index for index, row in enumerate(pairs)}
    found = rows(
        "SELECT p.annotator, p.pair, p.first_on_left, p.repeat, c.verdict, c.winner, c.seconds, "
        "c.strength, q.first, q.gold FROM current c JOIN presentations p ON p.id = c.presentation "
        "JOIN pairs q ON q.id = p.pair WHERE c.verdict <> 'skip' ORDER BY c.id"
    )
    other = {"tie": TIE, "both_bad": BOTH_BAD}
    labels = [
        other.get(row["verdict"], FIRST if row["winner"] == row["first"] else SECOND)
        for row in found
    ]
    gold = [
        -1 if row["gold"] is None else FIRST if row["gold"] == row["first"] else SECOND
        for row in found
    ]
    seconds = [np.nan if row["seconds"] is None else row["seconds"] for row in found]
    return Table(
        annotators=tuple(row["name"] for row in people),
        groups=tuple(row["grp"] for row in people),
        skipped=skipped,
        pairs=np.array([row["id"] for row in pairs], np.int64),
        lengths=np.array([(row["one"], row["two"]) for row in pairs], np.int64).reshape(-1, 2),
        makers=[(row["maker"], row["other"]) for row in pairs],
        prompts=np.array([row["prompt"] for row in pairs], np.int64),
        responses=np.array([(r["first"], r["second"]) for r in pairs], np.int64).reshape(-1, 2),
        annotator=np.array([position[row["annotator"]] for row in found], np.int64),
        pair=np.array([place[row["pair"]] for row in found], np.int64),
        label=np.array(labels, np.int64),
        first_on_left=np.array([bool(row["first_on_left"]) for row in found], bool),
        seconds=np.array(seconds, np.float64),
        strength=np.array([row["strength"] or 0 for row in found], np.int64),
        repeat=np.array([bool(row["repeat"]) for row in found], bool),
        gold=np.array(gold, np.int64),
    )
