"""Records of opened sources become pairs, one after the other, and the report is kept."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import NamedTuple, TypeAlias

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.audit import RepeatFinder
from dpo_keras.preferences.feedback_log import FEEDBACKS
from dpo_keras.preferences.pair import Fault, InvalidPair, PreferencePair, Text
from dpo_keras.preferences.rated_response import RatedResponse
from dpo_keras.preferences.read_report import (
    InvalidPreferences,
    Problem,
    ReadReport,
    encodable,
    merged,
    place,
)
from dpo_keras.preferences.record_kinds import COLUMNS, Record, mixed_kinds, read_records
from dpo_keras.preferences.records import LAYOUTS
from dpo_keras.utils import JSON

# (line, record), with a `Fault` in place of a record that cannot be read.
Records: TypeAlias = Iterator[tuple[int | None, JSON]]
FORMATS = ("jsonl", "json", "csv", "parquet")
SMALLEST = 1.2e-38  # weights below it are 0 in float32
# So many preferences out of range, and such a share of all, are no mistakes of single records.
OFF_SCALE, OFF_SCALE_SHARE = 10, 0.05
OFF_SCALE_RULES = ("preference out of range", "desirable out of range")
LISTED = 1000  # problems and warnings of each kind that the report of a stream lists


class CutOff(Exception):  # noqa: N818 (it is no error where `allow_truncated` is set)
    """A file ends in the middle of a record, or cannot be read from some place on."""


class Source(NamedTuple):
    """One opened source.

    `cells` tells whether its values are CSV cells, `unit` what its records are counted in: lines of
    a text file, or records. Relative paths in its records begin at `folder`.
    """

    name: str
    records: Records
    cells: bool = False
    unit: str = "record"
    folder: str = ""


@dataclass(frozen=True)
class Reading:
    """How sources are read.

    `feedback` is what is taken of a feedback log, "choices" or "thumbs"; None where it has one.
    `unused` counts the columns and message keys that are ignored; `cut_off` lists the files of
    which only a part could be read.
    """

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    allow_truncated: bool = False
    feedback: str | None = None
    unused: Counter[str] = field(default_factory=Counter)
    cut_off: list[Problem] = field(default_factory=list)

    def check(self) -> list[InputProblem]:
        """Return what is wrong with format and columns."""
        problems = []
        if self.format not in ("auto", *FORMATS):
            must = f"must be one of auto, {', '.join(FORMATS)}"
            problems.append(InputProblem("format", must, self.format))
        if self.feedback not in (None, *FEEDBACKS):
            must = f"must be one of {', '.join(FEEDBACKS)}, or None"
            problems.append(InputProblem("feedback", must, self.feedback))
        for ours, theirs in (self.columns or {}).items():
            if ours not in COLUMNS:
                known = ", ".join(sorted(COLUMNS))
                problems.append(InputProblem("columns", f"has {ours!r}, which is none of {known}"))
            if not isinstance(theirs, str) or not theirs:
                must = "must name a column of the data"
                problems.append(InputProblem(f"columns.{ours}", must, theirs))
        if len(self.renaming) < len(self.columns or {}):
            must = "must name each column once"
            problems.append(InputProblem("columns", must, dict(self.columns or {})))
        return problems

    @cached_property
    def renaming(self) -> dict[str, str]:
        """The source's name of a column to ours."""
        return {theirs: ours for ours, theirs in (self.columns or {}).items()}

    def our_names(self, header: Iterable[str]) -> list[str]:
        """Return a header in our names; a column in the way of a renamed one becomes unused."""
        names = list(header)
        taken = self.renaming.values() - self.renaming.keys() | self._other_layout(names)
        return [
            self.renaming.get(name, f"unused {name}" if name in taken else name) for name in names
        ]

    def _other_layout(self, header: list[str]) -> set[str]:
        """Return the columns of the layout that `columns` leaves, where it names one of the two."""
        chosen, compared = (set(names) for names in LAYOUTS.values())
        ours = set(self.columns or ())
        if ours & compared and not ours & chosen:
            return chosen
        left = (compared & set(header)) - self.renaming.keys()
        if left and ours & chosen and not ours & compared:
            return left | ({"preference"} - ours)  # it compares the columns that are left
        return set()

    def renamed(self, record: JSON) -> JSON:
        """Return a record with our column names; anything but a mapping as it is."""
        if self.columns and isinstance(record, PreferencePair | RatedResponse):
            must = (
                f"({', '.join(self.columns)}) have no effect on records that are pairs already; "
                "leave them out"
            )
            raise InputError(InputProblem("columns", must))
        if not self.columns or not isinstance(record, Mapping):
            return record
        return dict(zip(self.our_names(record), record.values(), strict=True))

    def note_cut_off(self, path: str, unit: str, last: int, count: int, error: Exception) -> None:
        """Note that a file ends too early or is damaged; raise unless that is allowed."""
        where = f"after {unit} {last:,}" if last else "from its beginning"
        reason = f"is cut off or damaged {where} ({error})"
        if not self.allow_truncated:
            raise InputError(
                f"{path} {reason}. Get the file again; to use only what can be read, give "
                "allow_truncated=True (in a configuration data.allow_truncated: true, on the "
                "command line --allow-truncated)."
            )
        message = f"the file {reason}: {count:,} records were read from it, the rest is lost."
        problem = Problem(path, last or None, "broken file", "file", None, message, unit)
        self.cut_off.append(problem)


class RecordStream(Iterable[Record]):
    """The records of opened sources, one after the other, never all of them in memory.

    The report lists `listed` problems and warnings of each kind and counts the others. None lists
    all, and duplicates with their text. `first` stops in each source after so many records.
    """

    def __init__(
        self,
        sources: Iterable[Source],
        reading: Reading,
        on_error: str = "report",
        limit: int | None = None,
        listed: int | None = LISTED,
        first: int | None = None,
    ):
        problems = reading.check()
        if on_error not in ("report", "fail"):
            problems.append(InputProblem("on_error", "must be 'report' or 'fail'", on_error))
        if limit is not None and (type(limit) is not int or limit < 1):
            problems.append(InputProblem("limit", "must be a whole number >= 1 or None", limit))
        if problems:
            raise InputError(problems)
        self.report = ReadReport()
        self._sources, self._reading, self._on_error = sources, reading, on_error
        self._limit, self._listed, self._first = limit, listed, first
        self._repeated_prompts: list[Problem] = []
        self._weighted = False
        self._out_of_range = 0

    def __iter__(self) -> Iterator[Record]:
        finder = RepeatFinder()
        sources: list[Source] = []
        source, lines = array("H"), array("q")
        chosen: list[Text] = []
        first: tuple[str, Record] | None = None
        for opened in self._sources:
            sources.append(opened)
            for line, pair in self._good(opened):
                here = place(opened.name, opened.unit, line)
                first = first or (here, pair)
                if type(pair) is not type(first[1]):
                    logged = bool(self.report.layouts["feedback log"])
                    raise InputError(mixed_kinds(*first, here, logged))
                self.report.kept += 1
                self.report.with_images += bool(pair.images)
                self.report.most_images = max(self.report.most_images, len(pair.images))
                self._weighted |= pair.weight > SMALLEST
                finder.add(pair)
                source.append(len(sources) - 1)
                lines.append(-1 if line is None else line)
                if self._listed is None:
                    chosen.append(pair.responses[0])
                self._note_repeated_prompt(opened, line, pair)
                yield pair
            if self.report.kept == self._limit:
                break
        self._judge()

        for index, rule, earlier in self._listed_repeats(finder):
            now, before = sources[source[index]], sources[source[earlier]]
            rated = first is not None and isinstance(first[1], RatedResponse)
            message = _repeat(rule, now, before, lines[earlier], rated)
            what = (rule, "response" if rated else "chosen", chosen[index] if chosen else None)
            problem = Problem(now.name, _known(lines[index]), *what, message, now.unit)
            self.report.warnings.append(problem)
        self.report.warnings += self._repeated_prompts + self._reading.cut_off
        if unused := self._reading.unused:
            counts = ", ".join(f"{name} ({count:,})" for name, count in unused.items())
            names, message = ", ".join(self.report.sources), f"not used: {counts}"
            self.report.warnings.append(Problem(names, None, "unused", "", None, message))

    def _good(self, source: Source) -> Iterator[tuple[int | None, Record]]:
        """Yield the good records of one source, and note what is wrong with the others."""
        report = self.report
        problems: list[Problem] = []
        parsed = 0
        unreadable = False
        lacking: Counter[str] = Counter()
        for line, record in islice(source.records, self._first):
            parsed += not isinstance(record, Fault)
            found = self._records_or_faults(record, source)
            if isinstance(found, list):
                for good in found:  # a line of a log may hold several, or none
                    report.read += 1
                    yield line, good
                    if report.kept == self._limit:
                        break
                if report.kept == self._limit:
                    break
                continue
            report.read += line is not None
            for fault in found:
                lacking[fault.field] += fault.rule == "missing column"
                self._out_of_range += fault.rule in OFF_SCALE_RULES
                unreadable |= line is None
                if self._listed is not None and len(problems) >= self._listed:
                    report.omitted[fault.rule] += 1
                    continue
                what = (fault.rule, fault.field, fault.value, encodable(fault.message))
                problems.append(Problem(source.name, line, *what, source.unit))
        report.sources.append(source.name)
        everywhere = {field for field, count in lacking.items() if count == parsed > 1}
        if everywhere:
            report.omitted.pop("missing column", None)
        report.problems += merged(problems, everywhere, parsed)
        if unreadable:  # other files make up for bad lines, but not for a whole file
            raise InvalidPreferences(f"{source.name}: no preference pair could be read:", report)

    def _records_or_faults(self, record: JSON, source: Source) -> list[Record] | tuple[Fault, ...]:
        if isinstance(record, Fault):
            return (record,)
        try:
            found, layout = read_records(
                record,
                feedback=self._reading.feedback,
                cells=source.cells,
                unused=self._reading.unused,
                folder=source.folder,
            )
        except InvalidPair as error:
            return error.faults
        self.report.layouts[layout] += 1
        return found

    def _note_repeated_prompt(self, source: Source, line: int | None, pair: Record) -> None:
        prompt = pair.prompt
        # A response may well begin with the one or two words of a short prompt.
        if not isinstance(prompt, str) or len(prompt) < 20:
            return
        if not all(text[: len(prompt)] == prompt for text in pair.responses):
            return
        rule = "response repeats prompt"
        if self._listed is not None and len(self._repeated_prompts) >= self._listed:
            self.report.omitted[rule] += 1
            return
        message = "the response begins with the whole prompt, which is scored with it."
        if len(pair.responses) > 1:
            message = "both responses begin with the whole prompt, which is scored with them."
        problem = Problem(source.name, line, rule, "prompt", None, message, source.unit)
        self._repeated_prompts.append(problem)

    def _judge(self) -> None:
        """Raise where nothing is good, or something is bad and nothing bad is allowed."""
        report = self.report
        names = ", ".join(report.sources)
        if not report.kept and not report.problems:
            lost = list(map(str, self._reading.cut_off))
            lost += [f"not used: {name} ({n:,})" for name, n in self._reading.unused.items()]
            raise InputError([f"{names}: there are no records in it.", *lost])
        if not report.kept:
            headline = f"{names}: no preference pair could be read"
            headline += f", all {report.read:,} records are bad:" if report.read > 1 else ":"
            raise InvalidPreferences(headline, report)
        self._check_scale(names)
        if self._reading.feedback and not report.layouts["feedback log"]:
            must = f"has no effect: {names} is no feedback log; leave it out"
            raise InputError(InputProblem("feedback", must, self._reading.feedback))
        if not self._weighted and self._first is None:
            raise InputError(
                f"{names}: the weight of all {report.kept:,} pairs is 0, so they would train "
                "nothing; give at least some a weight > 0, or leave the column out."
            )
        if report.problems and self._on_error == "fail":
            count = len(report.problems) + sum(report.omitted.values())
            raise InvalidPreferences(
                f"{names}: {report.dropped:,} of {report.read:,} records are bad, by "
                f"{count:,} problems (on_error='report' keeps the good ones):",
                report,
            )

    def _check_scale(self, names: str) -> None:
        """Raise where so many preferences are out of range that the others are misread too."""
        report, count = self.report, self._out_of_range
        if count < OFF_SCALE or count < report.read * OFF_SCALE_SHARE:
            return
        headline = (
            f"{names}: {count:,} of {report.read:,} records have a preference out of range, so "
            "the column has another scale, and the others would be misread too:"
        )
        raise InvalidPreferences(headline, report)

    def _listed_repeats(self, finder: RepeatFinder) -> list[tuple[int, str, int]]:
        """Return (index, rule, earlier index), in the order of the pairs."""
        repeats = []
        for rule, found in zip(("duplicate", "contradiction"), finder.find(), strict=True):
            listed = found[: self._listed]
            if omitted := len(found) - len(listed):
                self.report.omitted[rule] += omitted
            repeats += [(index, rule, earlier) for index, earlier in listed]
        return sorted(repeats, key=lambda repeat: repeat[0])


def _known(line: int) -> int | None:
    return None if line < 0 else line


def _repeat(rule: str, here: Source, before: Source, line: int, rated: bool) -> str:
    against = "rates otherwise than" if rated else "prefers the other response than"
    verb = "says the same as" if rule == "duplicate" else against
    other = place("" if here.name == before.name else before.name, before.unit, _known(line))
    return f"{verb} {other}, to the same prompt and {'response' if rated else 'responses'}."
