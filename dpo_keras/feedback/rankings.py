"""Rankings: several responses judged at once, kept as the judgements of all their pairs.

So agreement, bias and export of pairs need to know nothing of rankings; `to_rankings` puts the
judgements of one together again.
"""

import itertools
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback import judgements
from dpo_keras.feedback.assignment import Settings, in_order, in_sides
from dpo_keras.feedback.judgements import Conflict, Receipt, Submission, is_whole
from dpo_keras.utils import JSON


@dataclass(frozen=True, slots=True)
class RankingSubmission:
    """A ranking as it was sent."""

    presentation: int  # what was shown
    ranks: JSON  # for each response in the order shown, 1 for the best; equal ranks tie
    key: str  # unique to this ranking; a repeated key returns the first receipt again
    choice: str | None = None  # "skip" or "both_bad" in place of ranks
    reason: str | None = None  # in words
    seconds: float | None = None  # time the person took

    def choices(self, count: int) -> Iterator[str]:
        """Yield the choice of each pair of `count` responses, in the order of combinations."""
        if self.choice in ("skip", "both_bad"):
            yield from [self.choice] * (count * (count - 1) // 2)
            return
        ranks = self.ranks
        whole = isinstance(ranks, list) and all(type(rank) is int for rank in ranks)
        if not whole or len(ranks) != count or not set(ranks) <= set(range(1, count + 1)):
            rule = f"must be {count} whole numbers from 1 to {count}, one for each response"
            raise InputError(InputProblem("ranks", rule, ranks))
        for one, other in itertools.combinations(ranks, 2):
            yield "tie" if one == other else "left" if one < other else "right"


def submit(
    connection: sqlite3.Connection,
    settings: Settings,
    now: float,
    annotator: int,
    ranking: RankingSubmission,
) -> Receipt:
    """Append the judgements of all pairs of a ranking, in a transaction."""
    rows = _pairs_of(connection, annotator, ranking.presentation)
    if len(rows) < 2:
        raise Conflict("this is no ranking that was given to you; the page fetches one that was.")
    order = in_order(rows)
    by_sides = {in_sides(row): row["id"] for row in rows}
    receipts: list[Receipt] = []
    for sides, choice in zip(
        itertools.combinations(order, 2), ranking.choices(len(order)), strict=True
    ):
        presentation = by_sides[sides]
        submission = Submission(
            presentation,
            choice,
            f"{ranking.key}-{presentation}",
            reason=None if receipts else ranking.reason,
            seconds=None if ranking.seconds is None else ranking.seconds / len(rows),
        )
        receipts.append(judgements.submit(connection, settings, now, annotator, submission))
    return Receipt(receipts[-1].judgement, ranking.presentation, receipts[-1].again)


def undo(
    connection: sqlite3.Connection,
    settings: Settings,
    now: float,
    annotator: int,
    presentation: int,
    key: str,
) -> Receipt:
    """Take back the judgement of a pair, or those of the ranking that it belongs to."""
    rows = _pairs_of(connection, annotator, presentation)
    if len(rows) < 2:
        return judgements.undo(connection, settings, now, annotator, presentation, key)
    receipts = [
        judgements.undo(connection, settings, now, annotator, row["id"], f"{key}-{row['id']}")
        for row in rows
    ]
    return Receipt(receipts[-1].judgement, presentation, receipts[-1].again)


def _pairs_of(
    connection: sqlite3.Connection, annotator: int, presentation: object
) -> list[sqlite3.Row]:
    """Return the presentations of the ranking that one of them names; none for a pair."""
    return connection.execute(
        "SELECT p.id, p.first_on_left, pairs.first, pairs.second FROM presentations p "
        "JOIN pairs ON pairs.id = p.pair WHERE p.annotator = ?1 AND p.ranking = "
        "(SELECT ranking FROM presentations WHERE id = ?2 AND annotator = ?1) ORDER BY p.id",
        (annotator, presentation if is_whole(presentation) else -1),
    ).fetchall()
