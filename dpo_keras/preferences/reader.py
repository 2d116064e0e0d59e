"""Records of sources, one after the other: judged, counted, and turned into pairs."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from dpo_keras.errors import InputError
from dpo_keras.preferences.audit import find_repeats
from dpo_keras.preferences.collection import Preferences
from dpo_keras.preferences.pair import Fault, InvalidPair, PreferencePair, Text
from dpo_keras.preferences.prompt_hashes import RepeatFinder
from dpo_keras.preferences.read_report import InvalidPreferences, Problem, ReadReport
from dpo_keras.preferences.records import read_record
from dpo_keras.preferences.sources import PathLike, Reading, Source, open_sources

LISTED = 1000  # problems and warnings of each kind that the report of a stream names


class PreferenceStream(Iterable[PreferencePair]):
    """The pairs of sources of any size, one after the other, never all of them in memory.

    Repeats are found by hashes, about 30 bytes per pair. The report lists the first problems and
    warnings of each kind, and counts the others in `omitted`.

    Args:
        source: as for `read_preferences`, as are all others.
        format: of the files.
        on_error: "fail" raises after the last record, with the problems of all.
        limit: stop after this many good records.
        columns: our name of a column to the one that the data have.
        data_dir: where TensorFlow Datasets keeps its data.

    Attributes:
        report: the `ReadReport`; complete when the pairs have been iterated over.

    Raises:
        InputError: as `read_preferences`; while iterating where it is about the records.

    Example:
        >>> stream = PreferenceStream([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
        >>> [pair.chosen for pair in stream], stream.report.kept
        ([' 4'], 1)
    """

    def __init__(
        self,
        source: PathLike | Sequence[PathLike] | Iterable[Any],
        *,
        format: str = "auto",
        on_error: str = "report",
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
        data_dir: PathLike | None = None,
    ):
        reading = Reading(format, columns, data_dir)
        self._stream = RecordStream(source, reading, on_error, limit, listed=LISTED)
        self.report = self._stream.report

    def __iter__(self) -> Iterator[PreferencePair]:
        """Iterates over the pairs; once."""
        stream, finder = self._stream, RepeatFinder()
        names: list[str] = []
        source, lines = array("H"), array("q")
        for name, line, pair in stream.good():
            if not names or names[-1] != name:
                names.append(name)
            finder.add(pair)
            source.append(len(names) - 1)
            lines.append(-1 if line is None else line)
            stream.note_repeated_prompt(name, line, pair)
            yield pair
        stream.judge()
        repeats = finder.find()
        for rule, found in zip(("duplicate", "contradiction"), repeats, strict=True):
            if len(found) > LISTED:
                self.report.omitted[rule] += len(found) - LISTED
        self.report.warnings += stream.warnings(
            [[tuple(both) for both in found[:LISTED].tolist()] for found in repeats],
            lambda index: (names[source[index]], None if lines[index] < 0 else lines[index], None),
        )


class RecordStream:
    """Reads sources record by record, and keeps the report."""

    def __init__(
        self,
        source: Any,
        reading: Reading,
        on_error: str,
        limit: int | None,
        listed: int | None = None,
    ):
        _check_arguments(reading, on_error, limit)
        self.source, self.reading = source, reading
        self.on_error, self.limit, self.listed = on_error, limit, listed
        self.report = ReadReport()
        self.repeated_prompts: list[Problem] = []

    def good(self) -> Iterator[tuple[str, int | None, PreferencePair]]:
        """Yields `(source, line, pair)` for every good record."""
        report = self.report
        for source in open_sources(self.source, self.reading):
            for line, pair in self._good_of(source):
                report.kept += 1
                if self.listed is None:
                    self.note_repeated_prompt(source.name, line, pair)
                yield source.name, line, pair
            if report.kept == self.limit:
                return

    def _good_of(self, source: Source) -> Iterator[tuple[int | None, PreferencePair]]:
        """Yields the good records of one source."""
        report = self.report
        problems: list[Problem] = []
        parsed = 0
        lacking: Counter[str] = Counter()
        for line, record in source.records:
            report.read += line is not None
            faults: tuple[Fault, ...] = ()
            if isinstance(record, Fault):
                faults = (record,)
            else:
                parsed += 1
                try:
                    pair, layout = read_record(
                        record, cells=source.cells, unused=self.reading.unused
                    )
                except InvalidPair as error:
                    faults = error.faults
            if not faults:
                report.layouts[layout] += 1
                yield line, pair
                if report.kept == self.limit:
                    break
                continue
            for fault in faults:
                lacking[fault.field] += fault.rule == "missing column"
                if self.listed is not None and len(problems) >= self.listed:
                    report.omitted[fault.rule] += 1
                    continue
                problems.append(
                    Problem(source.name, line, fault.rule, fault.field, fault.value, fault.message)
                )
        report.sources.append(source.name)
        everywhere = {field for field, count in lacking.items() if count == parsed > 1}
        if everywhere:
            report.omitted.pop("missing column", None)
        report.problems += _merged(problems, everywhere, parsed)

    def judge(self) -> None:
        """Raises where there is nothing good, or something bad and nothing bad allowed."""
        report = self.report
        names = ", ".join(report.sources)
        if not report.kept:
            if not report.problems:
                raise InputError(f"{names}: there are no records in it.")
            headline = f"{names}: no preference pair could be read"
            headline += f", all {report.read:,} records are bad:" if report.read > 1 else ":"
            raise InvalidPreferences(headline, report)
        if report.problems and self.on_error == "fail":
            count = len(report.problems) + sum(report.omitted.values())
            raise InvalidPreferences(
                f"{names}: {report.dropped:,} of {report.read:,} records are bad, by "
                f"{count:,} problems (on_error='report' keeps the good ones):",
                report,
            )

    def note_repeated_prompt(self, source: str, line: int | None, pair: PreferencePair) -> None:
        """Notes a pair whose responses repeat the prompt."""
        if not _repeats_prompt(pair):
            return
        rule = "response repeats prompt"
        if self.listed is not None and len(self.repeated_prompts) >= self.listed:
            self.report.omitted[rule] += 1
            return
        message = "both responses begin with the whole prompt, which is scored with them."
        self.repeated_prompts.append(Problem(source, line, rule, "prompt", None, message))

    def warnings(
        self,
        repeats: Sequence[Sequence[tuple[int, int]]],
        place: Callable[[int], tuple[str, int | None, Any]],
    ) -> Iterator[Problem]:
        """Yields what was kept but should be looked at.

        Args:
            repeats: duplicates and contradictions, as `find_repeats` returns them.
            place: source, line and chosen response of a pair.
        """
        duplicates, contradictions = repeats
        found = [("duplicate", "says the same as", *both) for both in duplicates]
        found += [("contradiction", "prefers the other response than", *both)
                  for both in contradictions]  # fmt: skip
        for rule, verb, index, earlier in sorted(found, key=lambda entry: entry[2]):
            source, line, chosen = place(index)
            other_source, other_line, _ = place(earlier)
            other = (
                f"line {other_line}"
                if source == other_source
                else f"{other_source} line {other_line}"
            )
            message = f"{verb} {other}, to the same prompt and responses."
            yield Problem(source, line, rule, "chosen", chosen, message)
        yield from self.repeated_prompts
        if unused := self.reading.unused:
            counts = ", ".join(f"{name} ({count:,})" for name, count in unused.items())
            yield Problem(
                ", ".join(self.report.sources), None, "unused", "", None, f"not used: {counts}"
            )


def _merged(problems: list[Problem], everywhere: set[str], records: int) -> list[Problem]:
    """Makes one problem of a column that all records lack: nobody wants 2,000 times the same."""
    merged: list[Problem] = []
    for problem in problems:
        if problem.rule != "missing column" or problem.field not in everywhere:
            merged.append(problem)
        elif not any(p.field == problem.field and p.line is None for p in merged):
            message = f"in all {records:,} records {problem.message}"
            merged.append(replace(problem, line=None, message=message))
    return merged


def _repeats_prompt(pair: PreferencePair) -> bool:
    prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
    if not (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)):
        return False
    # A response may well begin with a word or two that are all of a short prompt.
    return len(prompt) >= 20 and chosen.startswith(prompt) and rejected.startswith(prompt)


def _check_arguments(reading: Reading, on_error: str, limit: int | None) -> None:
    faults = reading.check()
    if on_error not in ("report", "fail"):
        faults.append(f"on_error must be 'report' or 'fail', got {on_error!r}.")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        faults.append(f"limit must be a whole number >= 1 or None, got {limit!r}.")
    if faults:
        raise InputError(faults)


def read_preferences(
    source: PathLike | Sequence[PathLike] | Iterable[Any],
    *,
    format: str = "auto",
    on_error: str = "report",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    data_dir: PathLike | None = None,
) -> Preferences:
    """Reads preference pairs, keeps the good ones, and reports everything that is wrong.

    Records have the columns `prompt, chosen, rejected`, or `prompt, response_a, response_b,
    preference` (P(a is better); below 0.5 the responses are swapped and it becomes 1 - it).
    Optional: `preference` (default 1), `weight`, `annotator`, `group`, `id`, `margin`. Prompts and
    responses are text or lists of role/content messages (in CSV: as JSON). Where `prompt` is
    missing and both responses are whole conversations, all up to the last assistant turn is the
    prompt. Which rules there are is told at the top of this module.

    Args:
        source: a path (.jsonl, .json, .csv, their .gz, .parquet, or a directory that
            `build_preferences` made), several paths, "tfds:NAME/CONFIG:SPLIT" (TensorFlow
            Datasets), "builtin:support" (the bundled quickstart data), or an iterable of mappings,
            such as `tfds.as_numpy(dataset)` or a Hugging Face dataset.
        format: of the files: "auto" (by suffix), "jsonl", "json", "csv" or "parquet".
        on_error: "report" keeps the good records, with the bad in `.report`; "fail" raises if
            there is any bad one.
        limit: stop after this many good records; None reads all.
        columns: our name of a column to the one that the data have, for instance
            `{"prompt": "question", "chosen": "answer_a", "rejected": "answer_b"}`.
        data_dir: where TensorFlow Datasets keeps its data; None: where it does by itself.

    Returns:
        `Preferences`; its `.report` counts and names what was dropped.

    Raises:
        InputError: if an argument is wrong, a file cannot be read, no record is good, or
            `on_error` is "fail" and one is bad. Where records were read it is an
            `InvalidPreferences`, whose `.report` holds every problem.

    Example:
        >>> pairs = read_preferences([
        ...     {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"},
        ...     {"prompt": "2 + 3 =", "chosen": "", "rejected": " 5", "weight": -1},
        ... ])
        >>> print(pairs.report.summary())
        records: 2 read, 1 kept, 1 dropped
          weight out of range: 1 (line 2)
          empty response: 1 (line 2)
    """
    stream = RecordStream(source, Reading(format, columns, data_dir), on_error, limit)
    pairs: list[PreferencePair] = []
    places: list[tuple[str, int | None, Text]] = []
    for name, line, pair in stream.good():
        pairs.append(pair)
        places.append((name, line, pair.chosen))
    stream.judge()
    repeats = find_repeats(pairs)
    stream.report.warnings += stream.warnings(repeats, lambda index: places[index])
    return Preferences(pairs, stream.report)
