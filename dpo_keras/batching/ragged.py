"""Sequences of different lengths in two flat arrays, in memory or in a file."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

import numpy as np

from dpo_keras.errors import InputError

TOKEN_BYTES = 4  # bytes of a token in a file


@dataclass(frozen=True)
class Ragged:
    """Token sequences end to end; sequence i is `flat_values[row_splits[i]:row_splits[i + 1]]`.

    `tf.RaggedTensor` has the same layout: `tf.RaggedTensor.from_row_splits(r.flat_values,
    r.row_splits)` makes one without a copy.

    Args:
        flat_values: int32 `[total]`, all tokens.
        row_splits: int64 `[rows + 1]`, rising from 0 to `total`.

    Example:
        >>> tokens = Ragged.from_lists([[5, 6, 7], [], [8]])
        >>> len(tokens), tokens.lengths.tolist(), tokens[0].tolist()
        (3, [3, 0, 1], [5, 6, 7])
        >>> tokens.slice([1, 0, 0], [3, 0, 1]).tolist()
        [[6, 7], [], [8]]
        >>> tokens.take([2, 2, 0]).tolist()
        [[8], [8], [5, 6, 7]]
    """

    flat_values: np.ndarray
    row_splits: np.ndarray

    @classmethod
    def from_lists(cls, sequences: Iterable[Sequence[int] | np.ndarray]) -> Ragged:
        """Build the rows from lists or arrays of token ids."""
        rows = list(sequences)
        splits = row_splits_of([len(row) for row in rows])
        flat = np.fromiter(chain.from_iterable(rows), np.int32, count=int(splits[-1]))
        return cls(flat, splits)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, int64 `[rows]`."""
        return np.diff(self.row_splits)

    def __len__(self) -> int:
        return len(self.row_splits) - 1

    def __getitem__(self, row: int) -> np.ndarray:
        """Return the tokens of one row, as a view."""
        row = self._checked(row)
        return self.flat_values[self.row_splits[row] : self.row_splits[row + 1]]

    def slice(
        self, starts: Sequence[int] | np.ndarray, stops: Sequence[int] | np.ndarray
    ) -> Ragged:
        """Cut every row to `row[start:stop]`, 0 <= start, stop <= the row's length."""
        starts = np.asarray(starts, np.int64)
        lengths = np.maximum(np.asarray(stops, np.int64) - starts, 0)
        flat = self.flat_values[places(self.row_splits[:-1] + starts, lengths)]
        return Ragged(flat, row_splits_of(lengths))

    def take(self, rows: Sequence[int] | np.ndarray) -> Ragged:
        """Return the rows of the given numbers, in that order; repeats are allowed."""
        rows = np.asarray(rows, np.int64)
        starts = self.row_splits[rows]
        # Not self.lengths[rows]: the cost of a batch must not grow with the number of rows.
        lengths = self.row_splits[rows + 1] - starts
        return Ragged(self.flat_values[places(starts, lengths)], row_splits_of(lengths))

    def select(self, rows: Sequence[int] | np.ndarray) -> Ragged:
        """Return rows as `take` does, but leave their tokens on disk where they are on disk."""
        return self.take(rows)

    def expect(self, rows: Sequence[int] | np.ndarray) -> None:
        """Announce rows that are about to be read. Rows in memory need no announcement."""

    def tolist(self) -> list[list[int]]:
        """Return the rows as lists of Python integers."""
        return [self[row].tolist() for row in range(len(self))]

    def _checked(self, row: int) -> int:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        return row % len(self)


def row_splits_of(lengths: Sequence[int] | np.ndarray) -> np.ndarray:
    """Return where each row begins and the last one ends, int64 `[rows + 1]`."""
    splits = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=splits[1:])
    return splits


def round_up(value: int, multiple: int) -> int:
    """Round up to a multiple."""
    return -(-value // multiple) * multiple


def places(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Return the indices of runs that begin at `starts`, end to end, int64 `[sum(lengths)]`."""
    lengths = np.asarray(lengths, np.int64)
    ends = np.cumsum(lengths)
    total = int(ends[-1]) if len(ends) else 0
    return np.arange(total) + np.repeat(np.asarray(starts, np.int64) - (ends - lengths), lengths)


class TokenFile:
    """A file of little-endian int32 tokens, read in runs.

    The file is read, not mapped: mapped pages count as memory of the process, so a container may be
    charged for the whole file. The page cache keeps frequently read parts either way.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        self._file = self.path.open("rb", buffering=0)
        if hasattr(os, "posix_fadvise"):  # Linux
            # Disable read-ahead: the next row is somewhere else.
            os.posix_fadvise(self._file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)

    def read(self, starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Read runs of tokens, end to end, int32 `[sum(lengths)]`. Threads may share a file."""
        sizes = np.asarray(lengths, np.int64) * TOKEN_BYTES
        flat = np.empty(int(sizes.sum()) // TOKEN_BYTES, "<i4")
        view = memoryview(flat.view(np.uint8).data)
        handle, place = self._file.fileno(), 0
        runs = zip((np.asarray(starts) * TOKEN_BYTES).tolist(), sizes.tolist(), strict=True)
        for start, size in runs:
            if os.preadv(handle, [view[place : place + size]], start) != size:
                raise InputError(f"{self.path} is cut off; delete its folder to make it again.")
            place += size
        return flat.astype(np.int32, copy=False)

    def expect(self, starts: np.ndarray, lengths: np.ndarray) -> None:
        """Ask the system to fetch runs in the background, several at once."""
        # One after the other, the disk accesses of shuffled rows took three times as long.
        if not hasattr(os, "posix_fadvise"):
            return
        for start, size in (np.stack([starts, lengths], axis=1) * TOKEN_BYTES).tolist():
            os.posix_fadvise(self._file.fileno(), start, size, os.POSIX_FADV_WILLNEED)

    def __del__(self) -> None:
        if hasattr(self, "_file"):
            self._file.close()


class StoredRagged(Ragged):
    """Rows of a `TokenFile`, by their first token and length; a row is read when it is taken."""

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
        return row_splits_of(self._lengths)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens in each row, int64 `[rows]`."""
        return self._lengths.astype(np.int64)

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, row: int) -> np.ndarray:
        row = self._checked(row)
        return self._file.read(self._starts[[row]], self._lengths[[row]])

    def take(self, rows: Sequence[int] | np.ndarray) -> Ragged:
        """Read the rows of the given numbers, in that order; repeats are allowed."""
        rows = np.asarray(rows, np.int64)
        lengths = self._lengths[rows].astype(np.int64)
        return Ragged(self._file.read(self._starts[rows], lengths), row_splits_of(lengths))

    def expect(self, rows: Sequence[int] | np.ndarray) -> None:
        """Announce rows that are about to be read, so that the disk can begin."""
        rows = np.asarray(rows, np.int64)
        self._file.expect(self._starts[rows], self._lengths[rows])

    def select(self, rows: Sequence[int] | np.ndarray) -> StoredRagged:
        """Return rows without reading them."""
        rows = np.asarray(rows, np.int64)
        return StoredRagged(self._file, self._starts[rows], self._lengths[rows])
