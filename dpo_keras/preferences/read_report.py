"""What reading found: counts, every problem by line, rule and value, and warnings."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import as_number, shown
from dpo_keras.utils import JSON

SHOWN = 20  # groups of problems in the message of an `InvalidPreferences`
PLACES = 3  # lines that are named of a group


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule (the record was dropped) or one warning (it was kept).

    Attributes:
        source: the file, or "records" for a Python iterable.
        line: line in a text file; number of the record in a table, a JSON list or an iterable; each
            from 1. None where the problem concerns all of them.
        rule: short name of the rule, the same for all problems of a kind.
        field: the column.
        value: what was found there.
        message: what is wrong and what is expected.
        unit: what `line` counts: "line" of a text file, or "record".
    """

    source: str
    line: int | None
    rule: str
    field: str
    value: object
    message: str
    unit: str = "line"

    def __str__(self) -> str:
        return f"{place(self.source, self.unit, self.line)}: {self.message}"

    def as_dict(self) -> dict[str, JSON]:
        """Return the problem for JSON; of a long or strange value, its beginning."""
        plain = self.value is None or isinstance(self.value, bool | int | str)
        plain = (
            plain and len(str(self.value)) <= 200 and encodable(str(self.value)) == str(self.value)
        )
        value = self.value if plain else shown(self.value, 200)
        return asdict(replace(self, value=value, source=encodable(self.source)))


def place(source: str, unit: str, line: int | None) -> str:
    """Return where something is: "pairs.csv line 3"; of a Python iterable, "record 3"."""
    names = "" if source in ("", "records") and line is not None else source
    return names if line is None else f"{names} {unit} {line:,}".strip()


def encodable(text: str) -> str:
    """Return a text, such as the name of a file, without what UTF-8 cannot hold."""
    return text.encode("utf-8", "backslashreplace").decode()


@dataclass(frozen=True, slots=True)
class ProblemGroup:
    """Problems of one source, rule and column, to be told in one sentence.

    Attributes:
        source: the file, or "records" for a Python iterable.
        places: "line 3" or "lines 1, 7, 9 and 805 more"; empty where it concerns the whole source.
        field: the column.
        message: what is wrong, with the range of the values found.
    """

    source: str
    places: str
    field: str
    message: str

    def __str__(self) -> str:
        names = "" if self.source == "records" and self.places else self.source
        return f"{' '.join(filter(None, (names, self.places)))}: {self.message}"


def grouped(problems: Iterable[Problem]) -> list[ProblemGroup]:
    """Return problems in groups of one source, rule and column, in the order of the first ones.

    Example:
        >>> message = "weight must be in [0, 1e6], got {}."
        >>> for group in grouped(
        ...     Problem("a.csv", n, "weight out of range", "weight", -n, message.format(-n))
        ...     for n in range(1, 9)
        ... ):
        ...     print(group)
        a.csv lines 1, 2, 3 and 5 more: weight must be in [0, 1e6], got -8 … -1.
    """
    groups: dict[tuple[str, str, str, bool], list[Problem]] = {}
    for problem in problems:
        key = (problem.source, problem.rule, problem.field, problem.line is None)
        groups.setdefault(key, []).append(problem)
    return [
        ProblemGroup(source, _places(group), field, _message(group) + _scale_hint(group))
        for (source, _, field, _), group in groups.items()
    ]


def _places(group: Sequence[Problem]) -> str:
    """Return the first lines of a group: "line 3", "lines 1, 7, 9 and 805 more"."""
    lines = list(dict.fromkeys(problem.line for problem in group if problem.line is not None))
    if not lines:
        return ""
    named = ", ".join(f"{line:,}" for line in lines[:PLACES])
    more = f" and {len(lines) - PLACES:,} more" if len(lines) > PLACES else ""
    return f"{group[0].unit}{'s' if len(lines) > 1 else ''} {named}{more}"


def _message(group: Sequence[Problem]) -> str:
    """Return one message for all: that of the first, with the values of the others."""
    first = group[0]
    messages = {problem.message for problem in group}
    if len(messages) == 1:
        return first.message
    parts = {tuple(p.message.split(f", got {shown(p.value)}", 1)) for p in group}
    common = parts.pop()
    if parts or len(common) < 2:
        return f"{first.message} (that is {first.unit} {first.line}; the others are alike)"
    values = [shown(problem.value) for problem in group]
    numbers = [as_number(problem.value) for problem in group]
    known = [number for number in numbers if number is not None and not math.isnan(number)]
    if len(known) == len(group):
        found = " … ".join(values[numbers.index(end)] for end in (min(known), max(known)))
    else:
        different = list(dict.fromkeys(values))
        others = f" and {len(different) - PLACES:,} other values" if different[PLACES:] else ""
        found = ", ".join(different[:PLACES]) + others
    return f"{common[0]}, got {found}{common[1]}"


def _scale_hint(group: Sequence[Problem]) -> str:
    """Return how to convert preferences that are all out of range, where the scale is plain."""
    if group[0].rule not in ("preference out of range", "desirable out of range"):
        return ""
    numbers = [as_number(problem.value) for problem in group]
    for low, high, hint in _SCALES:
        if all(number is not None and low <= number <= high for number in numbers):
            return f" {hint}"
    return ""


# Bounds of preferences that are out of range, and what the column then probably holds.
_SCALES = (
    (1.0, 2.0, "For labels 1 (the first is better) and 2, give 2 - label."),
    (-1.0, 0.0, "For labels 1 (the first is better) and -1, give (label + 1) / 2."),
    (1.0, 100.0, "For percentages, give them divided by 100."),
)


def merged(problems: list[Problem], everywhere: set[str], records: int) -> list[Problem]:
    """Make one problem of a column that all records lack: 2,000 times the same helps nobody."""
    found: list[Problem] = []
    for problem in problems:
        if problem.rule != "missing column" or problem.field not in everywhere:
            found.append(problem)
        elif not any(p.field == problem.field and p.line is None for p in found):
            message = f"in all {records:,} records {problem.message}"
            found.append(replace(problem, line=None, message=message))
    return found


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
        with_images: kept records whose prompt has images.
        most_images: images of the prompt that has most.

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
    with_images: int = 0
    most_images: int = 0

    @property
    def dropped(self) -> int:
        """Number of records that did not become pairs."""
        return self.read - self.kept

    def as_dict(self) -> dict[str, JSON]:
        """Return the whole report, for JSON."""
        return {
            "sources": list(map(encodable, self.sources)),
            "read": self.read,
            "kept": self.kept,
            "dropped": self.dropped,
            "layouts": dict(self.layouts),
            "problems": [problem.as_dict() for problem in self.problems],
            "warnings": [problem.as_dict() for problem in self.warnings],
            "omitted": dict(self.omitted),
            "with_images": self.with_images,
            "most_images": self.most_images,
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
            values.get("with_images", 0),
            values.get("most_images", 0),
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
        groups = grouped(report.problems)
        messages = [headline, *map(str, groups[:SHOWN])]
        more = max(len(groups) - SHOWN, 0)
        if more:
            messages.append(f"... and {more:,} more rules broken.")
        if report.omitted:
            messages.append(f"... and {sum(report.omitted.values()):,} more problems.")
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
        units = {problem.unit for problem in placed}
        word = units.pop() if len(units) == 1 else "place"
        plural = "s" if len(placed) > 1 else ""
        lines.append(f"{rule}: {len(group) + unlisted:,} ({word}{plural} {', '.join(names)}{more})")
    return lines
