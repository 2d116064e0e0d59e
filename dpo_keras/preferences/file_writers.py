"""`write_preferences`: pairs into JSONL, JSONL.gz, CSV or Parquet, readable again without loss."""

from __future__ import annotations

import csv
import gzip
import io
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import PreferencePair

REQUIRED = ("prompt", "chosen", "rejected", "preference")
OPTIONAL = ("weight", "annotator", "group", "id", "margin", "swapped")


def write_preferences(pairs: Iterable[PreferencePair], path: str | os.PathLike[str]) -> None:
    """Writes pairs so that `read_preferences` gives the same ones back.

    The file appears whole or not at all: it is written beside its place and then moved there, over
    a file of the same name.

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
    kept = list(pairs)
    name = path.name.lower()
    suffix = next((suffix for suffix in WRITERS if name.endswith(suffix)), None)
    faults = []
    if suffix is None:
        faults.append(f"path must end in one of {', '.join(WRITERS)}, got {str(path)!r}.")
    if not kept:
        faults.append("pairs must hold at least one pair, got none.")
    if path.is_dir():
        faults.append(f"path must name a file, {path} is a directory.")
    elif not path.parent.is_dir():
        faults.append(f"the folder of {path} does not exist; create it first.")
    if faults or suffix is None:
        raise InputError(faults)
    records = [pair.as_dict() for pair in kept]
    handle, unfinished = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    try:
        WRITERS[suffix](records, Path(unfinished))
        os.chmod(unfinished, 0o666 & ~_umask())
        os.replace(unfinished, path)
    except BaseException:
        os.unlink(unfinished)
        raise


def _write_jsonl(records: list[dict[str, Any]], path: Path) -> None:
    path.write_bytes(_jsonl(records))


def _write_jsonl_gz(records: list[dict[str, Any]], path: Path) -> None:
    # No time in the header: the same pairs give the same bytes.
    path.write_bytes(gzip.compress(_jsonl(records), mtime=0))


def _write_csv(records: list[dict[str, Any]], path: Path) -> None:
    path.write_bytes(_csv(records))


def _write_csv_gz(records: list[dict[str, Any]], path: Path) -> None:
    path.write_bytes(gzip.compress(_csv(records), mtime=0))


def _write_parquet(records: list[dict[str, Any]], path: Path) -> None:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'dpo-keras[parquet]'.") from error
    columns = {name: [record.get(name) for record in records] for name in _columns(records)}
    if any(
        len({isinstance(value, str) for value in columns[name]}) > 1
        for name in ("prompt", "chosen", "rejected")
    ):
        raise InputError(
            "pairs of text and pairs of messages cannot share a Parquet column; write .jsonl."
        )
    pyarrow.parquet.write_table(pyarrow.table(columns), path)


def _jsonl(records: list[dict[str, Any]]) -> bytes:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode()


def _csv(records: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, _columns(records), restval="")
    writer.writeheader()
    for record in records:
        writer.writerow({name: _cell(value) for name, value in record.items()})
    return text.getvalue().encode()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False) if isinstance(value, list) else value


def _columns(records: list[dict[str, Any]]) -> list[str]:
    used = {name for record in records for name in record}
    return [*REQUIRED, *(name for name in OPTIONAL if name in used)]


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


WRITERS: dict[str, Callable[[list[dict[str, Any]], Path], None]] = {
    ".jsonl": _write_jsonl,
    ".jsonl.gz": _write_jsonl_gz,
    ".csv": _write_csv,
    ".csv.gz": _write_csv_gz,
    ".parquet": _write_parquet,
}
