"""Preference files: JSONL, JSON, CSV and Parquet, read record by record, and written.

Text formats may be gzipped. Each reader yields `(line, record)`, or `(line, Fault)` for a line that
cannot be read; the lines before and after it are read all the same.
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
from types import ModuleType
from typing import BinaryIO, cast

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.pair import Fault, PreferencePair, shown
from dpo_keras.preferences.record_stream import FORMATS, Reading, Records, Source
from dpo_keras.preferences.records import COLUMNS, OPTIONAL, missing_columns
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import replaced
from dpo_keras.utils.text import QUOTED, with_formulas, without_formulas

SUFFIXES = {**{f".{format}": format for format in FORMATS}, ".ndjson": "jsonl"}
WRITTEN = (".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet")
BOM = b"\xef\xbb\xbf"


def open_file(path: str | os.PathLike[str], reading: Reading) -> Source:
    """Return a file as a source; it is opened at the first record."""
    format = _format(Path(path), reading.format)
    return Source(os.fspath(path), _read(Path(path), format, reading), format == "csv")


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


def _read(path: Path, format: str, reading: Reading) -> Records:
    last: int | None = 0
    try:
        with _open(path) as stream:
            for last, record in READERS[format](stream, reading):
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
    with path.open("rb") as raw:
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


def _read_jsonl(stream: BinaryIO, reading: Reading) -> Records:
    # Lines end at "\n" only: JSON strings may hold other separators.
    for number, line in enumerate(stream, 1):
        text = line.removeprefix(BOM) if number == 1 else line
        if text.strip():
            yield number, reading.renamed(_parse_json(text))


def _parse_json(line: bytes) -> JSON:
    try:
        return _DECODER(line.decode("utf-8").strip())
    except UnicodeDecodeError as error:
        rule = f"not UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}."
        return Fault("not UTF-8", "line", shown(line), rule)
    except (ValueError, RecursionError) as error:
        text = shown(line.decode("utf-8").strip())
        return Fault("not JSON", "line", text, f"not JSON ({error}), got {text}.")


def _read_json(stream: BinaryIO, reading: Reading) -> Records:
    """Read one JSON list of records, or JSONL under that name."""
    start = b""
    while not start and (line := stream.readline()):
        start = line.removeprefix(BOM).strip()
    stream.seek(0)
    if not start.startswith(b"["):
        yield from _read_jsonl(stream, reading)
        return
    records = _parse_json(stream.read().removeprefix(BOM))
    if isinstance(records, Fault):
        yield None, records
        return
    yield from enumerate(map(reading.renamed, records), 1)


def _read_csv(stream: BinaryIO, reading: Reading) -> Records:
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
                header = reading.our_names(name.strip() for name in row)
                if faults := missing_columns(header):
                    yield from ((None, fault) for fault in faults)
                    return
            elif len(row) != len(header):
                rule = f"the row has {len(row)} cells, the header has {len(header)} columns."
                yield line, Fault("wrong number of cells", "line", len(row), rule)
            else:
                yield line, with_formulas(dict(zip(header, row, strict=True)))
    finally:
        csv.field_size_limit(limit)
        text.detach()  # otherwise its end would close the caller's stream


def _read_parquet(stream: BinaryIO, reading: Reading) -> Records:
    pyarrow = _pyarrow()
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        names = table.schema_arrow.names
        header = reading.our_names(names)
        if faults := missing_columns(header):
            yield from ((None, fault) for fault in faults)
            return
        used = {name: ours for name, ours in zip(names, header, strict=True) if ours in COLUMNS}
        reading.unused.update(f"column {name!r}" for name in names if name not in used)
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


def _pyarrow() -> ModuleType:
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'dpo-keras[parquet]'.") from error
    return pyarrow


_DECODER = json.JSONDecoder().decode
READERS: dict[str, Callable[[BinaryIO, Reading], Records]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}


def write_preferences(pairs: Iterable[PreferencePair], path: str | os.PathLike[str]) -> None:
    """Write pairs so that `read_preferences` returns the same ones.

    The file appears whole or not at all, and replaces one of the same name.

    Args:
        pairs: at least one.
        path: ends in .jsonl, .csv, the same with .gz, or .parquet.

    Raises:
        InputError: if there are no pairs, the suffix is another, the folder is missing, or pairs of
            text and pairs of messages are to share a Parquet file.

    Example:
        >>> import tempfile
        >>> from dpo_keras.preferences import read_preferences
        >>> pairs = [PreferencePair("Hi", "Hello!", "Go away.", annotator="ann")]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_preferences(pairs, f"{folder}/pairs.csv")
        ...     list(read_preferences(f"{folder}/pairs.csv")) == pairs
        True
    """
    path = Path(path)
    records = [pair.as_dict() for pair in pairs]
    suffix = next((suffix for suffix in WRITTEN if path.name.lower().endswith(suffix)), None)
    problems = []
    if suffix is None:
        must = f"must end in one of {', '.join(WRITTEN)}"
        problems.append(InputProblem("path", must, str(path)))
    if not records:
        problems.append(InputProblem("pairs", "must hold at least one pair, got none."))
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
    pyarrow = _pyarrow()
    columns = {name: [record.get(name) for record in records] for name in _columns(records)}
    for name in ("prompt", "chosen", "rejected"):
        if len({isinstance(value, str) for value in columns[name]}) > 1:
            raise InputError(
                "pairs of text and pairs of messages cannot share a Parquet column; write .jsonl."
            )
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _columns(records: list[dict[str, JSON]]) -> list[str]:
    used = {name for record in records for name in record}
    return [name for name in ("prompt", "chosen", "rejected", *OPTIONAL) if name in used]
