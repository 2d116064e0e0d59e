"""Token sequences that stay in a file: where they are is in memory, what they are is not."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError

WIDTH = 4  # bytes of a token


class TokenFile:
    """A file of int32 tokens (little-endian), read in runs.

    It is read, not mapped: mapped pages count as the process's own memory, and a pass over the data
    would seem to need (and in a container may be charged for) all of it. The system's page cache
    keeps what is read often, either way.

    Args:
        path: the file.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = open(self.path, "rb", buffering=0)
        if hasattr(os, "posix_fadvise"):  # Linux
            # No reading on behind a row: the next one is somewhere else.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Reads runs of tokens, end to end; safe to call from several threads.

        Args:
            starts: int `[n]`, the first token of each run.
            lengths: int `[n]`, how many.

        Returns:
            int32 `[sum(lengths)]`.

        Raises:
            InputError: if the file ends before.
        """
        sizes = np.asarray(lengths, np.int64) * WIDTH
        flat = np.empty(int(sizes.sum()) // WIDTH, "<i4")
        view = memoryview(flat.view(np.uint8).data)
        handle, place = self._file.fileno(), 0
        runs = zip((np.asarray(starts) * WIDTH).tolist(), sizes.tolist(), strict=True)
        for start, size in runs:
            if os.preadv(handle, [view[place : place + size]], start) != size:
                raise InputError(f"{self.path} is cut off; delete its folder to make it again.")
            place += size
        return flat.astype(np.int32, copy=False)

    def expect(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Has the system fetch runs that will be read soon, several at once and in its own time.

        Shuffled rows of a file that is not in memory cost a disk access each; one after the other
        they took three times as long.

        Args:
            starts: int `[n]`, the first token of each run.
            lengths: int `[n]`, how many.
        """
        if not hasattr(os, "posix_fadvise"):
            return
        handle = self._file.fileno()
        runs = (np.asarray(starts) * WIDTH).tolist(), (np.asarray(lengths) * WIDTH).tolist()
        for start, size in zip(*runs, strict=True):
            os.posix_fadvise(handle, start, size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        """Closes the file with the last of its readers."""
        if hasattr(self, "_file"):
            self._file.close()


class StoredRagged(Ragged):
    """Rows of a `TokenFile`, as a `Ragged`: batches are read when they are taken.

    Args:
        file: where the tokens are.
        starts: int `[rows]`, the first token of each row.
        lengths: int `[rows]`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     np.array([5, 6, 7, 8], "<i4").tofile(f"{folder}/tokens")
        ...     file = TokenFile(f"{folder}/tokens")
        ...     StoredRagged(file, np.array([0, 3]), np.array([3, 1])).take([1, 0]).tolist()
        [[8], [5, 6, 7]]
    """

    _file: TokenFile
    _starts: np.ndarray
    _lengths: np.ndarray

    def __init__(self, file: TokenFile, starts: np.ndarray, lengths: np.ndarray):
        self.__dict__.update(_file=file, _starts=starts, _lengths=lengths)

    @property
    def flat_values(self) -> np.ndarray:
        """All tokens, read into memory."""
        return self._file.read(self._starts, self._lengths)

    @property
    def row_splits(self) -> np.ndarray:
        """Where each row would begin in `flat_values`."""
        splits = np.zeros(len(self) + 1, np.int64)
        np.cumsum(self._lengths, out=splits[1:])
        return splits

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, int64 `[rows]`."""
        return self._lengths.astype(np.int64)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self._starts)

    def __getitem__(self, row: int) -> np.ndarray:
        """The tokens of one row."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return self._file.read(self._starts[[row]], self._lengths[[row]])

    def take(self, rows: Sequence[int] | np.ndarray) -> Ragged:
        """Reads rows, in the order given, repeats allowed."""
        return Ragged(*self._read(np.asarray(rows, np.int64)))

    def expect(self, rows: Sequence[int] | np.ndarray) -> None:
        """Announces rows that will be read soon."""
        rows = np.asarray(rows, np.int64)
        self._file.expect(self._starts[rows], self._lengths[rows])

    def select(self, rows: Sequence[int] | np.ndarray) -> StoredRagged:
        """Picks rows without reading them."""
        rows = np.asarray(rows, np.int64)
        return StoredRagged(self._file, self._starts[rows], self._lengths[rows])

    def _read(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        lengths = self._lengths[rows].astype(np.int64)
        splits = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=splits[1:])
        return self._file.read(self._starts[rows], lengths), splits
