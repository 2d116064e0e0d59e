"""Preference files: opened by their names and first bytes, and written.

Each reader yields `(line, record)`, or `(line, Fault)` for a record that cannot be read; those
before and after it are read all the same. A file that is cut off ends with `CutOff`.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, cast

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.pair import Fault
from dpo_keras.preferences.record_kinds import ORDERS, Record
from dpo_keras.preferences.record_stream import FORMATS, CutOff, Reading, Records, Source
from dpo_keras.preferences.records import OPTIONAL, TOOLS
from dpo_keras.preferences.tables import import_pyarrow, read_parquet
from dpo_keras.preferences.text_formats import BOM, CHUNK, read_csv, read_json_list, read_jsonl
from dpo_keras.preferences.tool_calls import calls_as_text
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import replaced
from dpo_keras.utils.text import QUOTED, without_formulas

SUFFIXES = {**{f".{format}": format for format in FORMATS}, ".ndjson": "jsonl"}
TEXTS = ("prompt", "chosen", "rejected", "response")
WRITTEN = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
READERS: dict[str, Callable[[BinaryIO, Reading], Records]] = {
    "jsonl": read_jsonl,
    "json": read_json_list,
    "csv": read_csv,
    "parquet": read_parquet,
}
BROKEN = (CutOff, EOFError, zlib.error, gzip.BadGzipFile)
# Only gzip is unpacked. The others are named by their first bytes.
ARCHIVES = {b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zX": "xz", b"PK\x03\x04": "zip"}


def open_file(path: str | os.PathLike[str], reading: Reading) -> Source:
    """Return a file as a source; it is opened at the first record."""
    path = Path(path)
    format = _format(path, reading.format)
    if format == "json" and not _holds_list(path):
        format = "jsonl"
    unit = "line" if format in ("jsonl", "csv") else "record"
    records = _read(path, format, unit, reading)
    return Source(os.fspath(path), records, format == "csv", unit, os.fspath(path.parent))


def _format(path: Path, format: str) -> str:
    if path.is_dir():
        inside = sorted(entry.name for entry in path.iterdir() if _suffix(entry) in SUFFIXES)
        held = ", ".join(inside[:5]) or "no data files"
        raise InputError(f"{path} is a directory, name the files in it; it holds {held}.")
    if not path.exists():
        raise InputError(f"{path}: no such file.")
    if format != "auto":
        return format
    suffix = _suffix(path)
    if suffix not in SUFFIXES:
        raise InputError(
            f"{path}: unknown suffix {suffix!r}; known are {', '.join(SUFFIXES)} (text formats "
            f"also with .gz). Rename the file or give format=, one of {', '.join(READERS)}."
        )
    return SUFFIXES[suffix]


def _holds_list(path: Path) -> bool:
    """Return whether a JSON file is one list of records; otherwise it has a record a line."""
    with contextlib.suppress(*BROKEN, OSError), _open(path) as stream:
        while start := stream.read(CHUNK):
            if start := start.removeprefix(BOM).lstrip():
                return start.startswith(b"[")
    return False


def _read(path: Path, format: str, unit: str, reading: Reading) -> Records:
    last: int | None = 0
    count = 0
    try:
        with _open(path) as stream:
            for last, record in READERS[format](stream, reading):
                count += not isinstance(record, Fault)
                yield last, record
    except BROKEN as error:
        reading.note_cut_off(str(path), unit, last or 0, count, error)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror or error}.") from error


def _suffix(path: Path) -> str:
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    with path.open("rb") as raw:
        # The first bytes decide, not the name: downloads lose and gain ".gz".
        start = raw.read(4)
        raw.seek(0)
        if start[:2] in (b"\xff\xfe", b"\xfe\xff"):
            raise InputError(f"{path} is UTF-16 text; save it as UTF-8.")
        for beginning, kind in ARCHIVES.items():
            if start.startswith(beginning):
                rule = f"is compressed by {kind}; unpack it first (gzip is read as it is)."
                raise InputError(f"{path} {rule}")
        if start[:2] == b"\x1f\x8b":
            with gzip.GzipFile(fileobj=raw) as unzipped:
                yield cast(BinaryIO, unzipped)
        else:
            yield raw


def write_preferences(pairs: Iterable[Record], path: str | os.PathLike[str]) -> None:
    """Write pairs, rated responses or rankings, so that `read_preferences` returns the same ones.

    The file appears whole or not at all, and replaces one of the same name.

    Args:
        pairs: at least one, all of one kind.
        path: ends in .jsonl, .csv, the same with .gz, or .parquet.

    Raises:
        InputError: if there are no pairs, the suffix is another, the folder is missing, or pairs of
            text and pairs of messages are to share a Parquet file.

    Example:
        >>> import tempfile
        >>> from dpo_keras.preferences import PreferencePair, read_preferences
        >>> pairs = [PreferencePair("Hi", "Hello!", "Go away.", annotator="ann")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_preferences(pairs, f"{folder}/pairs.csv")
        ...     list(read_preferences(f"{folder}/pairs.csv")) == pairs
        True
    """
    path = Path(path)
    pairs = list(pairs)
    records = [_record(pair, path.parent) for pair in pairs]
    suffix = next((suffix for suffix in WRITTEN if path.name.lower().endswith(suffix)), None)
    problems = []
    if suffix is None:
        must = f"must end in one of {', '.join(WRITTEN)}"
        problems.append(InputProblem("path", must, str(path)))
    if len({type(pair) for pair in pairs}) != 1:
        found = "pairs and rated responses" if records else "none"
        must = f"must hold at least one pair, and records of one kind, got {found}."
        problems.append(InputProblem("pairs", must))
    if path.is_dir():
        problems.append(InputProblem("path", f"must name a file, {path} is a directory."))
    elif not path.parent.is_dir():
        must = f"must lie in a folder, but {path.parent} does not exist; create it first."
        problems.append(InputProblem("path", must))
    if problems or suffix is None:
        raise InputError(problems)
    with replaced(path) as partial:
        if suffix == ".parquet":
            _write_parquet(records, partial)
            return
        if suffix.startswith(".csv"):
            text = _as_csv(records)
        else:
            text = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        # No time in the header: the same pairs give the same bytes.
        zipped = suffix.endswith(".gz")
        content = text.encode()
        partial.write_bytes(gzip.compress(content, mtime=0) if zipped else content)


def _record(pair: Record, folder: Path) -> dict[str, JSON]:
    """Return a pair as a record; paths of images in the file's own folder are relative to it."""
    record = pair.as_dict()
    if pair.images:
        record["images"] = [image.as_text(folder) for image in pair.images]
    return record


def _as_csv(records: list[dict[str, JSON]]) -> str:
    text = io.StringIO(newline="")
    rows = []
    for record in records:
        texts = {n: json.dumps(v, ensure_ascii=False) for n, v in record.items() if type(v) is list}
        rows.append(without_formulas({**record, **texts}))
    marked = [QUOTED] if any(QUOTED in row for row in rows) else []
    writer = csv.DictWriter(text, [*_columns(records), *marked], restval="")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_parquet(records: list[dict[str, JSON]], path: Path) -> None:
    pyarrow = import_pyarrow()
    records = [calls_as_text(record) for record in records]
    columns = {name: [record.get(name) for record in records] for name in _columns(records)}
    for name in columns.keys() & set(TEXTS):
        if len({isinstance(value, str) for value in columns[name]}) > 1:
            raise InputError(
                "pairs of text and pairs of messages cannot share a Parquet column; write .jsonl."
            )
    pyarrow.parquet.write_table(pyarrow.table(columns), path, write_page_checksum=True)


def _columns(records: list[dict[str, JSON]]) -> list[str]:
    used = {name for record in records for name in record}
    known = (*TEXTS, "responses", *ORDERS, "desirable", TOOLS, *OPTIONAL)
    return [name for name in known if name in used]
