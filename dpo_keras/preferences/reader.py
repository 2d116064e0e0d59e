"""`read_preferences`: pairs from files, built directories, TensorFlow Datasets and own records."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeAlias, TypeGuard

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.collection import Preferences, Rankings, RatedResponses
from dpo_keras.preferences.file_formats import open_file
from dpo_keras.preferences.pair import PreferencePair, shown
from dpo_keras.preferences.quickstart_data import support_pairs, support_rankings
from dpo_keras.preferences.quickstart_thumbs import THUMBS, support_thumbs_of
from dpo_keras.preferences.ranked_responses import RankedResponses
from dpo_keras.preferences.rated_response import RatedResponse
from dpo_keras.preferences.read_report import ReadReport
from dpo_keras.preferences.record_kinds import Record
from dpo_keras.preferences.record_stream import LISTED, Reading, Records, RecordStream, Source
from dpo_keras.preferences.stored_preferences import StoredPreferences, is_built
from dpo_keras.preferences.tables import table_records
from dpo_keras.preferences.tfds_source import parse_name, read_tfds

PathLike: TypeAlias = str | os.PathLike[str]
BUILTIN: dict[str, Callable[[], Iterable[Record]]] = {
    "builtin:support": support_pairs,
    "builtin:support-rankings": support_rankings,
}


def read_preferences(
    source: PathLike | Sequence[PathLike] | Iterable[object],
    *,
    format: str = "auto",
    on_error: str = "report",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    data_dir: PathLike | None = None,
    allow_truncated: bool = False,
    feedback: str | None = None,
) -> Preferences | RatedResponses | Rankings:
    """Read pairs, rated responses or rankings, keep the good, and report everything that is wrong.

    Records have the columns `prompt, chosen, rejected`, or `prompt, response_a, response_b,
    preference` (P(a is better); where it is below 0.5 the responses are swapped and it becomes
    1 - preference). Optional: `preference` (default 1), `weight`, `annotator`, `group`, `id`,
    `margin`. Prompts and responses are text or lists of role/content messages (in CSV: as JSON).
    Where `prompt` is missing and both responses are whole conversations, everything up to the last
    assistant turn is the prompt. `PreferencePair` lists the rules that a record must keep.

    Rated responses have the columns `prompt, response, desirable` (true, false or P(good)), or
    TRL's `prompt, completion, label`; see `RatedResponse`. Lines of a feedback log (`LogRecord`)
    become pairs by their `choice`, or rated responses by their `thumbs`.

    Rankings have the columns `prompt, responses` and `ranking` (1 for the best) or `scores`; see
    `RankedResponses`. All records are of one kind.

    Args:
        source: a path (.jsonl, .json, .csv, their .gz, .parquet, or a directory that
            `build_preferences` made), several paths, "tfds:NAME/CONFIG:SPLIT" (TensorFlow
            Datasets), "builtin:support" (the bundled quickstart data), a table (a data frame of
            pandas or polars, a mapping of columns, a table of pyarrow, one split of a Hugging Face
            data set), or any iterable of mappings, such as `tfds.as_numpy(dataset)`.
        format: format of the files: "auto" (by suffix), "jsonl", "json", "csv" or "parquet".
        on_error: "report" keeps the good records and lists the bad in `.report`; "fail" raises if
            there is any bad one.
        limit: stop after this many good records; None reads all.
        columns: our name of a column to the data's, for instance
            `{"prompt": "question", "chosen": "answer_a", "rejected": "answer_b"}`.
        data_dir: where TensorFlow Datasets keeps its data; None: its default.
        allow_truncated: whether to read what is left of a file that is cut off or damaged, with a
            warning in the report. Otherwise such a file is an error, whatever `on_error` is.
        feedback: what to take of a feedback log that has both, "choices" or "thumbs".

    Returns:
        `Preferences`, or `RatedResponses` or `Rankings` where the records are such; its `.report`
        counts and names what was dropped.

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
          weight out of range: 1 (record 2)
          empty response: 1 (record 2)
    """
    reading = Reading(format, columns, allow_truncated, feedback)
    sources = _opened(source, reading, data_dir)
    stream = RecordStream(sources, reading, on_error, limit, listed=None)
    records = list(stream)
    rated = [record for record in records if isinstance(record, RatedResponse)]
    if rated:
        return RatedResponses(rated, stream.report)
    ranked = [record for record in records if isinstance(record, RankedResponses)]
    if ranked:
        return Rankings(ranked, stream.report)
    pairs = (record for record in records if isinstance(record, PreferencePair))
    return Preferences(pairs, stream.report)


def check_first_records(
    source: PathLike | Sequence[PathLike] | Iterable[object],
    *,
    first: int = 100,
    format: str = "auto",
    on_error: str = "report",
    columns: Mapping[str, str] | None = None,
    data_dir: PathLike | None = None,
    allow_truncated: bool = False,
) -> ReadReport:
    """Check the first records of each source, without reading the rest.

    Of a built directory the sizes of all files are checked. Of TensorFlow Datasets only the name is
    checked: preparing a data set can take hours.

    Args:
        source: as in `read_preferences`.
        first: number of records to read from each source.
        format: as in `read_preferences`.
        on_error: "report" raises only where none of these records is good.
        columns: as in `read_preferences`.
        data_dir: as in `read_preferences`.
        allow_truncated: as in `read_preferences`.

    Returns:
        The report on these records.

    Raises:
        InputError: as `read_preferences` would for these records alone.

    Example:
        >>> pairs = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}] * 3
        >>> check_first_records(pairs, first=2).kept
        2
    """
    if type(first) is not int or first < 1:
        raise InputError(InputProblem("first", "must be a whole number >= 1", first))
    reading = Reading(format, columns, allow_truncated)
    unread: list[Source] = []
    sources: list[Source] = []
    for opened in _opened(source, reading, data_dir):
        checked_already = opened.name.startswith("tfds:") or is_built(opened.name)
        (unread if checked_already else sources).append(opened)
    stream = RecordStream(sources, reading, on_error, first=first)
    if sources:
        for _ in stream:
            pass
    stream.report.sources += [opened.name for opened in unread]
    return stream.report


class PreferenceStream(RecordStream):
    """The pairs of sources of any size, one after the other, never all of them in memory.

    Repeats are found by hashes, about 30 bytes per pair. `report`, complete after the last pair,
    lists the first problems and warnings of each kind, and counts the others in `omitted`.

    Args:
        source: as in `read_preferences`, as all arguments.
        on_error: "fail" raises after the last record, with the problems of all.

    Raises:
        InputError: as `read_preferences`; while iterating where records are wrong.

    Example:
        >>> stream = PreferenceStream([{"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}])
        >>> [pair.chosen for pair in stream], stream.report.kept
        ([' 4'], 1)
    """

    def __init__(
        self,
        source: PathLike | Sequence[PathLike] | Iterable[object],
        *,
        format: str = "auto",
        on_error: str = "report",
        limit: int | None = None,
        columns: Mapping[str, str] | None = None,
        data_dir: PathLike | None = None,
        allow_truncated: bool = False,
    ):
        reading = Reading(format, columns, allow_truncated)
        sources = _opened(source, reading, data_dir)
        super().__init__(sources, reading, on_error, limit, listed=LISTED)


def _opened(
    source: PathLike | Sequence[PathLike] | Iterable[object],
    reading: Reading,
    data_dir: PathLike | None,
) -> Iterator[Source]:
    """Yield each source; all wrong ones are reported together."""
    if isinstance(source, str | os.PathLike):
        source = [source]
    elif (table := table_records(source, reading)) is not None:
        yield Source("records", table)
        return
    elif isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        must = (
            "must be a path, a list of paths, a table or an iterable of records, "
            f"got {shown(source)} ({type(source).__name__})."
        )
        hint = "Put a single record into a list." if isinstance(source, Mapping) else ""
        if hasattr(source, "collect"):  # a lazy frame of polars
            hint = "Call its collect() first."
        raise InputError(InputProblem("source", must, hint=hint))
    if not _are_paths(source):
        yield Source("records", _renamed(enumerate(source, 1), reading))
        return
    opened: dict[str, Source] = {}
    problems: list[str] = []
    for path in [os.fspath(path) for path in source]:
        if path in opened:
            problems.append(f"{path} is given twice.")
            continue
        try:
            opened[path] = _open(path, reading, data_dir)
        except InputError as error:
            problems += error.problems
    if problems:
        raise InputError(problems)
    yield from opened.values()


def _are_paths(source: Iterable[object]) -> TypeGuard[Sequence[PathLike]]:
    return (
        isinstance(source, Sequence)
        and len(source) > 0
        and all(isinstance(item, str | os.PathLike) for item in source)
    )


def _open(path: str, reading: Reading, data_dir: PathLike | None) -> Source:
    """Check that a source can be opened; its records are read when they are asked for."""
    if path.startswith("builtin:"):
        if path.startswith(THUMBS):
            return Source(path, enumerate(support_thumbs_of(path), 1))
        if path not in BUILTIN:
            must = f"must be one of {', '.join(BUILTIN)}, {THUMBS} or {THUMBS}:NOISE"
            raise InputError(InputProblem("source", must, path))
        return Source(path, enumerate(BUILTIN[path](), 1))
    if path.startswith("tfds:"):
        parse_name(path)
        records: Records = read_tfds(path, data_dir)
    elif is_built(path):
        records = enumerate(StoredPreferences.open(path).read(), 1)
    else:
        return open_file(path, reading)
    return Source(path, _renamed(records, reading))


def _renamed(records: Records, reading: Reading) -> Records:
    return ((line, reading.renamed(record)) for line, record in records)
