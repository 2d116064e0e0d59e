"""The manifest of a directory of built pairs: its files, their sizes and SHA-256."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import Message, PreferencePair, Text

MANIFEST, INDEX = "manifest.json", "index.bin"
FORMAT = "dpo_keras preference pairs 1"


def is_built(path: str | os.PathLike[str]) -> bool:
    """Whether a path is a directory that `build_preferences` made.

    Example:
        >>> is_built(".")
        False
    """
    return (Path(path) / MANIFEST).is_file()


@dataclass(frozen=True)
class StoredFile:
    """One file of a built directory, as its manifest has it.

    Args:
        file: name.
        pairs: how many it holds.
        bytes: its size.
        sha256: of all of it.
    """

    file: str
    pairs: int
    bytes: int
    sha256: str


def sha256_of(path: Path) -> str:
    """Returns the SHA-256 of a file, read in pieces.

    Example:
        >>> len(sha256_of(Path(__file__)))
        64
    """
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_manifest(folder: Path) -> dict[str, Any]:
    """Reads the manifest of a built directory.

    Raises:
        InputError: if there is none, or it cannot be read.
    """
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
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        found = manifest.get("format") if isinstance(manifest, dict) else manifest
        raise InputError(f"{path} must say format {FORMAT!r}, got {found!r}; build again.")
    return manifest


def size_fault(folder: Path, file: StoredFile) -> str | None:
    """Says in a sentence how a file's size differs from the manifest's; None where it does not."""
    path = folder / file.file
    if not path.is_file():
        return f"{path} is missing; build the directory again, or restore the file."
    size = path.stat().st_size
    if size == file.bytes:
        return None
    what = "cut off" if size < file.bytes else "longer than it was"
    return (
        f"{path} is {what}: {size:,} bytes, the manifest has {file.bytes:,}. Build the directory "
        "again, or restore the file."
    )


TEXTS = ("prompt", "chosen", "rejected")
NAMES = ("annotator", "group", "id")
NUMBERS = ("preference", "weight", "margin")
FLAGS = ("messages", "swapped")
FEATURES = frozenset((*TEXTS, *NAMES, *NUMBERS, *FLAGS))


def to_features(pair: PreferencePair) -> dict[str, Any]:
    """Returns a pair as flat values.

    Example:
        >>> features = to_features(PreferencePair("Hi", "Hello!", "Go away.", annotator="ann"))
        >>> features["prompt"], features["messages"], features["annotator"], features["group"]
        ('Hi', False, 'ann', '')
    """
    features: dict[str, Any] = {name: _as_text(getattr(pair, name)) for name in TEXTS}
    features |= {name: getattr(pair, name) or "" for name in NAMES}
    features |= {"preference": pair.preference, "weight": pair.weight}
    features["margin"] = math.nan if pair.margin is None else pair.margin
    features["messages"] = not isinstance(pair.prompt, str)
    features["swapped"] = pair.swapped
    return features


def from_features(features: Mapping[str, Any]) -> PreferencePair:
    """Makes the pair again.

    Args:
        features: as `to_features` made them; text may be UTF-8 bytes, numbers NumPy's.

    Example:
        >>> pair = PreferencePair("Hi", "Hello!", "Go away.", preference=0.7, margin=0.1)
        >>> from_features(to_features(pair)) == pair
        True
    """
    text = {name: _plain(features[name]) or None for name in (*TEXTS, *NAMES)}
    prompt, chosen, rejected = (
        _messages(text[name] or "[]") if features["messages"] else text[name] or ""
        for name in TEXTS
    )
    margin = float(features["margin"])
    return PreferencePair(
        prompt,
        chosen,
        rejected,
        float(features["preference"]),
        float(features["weight"]),
        text["annotator"],
        text["group"],
        text["id"],
        None if math.isnan(margin) else margin,
        bool(features["swapped"]),
    )


def serialize(pair: PreferencePair) -> bytes:
    """Returns a pair as a serialized `tf.train.Example`, the same bytes for the same pair.

    Example:
        >>> pair = PreferencePair("Hi", "Hello!", "Go away.")
        >>> parse(serialize(pair)) == pair
        True
    """
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
    """Makes a pair of a serialized `tf.train.Example`.

    Raises:
        InputError: if it is none, or holds no pair.
    """
    try:
        feature = _example().FromString(record).features.feature
        values: dict[str, Any] = {name: feature[name].int64_list.value[0] for name in FLAGS}
        for name in (*TEXTS, *NAMES):
            values[name] = feature[name].bytes_list.value[0]
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


def _as_text(text: Text) -> str:
    if isinstance(text, str):
        return text
    return json.dumps([turn.as_dict() for turn in text], ensure_ascii=False)


def _messages(text: str) -> tuple[Message, ...]:
    return tuple(Message(turn["role"], turn["content"]) for turn in json.loads(text))


def _plain(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else value
