"""What reading found: counts, every problem by line, rule and value, and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import shown


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule (the record was dropped) or one warning (it was kept).

    Attributes:
        source: the file, or "records" for a Python iterable.
        line: line in a text file, row in Parquet, place in an iterable, each from 1; None where
            it is about all of them.
        rule: the rule's name, a few words, the same for all problems of a kind.
        field: the column.
        value: what was found there.
        message: a sentence that says what is wrong and what is wanted.
    """

    source: str
    line: int | None
    rule: str
    field: str
    value: Any
    message: str

    def __str__(self) -> str:
        """Returns the problem as one line for people."""
        place = self.source if self.line is None else f"{self.source} line {self.line}"
        return f"{place}: {self.message}"

    def as_dict(self) -> dict[str, Any]:
        """Returns the problem for JSON; a long or strange value as its beginning."""
        plain = self.value is None or isinstance(self.value, bool | int | str)
        value = self.value if plain and len(str(self.value)) <= 200 else shown(self.value, 200)
        return {
            "source": self.source,
            "line": self.line,
            "rule": self.rule,
            "field": self.field,
            "value": value,
            "message": self.message,
        }


@dataclass(slots=True)
class ReadReport:
    """Counts and problems of one `read_preferences`.

    Attributes:
        sources: the files read.
        read: records seen (blank lines are none).
        kept: records that became pairs.
        problems: broken rules, in the order of the lines; one record may break several.
        warnings: what was kept but should be looked at: duplicates, contradictions, columns that
            are not used, prompts repeated in the responses.
        layouts: how many kept records came as "chosen/rejected" and as "response_a/response_b".
        omitted: problems and warnings that are only counted, by rule: of data that are streamed the
            first ones are listed, so that the report stays small.

    Example:
        >>> report = ReadReport(["pairs.jsonl"], read=3, kept=2)
        >>> report.problems.append(
        ...     Problem("pairs.jsonl", 2, "empty response", "chosen", "", "chosen must hold text.")
        ... )
        >>> print(report.summary())
        pairs.jsonl: 3 read, 2 kept, 1 dropped
          empty response: 1 (line 2)
    """

    sources: list[str] = field(default_factory=list)
    read: int = 0
    kept: int = 0
    problems: list[Problem] = field(default_factory=list)
    warnings: list[Problem] = field(default_factory=list)
    layouts: Counter[str] = field(default_factory=Counter)
    omitted: Counter[str] = field(default_factory=Counter)

    @property
    def dropped(self) -> int:
        """Records read and not kept."""
        return self.read - self.kept

    def as_dict(self) -> dict[str, Any]:
        """Returns everything, for JSON."""
        return {
            "sources": list(self.sources),
            "read": self.read,
            "kept": self.kept,
            "dropped": self.dropped,
            "layouts": dict(self.layouts),
            "problems": [problem.as_dict() for problem in self.problems],
            "warnings": [problem.as_dict() for problem in self.warnings],
            "omitted": dict(self.omitted),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ReadReport:
        """Makes the report again that `as_dict` made these values of."""
        return cls(
            values["sources"],
            values["read"],
            values["kept"],
            [Problem(**entry) for entry in values["problems"]],
            [Problem(**entry) for entry in values["warnings"]],
            Counter(values["layouts"]),
            Counter(values["omitted"]),
        )

    def summary(self) -> str:
        """Returns the counts, and each rule with how often and where, as plain text."""
        sources = ", ".join(self.sources) or "records"
        lines = [f"{sources}: {self.read:,} read, {self.kept:,} kept, {self.dropped:,} dropped"]
        lines += [f"  {line}" for line in by_rule(self.problems, omitted=self.omitted)]
        lines += [f"  warning: {line}" for line in by_rule(self.warnings, omitted=self.omitted)]
        return "\n".join(lines)


class InvalidPreferences(InputError):
    """Preference data that breaks rules; `report` holds every problem, the message the first.

    Args:
        headline: what is wrong as a whole.
        report: the full report.
        shown_problems: how many problems the message holds at most.
    """

    def __init__(self, headline: str, report: ReadReport, shown_problems: int = 20):
        self.report = report
        messages = [headline, *(str(problem) for problem in report.problems[:shown_problems])]
        more = max(len(report.problems) - shown_problems, 0) + sum(report.omitted.values())
        if more:
            messages.append(f"... and {more:,} more.")
        super().__init__(messages)


def by_rule(
    problems: Sequence[Problem], places: int = 5, omitted: Mapping[str, int] | None = None
) -> list[str]:
    """Returns one line for each rule: its name, how often it was broken, the first places.

    Args:
        problems: those that are listed.
        places: how many are named for each rule.
        omitted: how many more there were, by rule.

    Example:
        >>> by_rule([Problem("a.csv", n, "empty prompt", "prompt", "", "") for n in range(1, 9)])
        ['empty prompt: 8 (lines 1, 2, 3, 4, 5 and 3 more)']
    """
    groups: dict[str, list[Problem]] = {}
    for problem in problems:
        groups.setdefault(problem.rule, []).append(problem)
    several = len({problem.source for problem in problems}) > 1
    lines = []
    for rule, group in groups.items():
        placed = [problem for problem in group if problem.line is not None]
        if not placed:
            lines.append(f"{rule}: {'; '.join(problem.message for problem in group)}")
            continue
        names = [
            f"{problem.source}:{problem.line}" if several else str(problem.line)
            for problem in placed[:places]
        ]
        unlisted = (omitted or {}).get(rule, 0)
        rest = max(len(placed) - places, 0) + unlisted
        more = f" and {rest:,} more" if rest else ""
        word = "line" if len(placed) == 1 else "lines"
        lines.append(f"{rule}: {len(group) + unlisted:,} ({word} {', '.join(names)}{more})")
    return lines
