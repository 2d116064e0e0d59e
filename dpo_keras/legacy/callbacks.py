"""Callbacks of Keras 3, this package's own included, in the `fit` of tf-keras."""

from collections.abc import Callable, Iterable
from typing import Any

import keras
import tf_keras

_HOOKS = [
    name
    for name in dir(keras.callbacks.Callback)
    if name.startswith("on_") and hasattr(tf_keras.callbacks.Callback, name)
]


def adapted(callback: Any) -> Any:
    """A callback of tf-keras that hands on to one of Keras 3.

    It has the hooks that the other one has and no more, because tf-keras refuses callbacks with
    hooks for batches under a parameter server.

    Args:
        callback: of either.

    Returns:
        The same where it is one of tf-keras.

    Example:
        >>> class Counts(keras.callbacks.Callback):
        ...     def on_epoch_end(self, epoch, logs=None): print(epoch, logs)
        >>> adapted(Counts()).on_epoch_end(3, {"loss": 0.5})
        3 {'loss': 0.5}
    """
    if not isinstance(callback, keras.callbacks.Callback):
        return callback

    def hook(name: str) -> Callable[..., Any]:
        return lambda self, *args, **kwargs: getattr(callback, name)(*args, **kwargs)

    base = keras.callbacks.Callback
    used = [n for n in _HOOKS if getattr(type(callback), n) is not getattr(base, n)]
    names = ["set_model", "set_params", *used]
    kind = type(
        type(callback).__name__, (tf_keras.callbacks.Callback,), {n: hook(n) for n in names}
    )
    return kind()


def adapted_all(callbacks: Any) -> list[Any]:
    """What `fit(callbacks=…)` takes (one, several or None), each of them adapted."""
    given = callbacks if isinstance(callbacks, Iterable) else [callbacks]
    return [adapted(callback) for callback in given if callback is not None]
