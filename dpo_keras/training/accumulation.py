"""Gradient accumulation that weighs each micro-batch by its pairs.

Keras averages the gradients of micro-batches, each a mean over its own pairs, so that a pair in a
small micro-batch counts for more. Packed rows hold different numbers of pairs, and the last batch
of an epoch is short. Here, with g_i the mean gradient of micro-batch i and w_i the weight of its
pairs, an update uses

    g = (sum_i w_i g_i) / (sum_i w_i),

which is the gradient of all the pairs in one batch.
"""

from typing import Any

import keras
import tensorflow as tf
from keras import ops


class WeighedAccumulation(keras.layers.Layer):
    """Changes a Keras optimizer with `gradient_accumulation_steps` to weigh its micro-batches.

    Args:
        optimizer: the optimizer; one that scales its loss is looked into.
    """

    def __init__(self, optimizer: Any, **kwargs: Any):
        super().__init__(trainable=False, **kwargs)
        self.built = True
        self._weight: Any = None
        # In a checkpoint, since a run may stop between two micro-batches.
        self.total = self.add_weight(
            name="total",
            shape=(),
            initializer="zeros",
            trainable=False,
            aggregation="only_first_replica",
        )
        inner = getattr(optimizer, "inner_optimizer", optimizer)
        steps = inner.gradient_accumulation_steps
        apply, clip = inner._backend_apply_gradients, inner._clip_gradients

        def weighed_apply(gradients: Any, variables: Any) -> None:
            # Here and not before: a step that loss scaling skips does not come so far.
            weight = self._weight
            self.total.assign_add(weight)
            apply([gradient * weight for gradient in gradients], variables)
            ended = ops.equal((inner._iterations + 1) % steps, 0)
            self.total.assign(ops.where(ended, 0.0, self.total))

        def weighed_clip(gradients: Any) -> Any:
            # Keras hands the sum over micro-batches, divided by their number.
            share = steps / ops.maximum(ops.convert_to_tensor(self.total), 1e-12)
            return clip([gradient * ops.cast(share, gradient.dtype) for gradient in gradients])

        inner._backend_apply_gradients, inner._clip_gradients = weighed_apply, weighed_clip

    def weigh(self, weight: Any) -> None:
        """Says how much the micro-batch weighs whose gradients are applied next.

        Args:
            weight: scalar, the weight of its pairs over all replicas.
        """
        self._weight = tf.cast(weight, "float32")


def accumulates(optimizer: Any) -> bool:
    """Whether an optimizer gathers several gradients before it takes a step.

    Example:
        >>> accumulates(keras.optimizers.SGD()), accumulates(
        ...     keras.optimizers.SGD(gradient_accumulation_steps=4))
        (False, True)
    """
    return bool(getattr(optimizer, "inner_optimizer", optimizer).gradient_accumulation_steps)
