"""Records of TensorFlow Datasets, under the name `tfds:NAME/CONFIG:SPLIT`."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.stored_preferences import FEATURES, IMAGES, from_features
from dpo_keras.preferences.tables import cell
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened

_NAME = re.compile(r"tfds:(?P<name>[\w/.=,-]+(?::\d+\.[\d*]+\.[\d*]+)?)(?::(?P<split>[^:].*))?")


class TfdsName(NamedTuple):
    """A builder (with configuration and version where given) and a split, as `tfds.load` has it."""

    builder: str
    split: str


def parse_name(path: str) -> TfdsName:
    """Parse `tfds:NAME[/CONFIG][:VERSION][:SPLIT]`; without a split it is "train"."""
    found = _NAME.fullmatch(path)
    if found is None:
        must = "must be tfds:NAME/CONFIG:SPLIT (as tfds:preference_pairs/jsonl:train)"
        raise InputError(InputProblem("source", must, path))
    return TfdsName(found["name"], found["split"] or "train")


def read_tfds(path: str, data_dir: str | os.PathLike[str] | None) -> Iterator[tuple[int, JSON]]:
    """Yield `(number, record)` of a dataset in its stored order; prepare it where it must be."""
    name = parse_name(path)
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        problem = "TensorFlow Datasets is needed for this: pip install 'dpo-keras[tfds]'."
        raise InputError(problem) from error
    import dpo_keras.preferences.tfds_builder  # noqa: F401 (registers `preference_pairs`)

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
        yield number, _plain_record(record)


def _plain_record(record: JSON) -> JSON:
    """Return a record as a file could hold it; one of our own builder becomes its pair."""
    if not isinstance(record, Mapping):
        return record
    if FEATURES - {IMAGES} <= record.keys() <= FEATURES:
        return from_features(record)
    return {name: cell(value) for name, value in record.items()}


@contextlib.contextmanager
def _explained(path: str, data_dir: str | os.PathLike[str] | None) -> Iterator[None]:
    """Turn what TensorFlow Datasets raises about a name into one sentence for its user."""
    try:
        yield
    except InputError:
        raise
    except (ValueError, AssertionError, LookupError, ImportError, OSError) as error:
        reason = shortened(" ".join(str(error).split()), 400)
        where = "" if data_dir is None else f" under {data_dir}"
        raise InputError(f"{path}: TensorFlow Datasets cannot read it{where}: {reason}") from error
