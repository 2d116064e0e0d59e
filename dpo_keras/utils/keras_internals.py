"""Keras optimizers as `PolicyTrainer` runs them: the same updates, in fewer passes over memory.

Both changes use private names of Keras' optimizers, for which there is no public way; the optimizer
belongs to one model, since Keras ties it to its variables.
"""

from typing import Any

import keras
import tensorflow as tf

from dpo_keras.utils.private_api import KERAS, TENSORFLOW, private
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


# -- layers (written for Keras 3.15) -------------------------------------------------------


def all_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Return a model and every layer in it, however deep; the architecture fixes the order."""
    return list(private(model, "_flatten_layers", KERAS)())


def base_kernel(layer: keras.layers.Layer) -> keras.Variable:
    """Return the kernel of a `Dense` or `EinsumDense` without its adapters.

    The public `kernel` adds the product of the adapters to it.
    """
    return private(layer, "_kernel", KERAS)


def unmerged_weights(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Return the base weight of a layer with LoRA and its adapters, each under Keras' own name."""
    names = ["lora_kernel_a", "lora_kernel_b", "lora_embeddings_a", "lora_embeddings_b"]
    base = "_embeddings" if isinstance(layer, keras.layers.Embedding) else "_kernel"
    if getattr(layer, "quantization_mode", None) is None:
        private(layer, base, KERAS)  # only some quantized layers have another base weight
    found = {name: getattr(layer, name, None) for name in [base, *names]}
    return {name: weight for name, weight in found.items() if weight is not None}


# -- graphs (written for TensorFlow 2.21) --------------------------------------------------


def optimization_barrier(tensors: list[Tensor]) -> list[Tensor]:
    """Keep XLA from merging computations on the results with equal ones on the arguments."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    return list(private(gen_xla_ops, "xla_optimization_barrier", TENSORFLOW)(tensors))
