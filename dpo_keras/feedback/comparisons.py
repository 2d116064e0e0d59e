"""What a judge is asked, and what it says."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import Image
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses, in the order in which a judge sees them."""

    prompt: JSON  # text, or a list of role/content mappings
    first: str
    second: str
    images: tuple[Image, ...] = ()  # of the prompt

    def swapped(self) -> Comparison:
        """Return the comparison in the other order."""
        return replace(self, first=self.second, second=self.first)


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


@dataclass(frozen=True, slots=True)
class NoVerdict:
    """Why a judge cannot say which is better; the pair stays open for it."""

    reason: str


class Answers(Protocol):
    """Keeps what was paid for, by the hash of the question."""

    def answer(self, question: str) -> str | None:
        """Return a known answer, else None."""

    def keep_answer(self, question: str, content: str) -> None:
        """Keep an answer before it is used."""


class Judge(ABC):
    """Something that compares responses.

    Args:
        name: of the annotator that it is in the store.
    """

    def __init__(self, name: str):
        self.name = name

    @abstractmethod
    def judge(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict | NoVerdict]]:
        """Yield the place and the verdict of each comparison, as they become known.

        Raises:
            InputError: the judge cannot go on. What it has yielded is kept.
        """

    def use_answers(self, answers: Answers) -> None:  # noqa: B027  # few judges pay
        """Take answers that are paid for from there, and keep new ones there."""


def prompt_words(prompt: JSON) -> str:
    """Return the beginning of a prompt, or of its last message, in quotes."""
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    return repr(shortened(text, 60))
