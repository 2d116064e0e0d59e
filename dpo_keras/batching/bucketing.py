"""Length buckets: which pairs share a batch, in which order, and of which shape."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dpo_keras.batching.ragged import round_up
from dpo_keras.batching.tokenized_pairs import TokenizedPairs
from dpo_keras.errors import InputError, InputProblem

MAX_BUCKETS = 16  # each bucket is a shape, and each shape costs a trace of the training step


@dataclass(frozen=True)
class BucketPlan:
    """The few static shapes that batches have.

    Args:
        lengths: tokens per sequence of each bucket, rising.
        slots: response tokens per row of each bucket, never falling.
        bucket: int `[N]`, the bucket of each pair: the smallest that holds it.
    """

    lengths: tuple[int, ...]
    slots: tuple[int, ...]
    bucket: np.ndarray


@dataclass(frozen=True)
class EpochOrder:
    """All batches of one epoch.

    Args:
        bucket: int `[steps]`, the shape of each batch.
        rows: int `[steps, batch_size]`, its pairs; -1 for the empty rows of the one short batch.
    """

    bucket: np.ndarray
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.bucket)


def plan_buckets(
    tokenized: TokenizedPairs, batch_size: int = 8, buckets: int | Sequence[int] = 4
) -> BucketPlan:
    """Choose the bucket lengths that compute the least padding.

    Candidates are multiples of 8 tokens (of 16 above 256, of 64 above 1024). Dynamic programming
    finds the at most `buckets` of them with the fewest token places over the data. A bucket with
    less than one full batch is merged into the next longer one.

    Args:
        tokenized: the pairs.
        batch_size: pairs per batch.
        buckets: maximum number of lengths, 1 to 16; or the lengths themselves.

    Returns:
        The plan. One bucket means one static shape, which XLA and TPUs prefer.

    Raises:
        InputError: `buckets` is out of range, or no given length holds the longest pair.

    Example:
        >>> from dpo_keras.batching.ragged import Ragged
        >>> rows = Ragged.from_lists([[5] * n for n in (4, 5, 30, 31)])
        >>> ends, ones = Ragged.from_lists([[2]] * 4), np.ones(4, np.float32)
        >>> pairs = TokenizedPairs(rows, ends, ends, ones, ones)
        >>> plan = plan_buckets(pairs, batch_size=2, buckets=4)
        >>> plan.lengths, plan.slots, plan.bucket.tolist()
        ((8, 32), (8, 8), [0, 0, 1, 1])
    """
    lengths = tokenized.lengths
    longest = int(lengths.max(initial=1))
    if isinstance(buckets, int):
        if isinstance(buckets, bool) or not 1 <= buckets <= MAX_BUCKETS:
            rule = f"must be 1 to {MAX_BUCKETS} (each is a shape to compile), or a list of lengths"
            raise InputError(InputProblem("buckets", rule, buckets))
        bounds = _best_lengths(lengths, longest, buckets, tokenized.max_length)
    else:
        bounds = sorted({int(bound) for bound in buckets})
        if not bounds or bounds[0] < 1 or bounds[-1] < longest:
            rule = f"must hold the longest pair, {longest} tokens"
            hint = "Add a longer bucket, or tokenize with a smaller max_length."
            raise InputError(InputProblem("buckets", rule, list(buckets), hint))
    counts = np.bincount(np.searchsorted(bounds, lengths), minlength=len(bounds))
    kept: list[int] = []
    waiting = 0
    for bound, count in zip(bounds, counts, strict=True):
        waiting += count
        if waiting >= batch_size or (bound == bounds[-1] and (waiting or not kept)):
            kept.append(bound)
            waiting = 0
    bucket = np.searchsorted(kept, lengths)
    needed = np.zeros(len(kept), np.int64)
    np.maximum.at(needed, bucket, tokenized.response_tokens)
    # Left-over rows move up into longer buckets, so a longer one never has fewer slots.
    slots = [round_up(max(int(n), 1), 8) for n in np.maximum.accumulate(needed)]
    return BucketPlan(tuple(kept), tuple(slots), bucket)


def epoch_order(
    plan: BucketPlan,
    batch_size: int,
    *,
    seed: int = 0,
    epoch: int = 0,
    shuffle: bool = True,
    drop_remainder: bool = False,
) -> EpochOrder:
    """Deal all pairs into batches: a pure function of its arguments.

    Within each bucket pairs are dealt in random order, or in file order without `shuffle`. Pairs
    left over after the last full batch of a bucket move up into the next longer one, so that an
    epoch has at most one short batch, its last. The batches of all buckets are then shuffled
    together. Without `shuffle` they come in the order in which they fill up as the file is read.

    Args:
        plan: the buckets.
        batch_size: pairs per batch.
        seed: any integer >= 0.
        epoch: number of the epoch, from 0; each has its own order.
        shuffle: False keeps file order as far as buckets allow.
        drop_remainder: leave the short batch out.

    Returns:
        `ceil(N / batch_size)` batches, or the floor with `drop_remainder`.

    Example:
        >>> plan = BucketPlan((8, 16), (8, 8), np.array([0, 1, 0, 0, 1]))
        >>> order = epoch_order(plan, 2, shuffle=False)
        >>> order.rows.tolist(), order.bucket.tolist()
        ([[0, 2], [1, 3], [4, -1]], [0, 1, 1])
    """
    random = np.random.default_rng([seed, epoch])
    full: list[np.ndarray] = []
    bucket: list[int] = []
    rest = np.zeros(0, np.int64)
    for number in range(len(plan.lengths)):
        rows = np.concatenate([rest, np.flatnonzero(plan.bucket == number)])
        rows = random.permutation(rows) if shuffle else np.sort(rows)
        whole = len(rows) // batch_size * batch_size
        full.append(rows[:whole].reshape(-1, batch_size))
        bucket += [number] * (whole // batch_size)
        rest = rows[whole:]
    batches = np.concatenate(full)
    places = random.permutation(len(batches)) if shuffle else np.argsort(batches.max(axis=1))
    batches, shapes = batches[places], np.array(bucket, np.int64)[places]
    if len(rest) and not drop_remainder:
        short = np.full((1, batch_size), -1, np.int64)
        short[0, : len(rest)] = rest
        batches = np.concatenate([batches, short])
        shapes = np.append(shapes, len(plan.lengths) - 1)
    return EpochOrder(shapes, batches)


def _best_lengths(lengths: np.ndarray, longest: int, buckets: int, limit: int | None) -> list[int]:
    step = 8 if longest <= 256 else 16 if longest <= 1024 else 64
    bounds = np.arange(step, round_up(longest, step) + 1, step)
    if limit is not None:  # rounding up must not exceed the model's positions
        bounds = np.minimum(bounds, max(limit, longest))
    held = np.searchsorted(np.sort(lengths), bounds, side="right")
    # cost[j]: token places of all pairs up to bounds[j], which is the longest of the buckets used.
    cost = held * bounds
    previous = [np.full(len(bounds), -1)]
    for _ in range(min(buckets, len(bounds)) - 1):
        # options[i, j]: bounds[j] is added after bounds[i], the best choice up to there.
        options = cost[:, None] + (held[None, :] - held[:, None]) * bounds[None, :]
        options[np.tril_indices(len(bounds))] = np.iinfo(np.int64).max
        best = options.min(axis=0)
        previous.append(np.where(best < cost, options.argmin(axis=0), -1))
        cost = np.minimum(best, cost)
    chosen = [len(bounds) - 1]
    for choice in reversed(previous):
        # -1: one bucket fewer costs the same here.
        if choice[chosen[-1]] >= 0:
            chosen.append(int(choice[chosen[-1]]))
    return [int(bounds[place]) for place in reversed(chosen)]
