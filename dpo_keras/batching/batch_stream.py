"""Python functions inside a `tf.data` pipeline, which let the interpreter end."""

from __future__ import annotations

import atexit
import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

from dpo_keras.batching.collate import Batch

_mutexes: list[tf.Tensor] = []


class PythonCalls:
    """Calls Python from one pipeline, one call at a time and none once the interpreter ends.

    A thread that calls Python while the interpreter shuts down is ended by it in the middle of the
    call. TensorFlow goes on waiting for that call, and the interpreter, as it destroys the
    iterator, for TensorFlow: the process hangs for ever. A prefetching pipeline calls Python at any
    time, so a program that merely leaves an iterator behind hangs now and then.

    Each call is therefore made under a mutex of TensorFlow. Before the interpreter shuts down it
    takes the mutex, which waits for the call in progress, and keeps it. A later call waits in
    TensorFlow, without Python, until the iterator is destroyed and cancels it.

    Example:
        >>> calls = PythonCalls()
        >>> double = lambda n: calls.numpy_function(lambda n: 2 * n, [n], [tf.int64])[0]
        >>> [int(n) for n in tf.data.Dataset.range(3).map(double)]
        [0, 2, 4]
    """

    def __init__(self) -> None:
        """Makes the mutex, outside any function that is being traced."""
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
        """`tf.numpy_function`, one call at a time.

        Args:
            function: of arrays, to a list of arrays.
            inputs: tensors.
            types: of the results.
            stateful: whether equal inputs may bring other results.

        Returns:
            The results, of unknown shapes.
        """
        lock = tf.raw_ops.MutexLock(mutex=self._mutex)
        with tf.control_dependencies([lock]):
            results = tf.numpy_function(function, inputs, list(types), stateful)
        # The lock ends with its tensor, also where the function fails or is cancelled; it must
        # only live as long as the call.
        with tf.control_dependencies(results):
            consumed = tf.raw_ops.ConsumeMutexLock(mutex_lock=lock)
        with tf.control_dependencies([consumed]):
            return [tf.identity(result) for result in results]


@atexit.register
def _end_calls() -> None:
    for mutex in _mutexes:
        lock = tf.raw_ops.MutexLock(mutex=mutex)
        # Never freed, hence never given back: a variable of this module would be, before iterators
        # that live longer than it.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(lock))


# The dimensions in which batches of different buckets differ.
DYNAMIC = {"token_ids": 2, "padding_mask": 2, "source": 1, "target": 1, "owner": 1}


class Source(NamedTuple):
    """Batches by number.

    Args:
        steps: batches per epoch.
        make: the batch of an epoch and a step of it.
        signature: shapes and types of all batches.
    """

    steps: int
    make: Callable[[int, int], Batch]
    signature: dict[str, tf.TensorSpec]


def signature_of(sample: Batch, dynamic: Mapping[str, int]) -> dict[str, tf.TensorSpec]:
    """The shapes and types of batches.

    Args:
        sample: one of them.
        dynamic: the dimension that differs between batches, of each tensor that has one.

    Example:
        >>> signature_of({"owner": np.zeros((2, 8), np.int32)}, {"owner": 1})["owner"].shape
        TensorShape([2, None])
    """
    signature = {}
    for name, value in sample.items():
        shape: list[int | None] = list(value.shape)
        if name in dynamic:
            shape[dynamic[name]] = None
        signature[name] = tf.TensorSpec(shape, value.dtype, name=name)
    return signature


def stream(source: Source, start: int, total: int | None) -> tf.data.Dataset:
    """The batches of a source from one step on, made while the model computes.

    Args:
        source: of the batches.
        start: number of the first global batch.
        total: one past the last; None never ends. Where it is given and `start` is 0, iterating
            again goes on to the next `total` batches.

    Returns:
        A dataset of known cardinality, deterministic, prefetching.
    """
    signature = source.signature
    names = list(signature)
    advances = total is not None and start == 0
    iterations = itertools.count()
    calls = PythonCalls()

    def first_step() -> list[np.int64]:
        iteration = next(iterations)
        return [np.int64(start + (iteration * total if advances and total is not None else 0))]

    def arrays(step: np.ndarray) -> list[np.ndarray]:
        batch = source.make(*divmod(int(step), source.steps))
        return [batch[name] for name in names]

    def load(step: tf.Tensor) -> dict[str, tf.Tensor]:
        types = [signature[name].dtype for name in names]
        tensors = calls.numpy_function(arrays, [step], types)
        return {
            name: tf.ensure_shape(tensor, signature[name].shape)
            for name, tensor in zip(names, tensors, strict=True)
        }

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
    # There are no files to share out: workers cut each global batch by its rows instead.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)
