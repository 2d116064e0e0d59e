"""The batch contract: tokenized pairs become arrays of one fixed shape, row by row.

* `token_ids`, `padding_mask` (int32 `[rows, 2, length]`): sequence 0 is prompt + chosen, sequence 1
  prompt + rejected, padded on the right.
* `source` (int32 `[rows, slots]`): for each response token the flat place, sequence · length +
  position, whose hidden state predicts it.
* `target` (int32 `[rows, slots]`): that token.
* `owner` (int32 `[rows, slots]`): 0 chosen, 1 rejected, -1 an empty slot.
* `preference`, `weight` (float32 `[rows, 1]`): label and weight; weight 0 where the row is empty.
* `reference` (float32 `[rows, 1, 2]`): reference log-probs, where the pairs carry them.
* `group` (int32 `[rows, 1]`), `margin` (float32 `[rows, 1]`): where the pairs carry them.

Every tensor shares dimension 0 and no index leaves its row, so a strategy may cut a batch anywhere
along that dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypedDict

import numpy as np

from dpo_keras.batching.encoders import TextEncoder
from dpo_keras.batching.ragged import Ragged, places
from dpo_keras.batching.tokenized_pairs import TokenizedPairs, truncate
from dpo_keras.errors import InputError
from dpo_keras.utils.tensors import Tensor


class Batch(TypedDict, total=False):
    """The batch contract: what the dataset yields, as NumPy arrays or tensors."""

    token_ids: Tensor
    padding_mask: Tensor
    positions: Tensor
    tree: Tensor
    source: Tensor
    target: Tensor
    owner: Tensor
    preference: Tensor
    weight: Tensor
    reference: Tensor
    group: Tensor
    margin: Tensor


def round_up(value: int, multiple: int) -> int:
    """Rounds up to a multiple.

    Example:
        >>> round_up(9, 8), round_up(8, 8), round_up(0, 8)
        (16, 8, 0)
    """
    return -(-value // multiple) * multiple


def collate(
    tokenized: TokenizedPairs,
    indices: np.ndarray | Sequence[int],
    length: int | None = None,
    slots: int | None = None,
    batch_size: int | None = None,
) -> Batch:
    """Lays pairs out as one batch.

    Args:
        tokenized: the pairs.
        indices: int `[n]`, which pairs, in row order. Negative numbers are empty rows.
        length: tokens per sequence; None takes the longest, rounded up to a multiple of 8.
        slots: response tokens per row, both responses together; None as above.
        batch_size: rows; None takes n. More rows than pairs are filled with empty rows: weight 0,
            owner -1, and a single position in the mask so that attention has something to see.

    Returns:
        The batch dict that the module describes.

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
    prompt, *responses = (
        part.take(indices) for part in (tokenized.prompt, tokenized.chosen, tokenized.rejected)
    )
    batch = _lay_out(prompt, responses, tokenized.pad, length, slots, batch_size)
    rows = len(batch["owner"])
    batch["preference"] = _column(tokenized.preference, indices, rows, 0.5)
    batch["weight"] = _column(tokenized.weight, indices, rows, 0.0)
    if tokenized.reference is not None:
        batch["reference"] = _column(tokenized.reference, indices, rows, 0.0)
    if tokenized.group is not None:
        batch["group"] = _column(tokenized.group, indices, rows, -1)
    if tokenized.margin is not None:
        batch["margin"] = _column(tokenized.margin, indices, rows, 0.0)
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
    """Lays out one response per row, in the same contract: its log-prob is in column 0.

    Args:
        prompts: n rows of prompt ids, each at least one token.
        responses: n rows of response ids.
        pad: id that fills sequences up.
        length: tokens per sequence; None takes the longest, rounded up to a multiple of 8.
        slots: response tokens per row; None as above.
        batch_size: rows; None takes n.

    Returns:
        A batch dict with one sequence per row and owner 0; preference 1, weight 1 (0 for empty
        rows).

    Raises:
        InputError: as `collate`.

    Example:
        >>> batch = collate_single([[1, 5]], [[6, 2]], length=4, slots=2)
        >>> batch["token_ids"].tolist(), batch["source"].tolist(), batch["owner"].tolist()
        ([[[1, 5, 6, 2]]], [[1, 2]], [[0, 0]])
    """
    prompts = prompts if isinstance(prompts, Ragged) else Ragged.from_lists(prompts)
    responses = responses if isinstance(responses, Ragged) else Ragged.from_lists(responses)
    batch = _lay_out(prompts, [responses], pad, length, slots, batch_size)
    rows, ones = len(batch["owner"]), np.ones(len(prompts), np.float32)
    batch["preference"] = _column(ones, np.arange(len(prompts)), rows, 0.5)
    batch["weight"] = _column(ones, np.arange(len(prompts)), rows, 0.0)
    return batch


def batch_from_strings(
    preprocessor: Any,
    prompts: Sequence[str],
    responses: Sequence[str],
    responses_b: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
    **layout: int,
) -> Batch:
    """Tokenizes strings and lays them out, for scoring a handful of texts.

    Args:
        preprocessor: whatever `TextEncoder` takes.
        prompts: n prompts.
        responses: n responses; column 0 of the result.
        responses_b: n other responses, column 1; None scores one response per prompt.
        max_length: cut to this many tokens as `tokenize_pairs` does; None leaves all.
        **layout: `length`, `slots`, `batch_size`, as in `collate`.

    Returns:
        A batch dict; two sequences per row where `responses_b` is given, else one.

    Raises:
        InputError: lists of different length, or a prompt without any token.

    Example:
        >>> class Letters:
        ...     end_token_id, pad_token_id = 2, 0
        ...     tokenize = staticmethod(lambda texts: [list(map(ord, t)) for t in texts])
        >>> batch_from_strings(Letters(), ["a"], ["b"], length=4)["token_ids"].tolist()
        [[[97, 98, 2, 0]]]
    """
    counts = {len(prompts), len(responses), len(prompts if responses_b is None else responses_b)}
    if len(counts) > 1:
        raise InputError(
            f"prompts and responses must be lists of one length, got {len(prompts)} prompts, "
            f"{len(responses)} responses"
            + ("." if responses_b is None else f" and {len(responses_b)} other responses.")
        )
    encoder = TextEncoder(preprocessor)
    prompt, first = encoder.prompts(prompts), encoder.responses(responses)
    second = first if responses_b is None else encoder.responses(responses_b)
    if max_length is not None:
        prompt, first, second = truncate(prompt, first, second, max_length, encoder.start)
    if responses_b is None:
        return collate_single(prompt, first, pad=encoder.pad, **layout)
    ones = np.ones(len(prompt), np.float32)
    pairs = TokenizedPairs(prompt, first, second, ones, ones, pad=encoder.pad)
    return collate(pairs, np.arange(len(pairs)), **layout)


def _lay_out(
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
    longest = int((before + after).max(initial=0))
    most = int(after.sum(0).max(initial=0))
    length = round_up(max(longest, 1), 8) if length is None else length
    slots = round_up(max(most, 1), 8) if slots is None else slots
    rows = count if batch_size is None else batch_size
    problems = [
        f"{name} must be at least {needed} for these {count} pairs, got {given}."
        for name, needed, given in (
            ("length", longest, length),
            ("slots", most, slots),
            ("batch_size", count, rows),
        )
        if given < needed
    ]
    if (before == 0).any():
        problems.append(
            f"prompt {int(np.argmin(before))} has no token: nothing predicts its response's first "
            "token. Give it some text, or use a tokenizer with a start token."
        )
    if problems:
        raise InputError(problems)

    token_ids = np.full((rows, sequences, length), pad, np.int32)
    used = np.zeros((rows, sequences), np.int64)
    used[count:, 0] = 1
    used[:count] = (before + after).T
    padding_mask = (np.arange(length) < used[..., None]).astype(np.int32)
    source = np.zeros((rows, slots), np.int32)
    target = np.zeros((rows, slots), np.int32)
    owner = np.full((rows, slots), -1, np.int32)
    row = np.arange(count)
    first_slot = row * slots
    for number, response in enumerate(responses):
        begin = (row * sequences + number) * length
        flat = token_ids.reshape(-1)
        flat[places(begin, before)] = prompt.flat_values
        flat[places(begin + before, after[number])] = response.flat_values
        slot = places(first_slot, after[number])
        # The token at position t is predicted by the hidden state at t - 1.
        source.reshape(-1)[slot] = places(number * length + before - 1, after[number])
        target.reshape(-1)[slot] = response.flat_values
        owner.reshape(-1)[slot] = number
        first_slot = first_slot + after[number]
    return {
        "token_ids": token_ids,
        "padding_mask": padding_mask,
        "source": source,
        "target": target,
        "owner": owner,
    }


def _column(values: np.ndarray, indices: np.ndarray, rows: int, empty: float) -> np.ndarray:
    column = np.full((rows, 1, *values.shape[1:]), empty, values.dtype)
    column[: len(indices), 0] = values[indices]
    return column
