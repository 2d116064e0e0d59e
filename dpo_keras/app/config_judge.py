"""The section of a configuration that says who compares responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dpo_keras.app.config_sections import Fraction, Natural, Section, key
from dpo_keras.errors import InputProblem
from dpo_keras.utils import JSON

# The keys of each type of judge, required ones first.
JUDGE_KEYS: dict[str, tuple[str, ...]] = {"people": (), "function": ("function", "returns")}
_REQUIRED = {"function": ("function",)}


class JudgeSettings(Section):
    """Who compares responses: the argument of `dpo_keras.feedback.judges.judge_of`."""

    type: Literal["people", "function"] = key(
        "people", "people on the annotation page, or a Python function"
    )
    name: Annotated[str, Field(min_length=1, max_length=100)] | None = key(
        None, "of the judge in the store; null: that of the function"
    )
    function: str | None = key(
        None,
        "`module:function` that takes (prompt, first, second) and returns P(first is better), or "
        "takes (prompt, response) and returns a score",
    )
    returns: Literal["preference", "score"] | None = key(
        None, "what the function returns; null goes by the number of its parameters"
    )
    error_rate: Fraction = key(0.0, "share of the pairs on which the verdict is turned round")
    error_seed: Natural = key(0, "chooses those pairs")

    def _broken_rules(self) -> Iterator[InputProblem]:
        for name in _REQUIRED.get(self.type, ()):
            if getattr(self, name) is None:
                yield InputProblem(name, f"is required with judge.type: {self.type}")

    def arguments(self) -> dict[str, JSON]:
        """Return the keyword arguments of the judge."""
        return {name: getattr(self, name) for name in ("name", *JUDGE_KEYS[self.type])}
