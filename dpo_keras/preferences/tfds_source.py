"""Pairs out of TensorFlow Datasets, under the name `tfds:NAME/CONFIG:SPLIT`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from dpo_keras.errors import InputError
from dpo_keras.preferences.record_files import FEATURES, from_features

_NAME = re.compile(r"tfds:(?P<name>[\w/.=,-]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(?P<split>[^:].*))?")


class TfdsName(NamedTuple):
    """What a `tfds:` source names.

    Args:
        builder: name, with configuration and version where they are given.
        split: as `tfds.load` takes it.
    """

    builder: str
    split: str


def parse_name(path: str) -> TfdsName:
    """Reads `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`; the split is "train" where there is none.

    Raises:
        InputError: if it has another form.

    Example:
        >>> parse_name("tfds:preference_pairs/hh:test[:10%]")
        TfdsName(builder='preference_pairs/hh', split='test[:10%]')
        >>> parse_name("tfds:mine:1.0.0").builder
        'mine:1.0.0'
    """
    found = _NAME.fullmatch(path)
    if found is None:
        raise InputError(
            f"source must be tfds:NAME/CONFIG:SPLIT (as tfds:preference_pairs/jsonl:train), got "
            f"{path!r}."
        )
    return TfdsName(found["name"], found["split"] or "train")


def read_tfds(
    path: str, data_dir: str | os.PathLike[str] | None = None
) -> Iterator[tuple[int, Any]]:
    """Yields `(number, record)` of a TensorFlow dataset, in the order in which it is stored.

    A set that is not there yet is prepared, as `tfds.load` does.

    Args:
        path: as `parse_name` takes it.
        data_dir: where TensorFlow Datasets keeps its data; None: `~/tensorflow_datasets`.

    Raises:
        InputError: if tensorflow-datasets is missing, or there is no such set, configuration or
            split.
    """
    name = parse_name(path)
    tfds = import_tfds()
    with _explained(path, data_dir):
        builder = tfds.builder(name.builder, data_dir=data_dir)
        builder.download_and_prepare()
        dataset = builder.as_dataset(
            split=name.split,
            # One file after the other: the order is that of the records, on every machine.
            read_config=tfds.ReadConfig(interleave_cycle_length=1),
            shuffle_files=False,
        )
    for number, record in enumerate(dataset.as_numpy_iterator(), 1):
        yield number, plain_record(record)


def import_tfds() -> Any:
    """Imports TensorFlow Datasets, and registers the builder `preference_pairs`.

    Raises:
        InputError: if it is not installed.
    """
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise InputError(
            "TensorFlow Datasets is needed for this: pip install 'dpo-keras[tfds]'."
        ) from error
    import dpo_keras.preferences.tfds_builder  # noqa: F401

    return tfds


def plain_record(record: Any) -> Any:
    """Makes a record of TensorFlow Datasets one that files could have.

    A sequence of role/content messages comes as a mapping of columns, numbers as NumPy's; the
    features of our own builder become the pair that they were.

    Example:
        >>> plain_record({"chosen": {"role": [b"user"], "content": [b"Hi"]}})
        {'chosen': [{'role': b'user', 'content': b'Hi'}]}
    """
    if not isinstance(record, Mapping):
        return record
    if record.keys() == FEATURES:
        return from_features(record)
    return {name: _plain(value) for name, value in record.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping) and value.keys() >= {"role", "content"}:
        names = list(value)
        columns = zip(*(value[name] for name in names), strict=True)
        return [dict(zip(names, turn, strict=True)) for turn in columns]
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value


@contextlib.contextmanager
def _explained(path: str, data_dir: Any) -> Iterator[None]:
    """Turns what TensorFlow Datasets raises about a name into one sentence for its user."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, AssertionError, LookupError, ImportError, OSError) as error:
        reason = " ".join(str(error).split())
        reason = reason if len(reason) < 400 else reason[:397] + "..."
        where = "" if data_dir is None else f" under {data_dir}"
        raise InputError(f"{path}: TensorFlow Datasets cannot read it{where}: {reason}") from error
