"""Stable pieces that several formulas share. Everything is `keras.ops`, so any backend runs it."""

from __future__ import annotations

from typing import Any

from keras import ops

Tensor = Any
"""A tensor of the active Keras backend, or anything `keras.ops.convert_to_tensor` takes."""

EXP_LIMIT = 30.0
"""Beyond this exponent `capped_exp` goes on as a straight line: e^30 squared, as in a gradient's
norm, still leaves float32 half its range."""


def as_floating(value: Tensor, dtype: str | None = None) -> Tensor:
    """Turn a value into a float tensor: float64 stays float64, all else becomes float32.

    Args:
        value: a tensor, array, list or number of any dtype.
        dtype: the dtype to take instead.

    Returns:
        A tensor of dtype `dtype`, or of `float64` or `float32` as said above.

    Example:
        >>> from keras import ops
        >>> ops.convert_to_numpy(as_floating([1, 2])).dtype
        dtype('float32')
    """
    from keras import backend

    value = ops.convert_to_tensor(value)
    if dtype is None:
        dtype = "float64" if backend.standardize_dtype(value.dtype) == "float64" else "float32"
    return ops.cast(value, dtype)


def capped_expm1(exponent: Tensor) -> Tensor:
    """Give exp(x) - 1, continued by its tangent where x > 30.

    A log-ratio of some thousand nats is ordinary for a long response, and exp of it is not finite.
    Clipping would end the gradient exactly where the response is furthest off; the tangent keeps
    value and gradient finite, and the order of any two values as it was.

    Args:
        exponent: a float tensor of any shape.

    Returns:
        A tensor of the same shape and dtype.

    Example:
        >>> from keras import ops
        >>> round(float(capped_expm1(ops.convert_to_tensor(1.0))), 4)
        1.7183
        >>> bool(ops.isfinite(capped_expm1(ops.convert_to_tensor(1e4))))
        True
    """
    within = ops.minimum(exponent, EXP_LIMIT)
    beyond = ops.maximum(exponent - EXP_LIMIT, 0.0)
    return ops.expm1(within) + ops.exp(ops.full_like(exponent, EXP_LIMIT)) * beyond


def log1mexp(log_p: Tensor) -> Tensor:
    """Give log(1 - exp(x)) for x < 0: the log-probability of the complement.

    Args:
        log_p: a float tensor of log-probabilities. Values above -1e-6 are taken as -1e-6, since
            the logarithm has no finite value at a probability of one.

    Returns:
        A tensor of the same shape and dtype.

    Example:
        >>> import math
        >>> from keras import ops
        >>> round(float(log1mexp(ops.convert_to_tensor(math.log(0.25)))), 4) == round(
        ...     math.log(0.75), 4)
        True
    """
    return ops.log(-ops.expm1(ops.minimum(log_p, -1e-6)))
