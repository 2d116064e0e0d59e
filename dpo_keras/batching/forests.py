"""Packed rows: texts with common beginnings laid out as trees, each token once.

Texts (a prompt with one response) are sorted, so that those with a common beginning are neighbors.
Each then adds to the row what it does not share with the text in front of it. Several texts of one
prompt, the turns of one conversation, and responses that begin alike become a radix tree that is
laid out depth first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_keras.batching.collate import Batch, labels, prompt_without_tokens, size_of
from dpo_keras.batching.ragged import Ragged, places
from dpo_keras.batching.tokenized_pairs import TokenizedPairs
from dpo_keras.errors import InputError, InputProblem

_KEYS = 2  # columns in front of the tokens: row and tree


@dataclass(frozen=True)
class SortedTexts:
    """The two texts of each of n pairs, sorted by row, tree and tokens.

    Args:
        order: int `[2 n]`, which text each is: 2 * pair + (0 chosen, 1 rejected).
        row: int `[2 n]`.
        tree: int `[2 n]`; texts share beginnings within their tree only.
        tokens: int32 `[2 n, longest]`; -1 behind a text's end.
        prompt: int `[2 n]`, tokens of the prompt.
        length: int `[2 n]`, tokens in all.
        shared: int `[2 n]`, tokens that each has in common with the text in front of it.
        new: bool `[2 n]`, False where prompt and response are those of the text in front of it.
    """

    order: np.ndarray
    row: np.ndarray
    tree: np.ndarray
    tokens: np.ndarray
    prompt: np.ndarray
    length: np.ndarray
    shared: np.ndarray
    new: np.ndarray

    @classmethod
    def of(
        cls, parts: Sequence[Ragged], row: np.ndarray | int, tree: np.ndarray | int
    ) -> SortedTexts:
        """Sort the texts of pairs, given their prompts, chosen and rejected responses."""
        prompt, chosen, rejected = parts
        before = np.repeat(prompt.lengths, 2)
        length = before + np.stack([chosen.lengths, rejected.lengths], axis=1).reshape(-1)
        longest = int(length.max(initial=0))
        # The last column tells equal texts apart whose prompts end at different places.
        keys = np.full((len(length), _KEYS + longest + 1), -1, np.int32)
        keys[0::2, 0] = keys[1::2, 0] = row
        keys[0::2, 1] = keys[1::2, 1] = tree
        keys[:, -1] = before
        width, flat = keys.shape[1], keys.reshape(-1)
        for column, response in enumerate((chosen, rejected)):
            begin = (2 * np.arange(len(prompt)) + column) * width + _KEYS
            flat[places(begin, prompt.lengths)] = prompt.flat_values
            flat[places(begin + prompt.lengths, response.lengths)] = response.flat_values
        # Rows of big-endian bytes sort as their numbers do.
        order = keys.astype(">u4").view(f"V{4 * width}").reshape(-1).argsort(kind="stable")
        keys, length = keys[order], length[order]
        differs = np.ones(keys.shape, bool)
        differs[1:] = keys[1:] != keys[:-1]
        shared = np.maximum(differs.argmax(axis=1) - _KEYS, 0)
        new = np.asarray(differs.any(axis=1))
        shared[~new] = longest
        shared = np.minimum(shared, np.minimum(length, np.roll(length, 1)))
        tokens = keys[:, _KEYS:-1]
        return cls(order, keys[:, 0], keys[:, 1], tokens, keys[:, -1], length, shared, new)

    @property
    def added(self) -> np.ndarray:
        """Tokens that each adds to its tree, int `[2 n]`."""
        return self.length - self.shared

    @property
    def scored(self) -> np.ndarray:
        """Response tokens that each adds to those to be scored, int `[2 n]`."""
        return np.where(self.new, self.length - self.prompt, 0)


def collate_packed(
    tokenized: TokenizedPairs,
    rows: np.ndarray | Sequence[Sequence[int]],
    length: int | None = None,
    slots: int | None = None,
    pairs: int | None = None,
    trees: np.ndarray | None = None,
) -> Batch:
    """Lay pairs out as one batch of packed rows.

    Args:
        tokenized: the pairs.
        rows: which pairs are in which row: int `[rows, pairs]`, -1 for empty pair slots, such as
            `PackedOrder.pairs[step]`; or a list of pair numbers per row.
        length: tokens per row. None takes the longest row, rounded up to a multiple of 8.
        slots: response tokens per row. None as for `length`.
        pairs: pair slots per row. None takes the largest number of pairs in a row.
        trees: int `[N]`, the tree of each pair, such as `PackingPlan.trees`: pairs of one tree that
            are in one row share what their texts have in common. None: each pair is a tree.

    Returns:
        The batch. A row without pairs is one prompt of a single padding token, so that attention
        has something to see.

    Raises:
        InputError: a row does not fit into `length`, `slots` or `pairs`, or a prompt has no token.

    Example:
        >>> ones = np.ones(2, np.float32)
        >>> tokens = [[[1, 5], [1, 5]], [[6, 2], [8, 2]], [[8, 2], [7]]]
        >>> two = TokenizedPairs(*(Ragged.from_lists(part) for part in tokens), ones, ones)
        >>> batch = collate_packed(two, [[0, 1]], length=8, slots=6, trees=np.zeros(2, int))
        >>> batch["token_ids"][0, 0].tolist()
        [1, 5, 6, 2, 7, 8, 2, 0]
        >>> batch["positions"][0, 0].tolist()
        [0, 1, 2, 3, 2, 2, 3, 0]
        >>> batch["reach"][0, 0].tolist()
        [7, 6, 2, 1, 1, 2, 1, 1]
        >>> batch["source"].tolist(), batch["owner"].tolist()
        ([[1, 2, 1, 1, 5, 0]], [[0, 0, 1, 2, 2, -1]])
        >>> batch["responses"].tolist()
        [[[0, 2], [2, 1]]]
    """
    grid = _grid(rows, pairs)
    row, pair_slot = np.nonzero(grid >= 0)
    numbers = grid[row, pair_slot]
    parts = [part.take(numbers) for part in tokenized.parts]
    if (parts[0].lengths == 0).any():
        empty = int(numbers[np.argmin(parts[0].lengths)])
        raise InputError(prompt_without_tokens(empty))
    texts = SortedTexts.of(parts, row, np.arange(len(row)) if trees is None else trees[numbers])
    used = np.bincount(texts.row, texts.added, len(grid)).astype(np.int64)
    spent = np.bincount(texts.row, texts.scored, len(grid)).astype(np.int64)
    length, slots = size_of(length, used), size_of(slots, spent)
    _check_fits({"length": (used, length), "slots": (spent, slots)}, grid)
    layout = _Layout(texts, used)
    batch = layout.tokens(length, tokenized.pad) | layout.responses(slots, spent)
    compared = np.full((*grid.shape, 2), -1, np.int32)
    compared[row, pair_slot] = layout.response_of_pairs()
    batch["responses"] = compared
    batch.update(labels(tokenized, numbers, grid.shape, (row, pair_slot)))
    return batch


class _Layout:
    """Where each token of sorted texts stands in its row; `used` is the tokens of each row."""

    def __init__(self, texts: SortedTexts, used: np.ndarray):
        self._texts, self._used = texts, used
        self._depth = np.arange(texts.tokens.shape[1], dtype=np.int32)
        number = np.arange(len(texts.length), dtype=np.int32)[:, None]
        adds = self._depth >= texts.shared[:, None]
        self._inside = self._depth < texts.length[:, None]
        self._fresh = adds & self._inside
        # A token that a text does not add was added by the last one before it that adds so early.
        adder = np.maximum.accumulate(np.where(adds, number, 0), axis=0)
        begin = np.cumsum(texts.added) - texts.added
        self._first = np.cumsum(used) - used  # of each row, if all rows were end to end
        start = begin - self._first[texts.row]
        self._place = ((start - texts.shared)[adder] + self._depth).astype(np.int32)
        # And it is seen until the next text that adds so early.
        later = np.where(adds, number, len(number))
        following = np.minimum.accumulate(later[::-1], axis=0)[::-1]
        following = np.concatenate([following[1:], later[:1] * 0 + len(number)])
        behind = np.append(begin, begin[-1:] + texts.added[-1:])[following]
        self._reach = behind - self._first[texts.row][:, None] - self._place

    def tokens(self, length: int, pad: int) -> Batch:
        """Return the keys of the batch that hold a value per token."""
        texts, fresh, count = self._texts, self._fresh, len(self._used)
        token_ids = np.full((count, 1, length), pad, np.int32)
        positions = np.zeros_like(token_ids)
        reach = np.ones_like(token_ids)
        place = (self._place + (texts.row * length)[:, None])[fresh]
        token_ids.reshape(-1)[place] = texts.tokens[fresh]
        positions.reshape(-1)[place] = np.broadcast_to(self._depth, fresh.shape)[fresh]
        reach.reshape(-1)[place] = self._reach[fresh]
        real = np.arange(length) < np.maximum(self._used, 1)[:, None, None]
        mask = real.astype(np.int32)
        return Batch(token_ids=token_ids, padding_mask=mask, positions=positions, reach=reach)

    def responses(self, slots: int, spent: np.ndarray) -> Batch:
        """Return the keys of the batch that hold a value per response token."""
        texts, count = self._texts, len(self._used)
        source = np.zeros((count, slots), np.int32)
        target, owner = np.zeros_like(source), np.full_like(source, -1)
        own = self._inside & texts.new[:, None] & (self._depth >= texts.prompt[:, None])
        filled = np.arange(slots) < spent[:, None]
        # Each token is predicted by the one before it, a response's first by its prompt's last.
        source[filled] = self._place[:, :-1][own[:, 1:]]
        target[filled] = texts.tokens[own]
        owner[filled] = np.repeat(self._response(), texts.scored)
        return Batch(source=source, target=target, owner=owner)

    def response_of_pairs(self) -> np.ndarray:
        """Return which response of its row each pair's chosen and rejected are, int `[n, 2]`."""
        found = np.zeros(len(self._texts.order), np.int32)
        found[self._texts.order] = self._response()
        return found.reshape(-1, 2)

    def _response(self) -> np.ndarray:
        """Return the number of each response among the different ones of its row: int `[2 n]`."""
        texts = self._texts
        of_rows = np.bincount(texts.row, texts.new, len(self._used)).astype(np.int64)
        return np.cumsum(texts.new) - 1 - (np.cumsum(of_rows) - of_rows)[texts.row]


def _grid(rows: np.ndarray | Sequence[Sequence[int]], pairs: int | None) -> np.ndarray:
    """Return which pair is in which row and pair slot, -1 where none, int64 `[rows, pairs]`."""
    if not isinstance(rows, np.ndarray):
        width = max(map(len, rows), default=0)
        rows = np.array([[*row, *[-1] * (width - len(row))] for row in rows], np.int64)
        rows = rows.reshape(len(rows), width)
    if rows.ndim != 2:
        raise InputError(InputProblem("rows", f"must be int [rows, pairs], got shape {rows.shape}"))
    width = max(rows.shape[1], 1) if pairs is None else pairs
    if (rows[:, width:] >= 0).any():
        rule = f"must be at least {rows.shape[1]} for these rows"
        raise InputError(InputProblem("pairs", rule, pairs))
    grid = np.full((len(rows), width), -1, np.int64)
    grid[:, : rows.shape[1]] = rows[:, :width]
    return grid


def _check_fits(needed: Mapping[str, tuple[np.ndarray, int]], grid: np.ndarray) -> None:
    """Refuse rows that hold more than they have room for, by the pairs in them."""
    problems = [
        InputProblem(name, f"must be at least {total[i]} for {_named(grid[i])} of row {i}", limit)
        for name, (total, limit) in needed.items()
        for i in np.flatnonzero(total > limit)
    ]
    if problems:
        raise InputError(problems)


def _named(pairs: np.ndarray) -> str:
    pairs = pairs[pairs >= 0]
    return f"pair {pairs[0]}" if len(pairs) == 1 else "the pairs"
