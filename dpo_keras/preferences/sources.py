"""What `read_preferences` takes as a source: files, built directories, TFDS, named and own data."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from dpo_keras.errors import InputError
from dpo_keras.preferences.file_formats import (
    READERS,
    Records,
    file_format,
    read_file,
    rename_record,
)
from dpo_keras.preferences.pair import shown
from dpo_keras.preferences.quickstart_data import support_pairs
from dpo_keras.preferences.record_files import is_built
from dpo_keras.preferences.records import COLUMNS
from dpo_keras.preferences.stored_preferences import StoredPreferences

PathLike: TypeAlias = str | os.PathLike[str]
BUILTIN = {"builtin:support": support_pairs}


class Source(NamedTuple):
    """One source, opened.

    Args:
        name: for messages.
        records: `(line, record)`, or `(line, Fault)`.
        cells: whether the values are CSV cells.
    """

    name: str
    records: Records
    cells: bool


@dataclass(frozen=True)
class Reading:
    """How sources are to be read.

    Args:
        format: of the files; "auto" goes by name.
        columns: our name of a column to the one that the source has.
        data_dir: where TensorFlow Datasets keeps its data.
        unused: counts what nothing is done with.
    """

    format: str = "auto"
    columns: Mapping[str, str] | None = None
    data_dir: PathLike | None = None
    unused: Counter[str] = field(default_factory=Counter)

    def check(self) -> list[str]:
        """Returns what is wrong with format and columns, one sentence each."""
        faults = []
        if self.format not in ("auto", *READERS):
            faults.append(f"format must be one of auto, {', '.join(READERS)}, got {self.format!r}.")
        for ours, theirs in (self.columns or {}).items():
            if ours not in COLUMNS:
                known = ", ".join(sorted(COLUMNS))
                faults.append(f"columns has {ours!r}, which is none of {known}.")
            if not isinstance(theirs, str) or not theirs:
                faults.append(f"columns: {ours} must name a column of the data, got {theirs!r}.")
        if len(self.renaming) < len(self.columns or {}):
            faults.append(f"columns must name each column once, got {dict(self.columns or {})}.")
        return faults

    @property
    def renaming(self) -> dict[str, str]:
        """The source's name of a column to ours."""
        return {theirs: ours for ours, theirs in (self.columns or {}).items()}


def open_sources(source: Any, reading: Reading) -> Iterator[Source]:
    """Yields each source, opened when its turn comes.

    Args:
        source: as for `read_preferences`.
        reading: how to read it.

    Raises:
        InputError: naming all sources that are none.
    """
    if isinstance(source, str | os.PathLike):
        source = [source]
    elif isinstance(source, Mapping | bytes) or not isinstance(source, Iterable):
        raise InputError(
            "source must be a path, a list of paths or an iterable of records, "
            f"got {shown(source)} ({type(source).__name__})."
        )
    if not _are_paths(source):
        yield Source("records", _renamed(enumerate(source, 1), reading), False)
        return
    openers: dict[str, Callable[[], Source]] = {}
    faults: list[str] = []
    for path in map(os.fspath, source):
        if path in openers:
            faults.append(f"{path} is given twice.")
            continue
        try:
            openers[path] = _opener(path, reading)
        except InputError as error:
            faults += error.problems
    if faults:
        raise InputError(faults)
    for opener in openers.values():
        yield opener()


def _renamed(records: Records, reading: Reading) -> Records:
    return ((line, rename_record(record, reading.renaming)) for line, record in records)


def _opener(path: str, reading: Reading) -> Callable[[], Source]:
    """Finds who opens a source, and whether it can be opened at all."""
    if path.startswith("builtin:"):
        if path not in BUILTIN:
            raise InputError(f"source must be one of {', '.join(BUILTIN)}, got {path!r}.")
        return lambda: Source(path, enumerate(BUILTIN[path](), 1), False)
    if path.startswith("tfds:"):
        from dpo_keras.preferences.tfds_source import parse_name, read_tfds

        parse_name(path)
        return lambda: Source(path, _renamed(read_tfds(path, reading.data_dir), reading), False)
    if is_built(path):
        stored = StoredPreferences.open(path)
        return lambda: Source(path, _renamed(enumerate(stored.read(), 1), reading), False)
    kind = file_format(Path(path), reading.format)
    return lambda: Source(
        path, read_file(Path(path), kind, reading.unused, reading.renaming), kind == "csv"
    )


def _are_paths(source: Iterable[Any]) -> bool:
    return (
        isinstance(source, Sequence)
        and len(source) > 0
        and all(isinstance(item, str | os.PathLike) for item in source)
    )
