"""The error for input that the user can correct. The command line exits with code 2 on it."""

from __future__ import annotations

import enum
from collections.abc import Iterable
from typing import Any


class _NoValue(enum.Enum):
    """A value that was not given; an enum member stays itself when it is pickled."""

    NO_VALUE = enum.auto()


_NO_VALUE = _NoValue.NO_VALUE


class InputProblem(str):
    """One broken rule: its message, which carries the parts that it is made of.

    Args:
        argument: name of the argument, dotted for a part of it: `"beta"`, `"penalties.nll"`. Empty
            where no single argument is at fault; then `rule` is the whole message.
        rule: what the argument must be, as it follows the name: `"must be > 0"`. A rule that starts
            with a colon is a sentence of its own: `": no model is there."`.
        value: the value received. Omit it where it says nothing.
        hint: what to do, a sentence of its own.

    Example:
        >>> print(InputProblem("beta", "must be > 0", -1.0, "0.1 is a usual value."))
        beta must be > 0, got -1.0. 0.1 is a usual value.
        >>> print(InputProblem("beta", "must be > 0", -1.0).renamed("loss.beta"))
        loss.beta must be > 0, got -1.0.
    """

    argument: str
    rule: str
    value: Any
    hint: str

    def __new__(
        cls, argument: str, rule: str, value: Any = _NO_VALUE, hint: str = ""
    ) -> InputProblem:
        """Compose the message."""
        text = f"{argument}{'' if rule.startswith(':') else ' '}{rule}" if argument else rule
        if value is not _NO_VALUE:
            text += f", got {value!r}"
        if argument and not text.endswith((".", "?", ":")):
            text += "."
        problem = super().__new__(cls, f"{text} {hint}" if hint else text)
        problem.argument, problem.rule, problem.value, problem.hint = argument, rule, value, hint
        return problem

    def __reduce__(self) -> tuple[type[InputProblem], tuple[Any, ...]]:
        """Return how to make it again: copies and pickles keep the parts."""
        return InputProblem, (self.argument, self.rule, self.value, self.hint)

    def renamed(self, argument: str) -> InputProblem:
        """Return the problem under another name, such as that of a configuration's key."""
        return InputProblem(argument, self.rule, self.value, self.hint)


class InputError(ValueError):
    """Input (a file, a configuration, an argument) breaks a rule.

    All problems of one input are reported together, one a line.

    Args:
        problems: one problem or several; a plain string is a problem without an argument.

    Example:
        >>> raise InputError([InputProblem("beta", "must be > 0", -1.0), "The file is empty."])
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: beta must be > 0, got -1.0.
        The file is empty.
    """

    def __init__(self, problems: str | Iterable[str]):
        given = [problems] if isinstance(problems, str) else problems
        self.problems = [p if isinstance(p, InputProblem) else InputProblem("", p) for p in given]
        super().__init__("\n".join(self.problems))
