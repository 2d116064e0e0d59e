"""Batches without a stream: every pair once and in order, or a few strings."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dpo_keras.batching.bucketing import epoch_order, plan_buckets
from dpo_keras.batching.collate import Batch, collate, collate_packed, collate_single
from dpo_keras.batching.dataset import DYNAMIC
from dpo_keras.batching.encoders import TextEncoder
from dpo_keras.batching.packing import packed_order, plan_packing
from dpo_keras.batching.tokenized_pairs import TokenizedPairs, truncate
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.python_stream import signature_of


class Part(NamedTuple):
    """One batch of a pass, and the pairs in it.

    Args:
        pairs: int `[rows * pairs]`, the pair that each pair slot holds; -1 for empty ones.
        batch: the batch.
    """

    pairs: np.ndarray
    batch: Batch

    def put(self, found: np.ndarray, results: np.ndarray) -> int:
        """Copy results per pair slot into `results` per pair; return the number of pairs.

        Example:
            >>> results = np.zeros(3)
            >>> Part(np.array([2, 0, -1]), {}).put(np.array([5.0, 6.0, 7.0]), results)
            2
            >>> results.tolist()
            [6.0, 0.0, 5.0]
        """
        real = self.pairs >= 0
        results[self.pairs[real]] = found[real]
        return int(real.sum())


def one_pass(
    tokenized: TokenizedPairs, batch_size: int = 16, batching: str = "buckets"
) -> Iterator[Part]:
    """Yield every pair once, in the order of `preference_dataset` without shuffling.

    Args:
        tokenized: the pairs.
        batch_size: pairs per batch, on average where packed.
        batching: "buckets" or "packed".

    Yields:
        The batches, with their pairs.

    Example:
        >>> from dpo_keras.batching.ragged import Ragged
        >>> rows = Ragged.from_lists([[5] * n for n in (4, 9, 3)])
        >>> ends, ones = Ragged.from_lists([[2]] * 3), np.ones(3, np.float32)
        >>> pairs = TokenizedPairs(rows, ends, ends, ones, ones)
        >>> [part.pairs.tolist() for part in one_pass(pairs, batch_size=2)]
        [[0, 2], [1, -1]]
        >>> [part.pairs.tolist() for part in one_pass(pairs, 2, "packed")]
        [[0, -1, -1], [1, 2, -1]]
    """
    if not len(tokenized):
        return
    if batching == "packed":
        packing = plan_packing(tokenized, batch_size, shuffle=False)
        for grid in packed_order(packing).pairs:
            batch = collate_packed(tokenized, grid, packing.length, packing.slots)
            yield Part(grid.reshape(-1), batch)
        return
    plan = plan_buckets(tokenized, batch_size)
    order = epoch_order(plan, batch_size, shuffle=False)
    for shape, rows in zip(order.bucket, order.rows, strict=True):
        length, slots = plan.lengths[shape], plan.slots[shape]
        yield Part(rows, collate(tokenized, rows, length, slots, batch_size))


def pass_signature(batch: Mapping[str, object]) -> dict[str, tf.TensorSpec]:
    """Return the shapes and types with which one trace serves every batch of a pass.

    Args:
        batch: one of them. Packed batches have one shape. Else lengths and slots stay open.

    Returns:
        A spec per key.
    """
    return signature_of(batch, {} if "tree" in batch else DYNAMIC)


def batch_from_strings(
    preprocessor: object,
    prompts: Sequence[str],
    responses: Sequence[str],
    responses_b: Sequence[str] | None = None,
    *,
    max_length: int | None = None,
    **layout: int,
) -> Batch:
    """Tokenize a few strings and lay them out as one batch.

    Args:
        preprocessor: anything that `TextEncoder` takes.
        prompts: n prompts.
        responses: n responses; column 0 of the result.
        responses_b: n other responses, column 1. None scores one response per prompt.
        max_length: cut to this many tokens as `tokenize_pairs` does; None keeps all.
        **layout: `length`, `slots`, `batch_size`, as in `collate`.

    Returns:
        A batch with two sequences per row where `responses_b` is given, else one.

    Raises:
        InputError: lists of different lengths, or a prompt without any token.

    Example:
        >>> class Letters:
        ...     end_token_id, pad_token_id = 2, 0
        ...     tokenize = staticmethod(lambda texts: [list(map(ord, t)) for t in texts])
        >>> batch_from_strings(Letters(), ["a"], ["b"], length=4)["token_ids"].tolist()
        [[[97, 98, 2, 0]]]
    """
    others = responses if responses_b is None else responses_b
    if not len(prompts) == len(responses) == len(others):
        more = "" if responses_b is None else f" and {len(others)} other responses"
        rule = f"must be as many as prompts, got {len(prompts)} prompts, {len(responses)} responses"
        raise InputError(InputProblem("responses", rule + more))
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
