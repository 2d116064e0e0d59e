"""Python functions inside a `tf.data` pipeline, which let the interpreter end."""

from __future__ import annotations

import atexit
import ctypes
from collections.abc import Callable, Sequence
from typing import Any

import tensorflow as tf

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
