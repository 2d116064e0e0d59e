"""Sequences of differing length in two flat arrays: small, fast to slice and cheap to hash."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np


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
