"""Other behaviour for a model's layers, for as long as a block of code runs.

KerasHub's backbones hand neither positions nor masks to their layers. What a layer should do
otherwise is put in its instance dictionary, in front of its class, and taken out again. While a
function is traced this decides what is in the graph; it changes no weight and no configuration.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from dpo_keras.errors import InputError

Swap = tuple[Any, str, Any]


@contextlib.contextmanager
def swapped(swaps: Iterable[Swap]) -> Iterator[None]:
    """Puts attributes in place of an object's own, and takes them out again at the end.

    Args:
        swaps: (object, name of the attribute, what it should be).

    Example:
        >>> class Layer:
        ...     def call(self): return "its own"
        >>> layer = Layer()
        >>> with swapped([(layer, "call", lambda: "another")]):
        ...     layer.call()
        'another'
        >>> layer.call(), vars(layer)
        ('its own', {})
    """
    missing = object()
    before: list[tuple[dict[str, Any], str, Any]] = []
    try:
        for owner, name, value in swaps:
            # Not setattr: Keras layers track what is set, and refuse some of it once built.
            attributes: dict[str, Any] = owner.__dict__
            before.append((attributes, name, attributes.get(name, missing)))
            attributes[name] = value
        yield
    finally:
        for attributes, name, value in reversed(before):
            if value is missing:
                attributes.pop(name, None)
            else:
                attributes[name] = value


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


def blocks_of(backbone: keras.Model) -> list[Any]:
    """The blocks of a backbone, one after another.

    Args:
        backbone: a KerasHub backbone.

    Raises:
        InputError: it has none that are known.

    Example:
        >>> import keras_hub
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=8, num_layers=2, num_heads=1, hidden_dim=4, intermediate_dim=8)
        >>> len(blocks_of(backbone))
        2
    """
    blocks = list(getattr(backbone, "transformer_layers", ()))
    if not blocks:
        raise InputError(
            f"remat needs a model made of transformer blocks, which {type(backbone).__name__} does "
            "not show. Use remat=False."
        )
    return blocks


def recomputed_calls(
    backbone: keras.Model, inner: Sequence[Swap] = (), static: bool = False
) -> list[Swap]:
    """The calls of all blocks, with gradients that compute the block anew.

    Args:
        backbone: a KerasHub backbone.
        inner: what else is swapped in the block while it runs; it must be so again on the way back.
        static: whether XLA compiles the step.

    Returns:
        What `swapped` takes.
    """
    return [(block, "call", _recomputed(block, inner, static)) for block in blocks_of(backbone)]


def _recomputed(block: Any, inner: Sequence[Swap], static: bool) -> Callable[..., Any]:
    call, variables = block.call, block.variables

    def recomputed(states: Any, **options: Any) -> Any:
        def run(states: Any, values: Sequence[Any]) -> Any:
            # Values and not variables, so that gradients reach them through this call alone.
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return call(states, **options)

        @tf.custom_gradient
        def differentiable(states: Any, *values: Any) -> Any:
            def gradient(upstream: Any) -> Any:
                again, constants = _apart(states, values, upstream, static)
                wanted = [v for v, of in zip(constants, variables, strict=True) if of.trainable]
                with tf.GradientTape() as tape, swapped(inner):
                    tape.watch([again, *wanted])
                    result = run(again, constants)
                found = tape.gradient(result, [again, *wanted], upstream)
                gradients = iter(found[1:])
                return [found[0], *(next(gradients) if v.trainable else None for v in variables)]

            return run(states, values), gradient

        return differentiable(states, *(tf.convert_to_tensor(v.value) for v in variables))

    return recomputed


def _apart(
    states: Any, values: Sequence[Any], upstream: Any, static: bool
) -> tuple[Any, Sequence[Any]]:
    """Inputs that no optimizer merges with those of the forward pass, and not ready before."""
    if static:
        # TensorFlow has no public name for what keeps XLA from merging equal computations.
        found = gen_xla_ops.xla_optimization_barrier([states, upstream])[0]
    else:
        with tf.control_dependencies([upstream]):
            found = tf.identity(states)
    return found, [tf.identity(value) for value in values]
