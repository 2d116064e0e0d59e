"""`build_preferences`: write preference files of any size as checked records."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import stored_preferences as stored
from dpo_keras.preferences.collection import hash64, prompt_bytes
from dpo_keras.preferences.reader import PathLike, PreferenceStream
from dpo_keras.preferences.record_kinds import Record
from dpo_keras.preferences.stored_preferences import StoredFile, StoredPreferences, serialize
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import flush_to_disk

NAME, VERSION = "preference_pairs", "1.0.0"
SHARD_BYTES = 256 * 2**20
EVERY = 2000  # pairs between two calls of `on_pairs`


def build_preferences(
    source: PathLike | Sequence[PathLike] | Iterable[object],
    out: PathLike,
    *,
    format: str = "auto",
    on_error: str = "report",
    limit: int | None = None,
    columns: Mapping[str, str] | None = None,
    data_dir: PathLike | None = None,
    allow_truncated: bool = False,
    shard_bytes: int = SHARD_BYTES,
    on_pairs: Callable[[int], None] | None = None,
) -> StoredPreferences:
    """Write pairs as sharded, checksummed records; memory does not grow with their number.

    The directory appears whole or not at all: everything is written into `.OUT.partial` beside it,
    which is then moved. What a killed build has left there is written anew.

    Args:
        source: as in `read_preferences`.
        out: the directory to make; it may be there if it is empty.
        format: as in `read_preferences`.
        on_error: "fail" builds nothing where any record is bad.
        limit: as in `read_preferences`.
        columns: as in `read_preferences`.
        data_dir: as in `read_preferences`.
        allow_truncated: as in `read_preferences`.
        shard_bytes: a shard that has reached this size is closed.
        on_pairs: progress listener, called now and then with the number of pairs written.

    Returns:
        The built pairs, opened.

    Raises:
        InputError: as `read_preferences`; if `out` is there and not empty, or another build of it
            is running.

    Example:
        >>> import tempfile
        >>> pairs = [{"prompt": "2 + 2 =", "chosen": " 4", "rejected": f" {n}"} for n in (5, 6)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     built = build_preferences(pairs, f"{folder}/built")
        ...     len(built), built[1].rejected, len(built.shards)
        (2, ' 6', 1)
    """
    folder = Path(out)
    problems = []
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        must = f"must be a new or an empty directory, {folder} is not."
        problems.append(InputProblem("out", must))
    if not folder.absolute().parent.is_dir():
        must = f"must lie in a folder, but that of {folder} does not exist; create it first."
        problems.append(InputProblem("out", must))
    if isinstance(shard_bytes, bool) or not isinstance(shard_bytes, int) or shard_bytes < 1:
        problems.append(InputProblem("shard_bytes", "must be an integer >= 1", shard_bytes))
    if problems:
        raise InputError(problems)
    stream = PreferenceStream(
        source,
        format=format,
        on_error=on_error,
        limit=limit,
        columns=columns,
        data_dir=data_dir,
        allow_truncated=allow_truncated,
    )
    with _unfinished(folder) as partial:
        shards = _write_records(stream, partial, shard_bytes, on_pairs)
        index = StoredFile.of(partial / stored.INDEX, sum(shard.pairs for shard in shards))
        manifest = {
            "format": stored.FORMAT,
            "pairs": index.pairs,
            "shards": [vars(shard) for shard in shards],
            "index": vars(index),
            "report": stream.report.as_dict(),
        }
        # For tfds.builder_from_directory.
        _write_json(partial / "features.json", _features())
        _write_json(partial / "dataset_info.json", _dataset_info(shards))
        _write_json(partial / stored.MANIFEST, manifest)
        flush_to_disk(partial)
    return StoredPreferences.open(folder)


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Yield a locked directory beside `folder` that takes its place after success.

    `atomic_files.replaced` is not enough: of two builds of one directory, the second must wait.
    """
    partial = folder.absolute().with_name(f".{folder.absolute().name}.partial")
    partial.mkdir(exist_ok=True)
    handle = os.open(partial, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another build of {folder} is running; wait for it.") from error
        for entry in partial.iterdir():
            entry.unlink()
        try:
            yield partial
            partial.replace(folder)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
    finally:
        os.close(handle)


def _write_records(
    pairs: Iterable[Record],
    folder: Path,
    shard_bytes: int,
    on_pairs: Callable[[int], None] | None,
) -> list[StoredFile]:
    """Write shards and index; shards get their names at the end, when their number is known."""
    import tensorflow as tf

    counts: list[int] = []
    done = 0
    writer = None
    with (folder / stored.INDEX).open("wb") as index:
        try:
            for pair in pairs:
                record = serialize(pair)
                if writer is None:
                    writer, place = tf.io.TFRecordWriter(f"{folder}/shard-{len(counts)}"), 0
                    counts.append(0)
                writer.write(record)
                row = (len(counts) - 1, place, len(record), hash64(prompt_bytes(pair)))
                index.write(np.array(row, stored.INDEX_ROW).tobytes())
                place += stored.RECORD_HEAD + len(record) + stored.RECORD_TAIL
                counts[-1] += 1
                done += 1
                if on_pairs is not None and done % EVERY == 0:
                    on_pairs(done)
                if place >= shard_bytes:
                    writer.close()
                    writer = None
        finally:
            if writer is not None:
                writer.close()
    shards = []
    for number, count in enumerate(counts):
        file = folder / f"{NAME}-train.tfrecord-{number:05d}-of-{len(counts):05d}"
        (folder / f"shard-{number}").replace(file)
        shards.append(StoredFile.of(file, count))
    if on_pairs is not None:
        on_pairs(done)
    return shards


def _write_json(path: Path, content: JSON) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False, default=str)
    path.write_text(text + "\n", encoding="utf-8")


def _dataset_info(shards: Sequence[StoredFile]) -> dict[str, JSON]:
    split = {
        "name": "train",
        "filepathTemplate": "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}",
        "numBytes": str(sum(shard.bytes for shard in shards)),
        "shardLengths": [str(shard.pairs) for shard in shards],
    }
    name = {"name": NAME, "version": VERSION, "fileFormat": "tfrecord"}
    return {**name, "disableShuffling": True, "splits": [split]}


def _features() -> dict[str, JSON]:
    """Return `tfds_builder.features()` as TFDS writes it, without needing TFDS."""

    def feature(name: str, **content: JSON) -> dict[str, JSON]:
        return {"pythonClassName": f"tensorflow_datasets.core.features.{name}", **content}

    text = feature("text_feature.Text", text={})
    number = {"shape": {}, "dtype": "float64", "encoding": "bytes"}
    flag = {"shape": {}, "dtype": "bool", "encoding": "none"}
    kinds = {
        **dict.fromkeys((*stored.TEXTS, *stored.NAMES, stored.IMAGES), text),
        **dict.fromkeys(stored.NUMBERS, feature("tensor_feature.Tensor", tensor=number)),
        **dict.fromkeys(stored.FLAGS, feature("scalar.Scalar", tensor=flag)),
    }
    return feature("features_dict.FeaturesDict", featuresDict={"features": kinds})
