r"""LoRA as two small products, so that no gradient of a frozen kernel is ever formed.

Keras computes x (W + s A B): its backward pass needs the gradient of the sum, as large as W, to get
those of A and B. Here

    y = x W + s (x A) B,

which is the same function; d/dA and d/dB need products with rank-sized sides only, and nothing of
W's size is formed on the way back.
"""

from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from dpo_keras.scoring.swapped import Swap


def low_rank_calls(model: keras.Model) -> list[Swap]:
    """The calls of all layers with LoRA switched on, factored.

    Args:
        model: any model; layers of other kinds, and quantized ones, are left as they are, and so
            is whatever is no model of Keras 3.

    Returns:
        What `swapped` takes.

    Example:
        >>> layer = keras.layers.Dense(3)
        >>> layer.build((None, 2))
        >>> model = keras.Sequential([keras.Input((2,)), layer])
        >>> low_rank_calls(model)
        []
        >>> layer.enable_lora(1)
        >>> len(low_rank_calls(model))
        1
    """
    if not isinstance(model, keras.Model):
        return []
    return [
        (layer, "call", _factored(layer))
        for layer in model._flatten_layers()
        if getattr(layer, "lora_enabled", False) and _can_factor(layer)
    ]


def _can_factor(layer: Any) -> bool:
    if getattr(layer, "quantization_mode", None) is not None:
        return False
    if isinstance(layer, keras.layers.Dense):
        return True
    if not isinstance(layer, keras.layers.EinsumDense):
        return False
    # B acts on the last axis of the kernel, which must be the last one of the output.
    kernel, output = layer.equation.split(",")[1].split("->")
    return kernel[-1] == output[-1] and kernel[-1] not in layer.equation.split(",")[0]


def _factored(layer: Any) -> Callable[..., Any]:
    scale = layer.lora_alpha / layer.lora_rank

    def product(inputs: Any, kernel: Any) -> Any:
        if isinstance(layer, keras.layers.Dense):
            return ops.matmul(inputs, kernel)
        return ops.einsum(layer.equation, inputs, kernel)

    def call(inputs: Any, training: bool | None = None) -> Any:
        # Adapters stay in float32 where the kernel does not.
        down, up, kernel = (
            ops.cast(weight, layer.compute_dtype)
            for weight in (layer.lora_kernel_a, layer.lora_kernel_b, layer._kernel)
        )
        states = product(inputs, kernel) + scale * ops.matmul(product(inputs, down), up)
        if layer.bias is not None:
            states = states + layer.bias
        return states if layer.activation is None else layer.activation(states)

    return call
