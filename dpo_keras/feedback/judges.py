"""Judges: whoever, or whatever, says which of two responses is better.

A judge is an annotator of the store. Its verdicts are judgements like a person's, so that agreement,
position bias and length bias are measured alike.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.store import Store
from dpo_keras.utils import JSON

AT_ONCE = 64  # presentations that a judge holds


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses, in the order in which a judge sees them."""

    prompt: JSON  # text, or a list of role/content mappings
    first: str
    second: str


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a judge says: `preference` is P(first is better) in [0, 1], 0.5 a tie."""

    preference: float
    reason: str | None = None

    def __post_init__(self) -> None:
        """Check the rule."""
        number = isinstance(self.preference, int | float) and math.isfinite(self.preference)
        if not number or not 0 <= self.preference <= 1:
            rule = "must be a number in [0, 1]"
            raise InputError(InputProblem("preference", rule, self.preference))


class Judge(ABC):
    """Something that compares responses.

    Args:
        name: of the annotator that it is in the store.
    """

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def judge(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict]]:
        """Yield the place and the verdict of each comparison, as they become known.

        Raises:
            InputError: the judge cannot go on. What it has yielded is kept.
        """


def ask_judge(
    store: Store,
    judge: Judge,
    limit: int | None = None,
    on_verdict: Callable[[int], object] | None = None,
) -> int:
    """Let a judge judge the store's open pairs; return how many it judged now.

    Each verdict is on the disk before the next is asked for. A call after a crash goes on where the
    last one stopped.

    Args:
        store: whose open pairs are judged.
        judge: who judges.
        limit: the most pairs to judge; None: all.
        on_verdict: called with the number judged so far.
    """
    annotator = store.judge_annotator(judge.name)
    done = 0
    while limit is None or done < limit:
        count = AT_ONCE if limit is None else min(AT_ONCE, limit - done)
        shown = store.next(annotator, count)
        if not shown:
            break
        asked = [Comparison(one.prompt, one.left, one.right) for one in shown]
        for place, verdict in judge.judge(asked):
            preferred = "left" if verdict.preference > 0.5 else "right"
            store.submit(
                annotator,
                shown[place].id,
                "tie" if verdict.preference == 0.5 else preferred,
                key=f"judge-{shown[place].id}",
                reason=verdict.reason,
            )
            done += 1
            if on_verdict is not None:
                on_verdict(done)
    return done
