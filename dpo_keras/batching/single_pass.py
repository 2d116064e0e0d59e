"""One pass over pairs in order, for what is computed once per pair."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import tensorflow as tf

from dpo_keras.batching.batch_stream import DYNAMIC, signature_of
from dpo_keras.batching.bucketing import epoch_order, plan_buckets
from dpo_keras.batching.collate import Batch, collate
from dpo_keras.batching.packed_rows import collate_packed
from dpo_keras.batching.packing import packed_order, plan_packing
from dpo_keras.batching.tokenized_pairs import TokenizedPairs


class Part(NamedTuple):
    """One batch of a pass.

    Args:
        pairs: int `[rows * pairs]`, whose results stand where in what a model finds per pair; -1
            where nobody's do.
        batch: the batch dict.
    """

    pairs: np.ndarray
    batch: Batch

    def put(self, found: np.ndarray, results: np.ndarray) -> int:
        """Puts a batch's results where they belong.

        Args:
            found: `[rows * pairs, …]`.
            results: `[N, …]`, changed.

        Returns:
            How many pairs there were.

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
    """Every pair once, in `preference_dataset`'s order without shuffling.

    Args:
        tokenized: the pairs.
        batch_size: pairs per batch; in the mean, where packed.
        batching: "buckets" or "packed".

    Returns:
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


def pass_signature(batch: Batch) -> dict[str, tf.TensorSpec]:
    """The shapes and types that one trace needs to serve every batch of a pass.

    Args:
        batch: one of them. Packed batches have one shape; else lengths and slots stay open.
    """
    return signature_of(batch, {} if "tree" in batch else DYNAMIC)
