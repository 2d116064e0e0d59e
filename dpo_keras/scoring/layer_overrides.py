"""Temporarily override layer methods: fused kernels, and blocks that are recomputed.

KerasHub's backbones hand neither positions nor masks to their layers. An override puts another
method into a layer's instance dictionary, in front of its class, while a block of code runs. While
a function is traced, that decides what is in its graph. Weights and configurations do not change.
"""

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import tensorflow as tf
from keras import ops

from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import ValuesInPlace, checkpointed, uses_jax
from dpo_keras.utils.keras_hub_attention import ATTENTION_METHOD, WINDOW_METHOD, window_mask
from dpo_keras.utils.keras_hub_internals import norm_settings, transformer_blocks
from dpo_keras.utils.keras_internals import all_layers, optimization_barrier
from dpo_keras.utils.keras_quantization import quantization_mode

Call: TypeAlias = Callable[..., Tensor]

# Numbers in a layer's input from which fusing saves more than compiling costs.
FUSED_FROM = 2**19


class Override(NamedTuple):
    """An attribute of an object and what takes its place."""

    owner: object
    name: str
    value: object


@contextlib.contextmanager
def overridden_methods(overrides: Iterable[Override]) -> Iterator[None]:
    """Put other attributes in front of objects' own; take them away when the block ends."""
    missing = object()
    before: list[tuple[dict[str, object], str, object]] = []
    try:
        for owner, name, value in overrides:
            # Not setattr: Keras layers track what is set, and refuse some of it once built.
            attributes = owner.__dict__
            before.append((attributes, name, attributes.get(name, missing)))
            attributes[name] = value
        yield
    finally:
        for attributes, name, value in reversed(before):
            if value is missing:
                attributes.pop(name, None)
            else:
                attributes[name] = value


def window_overrides(backbone: object) -> list[Override]:
    """Let attention keep to its window on JAX, where KerasHub 0.32 forgets it in some families."""
    layers = all_layers(backbone) if uses_jax() and isinstance(backbone, keras.Model) else []
    masks = [(layer, window_mask(layer)) for layer in layers]
    return [
        override
        for layer, mask in masks
        if mask is not None
        for override in (
            Override(layer, ATTENTION_METHOD, _windowed(getattr(layer, ATTENTION_METHOD), mask)),
            # Once is enough, and Qwen's own call of it does not run in a compiled loop.
            Override(layer, WINDOW_METHOD, lambda mask, cache_update_index=0: mask),
        )
    ]


def _windowed(attend: Call, mask: Call) -> Call:
    def windowed(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor = None,
        cache_update_index: Tensor = None,
    ) -> Tensor:
        first = 0 if cache_update_index is None else cache_update_index
        return attend(query, key, value, mask(attention_mask, cache_update_index=first))

    return windowed


def can_fuse() -> bool:
    """Tell whether kernels can be fused: on TensorFlow, and not within one of several replicas."""
    return not uses_jax() and tf.distribute.get_strategy().num_replicas_in_sync == 1


def fused(function: Call) -> Call:
    """Compile a function to one XLA kernel forward and one backward, which keeps only arguments."""

    def gradients(upstream: Tensor, *values: Tensor) -> Tensor:
        with tf.GradientTape() as tape:
            tape.watch(values)
            result = function(*values)
        return tape.gradient(result, values, upstream)

    forward = tf.function(function, jit_compile=True, autograph=False)
    backward = tf.function(gradients, jit_compile=True, autograph=False)

    def call(*values: Tensor) -> tuple[Tensor, Call]:
        def gradient(upstream: Tensor) -> Tensor:
            found = backward(upstream, *values)
            return found[0] if len(values) == 1 else found

        return forward(*values), gradient

    differentiable: Call = tf.custom_gradient(call)
    return differentiable


def fused_overrides(backbone: keras.Model) -> list[Override]:
    """Fuse norms, GELUs and biases of a backbone. Keep the result: it holds compiled kernels."""
    kernels: dict[object, Call] = {}
    overrides = []
    for layer in all_layers(backbone):
        settings = norm_settings(layer)
        activation: Call | None = getattr(layer, "activation", None)
        if settings is not None:
            overrides.append(Override(layer, "call", _fused_norm(layer, settings, kernels)))
        elif activation is not None and "gelu" in getattr(activation, "__name__", ""):
            if activation not in kernels:
                kernels[activation] = fused(activation)
            overrides.append(Override(layer, "activation", kernels[activation]))
        if (call := _flat_product(layer)) is not None:
            overrides.append(Override(layer, "call", call))
    return overrides


def _flat_product(layer: keras.layers.Layer) -> Call | None:
    """Compute a dense layer as one product of two matrices, to which TensorFlow adds the bias.

    Keras reshapes between product and bias, or multiplies each row of the batch by itself and then
    sums the gradients of the kernel over rows. None for layers that multiply in another way.
    """
    axes = _summed_axes(layer)
    if axes is None or hasattr(layer, "lora_kernel_a") or quantization_mode(layer) is not None:
        return None

    def call(inputs: Tensor, training: bool | None = None) -> Tensor:
        kernel = tf.cast(tf.convert_to_tensor(layer.kernel), inputs.dtype)
        depth, outputs = math.prod(kernel.shape[:axes]), kernel.shape[axes:]
        kernel = tf.reshape(kernel, (depth, -1))
        states = tf.matmul(tf.reshape(inputs, (-1, depth)), kernel)
        if layer.bias is not None:
            bias = tf.cast(tf.convert_to_tensor(layer.bias), states.dtype)
            states = tf.nn.bias_add(states, tf.reshape(bias, (-1,)))
        states = tf.reshape(states, (*ops.shape(inputs)[: len(inputs.shape) - axes], *outputs))
        return states if layer.activation is None else layer.activation(states)

    return call


def _summed_axes(layer: keras.layers.Layer) -> int | None:
    """Return how many axes, last of the inputs and first of the kernel, a dense layer sums over."""
    if isinstance(layer, keras.layers.Dense):
        return 1
    if not isinstance(layer, keras.layers.EinsumDense):
        return None
    arguments, output = layer.equation.split("->")
    inputs, kernel = arguments.split(",")
    summed = "".join(letter for letter in inputs if letter not in output)
    count = len(summed)
    flat = output == inputs[:-count] + kernel[count:] if count else False
    if not flat or not inputs.endswith(summed) or not kernel.startswith(summed):
        return None
    whole_bias = layer.bias is None or layer.bias.shape == layer.kernel.shape[count:]
    return count if whole_bias else None


def _fused_norm(
    layer: keras.layers.Layer, settings: dict[str, object], kernels: dict[object, Call]
) -> Call:
    variables = layer.variables
    shapes = [tuple(variable.shape) for variable in variables]
    key = (type(layer), layer.compute_dtype, repr(shapes), repr(settings))
    if key not in kernels:
        call = layer.call

        def normalize(states: Tensor, *values: Tensor) -> Tensor:
            with ValuesInPlace(zip(variables, values, strict=True)):
                return call(states)

        # One kernel serves all layers of the same settings: values come as arguments.
        kernels[key] = fused(normalize)
    kernel = kernels[key]

    def normalized(states: Tensor, *_: object, **__: object) -> Tensor:
        return kernel(states, *(tf.convert_to_tensor(variable.value) for variable in variables))

    return normalized


def remat_overrides(
    backbone: keras.Model,
    inner: Sequence[Override] = (),
    static: bool = False,
    collected: list[Tensor] | None = None,
) -> list[Override]:
    """Recompute a backbone's blocks in the backward pass, under the `inner` overrides, too.

    Args:
        backbone: the model whose blocks are recomputed.
        inner: what its layers do differently, as well when they are recomputed.
        static: whether XLA compiles the step.
        collected: the list to which `inner` overrides add tensors while a block runs. They count as
            results of the block: each is added once, and gradients flow through it.
    """
    collected = [] if collected is None else collected
    return [
        Override(block, "call", _recomputed(block, inner, static, collected))
        for block in transformer_blocks(backbone)
    ]


def _recomputed(
    block: keras.layers.Layer, inner: Sequence[Override], static: bool, collected: list[Tensor]
) -> Call:
    call, variables = block.call, block.variables

    def recomputed(*arguments: object, **options: object) -> object:
        given = (arguments, options)
        # Any of them may need a gradient: Gemma 4 hands keys and values from block to block.
        tensors = _floating(given)
        count = len(tensors)
        results: list[object] = []

        def run(inputs: Sequence[Tensor], values: Sequence[Tensor]) -> list[Tensor]:
            arguments, options = _replaced(given, inputs)
            before = len(collected)
            # Values and not variables, so that gradients reach them through this call alone.
            with ValuesInPlace(zip(variables, values, strict=True)):
                results[:] = [call(*arguments, **options)]
            further = collected[before:]
            del collected[before:]
            return [*_floating(results[0]), *further]

        def on_jax(*tensors: Tensor) -> list[Tensor]:
            return run(tensors[:count], tensors[count:])

        @tf.custom_gradient
        def differentiable(*tensors: Tensor) -> tuple[list[Tensor], Call]:
            def gradient(*upstream: Tensor) -> list[Tensor | None]:
                again = _set_apart(tensors, upstream, count, static)
                trainable = [True] * count + [bool(v.trainable) for v in variables]
                wanted = [t for t, watched in zip(again, trainable, strict=True) if watched]
                with tf.GradientTape() as tape, overridden_methods(inner):
                    tape.watch(wanted)
                    outputs = run(again[:count], again[count:])
                gradients = iter(tape.gradient(outputs, wanted, list(upstream)))
                return [next(gradients) if watched else None for watched in trainable]

            return run(tensors[:count], tensors[count:]), gradient

        values = (ops.convert_to_tensor(variable.value) for variable in variables)
        outputs = (checkpointed(on_jax) if uses_jax() else differentiable)(*tensors, *values)
        own = len(_floating(results[0]))
        collected.extend(outputs[own:])
        return _replaced(results[0], outputs[:own])

    return recomputed


def _is_floating(value: Any) -> bool:
    return bool(ops.is_tensor(value)) and keras.backend.is_float_dtype(value.dtype)


def _floating(structure: object) -> list[Tensor]:
    return [value for value in keras.tree.flatten(structure) if _is_floating(value)]


def _replaced(structure: object, values: Sequence[Tensor]) -> Any:
    """Put other tensors in the places of a structure's floating-point tensors, in order."""
    rest = iter(values)
    return keras.tree.map_structure(lambda v: next(rest) if _is_floating(v) else v, structure)


def _set_apart(
    tensors: Sequence[Tensor], upstream: Sequence[Tensor], count: int, static: bool
) -> list[Tensor]:
    """Copy tensors so that no optimizer merges their use with the forward pass or runs it early.

    The first `count` are a block's inputs, which wait for the gradient from above; the others are
    its weights.
    """
    inputs, weights = tensors[:count], tensors[count:]
    if static:
        found = optimization_barrier([*inputs, *upstream])[:count]
    else:
        with tf.control_dependencies(upstream):
            found = [tf.identity(value) for value in inputs]
    return [*found, *(tf.identity(value) for value in weights)]
