"""The batch contract of packed rows: whole trees one after another, each prompt once.

* `token_ids`, `padding_mask` (int32 `[rows, 1, length]`): the trees of a row one after another from
  place 0, each as prompt, chosen, rejected; then padding.
* `positions` (int32 `[rows, 1, length]`): a token's position in its own text. The prompt has
  0 … p - 1, and both responses go on from p; 0 where padding.
* `tree` (int32 `[rows, 1, length]`): 3 · pair slot + (0 prompt, 1 chosen, 2 rejected); -1 where
  padding. A response's token sees its own response and its own prompt, a prompt's token its prompt.
* `source`, `target`, `owner` (int32 `[rows, slots]`): as in `dpo_keras.batching.collate`; the
  source of both responses' first token is the place of their prompt's last token, and owner is
  2 · pair slot + (0 chosen, 1 rejected), -1 for an empty slot.
* `preference`, `weight`, `group`, `margin` `[rows, pairs]`, `reference` `[rows, pairs, 2]`: as
  there, weight 0 in empty pair slots.

No index leaves its row, so a strategy may cut a batch anywhere along dimension 0.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_keras.batching.collate import Batch, round_up
from dpo_keras.batching.ragged import places
from dpo_keras.batching.tokenized_pairs import TokenizedPairs
from dpo_keras.errors import InputError


def collate_packed(
    tokenized: TokenizedPairs,
    rows: np.ndarray | Sequence[Sequence[int]],
    length: int | None = None,
    slots: int | None = None,
    pairs: int | None = None,
) -> Batch:
    """Lays pairs out as one batch of packed rows.

    Args:
        tokenized: the pairs.
        rows: which pairs are in which row: int `[rows, pairs]`, -1 for empty pair slots, such as
            `PackedOrder.pairs[step]`; or a list of numbers per row.
        length: tokens per row; None takes the longest row, rounded up to a multiple of 8.
        slots: response tokens per row; None as above.
        pairs: pair slots per row; None takes the most that a row has.

    Returns:
        The batch dict that the module describes. A row without pairs is one prompt of a single
        padding token, so that attention has something to see.

    Raises:
        InputError: a row does not fit into `length`, `slots` or `pairs`, or a prompt has no token.

    Example:
        >>> from dpo_keras.batching.ragged import Ragged
        >>> ones = np.ones(2, np.float32)
        >>> tokens = [[[1, 5], [1]], [[6, 2], [7]], [[2], [8]]]
        >>> two = TokenizedPairs(*(Ragged.from_lists(part) for part in tokens), ones, ones)
        >>> batch = collate_packed(two, [[0, 1]], length=10, slots=6)
        >>> batch["token_ids"][0, 0].tolist()
        [1, 5, 6, 2, 2, 1, 7, 8, 0, 0]
        >>> batch["positions"][0, 0].tolist()
        [0, 1, 2, 3, 2, 0, 1, 1, 0, 0]
        >>> batch["tree"][0, 0].tolist()
        [0, 0, 1, 1, 2, 3, 4, 5, -1, -1]
        >>> batch["source"].tolist(), batch["owner"].tolist()
        ([[1, 2, 1, 5, 5, 0]], [[0, 0, 1, 2, 3, -1]])
    """
    grid = _grid(rows, pairs)
    count, pairs = grid.shape
    row, slot = np.nonzero(grid >= 0)
    chosen_pairs = grid[row, slot]
    parts = [
        part.take(chosen_pairs) for part in (tokenized.prompt, tokenized.chosen, tokenized.rejected)
    ]
    sizes = np.stack([part.lengths for part in parts])  # [3, n]
    answers = sizes[1] + sizes[2]
    used = np.bincount(row, sizes.sum(0), count).astype(np.int64)
    spent = np.bincount(row, answers, count).astype(np.int64)
    length = round_up(max(int(used.max(initial=1)), 1), 8) if length is None else length
    slots = round_up(max(int(spent.max(initial=1)), 1), 8) if slots is None else slots
    _check_fit(chosen_pairs, row, sizes, used, spent, length, slots)

    shape = (count, 1, length)
    token_ids = np.full(shape, tokenized.pad, np.int32)
    positions = np.zeros(shape, np.int32)
    tree = np.full(shape, -1, np.int32)
    source = np.zeros((count, slots), np.int32)
    target = np.zeros((count, slots), np.int32)
    owner = np.full((count, slots), -1, np.int32)

    # Pairs stand in row order, so a running sum less the row's own beginning is a place in the row.
    before, begin = sizes[0], _begins(sizes.sum(0), row, used)
    first_slot = _begins(answers, row, spent) + row * slots
    starts = (begin, begin + before, begin + before + sizes[1])
    for kind, (part, start, size) in enumerate(zip(parts, starts, sizes, strict=True)):
        place = places(row * length + start, size)
        token_ids.reshape(-1)[place] = part.flat_values
        tree.reshape(-1)[place] = np.repeat(3 * slot + kind, size)
        positions.reshape(-1)[place] = places(np.zeros_like(before) if kind == 0 else before, size)
        if kind == 0:
            continue
        filled = places(first_slot, size)
        # The token before each one predicts it; before a response's first, the prompt's last.
        predicts = places(start - 1, size)
        heads = (np.cumsum(size) - size)[size > 0]
        predicts[heads] = (begin + before - 1)[size > 0]
        source.reshape(-1)[filled] = predicts
        target.reshape(-1)[filled] = part.flat_values
        owner.reshape(-1)[filled] = np.repeat(2 * slot + kind - 1, size)
        first_slot = first_slot + size
    tree[used == 0, 0, 0] = 0
    batch = {
        "token_ids": token_ids,
        "padding_mask": (tree >= 0).astype(np.int32),
        "positions": positions,
        "tree": tree,
        "source": source,
        "target": target,
        "owner": owner,
    }
    for name, values, empty in (
        ("preference", tokenized.preference, 0.5),
        ("weight", tokenized.weight, 0.0),
        ("reference", tokenized.reference, 0.0),
        ("group", tokenized.group, -1),
        ("margin", tokenized.margin, 0.0),
    ):
        if values is not None:
            batch[name] = np.full((count, pairs, *values.shape[1:]), empty, values.dtype)
            batch[name][row, slot] = values[chosen_pairs]
    return batch


def _grid(rows: np.ndarray | Sequence[Sequence[int]], pairs: int | None) -> np.ndarray:
    if not isinstance(rows, np.ndarray):
        counts = [len(row) for row in rows]
        lists, rows = rows, np.full((len(rows), max(counts, default=0)), -1, np.int64)
        for number, row in enumerate(lists):
            rows[number, : len(row)] = row
    if rows.ndim != 2:
        raise InputError(f"rows must be int [rows, pairs], got shape {rows.shape}.")
    most = max(rows.shape[1], 1)
    if pairs is not None and pairs < most and (rows[:, pairs:] >= 0).any():
        raise InputError(f"pairs must be at least {most} for these rows, got {pairs}.")
    width = most if pairs is None else pairs
    grid = np.full((len(rows), width), -1, np.int64)
    grid[:, : min(width, rows.shape[1])] = rows[:, :width]
    return grid


def _begins(sizes: np.ndarray, row: np.ndarray, totals: np.ndarray) -> np.ndarray:
    return np.cumsum(sizes) - sizes - (np.cumsum(totals) - totals)[row]


def _check_fit(
    pairs: np.ndarray,
    row: np.ndarray,
    sizes: np.ndarray,
    used: np.ndarray,
    spent: np.ndarray,
    length: int,
    slots: int,
) -> None:
    trees = sizes.sum(0)
    problems = [
        f"pair {pairs[number]} has {trees[number]} tokens (prompt and both responses) and does not "
        f"fit into a row of length {length}."
        for number in np.flatnonzero(trees > length)
    ]
    alone = set(row[trees > length].tolist())
    for name, total, limit in (("length", used, length), ("slots", spent, slots)):
        problems += [
            f"{name} must be at least {total[number]} for the pairs of row {number}, got {limit}."
            for number in np.flatnonzero(total > limit)
            if number not in alone
        ]
    if (sizes[0] == 0).any():
        problems.append(
            f"the prompt of pair {pairs[int(np.argmin(sizes[0]))]} has no token: nothing predicts "
            "its response's first token. Give it some text, or use a tokenizer with a start token."
        )
    if problems:
        raise InputError(problems)
