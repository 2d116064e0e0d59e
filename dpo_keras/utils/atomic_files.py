"""Files and directories that are whole or absent, even after a crash in the middle of writing."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replaced(path: str | os.PathLike[str], *, replace_directory: bool = True) -> Iterator[Path]:
    """Yield a path to write to; move it to `path` once the block ends without an error.

    The block writes a file or makes a directory there. After an error it is removed, and what stood
    at `path` stays. With `replace_directory=False` a directory with files at `path`, even one that
    appeared in the meantime, stays and raises OSError in the end.
    """
    path = Path(path)
    make_directory(path.parent)
    # The suffix stays last: Keras and pandas choose the format by it.
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    _remove(partial)
    try:
        yield partial
        flush_to_disk(partial)
        if replace_directory and path.is_dir():
            # A directory that holds files cannot be replaced in one step.
            old = path.with_name(f".{path.name}.{os.getpid()}.old")
            _remove(old)
            path.replace(old)
            try:
                partial.replace(path)
            except BaseException:
                old.replace(path)
                raise
            _remove(old)
        else:
            partial.replace(path)
        # The new name only: the folder's other files may be large, or vanish meanwhile.
        _flush_names(path.parent)
    except BaseException:
        _remove(partial)
        raise


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write a UTF-8 text file that is whole or absent."""
    with replaced(path) as partial:
        partial.write_text(text, encoding="utf-8")


def make_directory(path: str | os.PathLike[str]) -> None:
    """Make a directory with its parents, where they are missing, and wait until they are on disk.

    A directory whose own name is not on the disk is lost with all that was flushed into it.
    """
    path = Path(path)
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    path.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _flush_names(folder.parent)


def flush_to_disk(path: str | os.PathLike[str]) -> None:
    """Wait until a file, or a directory with all that is in it, is on the disk."""
    path = Path(path)
    if path.is_dir():
        for inner in path.rglob("*"):
            if inner.is_file():
                _flush(inner)
            elif inner.is_dir():
                _flush_names(inner)
        _flush_names(path)
    else:
        _flush(path)


def _flush_names(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every file system flushes directories
        _flush(folder)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
