"""Preference pairs on disk: the directory that `build_preferences` makes, read without loading it.

| file | content |
|---|---|
| `preference_pairs-train.tfrecord-00000-of-00008` … | the pairs, as `tf.train.Example` |
| `index.bin` | for each pair: shard, place, size and the hash of its prompt |
| `manifest.json` | counts, sizes and SHA-256 of every file, and the report of the reading |
| `dataset_info.json`, `features.json` | so that `tfds.builder_from_directory` reads it too |
| `tokens/` | token ids, a folder for each tokenizer, template and truncation (a cache) |
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.preferences.collection import PairSequence
from dpo_keras.preferences.images import Image
from dpo_keras.preferences.pair import Message, PreferencePair
from dpo_keras.preferences.read_report import ReadReport
from dpo_keras.preferences.record_kinds import KINDS, Record
from dpo_keras.utils import JSON

MANIFEST, INDEX = "manifest.json", "index.bin"
FORMAT = "dpo_keras preference pairs 1"
INDEX_ROW = np.dtype([("shard", "<u4"), ("place", "<u8"), ("size", "<u4"), ("prompt", "<u8")])
# A TFRecord is length (8 bytes), its checksum (4), the data, their checksum (4).
RECORD_HEAD, RECORD_TAIL = 12, 4

TEXTS = ("prompt", "chosen", "rejected")
NAMES = ("annotator", "group", "id")
NUMBERS = ("preference", "weight", "margin")
FLAGS = ("messages", "swapped")
IMAGES = "images"  # JSON; absent from directories built before there were images
FEATURES = frozenset((*TEXTS, *NAMES, *NUMBERS, *FLAGS, IMAGES))

AGAIN = "build the directory again, or restore the file."


def is_built(path: str | os.PathLike[str]) -> bool:
    """Return whether a path is a directory that `build_preferences` made."""
    return (Path(path) / MANIFEST).is_file()


@dataclass(frozen=True)
class StoredFile:
    """One file of a built directory: name, number of pairs, size and SHA-256."""

    file: str
    pairs: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path, pairs: int) -> StoredFile:
        """Describe a file that is complete."""
        return cls(path.name, pairs, path.stat().st_size, _sha256(path))

    def problem(self, folder: Path, contents: bool = False) -> str | None:
        """Return what is wrong with the file on disk; its contents are read where asked for."""
        path = folder / self.file
        if not path.is_file():
            return f"{path} is missing; {AGAIN}"
        size = path.stat().st_size
        if size != self.bytes:
            what = "cut off" if size < self.bytes else "longer than it was"
            return f"{path} is {what}: {size:,} bytes, the manifest has {self.bytes:,}; {AGAIN}"
        if contents and (found := _sha256(path)) != self.sha256:
            was = self.sha256[:12]
            return f"{path} is damaged: its SHA-256 is {found[:12]}…, it was {was}…; {AGAIN}"
        return None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(eq=False, repr=False)
class StoredPreferences(PairSequence[PreferencePair]):
    """Pairs of a built directory: list-like, read from disk one by one, never all at once.

    A selection keeps 8 bytes per pair in memory. `open` makes one.

    Attributes:
        path: the directory.
        shards: its shards.
        report: how the pairs were read when the directory was built.
        rows: int64 `[N]`, which pairs of the directory these are, ascending; None for all.
        extent: pairs of the directory up to the last that may be among these; tokens are made for
            so many.
    """

    path: Path
    shards: tuple[StoredFile, ...]
    _index: np.ndarray
    report: ReadReport
    rows: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.extent = len(self._index)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> StoredPreferences:
        """Open a built directory, and check that every file is there in its full size.

        The index is compared with its checksum, a shard when it is read from its beginning; see
        `verify`.

        Raises:
            InputError: if it is no built directory, or naming every file that is missing or cut.
        """
        folder = Path(path)
        shards, report = _read_manifest(folder)
        return cls(folder, shards, np.memmap(folder / INDEX, INDEX_ROW, "r"), report)

    @property
    def checksum(self) -> str:
        """SHA-256 over the shards' own: directories of equal checksum hold the same pairs."""
        return hashlib.sha256("".join(s.sha256 for s in self.shards).encode()).hexdigest()

    @property
    def whole(self) -> StoredPreferences:
        """All pairs of the directory up to `extent`."""
        return StoredPreferences(self.path, self.shards, self._index[: self.extent], self.report)

    @property
    def prompt_hashes(self) -> np.ndarray:
        """The hash of each pair's prompt, uint64 `[N]`."""
        hashes = self._index["prompt"]
        return np.asarray(hashes if self.rows is None else hashes[self.rows])

    def __len__(self) -> int:
        return self.extent if self.rows is None else len(self.rows)

    def __iter__(self) -> Iterator[PreferencePair]:
        return self.read() if self.rows is None else map(self._read_one, map(int, self.rows))

    def __repr__(self) -> str:
        return f"StoredPreferences({len(self):,} pairs of {self.path})"

    def select(self, rows: np.ndarray) -> StoredPreferences:
        """Return the pairs at `rows`, int `[n]`, ascending; nothing is read."""
        rows = np.asarray(rows, np.int64)
        chosen = rows if self.rows is None else self.rows[rows]
        selected = StoredPreferences(self.path, self.shards, self._index, self.report, chosen)
        selected.extent = self.extent
        return selected

    def first(self, count: int) -> StoredPreferences:
        """Return the first `count` pairs; nothing beyond them is ever tokenized."""
        if count >= len(self):
            return self
        if self.rows is not None:
            return self.select(np.arange(count))
        return StoredPreferences(self.path, self.shards, self._index[:count], self.report)

    def read(self, start: int = 0) -> Iterator[PreferencePair]:
        """Read the directory's pairs from number `start` to `extent`, from checked shards.

        Raises:
            InputError: if a shard's checksum is wrong.
        """
        number = 0
        for shard in self.shards:
            count = min(shard.pairs, self.extent - number)
            skipped = min(max(start - number, 0), count)
            if skipped < count:
                if problem := shard.problem(self.path, contents=True):
                    raise InputError(problem)
                rows = self._index[number + skipped : number + count]
                with (self.path / shard.file).open("rb") as file:
                    file.seek(int(rows[0]["place"]))
                    for size in rows["size"].tolist():
                        record = file.read(RECORD_HEAD + size + RECORD_TAIL)
                        yield parse(record[RECORD_HEAD : RECORD_HEAD + size])
            number += count

    def verify(self) -> None:
        """Compare the checksum of every file; raise `InputError` with all that changed."""
        _read_manifest(self.path, contents=True)

    def _pair(self, row: int) -> PreferencePair:
        return self._read_one(row if self.rows is None else int(self.rows[row]))

    def _read_one(self, row: int) -> PreferencePair:
        entry = self._index[row]
        shard = self.path / self.shards[int(entry["shard"])].file
        try:
            with shard.open("rb", buffering=0) as file:
                place = int(entry["place"]) + RECORD_HEAD
                return parse(os.pread(file.fileno(), int(entry["size"]), place))
        except (OSError, InputError) as error:
            raise InputError(f"{shard}: pair {row} cannot be read ({error}); {AGAIN}") from error


def _read_manifest(
    folder: Path, contents: bool = False
) -> tuple[tuple[StoredFile, ...], ReadReport]:
    """Return the shards and the report of a built directory, after a check of all its files."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} is no directory of built pairs: it has no {MANIFEST}. Make one with "
            "dpo-keras data build FILES… --out DIR."
        ) from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); build the directory again.") from error
    found = manifest.get("format") if isinstance(manifest, dict) else manifest
    if found != FORMAT:
        raise InputError(f"{path} must say format {FORMAT!r}, got {found!r}; build again.")
    try:
        shards = tuple(StoredFile(**entry) for entry in manifest["shards"])
        files = [*shards, StoredFile(**manifest["index"])]
        report = ReadReport.from_dict(manifest["report"])
    except (KeyError, TypeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path} is damaged ({reason}); build again.") from error
    # The index is small, and decides which pairs are held out: it is read at once.
    problems = [file.problem(folder, contents or file.file == INDEX) for file in files]
    if any(problems):
        raise InputError([problem for problem in problems if problem])
    return shards, report


def to_features(pair: Record) -> dict[str, JSON]:
    """Return a pair as flat values: messages as JSON, what is missing as "" or NaN."""
    if not isinstance(pair, PreferencePair):
        raise InputError(
            f"a built directory holds preference pairs, and the data are {KINDS[type(pair)][1]}; "
            "train on their files themselves (data.path=FILE)."
        )
    record = pair.as_dict()
    features: dict[str, JSON] = {name: record[name] for name in TEXTS}
    if pair.tools:
        features["prompt"][0]["tools"] = pair.tools
    if messages := not isinstance(pair.prompt, str):
        features = {n: json.dumps(v, ensure_ascii=False) for n, v in features.items()}
    features |= {name: getattr(pair, name) or "" for name in NAMES}
    features |= {"preference": pair.preference, "weight": pair.weight}
    features["margin"] = math.nan if pair.margin is None else pair.margin
    features[IMAGES] = _images_to_json(pair.images)
    return {**features, "messages": messages, "swapped": pair.swapped}


def from_features(features: Mapping[str, JSON]) -> PreferencePair:
    """Return the pair that `to_features` was called on; text may be UTF-8 bytes."""
    text = {name: features[name] for name in (*TEXTS, *NAMES)}
    text = {n: v.decode() if isinstance(v, bytes) else v for n, v in text.items()}
    prompt, chosen, rejected = (
        _messages(text[name] or "[]") if features["messages"] else text[name] for name in TEXTS
    )
    others: dict[str, JSON] = {name: text[name] or None for name in NAMES}
    others |= {name: float(features[name]) for name in NUMBERS}
    if math.isnan(others["margin"]):
        others["margin"] = None
    others["images"] = _images_from_json(features.get(IMAGES) or "")
    return PreferencePair(prompt, chosen, rejected, **others, swapped=bool(features["swapped"]))


def serialize(pair: Record) -> bytes:
    """Return a pair as a serialized `tf.train.Example`, the same bytes for the same pair."""
    example = _example()()
    feature = example.features.feature
    for name, value in to_features(pair).items():
        if name in FLAGS:
            feature[name].int64_list.value.append(int(value))
        elif name in NUMBERS:
            feature[name].bytes_list.value.append(np.float64(value).tobytes())
        else:
            feature[name].bytes_list.value.append(value.encode())
    return example.SerializeToString(deterministic=True)


def parse(record: bytes) -> PreferencePair:
    """Return the pair of a serialized `tf.train.Example`; raise `InputError` if it holds none."""
    try:
        feature = _example().FromString(record).features.feature
        values: dict[str, JSON] = {name: feature[name].int64_list.value[0] for name in FLAGS}
        for name in (*TEXTS, *NAMES):
            values[name] = feature[name].bytes_list.value[0]
        images = feature[IMAGES].bytes_list.value
        values[IMAGES] = images[0] if images else b""
        for name in NUMBERS:
            values[name] = np.frombuffer(feature[name].bytes_list.value[0], np.float64)[0]
        return from_features(values)
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"a record is no preference pair ({type(error).__name__}).") from error


@functools.cache
def _example() -> Any:
    from tensorflow import train

    return train.Example


def _images_to_json(images: tuple[Image, ...]) -> str:
    """Keep paths as they are, with the hash of what they named; images without a file whole."""
    if not images:
        return ""
    return json.dumps([[image.digest, image.path or image.as_text()] for image in images])


def _images_from_json(text: str | bytes) -> tuple[Image, ...]:
    entries = json.loads(text) if text else []
    # Not `Image.of`: nothing is read from a file until a batch needs it.
    return tuple(
        Image.of(place) if place.startswith("data:") else Image(digest, place)
        for digest, place in entries
    )


def _messages(text: str) -> tuple[Message, ...]:
    return tuple(map(Message.from_dict, json.loads(text)))
