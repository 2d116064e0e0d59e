"""Records out of files: JSONL, JSON, CSV and Parquet, the text formats also gzipped.

Each reader yields `(line, record)`, or `(line, Fault)` for a line that cannot be read at all.
Whatever is wrong with one line, the lines before and after it are still read.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, TypeAlias, cast

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import Fault, PreferencePair, shown
from dpo_keras.preferences.records import COLUMNS, missing_columns

Records: TypeAlias = Iterator[tuple[int | None, Any]]

SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".csv": "csv",
    ".parquet": "parquet",
}


def file_format(path: Path, format: str) -> str:
    """Returns the format of a file: by its name where `format` is "auto".

    Raises:
        InputError: if the path is no readable file, or its suffix says nothing.

    Example:
        >>> file_format(Path(__file__), "auto")
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: ...files.py: unknown suffix '.py'; ...
    """
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if _suffix(entry) in SUFFIXES)
        hint = f" it holds {', '.join(inside[:5])}." if inside else " it holds no data files."
        raise InputError(f"{path} is a directory, name the files in it;{hint}")
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    if format != "auto":
        return format
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        known = ", ".join(SUFFIXES)
        raise InputError(
            f"{path}: unknown suffix {suffix!r}; known are {known} (the text formats also with "
            f".gz). Rename the file or give format=, one of {', '.join(READERS)}."
        )
    return SUFFIXES[suffix]


def read_file(
    path: Path, format: str, unused: Counter[str], renaming: Mapping[str, str] | None = None
) -> Records:
    """Yields the records of one file.

    Args:
        path: the file; whether it is gzipped is seen from its first bytes.
        format: a key of `READERS`.
        unused: counts the columns that are left out here already.
        renaming: the file's names of columns to ours.

    Yields:
        `(line, record)`; a `Fault` instead of a record where there is none to be had.
    """
    last: int | None = 0
    try:
        with _open(path) as stream:
            for last, record in READERS[format](stream, unused, renaming or {}):
                yield last, record
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        rule = f"the file is broken or cut off after line {last}: {error}"
        yield (last or 0) + 1, Fault("broken file", "file", str(path), rule)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with open(path, "rb") as raw:
        # The first bytes decide, not the name: downloads lose and gain ".gz".
        start = raw.read(4)
        raw.seek(0)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{path} is UTF-16 text; save it as UTF-8.")
        if start[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield cast(BinaryIO, unzipped)
        else:
            yield raw


def _read_jsonl(stream: BinaryIO, unused: Counter[str], renaming: Mapping[str, str]) -> Records:
    # Lines end at "\n" only: other separators may stand inside JSON strings.
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if line.isspace() or not line:
            continue
        yield number, rename_record(_parse_json(line), renaming)


def _parse_json(line: bytes) -> Any:
    try:
        return _DECODER(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        rule = f"not UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}."
        return Fault("not UTF-8", "line", shown(line), rule)
    except (ValueError, RecursionError) as error:
        text = shown(line.decode("utf-8").strip())
        return Fault("not JSON", "line", text, f"not JSON ({error}), got {text}.")


def _read_json(stream: BinaryIO, unused: Counter[str], renaming: Mapping[str, str]) -> Records:
    """Reads one JSON list of records, or JSONL under that name."""
    start = b""
    while not start and (line := stream.readline()):
        start = line.removeprefix(b"\xef\xbb\xbf").strip()
    stream.seek(0)
    if not start.startswith(b"["):
        yield from _read_jsonl(stream, unused, renaming)
        return
    records = _parse_json(stream.read().removeprefix(b"\xef\xbb\xbf"))
    if isinstance(records, Fault):
        yield None, records
        return
    yield from enumerate((rename_record(record, renaming) for record in records), 1)


def _read_csv(stream: BinaryIO, unused: Counter[str], renaming: Mapping[str, str]) -> Records:
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # Cells hold whole conversations. The limit is the module's, so it is put back.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        rows = csv.reader(text, strict=True)
        header: list[str] | None = None
        while True:
            line = rows.line_num + 1
            try:
                row = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield line, Fault("not CSV", "line", str(error), f"not CSV: {error}.")
                continue
            if not any(row):
                continue
            if header is None:
                header = _our_names([name.strip() for name in row], renaming)
                if faults := missing_columns(header):
                    for fault in faults:
                        yield None, fault
                    return
            elif len(row) != len(header):
                rule = f"the row has {len(row)} cells, the header has {len(header)} columns."
                yield line, Fault("wrong number of cells", "line", len(row), rule)
            else:
                yield line, dict(zip(header, row, strict=True))
    finally:
        csv.field_size_limit(limit)
        text.detach()  # or its end would close the stream of the caller


def _read_parquet(stream: BinaryIO, unused: Counter[str], renaming: Mapping[str, str]) -> Records:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'dpo-keras[parquet]'.") from error
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        header = _our_names(names, renaming)
        if faults := missing_columns(header):
            for fault in faults:
                yield None, fault
            return
        used = {name: ours for name, ours in zip(names, header, strict=True) if ours in COLUMNS}
        unused.update(f"column {name!r}" for name in names if name not in used)
        # Few rows at a time: they may hold long conversations.
        batches = table.iter_batches(batch_size=4096, columns=list(used))
        rows = (
            {used[name]: value for name, value in record.items()}
            for batch in batches
            for record in batch.to_pylist()
        )
        yield from enumerate(rows, 1)
    except (pyarrow.ArrowInvalid, pyarrow.ArrowNotImplementedError) as error:
        yield None, Fault("broken file", "file", None, f"not a Parquet file: {error}.")


def _our_names(header: list[str], renaming: Mapping[str, str]) -> list[str]:
    """Returns a header in our names; a column in the place of a renamed one gets its old name."""
    ours = set(renaming.values()) - renaming.keys()
    return [renaming.get(name, f"unused {name}" if name in ours else name) for name in header]


def rename_record(record: Any, renaming: Mapping[str, str]) -> Any:
    """Gives the columns of a record our names.

    Args:
        record: a mapping; anything else is returned as it is.
        renaming: the source's names to ours. A column that has one of our names already, and is
            not the one that is meant, counts as unused.

    Raises:
        InputError: if the record is a pair, whose columns have no other names.

    Example:
        >>> rename_record({"question": "Hi", "prompt": 7}, {"question": "prompt"})
        {'prompt': 'Hi', 'unused prompt': 7}
    """
    if renaming and isinstance(record, PreferencePair):
        raise InputError(
            f"columns ({', '.join(renaming.values())}) have no effect on records that are pairs "
            "already; leave them out."
        )
    if not renaming or not isinstance(record, Mapping):
        return record
    return dict(zip(_our_names(list(record), renaming), record.values(), strict=True))


_DECODER = json.JSONDecoder().decode
READERS: dict[str, Callable[[BinaryIO, Counter[str], Mapping[str, str]], Records]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
