"""Bin packing: pairs of differing size into rows of one capacity, by best fit."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass

import numpy as np

WINDOW = 1024  # pairs; a row takes no pair that comes later in the stream than that

Rows = list[list[int]]


@dataclass(frozen=True)
class Capacity:
    """What a row holds at most.

    Args:
        length: tokens.
        slots: response tokens.
        pairs: pairs.
    """

    length: int
    slots: int
    pairs: int


@dataclass(frozen=True)
class Sizes:
    """What each pair takes of a row.

    Args:
        tokens: int `[N]`, of prompt and both responses, each once.
        responses: int `[N]`, of both responses.
    """

    tokens: np.ndarray
    responses: np.ndarray

    def total(self, rows: Rows) -> np.ndarray:
        """Tokens in each row, int64 `[rows]`."""
        return np.array([self.tokens[row].sum() for row in rows], np.int64)


def best_fit(
    stream: np.ndarray,
    sizes: Sizes,
    capacity: Capacity,
    rows: Rows | None = None,
    window: int = WINDOW,
) -> Rows:
    """Packs a stream of pairs: each goes into the fullest row that still holds it.

    Pairs are taken as they come. Sorting them by size first (best fit decreasing) would fill rows
    by another percent, but leaves rows of two long pairs and rows of twenty short ones; as they
    come, rows are much alike in their number of pairs, and so are the steps made of them.

    Args:
        stream: int `[n]`, the pairs in order.
        sizes: of all pairs.
        capacity: of a row, no less than any pair.
        rows: rows to fill up first; they are changed.
        window: pairs after which a row takes no more, to keep the stream's order roughly.

    Returns:
        The rows, in the order in which they were begun.

    Example:
        >>> sizes = Sizes(np.array([6, 5, 4, 5]), np.array([2, 2, 2, 2]))
        >>> best_fit(np.arange(4), sizes, Capacity(length=10, slots=8, pairs=4))
        [[0, 2], [1, 3]]

    References:
        D. S. Johnson et al., Worst-case performance bounds for simple one-dimensional packing
        algorithms, SIAM J. Comput. 3 (1974).
    """
    tokens, responses = sizes.tokens.tolist(), sizes.responses.tolist()
    smallest = int(sizes.tokens.min(initial=capacity.length))
    rows = [] if rows is None else rows
    slots = [capacity.slots - sum(responses[pair] for pair in row) for row in rows]
    open_rows = sorted(
        (capacity.length - sum(tokens[pair] for pair in row), number)
        for number, row in enumerate(rows)
        if len(row) < capacity.pairs
    )
    before = 0
    for begin in range(0, len(stream), window):
        now = len(rows)
        for pair in stream[begin : begin + window].tolist():
            needed, answers = tokens[pair], responses[pair]
            place = bisect_left(open_rows, (needed, -1))
            while place < len(open_rows) and slots[open_rows[place][1]] < answers:
                place += 1
            if place < len(open_rows):
                room, number = open_rows.pop(place)
            else:
                room, number = capacity.length, len(rows)
                rows.append([])
                slots.append(capacity.slots)
            rows[number].append(pair)
            slots[number] -= answers
            if room - needed >= smallest and len(rows[number]) < capacity.pairs:
                insort(open_rows, (room - needed, number))
        open_rows = [entry for entry in open_rows if entry[1] >= before]
        before = now
    return rows


def split_rows(rows: Rows, count: int) -> Rows:
    """Makes more rows of the same pairs: the row of most pairs is halved, again and again.

    Args:
        rows: at most `count` rows.
        count: how many to make.

    Returns:
        That many rows; empty ones only where there are fewer pairs.

    Example:
        >>> split_rows([[0, 1, 2, 3], [4]], 3)
        [[0, 1], [2, 3], [4]]
    """
    # Rows stand where they stood: the key is (the row it was, the place of its first pair).
    heap = [(-len(row), number, 0, row) for number, row in enumerate(rows)]
    heapq.heapify(heap)
    while len(heap) < count and heap and heap[0][0] < -1:
        _, number, first, row = heapq.heappop(heap)
        half = (len(row) + 1) // 2
        for begin, part in ((first, row[:half]), (first + half, row[half:])):
            heapq.heappush(heap, (-len(part), number, begin, part))
    parts = [row for _, _, _, row in sorted(heap, key=lambda entry: entry[1:3])]
    return parts + [[] for _ in range(count - len(parts))]


def squeeze_rows(rows: Rows, count: int, sizes: Sizes, capacity: Capacity) -> Rows | None:
    """Makes fewer rows of the same pairs: the emptiest are dissolved into the others.

    Their pairs are packed again by best fit decreasing; if that does not do, twice as many rows are
    dissolved, and at last all.

    Args:
        rows: more than `count` rows.
        count: how many to make.
        sizes: of all pairs.
        capacity: of a row.

    Returns:
        At most that many rows, or None where they were not found.

    Example:
        >>> sizes = Sizes(np.array([6, 4, 4, 6]), np.ones(4, int))
        >>> squeeze_rows([[1, 2], [0], [3]], 2, sizes, Capacity(10, 10, 10))
        [[0, 1], [3, 2]]
    """
    fullest = np.argsort(-sizes.total(rows), kind="stable")
    dissolved = 2 * (len(rows) - count)
    while True:
        dissolved = min(dissolved, len(rows))
        kept = [list(rows[number]) for number in fullest[: len(rows) - dissolved]]
        loose = np.array(
            [pair for number in fullest[len(kept) :] for pair in rows[number]], np.int64
        )
        loose = loose[np.argsort(-sizes.tokens[loose], kind="stable")]
        found = best_fit(loose, sizes, capacity, kept, window=max(len(loose), 1))
        if len(found) <= count:
            return found
        if dissolved == len(rows):
            return None
        dissolved *= 2
