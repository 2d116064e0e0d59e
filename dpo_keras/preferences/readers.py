"""`read_preferences`: pairs out of files and Python records, with a report of what was wrong.

A record that breaks one of these rules is dropped; each broken rule is reported with its line:

- not JSON, not CSV, not UTF-8, broken file, wrong number of cells: it cannot be read;
- missing column, missing value, wrong type, unknown role, mixed forms: it is no comparison;
- not the assistant's turn, conversations differ: these are not two responses to one prompt;
- empty prompt, empty response, identical responses: there is nothing to learn from it;
- preference, weight or margin out of range: the number has no meaning.

These are warnings; the record is kept:

- duplicate: the same comparison with the same preference by the same annotator once more;
- contradiction: the same two responses with the opposite preference (a tie contradicts nothing);
- response repeats prompt: both responses begin with the whole prompt, which should stand once;
- unused: columns and message keys that nothing is done with.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeAlias

from dpo_keras.errors import InputError
from dpo_keras.preferences.audit import find_repeats
from dpo_keras.preferences.collection import Preferences
from dpo_keras.preferences.files import READERS, Records, file_format, read_file
from dpo_keras.preferences.records import read_record
from dpo_keras.preferences.report import InvalidPreferences, Problem, ReadReport
from dpo_keras.preferences.schema import Fault, InvalidPair, PreferencePair, shown
from dpo_keras.preferences.support import support_pairs

PathLike: TypeAlias = str | os.PathLike[str]
BUILTIN = {"builtin:support": support_pairs}


def read_preferences(
    source: PathLike | Sequence[PathLike] | Iterable[Any],
    *,
    format: str = "auto",
    on_error: str = "report",
    limit: int | None = None,
) -> Preferences:
    """Reads preference pairs, keeps the good ones, and reports everything that is wrong.

    Records have the columns `prompt, chosen, rejected`, or `prompt, response_a, response_b,
    preference` (P(a is better); below 0.5 the responses are swapped and it becomes 1 - it).
    Optional: `preference` (default 1), `weight`, `annotator`, `group`, `id`, `margin`. Prompts and
    responses are text or lists of role/content messages (in CSV: as JSON). Where `prompt` is
    missing and both responses are whole conversations, all up to the last assistant turn is the
    prompt. Which rules there are is told at the top of this module.

    Args:
        source: a path (.jsonl, .json, .csv, their .gz, .parquet), several paths,
            "builtin:support" (the bundled quickstart data), or an iterable of mappings, such as
            `tfds.as_numpy(dataset)` or a Hugging Face dataset.
        format: of the files: "auto" (by suffix), "jsonl", "json", "csv" or "parquet".
        on_error: "report" keeps the good records, with the bad in `.report`; "fail" raises if
            there is any bad one.
        limit: stop after this many good records; None reads all.

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
    _check_arguments(format, on_error, limit)
    reading = _Reading(limit)
    for name, records, cells in _sources(source, format, reading.unused):
        reading.add(name, records, cells)
        if len(reading.pairs) == limit:
            break
    return reading.finish(on_error)


class _Reading:
    """What has been read so far, over all sources."""

    def __init__(self, limit: int | None):
        self.limit = limit
        self.report = ReadReport()
        self.unused: Counter[str] = Counter()
        self.pairs: list[PreferencePair] = []
        self.places: list[tuple[str, int | None]] = []

    def add(self, source: str, records: Records, cells: bool) -> None:
        """Reads the records of one source."""
        problems: list[Problem] = []
        parsed = 0
        lacking: Counter[str] = Counter()
        for line, record in records:
            self.report.read += line is not None
            faults: tuple[Fault, ...] = ()
            if isinstance(record, Fault):
                faults = (record,)
            else:
                parsed += 1
                try:
                    pair, layout = read_record(record, cells=cells, unused=self.unused)
                except InvalidPair as error:
                    faults = error.faults
            if not faults:
                self.pairs.append(pair)
                self.places.append((source, line))
                self.report.layouts[layout] += 1
                if len(self.pairs) == self.limit:
                    break
                continue
            for fault in faults:
                lacking[fault.field] += fault.rule == "missing column"
                problems.append(
                    Problem(source, line, fault.rule, fault.field, fault.value, fault.message)
                )
        self.report.sources.append(source)
        everywhere = {field for field, count in lacking.items() if count == parsed > 1}
        self.report.problems += _merged(problems, everywhere, parsed)

    def finish(self, on_error: str) -> Preferences:
        """Adds the warnings, and raises where there is nothing good or nothing bad allowed."""
        report = self.report
        report.kept = len(self.pairs)
        names = ", ".join(report.sources)
        if not self.pairs:
            if not report.problems:
                raise InputError(f"{names}: there are no records in it.")
            headline = f"{names}: no preference pair could be read"
            headline += f", all {report.read:,} records are bad:" if report.read > 1 else ":"
            raise InvalidPreferences(headline, report)
        if report.problems and on_error == "fail":
            raise InvalidPreferences(
                f"{names}: {report.dropped:,} of {report.read:,} records are bad, by "
                f"{len(report.problems):,} problems (on_error='report' keeps the good ones):",
                report,
            )
        report.warnings += self._warnings()
        return Preferences(self.pairs, report)

    def _warnings(self) -> Iterator[Problem]:
        pairs = self.pairs
        duplicates, contradictions = find_repeats(pairs)
        found = [("duplicate", "says the same as", *both) for both in duplicates]
        found += [("contradiction", "prefers the other response than", *both)
                  for both in contradictions]  # fmt: skip
        for rule, verb, index, earlier in sorted(found, key=lambda entry: entry[2]):
            source, line = self.places[index]
            other_source, other_line = self.places[earlier]
            other = (
                f"line {other_line}"
                if source == other_source
                else f"{other_source} line {other_line}"
            )
            message = f"{verb} {other}, to the same prompt and responses."
            yield Problem(source, line, rule, "chosen", pairs[index].chosen, message)
        for (source, line), pair in zip(self.places, pairs, strict=True):
            if _repeats_prompt(pair):
                message = "both responses begin with the whole prompt, which is scored with them."
                yield Problem(source, line, "response repeats prompt", "prompt", None, message)
        if self.unused:
            counts = ", ".join(f"{name} ({count:,})" for name, count in self.unused.items())
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


def _sources(source: Any, format: str, unused: Counter[str]) -> Iterator[tuple[str, Records, bool]]:
    """Yields `(name, records, whether the values are CSV cells)` of each source."""
    if isinstance(source, str | os.PathLike):
        source = [source]
    elif isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise InputError(
            "source must be a path, a list of paths or an iterable of records, "
            f"got {shown(source)} ({type(source).__name__})."
        )
    if not _are_paths(source):
        yield "records", enumerate(source, 1), False
        return
    formats: dict[str, str] = {}
    faults: list[str] = []
    for path in map(os.fspath, source):
        if path in formats:
            faults.append(f"{path} is given twice.")
        elif path.startswith("builtin:"):
            formats[path] = "builtin"
            if path not in BUILTIN:
                faults.append(f"source must be one of {', '.join(BUILTIN)}, got {path!r}.")
        else:
            try:
                formats[path] = file_format(Path(path), format)
            except InputError as error:
                faults += error.problems
    if faults:
        raise InputError(faults)
    for path, kind in formats.items():
        if kind == "builtin":
            yield path, enumerate(BUILTIN[path](), 1), False
        else:
            yield path, read_file(Path(path), kind, unused), kind == "csv"


def _are_paths(source: Iterable[Any]) -> bool:
    return (
        isinstance(source, Sequence)
        and len(source) > 0
        and all(isinstance(item, str | os.PathLike) for item in source)
    )


def _check_arguments(format: str, on_error: str, limit: int | None) -> None:
    faults = []
    if format not in ("auto", *READERS):
        faults.append(f"format must be one of auto, {', '.join(READERS)}, got {format!r}.")
    if on_error not in ("report", "fail"):
        faults.append(f"on_error must be 'report' or 'fail', got {on_error!r}.")
    if limit is not None and (not isinstance(limit, int) or isinstance(limit, bool) or limit < 1):
        faults.append(f"limit must be a whole number >= 1 or None, got {limit!r}.")
    if faults:
        raise InputError(faults)
