"""What reading found: counts, every problem by line, rule and value, and warnings."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import shown
from dpo_keras.utils import JSON

SHOWN = 20  # problems in the message of an `InvalidPreferences`


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule (the record was dropped) or one warning (it was kept).

    Attributes:
        source: the file, or "records" for a Python iterable.
        line: line in a text file, row in Parquet, place in an iterable, each from 1; None where
            the problem concerns all of them.
        rule: short name of the rule, the same for all problems of a kind.
        field: the column.
        value: what was found there.
        message: what is wrong and what is expected.
    """

    source: str
    line: int | None
    rule: str
    field: str
    value: object
    message: str

    def __str__(self) -> str:
        place = self.source if self.line is None else f"{self.source} line {self.line}"
        return f"{place}: {self.message}"

    def as_dict(self) -> dict[str, JSON]:
        """Return the problem for JSON; of a long or strange value, its beginning."""
        plain = self.value is None or isinstance(self.value, bool | int | str)
        value = self.value if plain and len(str(self.value)) <= 200 else shown(self.value, 200)
        return asdict(replace(self, value=value))


@dataclass(slots=True)
class ReadReport:
    """Counts and problems of one `read_preferences`.

    Attributes:
        sources: the files read.
        read: records seen; blank lines are none.
        kept: records that became pairs.
        problems: broken rules, in the order of the lines; one record may break several.
        warnings: duplicates, contradictions, unused columns and prompts repeated in the responses:
            kept, but worth a look.
        layouts: how many kept records came as "chosen/rejected" and as "response_a/response_b".
        omitted: problems and warnings that are only counted, by rule: a stream lists the first
            ones, so that its report stays small.

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
        """Number of records that did not become pairs."""
        return self.read - self.kept

    def as_dict(self) -> dict[str, JSON]:
        """Return the whole report, for JSON."""
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
    def from_dict(cls, values: dict[str, JSON]) -> ReadReport:
        """Return the report that `as_dict` was called on."""
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
        """Return the counts, and how often and where each rule was broken, as plain text."""
        sources = ", ".join(self.sources) or "records"
        lines = [f"{sources}: {self.read:,} read, {self.kept:,} kept, {self.dropped:,} dropped"]
        lines += [f"  {line}" for line in by_rule(self.problems, self.omitted)]
        lines += [f"  warning: {line}" for line in by_rule(self.warnings, self.omitted)]
        return "\n".join(lines)


class InvalidPreferences(InputError):  # noqa: N818 (public name)
    """Preference data that breaks rules; `report` holds every problem, the message the first."""

    def __init__(self, headline: str, report: ReadReport):
        self.report = report
        messages = [headline, *(str(problem) for problem in report.problems[:SHOWN])]
        more = max(len(report.problems) - SHOWN, 0) + sum(report.omitted.values())
        if more:
            messages.append(f"... and {more:,} more.")
        super().__init__(messages)


def by_rule(problems: Sequence[Problem], omitted: Mapping[str, int], places: int = 5) -> list[str]:
    """Return one line for each rule: its name, how often it was broken, the first places."""
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
        names = [f"{p.source}:{p.line}" if several else str(p.line) for p in placed[:places]]
        unlisted = omitted.get(rule, 0)
        rest = max(len(placed) - places, 0) + unlisted
        more = f" and {rest:,} more" if rest else ""
        word = "line" if len(placed) == 1 else "lines"
        lines.append(f"{rule}: {len(group) + unlisted:,} ({word} {', '.join(names)}{more})")
    return lines
