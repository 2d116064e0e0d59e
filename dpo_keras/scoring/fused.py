"""Elementwise layers as one kernel each way, with nothing kept but their input.

TensorFlow runs an activation such as GELU as eight passes over memory and keeps their results for
the backward pass: on a fast matrix unit that is a fifth of a step, and the largest part of what a
step remembers. Here XLA compiles such a layer into one pass forward and one pass back, which
computes the forward values anew.
"""

from collections.abc import Callable
from typing import Any

import keras
import tensorflow as tf

from dpo_keras.scoring.swapped import Swap

# Numbers in a layer's input from which fusing saves more than compiling costs.
FUSED_FROM = 2**19
_NORMS = (
    "LayerNormalization",
    "LlamaLayerNorm",
    "MistralLayerNormalization",
    "Phi3LayerNorm",
    "Qwen3LayerNorm",
    "QwenLayerNorm",
    "RMSNormalization",
)


def fused(function: Callable[..., Any]) -> Callable[..., Any]:
    """A function of tensors as one XLA kernel forward and one back.

    Args:
        function: of tensors to one tensor, made of TensorFlow operations only.

    Returns:
        The same function; of its values only the arguments are kept for the gradient.

    Example:
        >>> square = fused(tf.square)
        >>> with tf.GradientTape() as tape:
        ...     x = tf.constant(3.0)
        ...     tape.watch(x)
        ...     y = square(x)
        >>> float(y), float(tape.gradient(y, x))
        (9.0, 6.0)
    """

    def gradients(upstream: Any, *values: Any) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(values)
            result = function(*values)
        return tape.gradient(result, values, upstream)

    forward = tf.function(function, jit_compile=True, autograph=False)
    backward = tf.function(gradients, jit_compile=True, autograph=False)

    @tf.custom_gradient
    def call(*values: Any) -> Any:
        def gradient(upstream: Any) -> Any:
            found = backward(upstream, *values)
            return found[0] if len(values) == 1 else found

        return forward(*values), gradient

    return call


def fused_calls(backbone: keras.Model) -> list[Swap]:
    """The norms and GELUs of a backbone, fused.

    Args:
        backbone: a KerasHub backbone.

    Returns:
        What `swapped` takes; to be kept, so that kernels are compiled once.
    """
    kernels: dict[Any, Callable[..., Any]] = {}
    swaps: list[Swap] = []
    for layer in backbone._flatten_layers():
        if type(layer).__name__ in _NORMS:
            swaps.append((layer, "call", _norm(layer, kernels)))
        elif _is_gelu(getattr(layer, "activation", None)):
            swaps.append((layer, "activation", _activation(layer.activation, kernels)))
    return swaps


def _is_gelu(activation: Any) -> bool:
    return "gelu" in getattr(activation, "__name__", "")


def _activation(activation: Callable[..., Any], kernels: dict[Any, Any]) -> Callable[..., Any]:
    if activation not in kernels:
        kernels[activation] = fused(activation)
    return kernels[activation]


def _norm(layer: Any, kernels: dict[Any, Any]) -> Callable[..., Any]:
    # Not get_config: KerasHub's norms have none.
    settings = {name: getattr(layer, name, None) for name in ("epsilon", "axis", "rms_scaling")}
    shapes = [tuple(variable.shape) for variable in layer.variables]
    key = (type(layer), layer.compute_dtype, repr(shapes), repr(settings))
    variables = layer.variables
    if key not in kernels:
        call = layer.call

        def normalize(states: Any, *values: Any) -> Any:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return call(states)

        # One kernel serves all layers of the same settings: values come as arguments.
        kernels[key] = fused(normalize)
    kernel = kernels[key]

    def normalized(states: Any, *_: Any, **__: Any) -> Any:
        return kernel(states, *(tf.convert_to_tensor(variable.value) for variable in variables))

    return normalized
