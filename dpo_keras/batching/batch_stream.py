"""Streams of batches: a `tf.data` pipeline over Python, one pass over all pairs, a few strings."""

from __future__ import annotations

import atexit
import ctypes
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dpo_keras.batching.bucketing import epoch_order, plan_buckets
from dpo_keras.batching.collate import Batch, collate, collate_single
from dpo_keras.batching.encoders import TextEncoder
from dpo_keras.batching.forests import collate_packed
from dpo_keras.batching.packing import packed_order, plan_packing
from dpo_keras.batching.tokenized_pairs import TokenizedPairs, truncate
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.backends import leave_devices_to_jax

_DYNAMIC = {
    "token_ids": 2,
    "padding_mask": 2,
    "source": 1,
    "target": 1,
    "owner": 1,
    "vision_mask": 1,
}
# Where the size of an image decides on the number of its patches.
_DYNAMIC_PATCHES = {"pixel_values": 1}

_mutexes: list[tf.Tensor] = []


class PythonCalls:
    """Calls Python from a pipeline, one call at a time and none after the interpreter ends.

    An interpreter that shuts down ends a prefetching thread in the middle of a call. TensorFlow
    waits for that call, and the interpreter, which destroys the iterator, waits for TensorFlow: the
    process hangs. Each call is therefore made under a mutex of TensorFlow, which the interpreter
    takes before it shuts down, after the call in progress, and keeps.
    """

    def __init__(self) -> None:
        # The mutex is made outside any function that is being traced.
        with tf.init_scope(), tf.device("CPU:0"):
            self._mutex = tf.raw_ops.MutexV2(shared_name=f"dpo_keras_python_calls_{len(_mutexes)}")
        _mutexes.append(self._mutex)

    def numpy_function(
        self,
        function: Callable[..., Any],
        inputs: Sequence[tf.Tensor],
        types: Sequence[tf.DType],
        stateful: bool = False,
    ) -> list[tf.Tensor]:
        """Call a function as `tf.numpy_function` does, one call at a time."""
        lock = tf.raw_ops.MutexLock(mutex=self._mutex)
        with tf.control_dependencies([lock]):
            results = tf.numpy_function(function, inputs, list(types), stateful)
        # The lock ends with its tensor, also where the function fails or is cancelled. It must only
        # live as long as the call.
        with tf.control_dependencies(results):
            consumed = tf.raw_ops.ConsumeMutexLock(mutex_lock=lock)
        with tf.control_dependencies([consumed]):
            return [tf.identity(result) for result in results]


@atexit.register
def _end_calls() -> None:
    for mutex in _mutexes:
        lock = tf.raw_ops.MutexLock(mutex=mutex)
        # Never freed, hence never given back. A variable of this module would be freed before
        # iterators that live longer than it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(lock))


class Source(NamedTuple):
    """Batches by number: `steps` per epoch; `make` makes that of an epoch and step."""

    steps: int
    make: Callable[[int, int], Mapping[str, object]]
    signature: dict[str, tf.TensorSpec]


def dynamic_dimensions(sample: Mapping[str, object]) -> dict[str, int]:
    """Return the dimensions in which batches like a sample differ between buckets."""
    return {**_DYNAMIC, **(_DYNAMIC_PATCHES if "image_grid_thw" in sample else {})}


def signature_of(
    sample: Mapping[str, object], dynamic: Mapping[str, int]
) -> dict[str, tf.TensorSpec]:
    """Return the specs of batches like a sample; None in the dimension that `dynamic` names."""
    signature = {}
    for name, value in sample.items():
        array = np.asarray(value)
        shape: list[int | None] = list(array.shape)
        if name in dynamic:
            shape[dynamic[name]] = None
        signature[name] = tf.TensorSpec(shape, array.dtype, name=name)
    return signature


def stream(source: Source, start: int, total: int | None) -> tf.data.Dataset:
    """Return the batches from number `start` to `total` over all epochs; None never ends.

    If `start` is 0, iterating again continues with the next `total` batches.
    """
    signature = source.signature
    calls = PythonCalls()
    iterations = itertools.count()
    advance = 0 if total is None or start else total  # from one iteration to the next

    leave_devices_to_jax()

    def first_step() -> list[np.int64]:
        return [np.int64(start + next(iterations) * advance)]

    def arrays(step: np.ndarray) -> list[object]:
        batch = source.make(*divmod(int(step), source.steps))
        return [batch[name] for name in signature]

    def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
        tensors = calls.numpy_function(arrays, [step], [s.dtype for s in signature.values()])
        specs = zip(signature.items(), tensors, strict=True)
        return {name: tf.ensure_shape(tensor, spec.shape) for (name, spec), tensor in specs}

    steps = np.iinfo(np.int64).max if total is None else total - start

    def iterate(_: tf.Tensor) -> tf.data.Dataset:
        (step,) = calls.numpy_function(first_step, [], [tf.int64], stateful=True)
        first = tf.ensure_shape(step, [])
        stop = steps if total is None else first + steps
        return tf.data.Dataset.range(first, stop).map(load)

    dataset = tf.data.Dataset.from_tensors(0).flat_map(iterate)
    cardinality = tf.data.INFINITE_CARDINALITY if total is None else steps
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(cardinality))
    options = tf.data.Options()
    options.deterministic = True
    # There are no files to share out: workers cut each batch by its rows instead.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return prefetched(dataset.with_options(options))


def prefetched(dataset: tf.data.Dataset) -> tf.data.Dataset:
    """Make two batches ahead, without autotuning.

    Its thread may sleep through the end of an iterator, which waits for it: up to a minute
    (TensorFlow 2.21).
    """
    options = tf.data.Options()
    options.autotune.enabled = False
    return dataset.prefetch(2).with_options(options)


class Part(NamedTuple):
    """One batch of a pass; `pairs` is the pair in each pair slot, int `[rows * pairs]`, or -1."""

    pairs: np.ndarray
    batch: Batch

    def put(self, found: np.ndarray, results: np.ndarray) -> int:
        """Copy results per pair slot into `results` per pair; return the number of pairs."""
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
        >>> rows = Ragged.from_lists([[n] * n for n in (4, 9, 3)])
        >>> chosen, rejected = (Ragged.from_lists([[end]] * 3) for end in (2, 3))
        >>> pairs = TokenizedPairs(rows, chosen, rejected, np.ones(3), np.ones(3))
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
            batch = collate_packed(
                tokenized, grid, packing.length, packing.slots, trees=packing.trees
            )
            yield Part(grid.reshape(-1), batch)
        return
    plan = plan_buckets(tokenized, batch_size)
    order = epoch_order(plan, batch_size, shuffle=False)
    for bucket, rows in zip(order.bucket, order.rows, strict=True):
        length, slots = plan.lengths[bucket], plan.slots[bucket]
        yield Part(rows, collate(tokenized, rows, length, slots, batch_size))


def pass_signature(batch: Mapping[str, object]) -> dict[str, tf.TensorSpec]:
    """Return the shapes and types with which one trace serves every batch of a pass.

    Args:
        batch: one of them. Packed, all have its shape; else lengths and slots stay open.

    Returns:
        A spec per key.
    """
    return signature_of(batch, {} if "reach" in batch else dynamic_dimensions(batch))


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
        prompt, first, second = truncate(
            prompt, first, second, max_length=max_length, start=encoder.start
        )
    if responses_b is None:
        return collate_single(prompt, first, pad=encoder.pad, **layout)
    ones = np.ones(len(prompt), np.float32)
    pairs = TokenizedPairs(prompt, first, second, ones, ones, pad=encoder.pad)
    return collate(pairs, np.arange(len(pairs)), **layout)
