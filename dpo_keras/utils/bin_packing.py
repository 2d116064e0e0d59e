"""Bin packing: trees of different sizes into rows of one capacity, by best fit."""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

WINDOW = 1024  # trees; a row takes no tree that is further behind in the stream

Rows: TypeAlias = list[list[int]]
"""The numbers of the trees in each row."""


@dataclass(frozen=True)
class Capacity:
    """What a row holds at most: tokens, response tokens, pairs."""

    length: int
    slots: int
    pairs: int


@dataclass(frozen=True)
class Sizes:
    """Sizes of each tree, int `[T]`: its tokens, its response tokens, its pairs."""

    tokens: np.ndarray
    responses: np.ndarray
    pairs: np.ndarray


def best_fit(
    stream: np.ndarray,
    sizes: Sizes,
    capacity: Capacity,
    rows: Rows | None = None,
    window: int = WINDOW,
) -> Rows:
    """Pack a stream of trees: each goes into the fullest row that still holds it.

    Sorting them by size first (best fit decreasing; D. S. Johnson et al., SIAM J. Comput. 3, 1974)
    would fill rows by one percent more, but rows, and so steps, would no longer hold similar
    numbers of pairs. `rows` are filled first, and changed.
    """
    tokens, responses = sizes.tokens.tolist(), sizes.responses.tolist()
    pairs = sizes.pairs.tolist()
    smallest = int(sizes.tokens.min(initial=capacity.length))
    rows = [] if rows is None else rows
    slots = [capacity.slots - sum(responses[tree] for tree in row) for row in rows]
    places = [capacity.pairs - sum(pairs[tree] for tree in row) for row in rows]
    open_rows = sorted(
        (capacity.length - sum(tokens[tree] for tree in row), number)
        for number, row in enumerate(rows)
        if places[number] > 0
    )
    before = 0
    for begin in range(0, len(stream), window):
        now = len(rows)
        for tree in stream[begin : begin + window].tolist():
            needed, answers, count = tokens[tree], responses[tree], pairs[tree]
            place = bisect_left(open_rows, (needed, -1))
            while place < len(open_rows) and (
                slots[open_rows[place][1]] < answers or places[open_rows[place][1]] < count
            ):
                place += 1
            if place < len(open_rows):
                room, number = open_rows.pop(place)
            else:
                room, number = capacity.length, len(rows)
                rows.append([])
                slots.append(capacity.slots)
                places.append(capacity.pairs)
            rows[number].append(tree)
            slots[number] -= answers
            places[number] -= count
            if room - needed >= smallest and places[number] > 0:
                insort(open_rows, (room - needed, number))
        open_rows = [entry for entry in open_rows if entry[1] >= before]
        before = now
    return rows


def split_rows(rows: Rows, count: int) -> Rows:
    """Make `count` rows of fewer: the row of most trees is halved, until there are enough.

    Empty rows are added only where there are fewer trees than rows.
    """
    # Rows keep their order: the key is (the original row, the place of the first tree in it).
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

    The emptiest rows are dissolved, and their trees packed into the others by best fit decreasing.
    If that is not enough, twice as many rows are dissolved, and finally all.
    """
    fullest = np.argsort([-sizes.tokens[row].sum() for row in rows], kind="stable")
    dissolved = 2 * (len(rows) - count)
    while True:
        dissolved = min(dissolved, len(rows))
        kept = [list(rows[number]) for number in fullest[: len(rows) - dissolved]]
        loose = np.array([tree for i in fullest[len(kept) :] for tree in rows[i]], np.int64)
        loose = loose[np.argsort(-sizes.tokens[loose], kind="stable")]
        found = best_fit(loose, sizes, capacity, kept, window=max(len(loose), 1))
        if len(found) <= count:
            return found
        if dissolved == len(rows):
            return None
        dissolved *= 2
