"""Sequences of differing length in two flat arrays: small, fast to slice and cheap to hash."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from dpo_keras.errors import InputError


@dataclass(frozen=True)
class Ragged:
    """Token sequences laid end to end; sequence i is `flat_values[row_splits[i]:row_splits[i+1]]`.

    The layout is that of `tf.RaggedTensor`: `tf.RaggedTensor.from_row_splits(r.flat_values,
    r.row_splits)` takes it as it is.

    Args:
        flat_values: int32 `[total]`, all tokens.
        row_splits: int64 `[rows + 1]`, rising from 0 to `total`.

    Example:
        >>> tokens = Ragged.from_lists([[5, 6, 7], [], [8]])
        >>> len(tokens), tokens.lengths.tolist(), tokens[0].tolist()
        (3, [3, 0, 1], [5, 6, 7])
        >>> tokens.slice([1, 0, 0], [3, 0, 1]).tolist()
        [[6, 7], [], [8]]
    """

    flat_values: np.ndarray
    row_splits: np.ndarray

    @classmethod
    def from_lists(cls, sequences: Iterable[Sequence[int] | np.ndarray]) -> Ragged:
        """Packs lists (or arrays) of token ids.

        Args:
            sequences: one sequence of token ids per row.

        Returns:
            The rows in the order given.

        Example:
            >>> Ragged.from_lists([[1], [2, 3]]).row_splits.tolist()
            [0, 1, 3]
        """
        rows = list(sequences)
        splits = np.zeros(len(rows) + 1, np.int64)
        np.cumsum([len(row) for row in rows], out=splits[1:])
        flat = np.fromiter(chain.from_iterable(rows), np.int32, count=int(splits[-1]))
        return cls(flat, splits)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, int64 `[rows]`."""
        return np.diff(self.row_splits)

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.row_splits) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """The tokens of one row, a view."""
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row %= len(self)
        return self.flat_values[self.row_splits[row] : self.row_splits[row + 1]]

    def slice(
        self, starts: Sequence[int] | np.ndarray, stops: Sequence[int] | np.ndarray
    ) -> Ragged:
        """Cuts every row to `row[start:stop]`, all rows at once.

        Args:
            starts: int `[rows]`, first token kept, counted from the row's beginning.
            stops: int `[rows]`, one past the last token kept.

        Returns:
            As many rows, cut.

        Example:
            >>> Ragged.from_lists([[1, 2, 3], [4, 5]]).slice([0, 1], [2, 2]).tolist()
            [[1, 2], [5]]
        """
        starts = np.asarray(starts, np.int64)
        lengths = np.maximum(np.asarray(stops, np.int64) - starts, 0)
        splits = np.zeros(len(self) + 1, np.int64)
        np.cumsum(lengths, out=splits[1:])
        return Ragged(self.flat_values[places(self.row_splits[:-1] + starts, lengths)], splits)

    def take(self, rows: Sequence[int] | np.ndarray) -> Ragged:
        """Picks rows, in the order given, repeats allowed.

        Args:
            rows: int `[n]` row numbers.

        Returns:
            A new Ragged of n rows.

        Example:
            >>> Ragged.from_lists([[1], [2, 3]]).take([1, 1, 0]).tolist()
            [[2, 3], [2, 3], [1]]
        """
        rows = np.asarray(rows, np.int64)
        starts = self.row_splits[rows]
        # Not self.lengths[rows]: a batch must not cost more where there are more rows.
        lengths = self.row_splits[rows + 1] - starts
        splits = np.zeros(len(rows) + 1, np.int64)
        np.cumsum(lengths, out=splits[1:])
        return Ragged(self.flat_values[places(starts, lengths)], splits)

    def select(self, rows: Sequence[int] | np.ndarray) -> Ragged:
        """Picks rows without reading their tokens where these are on disk; else as `take`.

        Args:
            rows: int `[n]` row numbers.

        Returns:
            n rows.

        Example:
            >>> Ragged.from_lists([[1], [2, 3]]).select([1]).tolist()
            [[2, 3]]
        """
        return self.take(rows)

    def expect(self, rows: Sequence[int] | np.ndarray) -> None:
        """Announces rows that will be read soon; rows in memory need no announcement.

        Args:
            rows: int `[n]` row numbers.
        """

    def tolist(self) -> list[list[int]]:
        """The rows as lists of Python integers.

        Example:
            >>> Ragged.from_lists([[1], []]).tolist()
            [[1], []]
        """
        return [self[row].tolist() for row in range(len(self))]


def places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Flat indices of the runs `starts[i], starts[i] + 1, …` of the given lengths, end to end.

    Args:
        starts: int `[n]`, where each run begins.
        lengths: int `[n]`, how long each run is, >= 0.

    Returns:
        int64 `[sum(lengths)]`.

    Example:
        >>> places(np.array([10, 20]), np.array([2, 3])).tolist()
        [10, 11, 20, 21, 22]
    """
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(np.asarray(starts, np.int64) - (ends - lengths), lengths)


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

    def warm(self) -> None:
        """Reads all of a file that fits well into free memory once, from front to back.

        A disk does that many times faster than it finds shuffled rows, and the system keeps what
        was read as long as nobody else wants the memory. It happens in the background.
        """
        if self.path.stat().st_size <= _free_memory() // 2:
            threading.Thread(target=_read_through, args=(self.path,), daemon=True).start()

    def __del__(self) -> None:
        """Closes the file with the last of its readers."""
        if hasattr(self, "_file"):
            self._file.close()


def _read_through(path: Path) -> None:
    buffer = bytearray(2**22)
    with contextlib.suppress(OSError), open(path, "rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _free_memory() -> int:
    """Returns the bytes that the system could use for its page cache; 0 where it does not say."""
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        return 1024 * int(next(n for n in lines if n.startswith("MemAvailable:")).split()[1])
    return 0


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
