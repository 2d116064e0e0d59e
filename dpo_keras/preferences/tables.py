"""Tables: Parquet files, and data frames and data sets that a program has in memory already.

pandas, polars, pyarrow and Hugging Face `datasets` are recognised by their methods: none of them is
imported.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import BinaryIO

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.pair import Fault, as_number, broken
from dpo_keras.preferences.record_kinds import columns_of, header_faults
from dpo_keras.preferences.record_stream import CutOff, Reading, Records
from dpo_keras.utils import JSON


def read_parquet(stream: BinaryIO, reading: Reading) -> Records:
    """Read Parquet; only the columns that are used."""
    pyarrow = import_pyarrow()
    try:
        table = pyarrow.parquet.ParquetFile(stream, page_checksum_verification=True)
        names = used_columns(table.schema_arrow.names, reading)
        if not isinstance(names, dict):
            yield from ((None, fault) for fault in names)
            return
        # Few rows at a time: they may hold long conversations.
        batches = table.iter_batches(batch_size=4096, columns=list(names))
        rows = (row for batch in batches for row in arrow_rows(batch))
        for number, row in enumerate(rows, 1):
            yield number, _record(row, names)
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise CutOff(f"not a Parquet file, or a part of one: {error}") from error


def used_columns(names: Sequence[str], reading: Reading) -> dict[str, str] | list[Fault]:
    """Return the columns of a table that are read, with our names for them, or its faults."""
    header = reading.our_names(names)
    if faults := header_faults(header):
        return faults
    known = columns_of(header)
    used = {name: ours for name, ours in zip(names, header, strict=True) if ours in known}
    reading.unused.update(f"column {name!r}" for name in names if name not in used)
    return used


def arrow_rows(batch: JSON) -> Iterator[JSON]:
    """Yield the rows of a batch of pyarrow; a `Fault` for a row with text that is not UTF-8."""
    try:
        yield from batch.to_pylist()
    except UnicodeDecodeError:
        for place in range(batch.num_rows):
            yield _arrow_row(batch.slice(place, 1))


def _arrow_row(row: JSON) -> JSON:
    values = {}
    for name, column in zip(row.schema.names, row.columns, strict=True):
        try:
            values[name] = column[0].as_py()
        except UnicodeDecodeError as error:
            found = error.object[error.start]
            rule = f"must be valid UTF-8 text, byte {error.start + 1} is {found:#04x}."
            return broken("not UTF-8", name, None, rule)
    return values


def import_pyarrow() -> ModuleType:
    """Import pyarrow, or say how to install it."""
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise InputError("Parquet files need pyarrow: pip install 'dpo-keras[parquet]'.") from error
    return pyarrow


def table_records(source: JSON, reading: Reading) -> Records | None:
    """Return the records of a table in memory; None where the source is no table.

    Missing cells (None, NaN, pandas' NA) are missing values.

    Raises:
        InputError: where a mapping holds several tables, or columns of different lengths.
    """
    if isinstance(source, Mapping):
        return _columns(source, reading)
    if hasattr(source, "column_names") and hasattr(source, "with_format"):  # Hugging Face datasets
        return _dataset_records(source, reading)
    rows: Iterable[JSON]
    if hasattr(source, "column_names") and hasattr(source, "to_batches"):  # pyarrow
        names = source.column_names
        rows = (row for batch in source.to_batches(max_chunksize=4096) for row in arrow_rows(batch))
    elif hasattr(source, "iter_rows") and hasattr(source, "columns"):  # polars
        names, rows = source.columns, source.iter_rows()
    elif hasattr(source, "itertuples") and hasattr(source, "columns"):  # pandas
        names, rows = source.columns, source.itertuples(index=False, name=None)
    else:
        return None
    return _records(names, rows, reading)


def _records(names: Iterable[object], rows: Iterable[JSON], reading: Reading) -> Records:
    """Yield the rows of a table as records; a row is a sequence, a mapping or a `Fault`."""
    columns = list(map(str, names))
    used = used_columns(columns, reading)
    if not isinstance(used, dict):
        yield from ((None, fault) for fault in used)
        return
    for number, row in enumerate(rows, 1):
        values = row if isinstance(row, Fault | Mapping) else dict(zip(columns, row, strict=True))
        yield number, _record(values, used)


def _dataset_records(source: JSON, reading: Reading) -> Records:
    dataset = source.with_format(None)  # tensors become plain values
    if dataset.column_names is not None:
        return _records(dataset.column_names, dataset, reading)
    cells = ({name: cell(value) for name, value in row.items()} for row in dataset)
    return enumerate(map(reading.renamed, cells), 1)


def _columns(source: Mapping[JSON, JSON], reading: Reading) -> Records | None:
    """Return the records of a mapping of columns; None where its values are none."""
    values = list(source.values())
    if values and all(
        hasattr(value, "column_names") or hasattr(value, "columns") for value in values
    ):
        splits = ", ".join(map(str, source))
        must = f"must be one data set, got a mapping of several ({splits})"
        hint = f"Choose one, as in source[{next(iter(source))!r}]."
        raise InputError(InputProblem("source", must, hint=hint))
    if not values or not all(map(_is_column, values)):
        return None
    lengths = {str(name): len(column) for name, column in source.items()}
    if len(set(lengths.values())) > 1:
        found = ", ".join(f"{name} {length:,}" for name, length in lengths.items())
        raise InputError(InputProblem("source", f"must have columns of one length, got {found}"))
    return _records(source, zip(*values, strict=True), reading)


def _is_column(value: object) -> bool:
    if isinstance(value, str | bytes | Mapping) or not hasattr(value, "__len__"):
        return False
    # A list of messages is no column, but the text of one record.
    return not isinstance(next(iter(value), None), Mapping)  # type: ignore[call-overload]


def _record(row: JSON, used: Mapping[str, str]) -> JSON:
    if isinstance(row, Fault):
        return row
    return {ours: cell(row[name]) for name, ours in used.items()}


def cell(value: JSON) -> JSON:
    """Return the value of a table's cell as a file would hold it; None where it is missing."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping) and value.keys() >= {"role", "content"}:
        if isinstance(value["role"], str):
            return value
        # Messages as a mapping of columns, as TensorFlow Datasets and `datasets` have sequences.
        turns = zip(*value.values(), strict=True)
        return [dict(zip(value, turn, strict=True)) for turn in turns]
    if getattr(value, "ndim", 1) == 0 and hasattr(value, "item"):
        value = value.item()
    number = as_number(value)
    missing = type(value).__name__ in ("NAType", "NaTType") or (
        number is not None and math.isnan(number)
    )
    return None if missing else value
