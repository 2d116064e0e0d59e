"""Tokenized pairs as a `tf.data.Dataset` of dict batches: few shapes, one order per seed."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import numpy as np
import tensorflow as tf

from dpo_keras.batching.batch_stream import DYNAMIC, Source, signature_of, stream
from dpo_keras.batching.bucketing import epoch_order, plan_buckets
from dpo_keras.batching.chat_templates import ChatTemplate
from dpo_keras.batching.collate import Batch, collate
from dpo_keras.batching.packed_rows import collate_packed
from dpo_keras.batching.packing import PackingPlan, packed_order, plan_packing
from dpo_keras.batching.tokenization import Overlength, tokenize_pairs
from dpo_keras.batching.tokenized_pairs import TokenizedPairs
from dpo_keras.errors import InputError

Batching = Literal["buckets", "packed"]

AHEAD = 32  # batches that disks are told of before they are needed


def steps_per_epoch(
    pairs: int | TokenizedPairs,
    batch_size: int,
    drop_remainder: bool = False,
    *,
    batching: Batching = "buckets",
    row_length: int | None = None,
    rows: int | None = None,
    replicas: int = 1,
    seed: int = 0,
    shuffle: bool = True,
) -> int:
    """Counts the batches of one epoch, the same for every epoch.

    Args:
        pairs: the tokenized pairs; for buckets their number is enough.
        batch_size: pairs per batch.
        drop_remainder: whether the short last batch is left out.
        batching: as in `preference_dataset`, and so are the rest, which matter only when packed.
        row_length: tokens per row.
        rows: rows per batch.
        replicas: that share a batch.
        seed: of the order.
        shuffle: whether there is one.

    Returns:
        With buckets, whatever they are, `ceil(pairs / batch_size)`, or the floor; packed, what the
        first epoch needs.

    Raises:
        InputError: packed, and `pairs` is only a number; or as `plan_packing`.

    Example:
        >>> steps_per_epoch(10, 4), steps_per_epoch(10, 4, drop_remainder=True)
        (3, 2)
    """
    if batching == "packed":
        if not isinstance(pairs, TokenizedPairs):
            raise InputError(f"pairs must be TokenizedPairs to count packed batches, got {pairs}.")
        return _plan(pairs, batch_size, row_length, rows, replicas, seed, shuffle).steps
    count = pairs if isinstance(pairs, int) else len(pairs)
    return count // batch_size if drop_remainder else -(-count // batch_size)


def preference_dataset(
    pairs: Iterable[Any] | TokenizedPairs,
    preprocessor: Any = None,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    template: str | ChatTemplate | None = None,
    overlength: Overlength = "truncate",
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = 1,
    start_step: int = 0,
    buckets: int | Sequence[int] = 4,
    drop_remainder: bool = False,
    batching: Batching = "buckets",
    row_length: int | None = None,
    rows: int | None = None,
    replicas: int = 1,
    worker: tuple[int, int] | None = None,
) -> tf.data.Dataset:
    """Makes the batches that `DPOModel.fit` and `evaluate` take.

    An epoch brings each pair once. There are two ways to lay pairs out:

    * `"buckets"`, for any model: every batch is a dict (see `dpo_keras.batching.collate`) of
      exactly `batch_size` rows, one pair each as two padded sequences, in one of a few static
      shapes; only the last batch of an epoch may hold empty rows.
    * `"packed"`, for models without a packing obstacle: rows hold several pairs, each prompt once
      (see `dpo_keras.batching.packed_rows`), in one static shape and almost without padding.
      A batch holds `batch_size` pairs in the mean.

    **Order.** Global batch k is a pure function of the arguments and k; k // steps_per_epoch is its
    epoch. `start_step=k` begins there without making the batches before, so a stopped run goes on
    with exactly the batches it had not seen: build the stream with `epochs=None` and give `fit` its
    `steps_per_epoch`. Where `epochs` is a number and `start_step` 0, iterating the same object
    again (as `fit(epochs=3)` does with `epochs=1`) goes on to the following epochs, each in its own
    order, like `tf.data`'s `reshuffle_each_iteration`; with `shuffle=False` every iteration is the
    same.

    **Distribution.** Pass the dataset to `fit` as it is. Every worker builds the same dataset, of
    the *global* batch size; the strategy cuts each batch along its rows, and the pieces that all
    replicas get in a step are together exactly that batch (`batch_size` must be a multiple of the
    number of replicas). With `worker=(index, count)` a worker makes, and reads from disk, only its
    own rows of each global batch, the same that the strategy would have cut for it: for
    `strategy.distribute_datasets_from_function`, where each worker has one replica.

    Args:
        pairs: `Preferences` or any pairs that `tokenize_pairs` takes, or `TokenizedPairs`.
        preprocessor: the policy's KerasHub preprocessor or what else `tokenize_pairs` takes; not
            needed for `TokenizedPairs`.
        batch_size: pairs per batch, over all replicas.
        max_length: see `tokenize_pairs`; of no concern to `TokenizedPairs`, as are the next two.
        template: see `tokenize_pairs`.
        overlength: see `tokenize_pairs`.
        shuffle: False keeps file order as far as buckets, or rows, allow.
        seed: any integer >= 0.
        epochs: how many epochs one iteration brings; None never ends.
        start_step: number of the first global batch, from 0.
        buckets: how many static lengths at most, or the lengths (see `plan_buckets`). 1 gives one
            fully static shape. Of no concern to packed batches.
        drop_remainder: leave out the short last batch of each epoch; packed batches have none.
        batching: "buckets" or "packed".
        row_length: tokens per row of packed batches; None chooses (see `plan_packing`).
        rows: rows per packed batch, over all replicas; None chooses.
        replicas: how many share a packed batch, so that they get as many rows each.
        worker: (index, count): bring the rows of this worker only; None brings all.

    Returns:
        A dataset of known cardinality, deterministic, prefetching.

    Raises:
        InputError: wrong arguments, all of them together; or as `tokenize_pairs`.

    Example:
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [list(map(ord, t)) for t in texts])
        >>> from dpo_keras.preferences import PreferencePair
        >>> pairs = [PreferencePair("2+2=", "4", wrong) for wrong in ("5", "6", "seven")]
        >>> dataset = preference_dataset(pairs, Letters(), batch_size=2)
        >>> int(dataset.cardinality()), [batch["weight"].numpy().sum() for batch in dataset]
        (2, [np.float32(2.0), np.float32(1.0)])
    """
    problems = [
        f"{name} must be an integer >= {least}, got {value!r}."
        for name, value, least in (
            ("batch_size", batch_size, 1),
            ("seed", seed, 0),
            ("start_step", start_step, 0),
            ("epochs", 1 if epochs is None else epochs, 1),
        )
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least
    ]
    if not isinstance(pairs, TokenizedPairs) and preprocessor is None:
        problems.append("preprocessor is needed to tokenize the pairs: pass policy.preprocessor.")
    if batching not in get_args(Batching):
        names = " or ".join(map(repr, get_args(Batching)))
        problems.append(f"batching must be {names}, got {batching!r}.")
    if batching != "packed":
        problems += [
            f"{name} has no effect without batching='packed', got {value}; leave it out."
            for name, value in (("row_length", row_length), ("rows", rows))
            if value is not None
        ]
    elif drop_remainder:
        problems.append("drop_remainder has no effect with batching='packed'; leave it out.")
    if worker is not None and not 0 <= worker[0] < worker[1]:
        problems.append(f"worker must be (index, count) with 0 <= index < count, got {worker}.")
    elif worker is not None and batching != "packed" and batch_size % worker[1]:
        problems.append(
            f"batch_size must be a multiple of the {worker[1]} workers, got {batch_size}."
        )
    if problems:
        raise InputError(problems)
    if isinstance(pairs, TokenizedPairs):
        tokenized = pairs
    else:
        tokenized = tokenize_pairs(
            pairs, preprocessor, max_length=max_length, template=template, overlength=overlength
        )
    if batching == "packed":
        plan = _plan(tokenized, batch_size, row_length, rows, replicas, seed, shuffle)
        source = _packed(tokenized, plan, worker)
    else:
        source = _bucketed(tokenized, batch_size, buckets, seed, shuffle, drop_remainder, worker)
    if source.steps == 0:
        raise InputError(
            f"drop_remainder leaves no batch: {len(tokenized)} pairs, batch_size {batch_size}."
        )
    total = None if epochs is None else epochs * source.steps
    if total is not None and start_step >= total:
        raise InputError(
            f"start_step must be less than the {total} batches of {epochs} epochs, "
            f"got {start_step}."
        )
    return stream(source, start_step, total)


def _bucketed(
    tokenized: TokenizedPairs,
    batch_size: int,
    buckets: int | Sequence[int],
    seed: int,
    shuffle: bool,
    drop_remainder: bool,
    worker: tuple[int, int] | None,
) -> Source:
    plan = plan_buckets(tokenized, batch_size, buckets)
    order = functools.lru_cache(maxsize=2)(
        lambda epoch: epoch_order(
            plan, batch_size, seed=seed, epoch=epoch, shuffle=shuffle, drop_remainder=drop_remainder
        )
    )

    def make(epoch: int, step: int) -> Batch:
        shape, batches = order(epoch).bucket[step], order(epoch).rows
        rows = _rows_of(tokenized, batches, step, worker)
        return collate(tokenized, rows, plan.lengths[shape], plan.slots[shape], len(rows))

    # Batches of one shape are static throughout; else only length and slots are left open.
    one = len(plan.lengths) == 1
    rows = batch_size // (1 if worker is None else worker[1])
    sample = collate(tokenized, [0], plan.lengths[-1], plan.slots[-1], rows)
    return Source(
        steps_per_epoch(tokenized, batch_size, drop_remainder),
        make,
        signature_of(sample, {} if one else DYNAMIC),
    )


def _plan(
    tokenized: TokenizedPairs,
    batch_size: int,
    row_length: int | None,
    rows: int | None,
    replicas: int,
    seed: int,
    shuffle: bool,
) -> PackingPlan:
    return plan_packing(
        tokenized,
        batch_size,
        length=row_length,
        rows=rows,
        replicas=replicas,
        seed=seed,
        shuffle=shuffle,
    )


def _packed(tokenized: TokenizedPairs, plan: PackingPlan, worker: tuple[int, int] | None) -> Source:
    order = functools.lru_cache(maxsize=2)(lambda epoch: packed_order(plan, epoch))

    def make(epoch: int, step: int) -> Batch:
        batches = order(epoch if plan.shuffle else 0).pairs
        pairs = _rows_of(tokenized, batches, step, worker)
        return collate_packed(tokenized, pairs, plan.length, plan.slots)

    return Source(plan.steps, make, signature_of(make(0, 0), {}))


def _rows_of(
    tokenized: TokenizedPairs, batches: np.ndarray, step: int, worker: tuple[int, int] | None
) -> np.ndarray:
    """Takes a batch's rows, or a worker's share of them, and announces those of a later batch."""
    index, count = worker or (0, 1)
    size = batches.shape[1]
    if size % count:
        raise InputError(
            f"a batch of {size} packed rows cannot be shared by {count} workers; pass "
            f"replicas={count}."
        )
    mine = batches[:, index * size // count : (index + 1) * size // count]
    soon = mine[0 if step == 0 else step + AHEAD : step + AHEAD + 1]
    tokenized.expect(soon[soon >= 0])
    return mine[step]
