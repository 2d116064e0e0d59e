"""Keras optimizers as `PolicyTrainer` runs them: the same updates, in fewer passes over memory.

Both changes use private names of Keras' optimizers, for which there is no public way; the optimizer
belongs to one model, since Keras ties it to its variables.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import keras
import tensorflow as tf

from dpo_keras.utils.tensors import Tensor


def sum_gradients_ourselves(optimizer: Any) -> None:
    """Keeps a Keras optimizer from summing gradients over replicas a second time.

    Keras clips first and sums second. Summing first needs its own sum switched off.

    Args:
        optimizer: the optimizer; one that scales its loss is looked into.
    """
    getattr(optimizer, "inner_optimizer", optimizer)._all_reduce_sum_gradients = list


def update_in_one_pass(optimizer: Any) -> None:
    r"""Lets Adam and AdamW use TensorFlow's own kernel, and skip a weight decay of 0.

    Keras writes Adam as ten operations, each a pass over all weights. The kernel is one:

        m <- m + (1 - beta_1) (g - m),   v <- v + (1 - beta_2) (g^2 - v),
        w <- w - alpha m / (sqrt(v) + epsilon),   alpha = rate sqrt(1 - beta_2^t) / (1 - beta_1^t)

    Args:
        optimizer: any Keras optimizer; others than these two, and AMSGrad, stay as they are.

    References:
        Kingma and Ba, Adam, arXiv 1412.6980, section 2.
    """
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    if not inner.weight_decay:
        inner._apply_weight_decay = lambda variables: None
    # A subclass may mean something else by its update.
    if type(inner) not in (keras.optimizers.Adam, keras.optimizers.AdamW) or inner.amsgrad:
        return

    def update_step(gradient: Any, variable: Any, learning_rate: Any) -> None:
        number = inner._get_variable_index(variable)
        variable = variable.value if isinstance(variable, keras.Variable) else variable
        dtype = variable.dtype
        # With accumulation Keras computes the number of updates; else it is a variable.
        step = keras.ops.cast(inner.iterations + 1, dtype)
        beta_1, beta_2 = tf.cast(inner.beta_1, dtype), tf.cast(inner.beta_2, dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=inner._momentums[number].value.handle,
            v=inner._velocities[number].value.handle,
            beta1_power=tf.pow(beta_1, step),
            beta2_power=tf.pow(beta_2, step),
            lr=tf.cast(learning_rate, dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.cast(inner.epsilon, dtype),
            grad=tf.cast(gradient, dtype),
        )

    inner.update_step = update_step


@contextlib.contextmanager
def native_slice_update() -> Iterator[None]:
    """Make `keras.ops.slice_update` a plain TensorFlow op in a block of code.

    Written for Keras 3.15 and KerasHub 0.32. KerasHub writes its key-value caches with
    `keras.ops.slice_update`, which is `XlaDynamicUpdateSlice` on TensorFlow. Model servers are
    built without XLA and fail on it at the first request. `TensorStridedSliceUpdate` computes the
    same (start indices are clamped so that the update fits), in place where it can. Replacing the
    function on the public module is enough, because models look it up there in each call.
    """
    original = keras.ops.slice_update

    def slice_update(inputs: Tensor, start_indices: Tensor, updates: Tensor) -> Tensor:
        inputs = tf.convert_to_tensor(inputs)
        updates = tf.cast(updates, inputs.dtype)
        size = tf.shape(updates)
        start = tf.stack([tf.cast(index, tf.int32) for index in start_indices])
        start = tf.clip_by_value(start, 0, tf.shape(inputs) - size)
        updated = tf.raw_ops.TensorStridedSliceUpdate(
            input=inputs, begin=start, end=start + size, strides=tf.ones_like(start), value=updates
        )
        updated.set_shape(inputs.shape)
        return updated

    keras.ops.slice_update = slice_update
    try:
        yield
    finally:
        keras.ops.slice_update = original
