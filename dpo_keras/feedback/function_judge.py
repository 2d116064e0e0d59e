"""A Python function as a judge: of two responses, or of one at a time."""

from __future__ import annotations

import importlib
import inspect
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Self, SupportsFloat

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.comparisons import Comparison, Judge, NoVerdict, Verdict, prompt_words
from dpo_keras.utils.text import did_you_mean, shortened

RETURNS = ("preference", "score")


class FunctionJudge(Judge):
    """A function that compares two responses, or scores one.

        (prompt, first, second) -> P(first is better) in [0, 1], or a `Verdict`
        (prompt, response) -> score; the higher one wins, equal ones tie

    Args:
        function: takes a prompt (text, or a list of role/content mappings) and texts.
        name: of the annotator that it is in the store.
        returns: "preference" or "score"; None goes by the number of parameters, 3 or 2.

    Raises:
        InputError: the function takes neither two nor three arguments.

    Example:
        >>> shorter = FunctionJudge(lambda prompt, response: -len(response), "shorter")
        >>> list(shorter.judge([Comparison("Hi!", "Hello.", "Good afternoon.")]))
        [(0, Verdict(preference=1.0, reason=None))]
    """

    def __init__(self, function: Callable[..., Any], name: str, returns: str | None = None):
        super().__init__(name)
        if returns is not None and returns not in RETURNS:
            rule = f"must be one of {', '.join(RETURNS)}, or null"
            raise InputError(InputProblem("returns", rule, returns))
        self.function = function
        self.returns = returns or _returns(function)

    @classmethod
    def named(cls, function: str, name: str | None = None, returns: str | None = None) -> Self:
        """Make the judge of a function's name, `module:function`."""
        return cls(load_function(function), name or function[:100], returns)

    def judge(self, comparisons: Sequence[Comparison]) -> Iterator[tuple[int, Verdict | NoVerdict]]:
        """Yield the verdicts in the order of the comparisons.

        Raises:
            InputError: the function raised, or returned no such number; the pair is named.
        """
        for place, asked in enumerate(comparisons):
            yield place, self._verdict(asked)

    def _verdict(self, asked: Comparison) -> Verdict:
        if self.returns == "preference":
            given = self._call(asked.prompt, asked.first, asked.second)
            if isinstance(given, Verdict):
                return given
            preference = _number(given)
            if preference is None or not 0 <= preference <= 1:
                raise self._problem(asked.prompt, f"must return a number in [0, 1]{_got(given)}")
            return Verdict(preference)
        first, second = (
            self._score(asked.prompt, asked.first),
            self._score(asked.prompt, asked.second),
        )
        return Verdict(0.5 if first == second else float(first > second))

    def _score(self, prompt: Any, response: str) -> float:
        given = self._call(prompt, response)
        score = _number(given)
        if score is None:
            raise self._problem(prompt, f"must return a finite number{_got(given)}")
        return score

    def _call(self, prompt: Any, *responses: str) -> Any:
        try:
            return self.function(prompt, *responses)
        except Exception as error:
            words = shortened(f"{type(error).__name__}: {error}", 300)
            raise self._problem(prompt, f"raised {words}") from error

    def _problem(self, prompt: Any, what: str) -> InputError:
        name = getattr(self.function, "__qualname__", self.name)
        rule = f": {name} {what}; at the prompt {prompt_words(prompt)}."
        return InputError(InputProblem("function", rule))


def _number(given: SupportsFloat) -> float | None:
    """Return a finite number, also of NumPy or TensorFlow; None where it is none."""
    try:
        number = math.nan if isinstance(given, str) else float(given)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def _got(given: Any) -> str:
    return f", got {shortened(repr(given), 60)}"


def _returns(function: Callable[..., Any]) -> str:
    for returns, count in (("score", 2), ("preference", 3)):
        try:
            inspect.signature(function).bind(*range(count))
        except (TypeError, ValueError):  # built-in functions may have no signature
            continue
        return returns
    rule = "must take (prompt, first, second) or (prompt, response)"
    raise InputError(InputProblem("function", rule, getattr(function, "__qualname__", function)))


def load_function(name: str) -> Callable[..., Any]:
    """Import a function by `module:function`; modules of the current folder are found too.

    Raises:
        InputError: there is no such module or function, or its import fails.

    Example:
        >>> load_function("dpo_keras.preferences.quickstart_data:judge").__name__
        'judge'
    """
    module_name, colon, path = name.partition(":")
    if not (colon and module_name and path):
        raise InputError(InputProblem("function", "must be module:function", name))
    folder = str(Path.cwd())
    sys.path.append(folder)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if not f"{module_name}.".startswith(f"{error.name}."):
            raise _not_imported(module_name, error) from error
        rule = f"must name a module that can be imported; there is no {error.name}"
        hint = "Modules are looked for in the current folder and where Python finds packages."
        raise InputError(InputProblem("function", rule, name, hint)) from error
    except Exception as error:
        raise _not_imported(module_name, error) from error
    finally:
        sys.path.remove(folder)
    for part in path.split("."):
        if not hasattr(found, part):
            near = did_you_mean(part, [other for other in dir(found) if other[:1] != "_"])
            rule = f"must name a function of {module_name}, which has no {part}"
            raise InputError(InputProblem("function", rule, name, near))
        found = getattr(found, part)
    if not callable(found):
        raise InputError(InputProblem("function", "must name something that can be called", name))
    return found


def _not_imported(module: str, error: BaseException) -> InputError:
    words = shortened(f"{type(error).__name__}: {error}", 300)
    return InputError(InputProblem("function", f": the import of {module} failed: {words}"))
