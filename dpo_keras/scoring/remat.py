"""Gradient checkpointing: a block's inner values are computed anew on the way back, not kept.

    keep x;    forward: y = f(x);    backward: f(x) again, then its gradients

Memory falls from every layer's inner values to one tensor for each block, for one more forward pass
of each block (Chen et al., arXiv 1604.06174).
"""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf
from tensorflow.compiler.tf2xla.ops import gen_xla_ops

from dpo_keras.errors import InputError
from dpo_keras.scoring.swapped import Swap, swapped


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
