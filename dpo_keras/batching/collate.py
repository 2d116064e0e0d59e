"""The batch contract, and the layout of a pair per row; `forests.py` has that of packed rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict, cast

import numpy as np

from dpo_keras.batching.ragged import Ragged, places, round_up
from dpo_keras.batching.tokenized_pairs import TokenizedPairs
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import Tensor

# The columns of pairs that batches carry, with their values in an empty pair slot.
_EMPTY_LABELS = {"preference": 0.5, "weight": 0, "reference": 0, "group": -1, "margin": 0}
_EMPTY_LABELS["rated"] = 0


class Batch(TypedDict, total=False):
    """The batch contract: arrays or tensors that share dimension 0, *rows*.

    No index leaves its row, so that a strategy may cut a batch anywhere along the rows. There are
    two layouts:

    * **A pair per row** (`collate`): 2 sequences, prompt + chosen and prompt + rejected; 1 pair
      slot. `collate_single` has 1 sequence, prompt + response.
    * **Packed rows** (`collate_packed`): 1 sequence of whole trees; several pair slots. A tree
      holds the texts (prompt + response) of one pair or of several, each common beginning once,
      laid out depth first. A token sees what is before it in its own text only.
    """

    token_ids: Tensor
    """int32 `[rows, sequences, length]`: the tokens."""
    padding_mask: Tensor
    """int32 `[rows, sequences, length]`: 1 for tokens, 0 for padding."""
    positions: Tensor
    """int32 `[rows, 1, length]`, packed rows only: position of each token in its own text. All
    responses continue from their prompt; 0 where padding."""
    reach: Tensor
    """int32 `[rows, 1, length]`, packed rows only: from each token on, itself included, the number
    of places that see it; 1 where padding. These are the token and all that follow it in any text,
    so place i sees place j where 0 <= i - j < reach_j."""
    source: Tensor
    """int32 `[rows, slots]`: for each response token, the place in its row (sequence * length +
    position) whose hidden state predicts it. In a tree, the prompt's last token predicts the first
    token of all its responses."""
    target: Tensor
    """int32 `[rows, slots]`: that response token."""
    owner: Tensor
    """int32 `[rows, slots]`: number of its response in the row; -1 for an empty slot. Without
    `responses`, a response's number is 2 * pair slot + (0 chosen, 1 rejected)."""
    responses: Tensor
    """int32 `[rows, pairs, 2]`, packed rows only: the responses that each pair compares, by their
    numbers in `owner`; -1 in an empty pair slot. Pairs of one prompt may name the same one, whose
    tokens are in the row once."""
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
    rated: Tensor
    """float32 `[rows, pairs]`, only of rated responses: 1, and 0 in an empty slot. "Chosen" is then
    the response, "rejected" a response to another prompt, and `preference` P(response is good)."""
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
    batch.update(labels(tokenized, indices, (len(batch["owner"]), 1), place))
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
    batch.update(labels(unlabeled, rows, (len(batch["owner"]), 1), (rows, 0)))
    return batch


def size_of(given: int | None, needed: np.ndarray) -> int:
    """Return the given size, or the largest that is needed, rounded up to a multiple of 8."""
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
    length, slots = size_of(length, before + after), size_of(slots, after.sum(0))
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


def labels(
    tokenized: TokenizedPairs, pairs: np.ndarray, shape: tuple[int, ...], place: tuple[Tensor, ...]
) -> Batch:
    """Put the labels of the pairs at their places, (row, pair slot)."""
    labels: dict[str, np.ndarray] = {}
    for name, empty in _EMPTY_LABELS.items():
        if (values := getattr(tokenized, name)) is not None:
            labels[name] = np.full((*shape, *values.shape[1:]), empty, values.dtype)
            labels[name][place] = values[pairs]
    return cast(Batch, labels)


def prompt_without_tokens(number: int) -> InputProblem:
    """Describe the problem of a prompt that no response can follow."""
    rule = f"prompt {number} has no token: nothing predicts its response's first token."
    return InputProblem("", rule, hint="Give it some text, or use a tokenizer with a start token.")
