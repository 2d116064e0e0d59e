"""Where a model is written: numbered versions, whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

import tensorflow as tf

from dpo_keras.errors import InputError


def next_version(path: str | Path) -> int:
    """The version after the last one in a model's directory.

    Args:
        path: the directory that holds the versions; it need not exist.

    Returns:
        1 for a new model.

    Example:
        >>> next_version("saved_models/no_such_model")
        1
    """
    folder = Path(path)
    versions = [
        int(entry.name)
        for entry in (folder.iterdir() if folder.is_dir() else ())
        if entry.is_dir() and entry.name.isdecimal()
    ]
    return max(versions, default=0) + 1


def version_path(path: str | Path) -> Path:
    """Where a version is to be written: `path` if it ends in a number, else its next version.

    Args:
        path: `<name>/<version>`, or `<name>`.

    Returns:
        The absolute path of a version that does not exist yet.

    Raises:
        InputError: the version exists, or something that is no directory is in the way.
    """
    given = Path(path).absolute()
    if not given.name.isdecimal():
        given = given / str(next_version(given))
    if given.exists():
        raise InputError(
            f"path {given} exists already. Versions are never overwritten, because a server may be "
            f"reading them; the next free one is {given.parent / str(next_version(given.parent))}."
        )
    for parent in given.parents:
        if parent.exists():
            if not parent.is_dir():
                raise InputError(f"path {given} cannot be made: {parent} is a file.")
            break
    return given


@contextlib.contextmanager
def staged(target: Path) -> Iterator[Path]:
    """A directory beside `target` that becomes `target`, or vanishes.

    Args:
        target: a version that does not exist.

    Yields:
        Where to write.

    Raises:
        OSError: it could not be written.
    """
    # Servers look only at names that are whole numbers.
    partial = target.parent / f".{target.name}.{secrets.token_hex(4)}.partial"
    try:
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            os.rename(partial, target)
        except (OSError, tf.errors.OpError) as error:
            raise OSError(
                f"the model could not be written to {target} ({error}); nothing was left there."
            ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
