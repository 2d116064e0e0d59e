"""The section of a configuration that says who compares responses."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from dpo_keras.app.config_sections import (
    Arguments,
    Count,
    Fraction,
    Natural,
    NotNegative,
    Positive,
    Section,
    key,
)
from dpo_keras.errors import InputProblem
from dpo_keras.utils import JSON

# The keys that each type of judge reads, beside `name`.
JUDGE_KEYS: dict[str, tuple[str, ...]] = {
    "people": (),
    "function": ("function", "returns"),
    "endpoint": (
        "url", "model", "rubric", "api_key_variable", "temperature", "options", "attempts",
        "timeout", "patience", "concurrency", "requests_per_minute",
    ),
}  # fmt: skip
_REQUIRED = {"function": ("function",), "endpoint": ("url", "model")}


class JudgeSettings(Section):
    """Who compares responses: the argument of `dpo_keras.feedback.judges.judge_of`."""

    type: Literal["people", "function", "endpoint"] = key(
        "people", "people on the annotation page, a Python function, or a chat endpoint"
    )
    name: Annotated[str, Field(min_length=1, max_length=100)] | None = key(
        None, "of the judge in the store; null: that of the function or the model"
    )
    function: str | None = key(
        None,
        "`module:function` that takes (prompt, first, second) and returns P(first is better), or "
        "takes (prompt, response) and returns a score",
    )
    returns: Literal["preference", "score"] | None = key(
        None, "what the function returns; null goes by the number of its parameters"
    )
    url: str | None = key(
        None, "of an OpenAI-compatible endpoint, such as `https://api.openai.com/v1`"
    )
    model: Annotated[str, Field(min_length=1)] | None = key(None, "its name at the endpoint")
    rubric: str | None = key(
        None, "what makes a response better, in words; null: correct, to the point, harmless"
    )
    api_key_variable: str | None = key(
        None, "the environment variable that holds the key; null sends none"
    )
    temperature: NotNegative | None = key(0.0, "null leaves it to the endpoint")
    options: Arguments = key({}, "further fields of the request, such as `{max_tokens: 300}`")
    attempts: Count = key(3, "how often a question is asked whose answer names no response")
    timeout: Positive = key(60.0, "seconds to wait for a connection, and for parts of an answer")
    patience: Positive = key(300.0, "seconds for which a failing endpoint is asked again")
    concurrency: Count = key(4, "the most requests at once")
    requests_per_minute: Positive | None = key(None, "the most; null: any number")
    error_rate: Fraction = key(0.0, "share of the pairs on which the verdict is turned round")
    error_seed: Natural = key(0, "chooses those pairs")

    def _broken_rules(self) -> Iterator[InputProblem]:
        for name in _REQUIRED.get(self.type, ()):
            if getattr(self, name) is None:
                yield InputProblem(name, f"is required with judge.type: {self.type}")

    def arguments(self) -> dict[str, JSON]:
        """Return the keyword arguments of the judge."""
        return {name: getattr(self, name) for name in ("name", *JUDGE_KEYS[self.type])}
