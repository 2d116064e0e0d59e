"""The manifest of a directory of built pairs: its files, their sizes and SHA-256."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dpo_keras.errors import InputError

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
