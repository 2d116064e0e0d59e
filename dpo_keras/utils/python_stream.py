"""A `tf.data` pipeline over batches that Python makes by number, and that lets Python end."""

from __future__ import annotations

import atexit
import ctypes
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import tensorflow as tf

_mutexes: list[tf.Tensor] = []


class PythonCalls:
    """Calls Python from a pipeline, one call at a time and none after the interpreter ends.

    While the interpreter shuts down, it ends a thread that calls Python in the middle of the call.
    TensorFlow keeps waiting for that call, and the interpreter, which destroys the iterator, keeps
    waiting for TensorFlow: the process hangs. A prefetching pipeline calls Python at any time, so a
    program that only leaves an iterator behind hangs now and then.

    Each call is therefore made under a mutex of TensorFlow. The interpreter takes the mutex before
    it shuts down, which waits for the call in progress, and keeps it. A later call waits in
    TensorFlow, without Python, until the iterator is destroyed and cancels it.
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
    """Batches by number."""

    steps: int  # per epoch
    make: Callable[[int, int], Mapping[str, object]]  # from an epoch and a step to arrays
    signature: dict[str, tf.TensorSpec]  # of all batches


def signature_of(
    sample: Mapping[str, object], dynamic: Mapping[str, int]
) -> dict[str, tf.TensorSpec]:
    """Return the specs of batches like `sample`; `dynamic` names the dimension that differs."""
    signature = {}
    for name, value in sample.items():
        array = np.asarray(value)
        shape: list[int | None] = list(array.shape)
        if name in dynamic:
            shape[dynamic[name]] = None
        signature[name] = tf.TensorSpec(shape, array.dtype, name=name)
    return signature


def stream(source: Source, start: int, total: int | None) -> tf.data.Dataset:
    """Return the batches `start` to `total` of a source, made while the model computes.

    Batches are counted over all epochs; with `total` None they never end. If it is given and
    `start` is 0, iterating again continues with the next `total` batches.
    """
    signature = source.signature
    names = list(signature)
    calls = PythonCalls()
    iterations = itertools.count()
    advance = 0 if total is None or start else total  # from one iteration to the next

    def first_step() -> list[np.int64]:
        return [np.int64(start + next(iterations) * advance)]

    def arrays(step: np.ndarray) -> list[object]:
        batch = dict(source.make(*divmod(int(step), source.steps)))
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
    # There are no files to share out: workers cut each batch by its rows instead.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.DATA
    return dataset.prefetch(tf.data.AUTOTUNE).with_options(options)
