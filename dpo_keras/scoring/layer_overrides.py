"""Temporarily override layer methods: fused kernels, and blocks that are recomputed.

KerasHub's backbones hand neither positions nor masks to their layers. An override puts another
method into a layer's instance dictionary, in front of its class, while a block of code runs. While
a function is traced, that decides what is in its graph. Weights and configurations do not change.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple, TypeAlias

import keras
import tensorflow as tf

from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_internals import norm_settings, transformer_blocks
from dpo_keras.utils.keras_internals import all_layers, optimization_barrier

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
    """Fuse the norms and GELUs of a backbone. Keep the result: it holds the compiled kernels."""
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
    return overrides


def _fused_norm(
    layer: keras.layers.Layer, settings: dict[str, object], kernels: dict[object, Call]
) -> Call:
    variables = layer.variables
    shapes = [tuple(variable.shape) for variable in variables]
    key = (type(layer), layer.compute_dtype, repr(shapes), repr(settings))
    if key not in kernels:
        call = layer.call

        def normalize(states: Tensor, *values: Tensor) -> Tensor:
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return call(states)

        # One kernel serves all layers of the same settings: values come as arguments.
        kernels[key] = fused(normalize)
    kernel = kernels[key]

    def normalized(states: Tensor, *_: object, **__: object) -> Tensor:
        return kernel(states, *(tf.convert_to_tensor(variable.value) for variable in variables))

    return normalized


def remat_overrides(
    backbone: keras.Model, inner: Sequence[Override] = (), static: bool = False
) -> list[Override]:
    """Recompute a backbone's blocks in the backward pass, under the `inner` overrides, too."""
    blocks = transformer_blocks(backbone)
    return [Override(block, "call", _recomputed(block, inner, static)) for block in blocks]


def _recomputed(block: keras.layers.Layer, inner: Sequence[Override], static: bool) -> Call:
    call, variables = block.call, block.variables

    def recomputed(states: Tensor, **options: object) -> Tensor:
        def run(states: Tensor, values: Sequence[Tensor]) -> Tensor:
            # Values and not variables, so that gradients reach them through this call alone.
            with keras.StatelessScope(state_mapping=list(zip(variables, values, strict=True))):
                return call(states, **options)

        @tf.custom_gradient
        def differentiable(states: Tensor, *values: Tensor) -> tuple[Tensor, Call]:
            def gradient(upstream: Tensor) -> list[Tensor | None]:
                again, constants = _set_apart(states, values, upstream, static)
                wanted = [v for v, of in zip(constants, variables, strict=True) if of.trainable]
                with tf.GradientTape() as tape, overridden_methods(inner):
                    tape.watch([again, *wanted])
                    result = run(again, constants)
                found = tape.gradient(result, [again, *wanted], upstream)
                gradients = iter(found[1:])
                return [found[0], *(next(gradients) if v.trainable else None for v in variables)]

            return run(states, values), gradient

        return differentiable(states, *(tf.convert_to_tensor(v.value) for v in variables))

    return recomputed


def _set_apart(
    states: Tensor, values: Sequence[Tensor], upstream: Tensor, static: bool
) -> tuple[Tensor, list[Tensor]]:
    """Copy inputs so that no optimizer merges their use with the forward pass or runs it early."""
    if static:
        found = optimization_barrier([states, upstream])[0]
    else:
        with tf.control_dependencies([upstream]):
            found = tf.identity(states)
    return found, [tf.identity(value) for value in values]


def made_after(upstream: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors once `upstream` is there, so that no optimizer shares what is made of them."""
    with tf.control_dependencies([upstream]):
        return {name: tf.identity(tensor) for name, tensor in tensors.items()}
