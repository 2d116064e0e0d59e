"""Updates of weights in bfloat16 and float16, calculated in float32. Written for Keras 3.15."""

from __future__ import annotations

import warnings
from typing import Any

import keras
import numpy as np
from keras import ops

from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import uses_jax
from dpo_keras.utils.keras_hub_internals import KERAS, private
from dpo_keras.utils.keras_internals import inner_optimizer


def _is_half(dtype: Any) -> bool:
    return keras.backend.standardize_dtype(dtype) in ("bfloat16", "float16")


class _Float32View:
    """A weight in half precision, as an optimizer sees it: read and written in float32."""

    dtype = "float32"

    def __init__(self, weight: Any):
        self.weight = weight

    def __getattr__(self, name: str) -> Any:
        """Return what else an optimizer asks of a weight, such as its shape."""
        return getattr(self.weight, name)

    def __tf_tensor__(self, dtype: Any = None, name: str | None = None) -> Tensor:
        """Return the weight's value."""
        return ops.cast(self.weight, dtype or "float32")

    def __jax_array__(self) -> Tensor:
        """Return the weight's value."""
        return ops.cast(self.weight, "float32")

    def assign(self, value: Tensor) -> None:
        """Round to the weight's dtype once, at the end of the update."""
        self.weight.assign(ops.cast(value, self.weight.dtype))

    def assign_add(self, value: Tensor) -> None:
        """Add in float32."""
        self.assign(ops.cast(self.weight, "float32") + value)

    def assign_sub(self, value: Tensor) -> None:
        """Subtract in float32."""
        self.assign(ops.cast(self.weight, "float32") - value)


def _updated(variable: Any) -> Any:
    """Return what an optimizer updates of a variable: on TensorFlow the `tf.Variable` in it."""
    inside = isinstance(variable, keras.Variable) and not uses_jax()
    return variable.value if inside else variable


def update_in_float32(optimizer: keras.optimizers.Optimizer) -> None:
    """Keep the state of weights in half precision, and calculate their updates, in float32.

    Keras 3.15 does both in the weight's dtype. In bfloat16 a beta_2 of 0.999 is 1, and Adam stands
    still: its rate alpha = rate sqrt(1 - beta_2^t) / (1 - beta_1^t) is 0.
    """
    inner = inner_optimizer(optimizer)
    index_of = private(inner, "_get_variable_index", KERAS)
    add, update = inner.add_variable, inner.update_step

    def add_variable(*args: Any, dtype: Any = None, **kwargs: Any) -> keras.Variable:
        half = dtype is not None and _is_half(dtype)
        return add(*args, dtype="float32" if half else dtype, **kwargs)

    def update_step(gradient: Tensor, variable: Any, learning_rate: Tensor) -> None:
        if _is_half(variable.dtype):
            gradient, variable = ops.cast(gradient, "float32"), _Float32View(_updated(variable))
        update(gradient, variable, learning_rate)

    inner._get_variable_index = lambda variable: index_of(getattr(variable, "weight", variable))
    inner.add_variable, inner.update_step = add_variable, update_step


def scaling_losses(
    optimizer: str | keras.optimizers.Optimizer, layers: list[keras.layers.Layer]
) -> keras.optimizers.Optimizer:
    """Return an optimizer that scales losses, where a layer computes in float16.

    Keras does so by itself where the model as a whole has the dtype policy mixed_float16.
    """
    optimizer = keras.optimizers.get(optimizer)
    scales = isinstance(optimizer, keras.optimizers.LossScaleOptimizer)
    if scales or not any(layer.compute_dtype == "float16" for layer in layers):
        return optimizer
    return keras.optimizers.LossScaleOptimizer(optimizer, name="loss_scale_optimizer")


_STEPS_BY_RATE = {"Adam", "AdamW", "Adamax", "Nadam", "Lion"}
"""Optimizers whose updates are about as large as the learning rate."""


def share_that_stands_still(
    optimizer: keras.optimizers.Optimizer, weights: list[keras.Variable]
) -> tuple[float, float] | None:
    """Return the share of trained weights whose updates are rounded away, and the rate.

    A weight w stays where it is while updates are below half the distance to its neighbours, which
    is w / 2^8 in bfloat16 and w / 2^11 in float16, within a factor of 2. None where nothing can be
    said: no such weights, or an optimizer whose steps do not follow the rate.
    """
    inner = inner_optimizer(optimizer)
    halves = [weight for weight in weights if _is_half(weight.dtype)]
    if type(inner).__name__ not in _STEPS_BY_RATE or not halves:
        return None
    given = private(inner, "_learning_rate", KERAS)
    scheduled = isinstance(given, keras.optimizers.schedules.LearningRateSchedule)
    # A schedule may rise for long; powers of two come close to its highest rate.
    rates = [float(given(step)) for step in (0, *(2**n for n in range(20)))] if scheduled else []
    rate = (
        max(rates, default=0.0)
        if scheduled
        else float(keras.ops.convert_to_numpy(inner.learning_rate))
    )
    still, total = 0.0, sum(int(np.prod(weight.shape)) for weight in weights)
    for weight in halves:
        value = np.asarray(keras.ops.convert_to_numpy(weight)).astype("float32").ravel()
        value = value[:: max(value.size // 1000, 1)]  # a sample says it as well
        spacing = np.abs(value) / (2**8 if weight.dtype == "bfloat16" else 2**11)
        still += int((rate < spacing / 2).sum()) / value.size * int(np.prod(weight.shape))
    return still / total, rate


def warn_of_lost_updates(
    optimizer: keras.optimizers.Optimizer, weights: list[keras.Variable]
) -> None:
    """Warn where most half-precision weights round each update away."""
    found = share_that_stands_still(optimizer, weights)
    if found is not None and found[0] > 0.5:
        warnings.warn(
            f"at a learning rate of {found[1]:g}, {found[0]:.0%} of the trained weights stay what "
            "they are: an update is below what their dtype can tell apart. Keep weights in "
            "float32 (dtype='mixed_bfloat16'), train LoRA adapters, or raise the learning rate.",
            UserWarning,
            stacklevel=3,
        )
