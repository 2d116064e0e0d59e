"""Bin packing: pairs of different sizes into rows of one capacity, by best fit."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

WINDOW = 1024  # pairs; a row takes no pair that is further behind in the stream

Rows: TypeAlias = list[list[int]]
"""The numbers of the pairs in each row."""


@dataclass(frozen=True)
class Capacity:
    """What a row holds at most: tokens, response tokens, pairs."""

    length: int
    slots: int
    pairs: int


@dataclass(frozen=True)
class Sizes:
    """Tokens of each pair, int `[N]`: of its tree, and of both responses."""

    tokens: np.ndarray
    responses: np.ndarray


def best_fit(
    stream: np.ndarray,
    sizes: Sizes,
    capacity: Capacity,
    rows: Rows | None = None,
    window: int = WINDOW,
) -> Rows:
    """Pack a stream of pairs: each goes into the fullest row that still holds it.

    Sorting pairs by size first (best fit decreasing) would fill rows by one percent more, but makes
    rows of two long pairs and of twenty short ones. As pairs come, rows and thus steps hold similar
    numbers of them. `rows` are filled first, and changed. A row takes no pair more than `window`
    pairs later in the stream, which roughly keeps its order.

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
    """Make `count` rows of fewer: the row of most pairs is halved, until there are enough.

    Empty rows are added only where there are fewer pairs than rows.
    """
    # Rows keep their order: the key is (the original row, the place of the first pair in it).
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
    """Make at most `count` rows of more; None where that fails.

    The emptiest rows are dissolved, and their pairs packed into the others by best fit decreasing.
    If that is not enough, twice as many rows are dissolved, and finally all.
    """
    fullest = np.argsort([-sizes.tokens[row].sum() for row in rows], kind="stable")
    dissolved = 2 * (len(rows) - count)
    while True:
        dissolved = min(dissolved, len(rows))
        kept = [list(rows[number]) for number in fullest[: len(rows) - dissolved]]
        loose = np.array([pair for i in fullest[len(kept) :] for pair in rows[i]], np.int64)
        loose = loose[np.argsort(-sizes.tokens[loose], kind="stable")]
        found = best_fit(loose, sizes, capacity, kept, window=max(len(loose), 1))
        if len(found) <= count:
            return found
        if dissolved == len(rows):
            return None
        dissolved *= 2
