"""Tokenized pairs as a `tf.data.Dataset` of dict batches: few shapes, one order per seed."""

from __future__ import annotations

import functools
import itertools
import threading
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import tensorflow as tf

from dpo_keras.batching.buckets import BucketPlan, EpochOrder, epoch_order, plan_buckets
from dpo_keras.batching.collate import Batch, collate
from dpo_keras.batching.pairs import TokenizedPairs
from dpo_keras.batching.templates import ChatTemplate
from dpo_keras.batching.tokenization import Overlength, tokenize_pairs
from dpo_keras.errors import InputError


def steps_per_epoch(
    pairs: int | TokenizedPairs, batch_size: int, drop_remainder: bool = False
) -> int:
    """Counts the batches of one epoch; buckets and order do not change it.

    Args:
        pairs: the tokenized pairs, or how many there are.
        batch_size: pairs per batch.
        drop_remainder: whether the short last batch is left out.

    Returns:
        `ceil(pairs / batch_size)`, or the floor.

    Example:
        >>> steps_per_epoch(10, 4), steps_per_epoch(10, 4, drop_remainder=True)
        (3, 2)
    """
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
) -> tf.data.Dataset:
    """Makes the batches that `DPOModel.fit` and `evaluate` take.

    Every batch is a dict (see `dpo_keras.batching.collate`) of exactly `batch_size` rows, in one of
    a few static shapes. An epoch brings each pair once; only its last batch may hold empty rows.

    **Order.** Global batch k is a pure function of the pairs, `batch_size`, `buckets`, `seed` and
    k; k // steps_per_epoch is its epoch. `start_step=k` begins there without making the batches
    before, so a stopped run goes on with exactly the batches it had not seen: build the stream with
    `epochs=None` and give `fit` its `steps_per_epoch`. Where `epochs` is a number and `start_step`
    0, iterating the same object again (as `fit(epochs=3)` does with `epochs=1`) goes on to the
    following epochs, each in its own order, like `tf.data`'s `reshuffle_each_iteration`; with
    `shuffle=False` every iteration is the same.

    **Distribution.** Pass the dataset to `fit` as it is. Every worker builds the same dataset, of
    the *global* batch size; the strategy cuts each batch along its rows, and the pieces that all
    replicas get in a step are together exactly that batch (`batch_size` must be a multiple of the
    number of replicas).

    Args:
        pairs: `Preferences` or any pairs that `tokenize_pairs` takes, or `TokenizedPairs`.
        preprocessor: the policy's KerasHub preprocessor or what else `tokenize_pairs` takes; not
            needed for `TokenizedPairs`.
        batch_size: rows per batch, over all replicas.
        max_length: see `tokenize_pairs`; of no concern to `TokenizedPairs`, as are the next two.
        template: see `tokenize_pairs`.
        overlength: see `tokenize_pairs`.
        shuffle: False keeps file order as far as buckets allow.
        seed: any integer >= 0.
        epochs: how many epochs one iteration brings; None never ends.
        start_step: number of the first global batch, from 0.
        buckets: how many static lengths at most, or the lengths (see `plan_buckets`). 1 gives one
            fully static shape.
        drop_remainder: leave out the short last batch of each epoch.

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
    if problems:
        raise InputError(problems)
    if isinstance(pairs, TokenizedPairs):
        tokenized = pairs
    else:
        tokenized = tokenize_pairs(
            pairs, preprocessor, max_length=max_length, template=template, overlength=overlength
        )
    per_epoch = steps_per_epoch(tokenized, batch_size, drop_remainder)
    if per_epoch == 0:
        raise InputError(
            f"drop_remainder leaves no batch: {len(tokenized)} pairs, batch_size {batch_size}."
        )
    total = None if epochs is None else epochs * per_epoch
    if total is not None and start_step >= total:
        raise InputError(
            f"start_step must be less than the {total} batches of {epochs} epochs, "
            f"got {start_step}."
        )
    plan = plan_buckets(tokenized, batch_size, buckets)
    order = functools.lru_cache(maxsize=2)(
        lambda epoch: epoch_order(
            plan, batch_size, seed=seed, epoch=epoch, shuffle=shuffle, drop_remainder=drop_remainder
        )
    )

    def make(step: int) -> Batch:
        return _batch(tokenized, plan, order(int(step) // per_epoch), int(step) % per_epoch)

    advances = total is not None and start_step == 0
    return _stream(make, _signature(tokenized, plan, batch_size), start_step, total, advances)


def _batch(tokenized: TokenizedPairs, plan: BucketPlan, order: EpochOrder, step: int) -> Batch:
    shape = order.bucket[step]
    rows = order.rows[step]
    return collate(tokenized, rows, plan.lengths[shape], plan.slots[shape], len(rows))


def _signature(
    tokenized: TokenizedPairs, plan: BucketPlan, batch_size: int
) -> dict[str, tf.TensorSpec]:
    # Batches of one shape are static throughout; else only length and slots are left open.
    one = len(plan.lengths) == 1
    sample = collate(tokenized, [0], plan.lengths[-1], plan.slots[-1], batch_size)
    dynamic = {"token_ids": 2, "padding_mask": 2, "source": 1, "target": 1, "owner": 1}
    signature = {}
    for name, value in sample.items():
        shape: list[int | None] = list(value.shape)
        if name in dynamic and not one:
            shape[dynamic[name]] = None
        signature[name] = tf.TensorSpec(shape, value.dtype, name=name)
    return signature


def _stream(
    make: Any, signature: dict[str, tf.TensorSpec], start: int, total: int | None, advances: bool
) -> tf.data.Dataset:
    names = list(signature)
    iterations = itertools.count()
    lock = threading.Lock()

    def first_step() -> np.int64:
        with lock:
            iteration = next(iterations)
        return np.int64(start + (iteration * total if advances and total is not None else 0))

    def arrays(step: np.ndarray) -> list[np.ndarray]:
        batch = make(step)
        return [batch[name] for name in names]

    def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
        types = [signature[name].dtype for name in names]
        tensors = tf.numpy_function(arrays, [step], types, stateful=False)
        return {
            name: tf.ensure_shape(tensor, signature[name].shape)
            for name, tensor in zip(names, tensors, strict=True)
        }

    steps = np.iinfo(np.int64).max if total is None else total - start

    def iterate(_: tf.Tensor) -> tf.data.Dataset:
        first = tf.ensure_shape(tf.numpy_function(first_step, [], tf.int64), [])
        stop = steps if total is None else first + steps
        return tf.data.Dataset.range(first, stop).map(load)

    dataset = tf.data.Dataset.from_tensors(0).flat_map(iterate)
    cardinality = tf.data.INFINITE_CARDINALITY if total is None else steps
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(cardinality))
    options = tf.data.Options()
    options.deterministic = True
    # There are no files to share out: workers cut each global batch by its rows instead.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)
