"""The batch contract, and the two layouts that fill it: a pair per row, and packed rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

import numpy as np

from dpo_keras.batching.ragged import Ragged, places, round_up
from dpo_keras.batching.tokenized_pairs import TokenizedPairs, prompt_without_tokens
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import Tensor

# The columns of pairs that batches carry, with their values in an empty pair slot.
_EMPTY_LABELS = {"preference": 0.5, "weight": 0, "reference": 0, "group": -1, "margin": 0}


class Batch(TypedDict, total=False):
    """The batch contract: arrays or tensors that share dimension 0, *rows*.

    No index leaves its row, so that a strategy may cut a batch anywhere along the rows. There are
    two layouts:

    * **A pair per row** (`collate`): 2 sequences, prompt + chosen and prompt + rejected; 1 pair
      slot. `collate_single` has 1 sequence, prompt + response.
    * **Packed rows** (`collate_packed`): 1 sequence of whole trees (prompt, chosen, rejected);
      several pair slots. A token sees its own response and its own prompt only.
    """

    token_ids: Tensor
    """int32 `[rows, sequences, length]`: the tokens."""
    padding_mask: Tensor
    """int32 `[rows, sequences, length]`: 1 for tokens, 0 for padding."""
    positions: Tensor
    """int32 `[rows, 1, length]`, packed rows only: position of each token in its own text. Both
    responses continue from the prompt; 0 where padding."""
    tree: Tensor
    """int32 `[rows, 1, length]`, packed rows only: 3 * pair slot + (0 prompt, 1 chosen,
    2 rejected); -1 where padding."""
    source: Tensor
    """int32 `[rows, slots]`: for each response token, the place in its row (sequence * length +
    position) whose hidden state predicts it. In a tree, the prompt's last token predicts the first
    token of both responses."""
    target: Tensor
    """int32 `[rows, slots]`: that response token."""
    owner: Tensor
    """int32 `[rows, slots]`: 2 * pair slot + (0 chosen, 1 rejected); -1 for an empty slot."""
    preference: Tensor
    """float32 `[rows, pairs]`: probability that chosen is better; 0.5 in an empty pair slot."""
    weight: Tensor
    """float32 `[rows, pairs]`: weight of the pair; 0 in an empty pair slot."""
    reference: Tensor
    """float32 `[rows, pairs, 2]`, only with reference log-probs: those of chosen and rejected."""
    group: Tensor
    """int32 `[rows, pairs]`, only where pairs have groups: number of the group, -1 without one."""
    margin: Tensor
    """float32 `[rows, pairs]`, only where pairs have margins: the margin, 0 without one."""
    images: Tensor
    """float32 `[rows, images, height, width, 3]`, only where prompts have images; PaliGemma's have
    no dimension of images."""
    pixel_values: Tensor
    """float32 `[rows, images, patches, values]`, of Gemma 4: images in patches. Of Qwen 3.5
    `[rows, patches, frames, side, side, 3]`: the patches of all images of a row, then 0."""
    pixel_position_ids: Tensor  # int32 `[rows, images, patches, 2]`, of Gemma 4
    image_grid_thw: Tensor
    """int32 `[rows, images, 3]`, of Qwen 3.5: 1, patches down and patches across; then 0."""
    vision_indices: Tensor
    """int32 `[rows, images * tokens]`, not of Qwen 3.5: places of image tokens in each sequence,
    then 0."""
    vision_mask: Tensor
    """int32 `[rows, length]`: 1 for image tokens, the same in either sequence."""


def collate(
    tokenized: TokenizedPairs,
    indices: np.ndarray | Sequence[int],
    length: int | None = None,
    slots: int | None = None,
    batch_size: int | None = None,
) -> Batch:
    """Lay pairs out as one batch, a pair per row.

    Args:
        tokenized: the pairs.
        indices: int `[n]`, which pairs, in row order. Negative numbers are empty rows.
        length: tokens per sequence. None takes the longest, rounded up to a multiple of 8.
        slots: response tokens per row, both responses together. None as for `length`.
        batch_size: rows; None takes n. Rows beyond the pairs are empty: weight 0, owner -1, and one
            position in the mask, so that attention has something to see.

    Returns:
        The batch.

    Raises:
        InputError: a pair does not fit into `length` or `slots`, or the pairs into `batch_size`.

    Example:
        >>> rows = lambda ids: Ragged.from_lists([ids])
        >>> one = np.ones(1, np.float32)
        >>> pair = TokenizedPairs(rows([1, 5]), rows([6, 2]), rows([2]), one, one)
        >>> batch = collate(pair, [0], length=4, slots=4)
        >>> batch["token_ids"].tolist()
        [[[1, 5, 6, 2], [1, 5, 2, 0]]]
        >>> batch["source"].tolist(), batch["target"].tolist(), batch["owner"].tolist()
        ([[1, 2, 5, 0]], [[6, 2, 2, 0]], [[0, 0, 1, -1]])
    """
    indices = np.asarray(indices, np.int64)
    indices = indices[indices >= 0]
    prompt, *responses = (part.take(indices) for part in tokenized.parts)
    batch = _pair_per_row(prompt, responses, tokenized.pad, length, slots, batch_size)
    place = (np.arange(len(indices)), 0)
    batch.update(_labels(tokenized, indices, (len(batch["owner"]), 1), place))
    if tokenized.images is not None:
        rows, _, length = batch["token_ids"].shape
        batch.update(cast(Batch, tokenized.images[indices].tensors(prompt, length, rows)))
    return batch


def collate_single(
    prompts: Ragged | Sequence[Sequence[int]],
    responses: Ragged | Sequence[Sequence[int]],
    *,
    pad: int = 0,
    length: int | None = None,
    slots: int | None = None,
    batch_size: int | None = None,
) -> Batch:
    """Lay out one response per row. The scorer then returns its log-prob in column 0.

    Args:
        prompts: n rows of prompt ids, each at least one token.
        responses: n rows of response ids.
        pad: id that fills sequences up.
        length: tokens per sequence. None takes the longest, rounded up to a multiple of 8.
        slots: response tokens per row. None as for `length`.
        batch_size: rows; None takes n.

    Returns:
        A batch with one sequence per row, owner 0, preference 1 and weight 1 (0 in empty rows).

    Raises:
        InputError: as `collate`.

    Example:
        >>> batch = collate_single([[1, 5]], [[6, 2]], length=4, slots=2)
        >>> batch["token_ids"].tolist(), batch["source"].tolist(), batch["owner"].tolist()
        ([[[1, 5, 6, 2]]], [[1, 2]], [[0, 0]])
    """
    prompts = prompts if isinstance(prompts, Ragged) else Ragged.from_lists(prompts)
    responses = responses if isinstance(responses, Ragged) else Ragged.from_lists(responses)
    batch = _pair_per_row(prompts, [responses], pad, length, slots, batch_size)
    ones, rows = np.ones(len(prompts), np.float32), np.arange(len(prompts))
    unlabeled = TokenizedPairs(prompts, responses, responses, ones, ones)
    batch.update(_labels(unlabeled, rows, (len(batch["owner"]), 1), (rows, 0)))
    return batch


def collate_packed(
    tokenized: TokenizedPairs,
    rows: np.ndarray | Sequence[Sequence[int]],
    length: int | None = None,
    slots: int | None = None,
    pairs: int | None = None,
) -> Batch:
    """Lay pairs out as one batch of packed rows.

    Args:
        tokenized: the pairs.
        rows: which pairs are in which row: int `[rows, pairs]`, -1 for empty pair slots, such as
            `PackedOrder.pairs[step]`; or a list of pair numbers per row.
        length: tokens per row. None takes the longest row, rounded up to a multiple of 8.
        slots: response tokens per row. None as for `length`.
        pairs: pair slots per row. None takes the largest number of pairs in a row.

    Returns:
        The batch. A row without pairs is one prompt of a single padding token, so that attention
        has something to see.

    Raises:
        InputError: a row does not fit into `length`, `slots` or `pairs`, or a prompt has no token.

    Example:
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
    count = len(grid)
    row, pair_slot = np.nonzero(grid >= 0)
    numbers = grid[row, pair_slot]
    parts = [part.take(numbers) for part in tokenized.parts]
    sizes = np.stack([part.lengths for part in parts])  # [3, n]
    trees, answers = sizes.sum(0), sizes[1] + sizes[2]
    used = np.bincount(row, trees, count).astype(np.int64)
    spent = np.bincount(row, answers, count).astype(np.int64)
    length, slots = _size(length, used), _size(slots, spent)
    needed = {"length": (used, length), "slots": (spent, slots)}
    if problems := _packing_problems(numbers, sizes, needed):
        raise InputError(problems)

    token_ids = np.full((count, 1, length), tokenized.pad, np.int32)
    positions = np.zeros_like(token_ids)
    tree = np.full_like(token_ids, -1)
    source = np.zeros((count, slots), np.int32)
    target, owner = np.zeros_like(source), np.full_like(source, -1)
    # Pairs are in row order: a running sum, less that of the earlier rows, is a place in the row.
    prompt, begin = sizes[0], _begins(trees, row, used)
    starts = (begin, begin + prompt, begin + prompt + sizes[1])
    first_slot = _begins(answers, row, spent) + row * slots
    for branch, (part, start, size) in enumerate(zip(parts, starts, sizes, strict=True)):
        place = places(row * length + start, size)
        token_ids.reshape(-1)[place] = part.flat_values
        tree.reshape(-1)[place] = np.repeat(3 * pair_slot + branch, size)
        positions.reshape(-1)[place] = places(prompt * (branch > 0), size)
        if branch > 0:
            slot = places(first_slot, size)
            # Each token is predicted by the one before it, a response's first by its prompt's last.
            predicts = places(start - 1, size)
            heads = (np.cumsum(size) - size)[size > 0]
            predicts[heads] = (begin + prompt - 1)[size > 0]
            source.reshape(-1)[slot] = predicts
            target.reshape(-1)[slot] = part.flat_values
            owner.reshape(-1)[slot] = np.repeat(2 * pair_slot + branch - 1, size)
            first_slot = first_slot + size
    tree[used == 0, 0, 0] = 0
    batch: Batch = {
        "token_ids": token_ids,
        "padding_mask": (tree >= 0).astype(np.int32),
        "positions": positions,
        "tree": tree,
        "source": source,
        "target": target,
        "owner": owner,
    }
    batch.update(_labels(tokenized, numbers, grid.shape, (row, pair_slot)))
    return batch


def _size(given: int | None, needed: np.ndarray) -> int:
    return round_up(max(int(needed.max(initial=0)), 1), 8) if given is None else given


def _pair_per_row(
    prompt: Ragged,
    responses: list[Ragged],
    pad: int,
    length: int | None,
    slots: int | None,
    batch_size: int | None,
) -> Batch:
    count, sequences = len(prompt), len(responses)
    before = prompt.lengths
    after = np.stack([part.lengths for part in responses])  # [sequences, n]
    longest, most = (before + after).max(initial=0), after.sum(0).max(initial=0)
    length, slots = _size(length, before + after), _size(slots, after.sum(0))
    rows = count if batch_size is None else batch_size
    sizes = {"length": (longest, length), "slots": (most, slots), "batch_size": (count, rows)}
    problems = [
        InputProblem(name, f"must be at least {needed} for these {count} pairs", given)
        for name, (needed, given) in sizes.items()
        if given < needed
    ]
    if (before == 0).any():
        problems.append(prompt_without_tokens(int(np.argmin(before))))
    if problems:
        raise InputError(problems)

    token_ids = np.full((rows, sequences, length), pad, np.int32)
    flat = token_ids.reshape(-1)
    used = np.zeros((rows, sequences), np.int64)
    used[count:, 0] = 1
    used[:count] = (before + after).T
    source = np.zeros((rows, slots), np.int32)
    target, owner = np.zeros_like(source), np.full_like(source, -1)
    row = np.arange(count)
    first_slot = row * slots
    for number, response in enumerate(responses):
        begin = (row * sequences + number) * length
        flat[places(begin, before)] = prompt.flat_values
        flat[places(begin + before, after[number])] = response.flat_values
        slot = places(first_slot, after[number])
        # The hidden state at position t - 1 predicts the token at position t.
        source.reshape(-1)[slot] = places(number * length + before - 1, after[number])
        target.reshape(-1)[slot] = response.flat_values
        owner.reshape(-1)[slot] = number
        first_slot = first_slot + after[number]
    mask = (np.arange(length) < used[..., None]).astype(np.int32)
    return Batch(token_ids=token_ids, padding_mask=mask, source=source, target=target, owner=owner)


def _labels(
    tokenized: TokenizedPairs, pairs: np.ndarray, shape: tuple[int, ...], place: tuple[Tensor, ...]
) -> Batch:
    """Put the labels of the pairs at their places, (row, pair slot)."""
    labels: dict[str, np.ndarray] = {}
    for name, empty in _EMPTY_LABELS.items():
        if (values := getattr(tokenized, name)) is not None:
            labels[name] = np.full((*shape, *values.shape[1:]), empty, values.dtype)
            labels[name][place] = values[pairs]
    return cast(Batch, labels)


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


def _begins(sizes: np.ndarray, row: np.ndarray, totals: np.ndarray) -> np.ndarray:
    """Return the place in its row where each pair begins, `totals` being the sums of the rows."""
    return np.cumsum(sizes) - sizes - (np.cumsum(totals) - totals)[row]


def _packing_problems(
    numbers: np.ndarray, sizes: np.ndarray, needed: Mapping[str, tuple[np.ndarray, int]]
) -> list[InputProblem]:
    trees, length = sizes.sum(0), needed["length"][1]
    problems = [
        InputProblem(
            "length",
            f"must be at least {trees[i]}: pair {numbers[i]} has {trees[i]} tokens (prompt and "
            f"both responses) and does not fit into a row of length {length}",
        )
        for i in np.flatnonzero(trees > length)
    ]
    for name, (total, limit) in needed.items():
        problems += [
            InputProblem(name, f"must be at least {total[i]} for the pairs of row {i}", limit)
            for i in np.flatnonzero(total > limit)
        ]
    if (sizes[0] == 0).any():
        problems.append(prompt_without_tokens(int(numbers[np.argmin(sizes[0])])))
    return problems
