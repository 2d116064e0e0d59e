"""Private names of Keras, each used in one function here. Written for Keras 3.15.

There is no public way to do what these functions do. No other module may use a name of Keras that
begins with an underscore, but `keras_quantization` and `keras_half_precision`. A release without
such a name is reported by `private`.
"""

from __future__ import annotations

import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import h5py
import keras
import tensorflow as tf

from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_internals import KERAS, TENSORFLOW, TF_KERAS, private
from dpo_keras.utils.keras_quantization import quantization_state

# -- optimizers (written for Keras 3.15) ---------------------------------------------------


def inner_optimizer(optimizer: keras.optimizers.Optimizer) -> keras.optimizers.Optimizer:
    """Return the optimizer that updates weights, without the loss scaling around it."""
    return getattr(optimizer, "inner_optimizer", optimizer)


def leave_gradient_sums_to_caller(optimizer: keras.optimizers.Optimizer) -> None:
    """Keep an optimizer from summing gradients over replicas: the caller sums, before it clips."""
    inner = inner_optimizer(optimizer)
    private(inner, "_all_reduce_sum_gradients", KERAS)
    inner._all_reduce_sum_gradients = list


def skip_zero_weight_decay(optimizer: keras.optimizers.Optimizer) -> None:
    """Skip the pass over all weights that subtracts a weight decay of 0 (Keras 3.15)."""
    inner = inner_optimizer(optimizer)
    private(inner, "_apply_weight_decay", KERAS)
    if not inner.weight_decay:
        inner._apply_weight_decay = lambda variables: None


def use_adam_kernel(optimizer: keras.optimizers.Optimizer) -> None:
    r"""Let Adam and AdamW update each weight with TensorFlow's own kernel (Keras 3.15).

    Keras writes Adam as ten operations, each a pass over all weights. The kernel is one pass:

        m <- m + (1 - beta_1) (g - m),   v <- v + (1 - beta_2) (g^2 - v),
        w <- w - alpha m / (sqrt(v) + epsilon),   alpha = rate sqrt(1 - beta_2^t) / (1 - beta_1^t)

    (Kingma and Ba, arXiv 1412.6980, section 2.) Other optimizers and AMSGrad stay as they are.
    """
    inner = inner_optimizer(optimizer)
    # A subclass may define another update.
    if type(inner) not in (keras.optimizers.Adam, keras.optimizers.AdamW) or inner.amsgrad:
        return
    index_of = private(inner, "_get_variable_index", KERAS)

    def update_step(gradient: Tensor, variable: Tensor, learning_rate: Tensor) -> None:
        if not isinstance(variable, keras.Variable | tf.Variable):  # `update_in_float32`'s view
            type(inner).update_step(inner, gradient, variable, learning_rate)
            return
        number = index_of(variable)
        variable = variable.value if isinstance(variable, keras.Variable) else variable
        dtype = variable.dtype
        # `iterations` counts updates, also where gradients are accumulated.
        step = keras.ops.cast(inner.iterations + 1, dtype)
        beta_1, beta_2 = tf.cast(inner.beta_1, dtype), tf.cast(inner.beta_2, dtype)
        tf.raw_ops.ResourceApplyAdam(
            var=variable.handle,
            m=private(inner, "_momentums", KERAS)[number].value.handle,
            v=private(inner, "_velocities", KERAS)[number].value.handle,
            beta1_power=tf.pow(beta_1, step),
            beta2_power=tf.pow(beta_2, step),
            lr=tf.cast(learning_rate, dtype),
            beta1=beta_1,
            beta2=beta_2,
            epsilon=tf.cast(inner.epsilon, dtype),
            grad=tf.cast(gradient, dtype),
        )

    inner.update_step = update_step


def micro_steps(optimizer: keras.optimizers.Optimizer) -> keras.Variable:
    """Return the number of gradients given to an optimizer; `iterations` counts its updates."""
    return private(inner_optimizer(optimizer), "_iterations", KERAS)


class WeighedAccumulation(keras.layers.Layer):
    """Change an accumulating optimizer to weigh each micro-batch by its pairs (Keras 3.15).

    Keras averages the gradients of micro-batches, each a mean over its own pairs, so that a pair in
    a small micro-batch counts for more. With g_i the mean gradient of micro-batch i and w_i the
    weight of its pairs, an update here uses g = (sum_i w_i g_i) / (sum_i w_i), which is the
    gradient of all the pairs in one batch.
    """

    def __init__(self, optimizer: keras.optimizers.Optimizer):
        super().__init__(trainable=False)
        self.built = True
        self._weight: Tensor = None
        # In a checkpoint, since a run may stop between two micro-batches.
        once = {"trainable": False, "aggregation": "only_first_replica"}
        self.total = self.add_weight(name="total", shape=(), initializer="zeros", **once)
        inner = inner_optimizer(optimizer)
        steps = inner.gradient_accumulation_steps
        apply = private(inner, "_backend_apply_gradients", KERAS)
        clip = private(inner, "_clip_gradients", KERAS)

        def weighed_apply(gradients: Sequence[Tensor], variables: Sequence[Tensor]) -> None:
            # Here and not in `weigh`: a step that loss scaling skips does not come so far.
            self.total.assign_add(self._weight)
            apply([gradient * self._weight for gradient in gradients], variables)
            ended = keras.ops.equal((micro_steps(inner) + 1) % steps, 0)
            total = keras.ops.convert_to_tensor(self.total)
            self.total.assign(keras.ops.where(ended, 0.0, total))

        def average_and_clip(gradients: Sequence[Tensor]) -> list[Tensor]:
            # Keras hands over the sum over micro-batches, divided by their number.
            share = steps / keras.ops.maximum(keras.ops.convert_to_tensor(self.total), 1e-12)
            return list(clip([g * keras.ops.cast(share, g.dtype) for g in gradients]))

        inner._backend_apply_gradients, inner._clip_gradients = weighed_apply, average_and_clip

    def weigh(self, weight: Tensor) -> None:
        """Set what the next micro-batch weighs: a scalar, its pairs over all replicas."""
        self._weight = keras.ops.cast(weight, "float32")


# -- models (written for Keras 3.15) -------------------------------------------------------


def check_trainer_hooks(names: Sequence[str]) -> None:
    """Require methods of `keras.Model` that a trainer overrides.

    Nothing else shows that a release of Keras calls an override no more.
    """
    for name in names:
        private(keras.Model, name, KERAS)


def set_values(variables: Sequence[keras.Variable], values: Sequence[Tensor]) -> None:
    """Give variables on JAX their values after a step, which have their shapes and shardings."""
    for variable, value in zip(variables, values, strict=True):
        private(variable, "_value", KERAS)
        variable._value = value


def forget_layer(owner: keras.layers.Layer, layer: keras.layers.Layer) -> None:
    """Remove a layer from the layers and weights that its owner tracks (Keras 3.15)."""
    private(private(owner, "_tracker", KERAS), "untrack", KERAS)(layer)


def add_weight_like(layer: keras.layers.Layer, source: keras.Variable, name: str) -> keras.Variable:
    """Add to a layer a weight of zeros, not trained, that lies on devices as another one does."""
    options = {"shape": source.shape, "dtype": source.dtype, "initializer": "zeros"}
    options |= {"trainable": False, "autocast": False, "name": name}
    layout = getattr(source, "_layout", None)
    if layout is None:
        return layer.add_weight(**options)
    # `add_weight` takes no layout, and would make the whole weight on each device.
    with keras.name_scope(layer.name):
        weight = keras.Variable(**options, layout=layout)
    private(layer, "_track_variable", KERAS)(weight)
    return weight


# -- layers (written for Keras 3.15) -------------------------------------------------------


def all_layers(model: keras.layers.Layer) -> list[keras.layers.Layer]:
    """Return a model and every layer in it, however deep; the architecture fixes the order."""
    return list(private(model, "_flatten_layers", KERAS)())


def layers_by_path(model: keras.layers.Layer) -> dict[str, keras.layers.Layer]:
    """Return every layer in a model by the names on the way to it: `block_0/attention/query`.

    Keras' own `layer.path` leaves out parts, and is None for some layers.
    """
    found: dict[str, keras.layers.Layer] = {}
    seen: set[int] = set()

    def visit(owner: keras.layers.Layer, prefix: str) -> None:
        children = private(owner, "_flatten_layers", KERAS)(include_self=False, recursive=False)
        for child in children:
            if id(child) not in seen:
                seen.add(id(child))
                found[f"{prefix}{child.name}"] = child
                visit(child, f"{prefix}{child.name}/")

    visit(model, "")
    return found


def adds_losses(layer: keras.layers.Layer) -> bool:
    """Tell whether a layer calls `add_loss`: in its own code, or for its activity regularizer."""
    if getattr(layer, "activity_regularizer", None) is not None:
        return True
    kinds = [kind for kind in type(layer).__mro__ if not kind.__module__.startswith("keras.")]
    functions = [function for kind in kinds for function in vars(kind).values()]
    codes = [getattr(function, "__code__", None) for function in functions]
    return any(code is not None and "add_loss" in code.co_names for code in codes)


def base_kernel(layer: keras.layers.Layer) -> keras.Variable:
    """Return the kernel of a `Dense` or `EinsumDense`; the public `kernel` adds the adapters."""
    return private(layer, "_kernel", KERAS)


def unmerged_weights(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Return the base weight of a layer with LoRA and its adapters, each under Keras' own name.

    A quantized base weight comes with its scales, zero points and groups.
    """
    names = ["lora_kernel_a", "lora_kernel_b", "lora_embeddings_a", "lora_embeddings_b"]
    base = "_embeddings" if isinstance(layer, keras.layers.Embedding) else "_kernel"
    if getattr(layer, "quantization_mode", None) is None:
        private(layer, base, KERAS)  # only some quantized layers have another base weight
    found = {name: getattr(layer, name, None) for name in [base, *names]}
    found |= quantization_state(layer)
    return {name: weight for name, weight in found.items() if weight is not None}


# -- models of tf-keras (written for tf-keras 2.21) ----------------------------------------


def tf_keras_steps_per_execution(model: object) -> int:
    """Return how many steps a call of a tf-keras model's train function takes."""
    return int(private(model, "_steps_per_execution", TF_KERAS) or 1)


# -- graphs (written for TensorFlow 2.21) --------------------------------------------------


def optimization_barrier(tensors: list[Tensor]) -> list[Tensor]:
    """Keep XLA from merging computations on the results with equal ones on the arguments."""
    from tensorflow.compiler.tf2xla.ops import gen_xla_ops

    return list(private(gen_xla_ops, "xla_optimization_barrier", TENSORFLOW)(tensors))


# -- operations (written for Keras 3.15 and KerasHub 0.32) ---------------------------------


@contextlib.contextmanager
def native_slice_update() -> Iterator[None]:
    """Make `keras.ops.slice_update` a plain TensorFlow op in a block of code.

    KerasHub writes its key-value caches with it. It is `XlaDynamicUpdateSlice`, on which model
    servers, built without XLA, fail. `TensorStridedSliceUpdate` computes the same (start indices
    are clamped so that the update fits). Models look the function up in the public module.
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


# -- files of weights (written for Keras 3.15 and h5py 3.14) ---------------------------------


class _ClosableFile(io.FileIO):
    """A file that keeps the first error of writing to itself."""

    error: OSError | None = None

    def __repr__(self) -> str:
        """Return the path: h5py takes it for the file's name, and Keras names shards by it."""
        return str(self.name)

    def write(self, content: Any) -> int:
        """Write all of `content`, or drop it."""
        left = memoryview(content).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size

    def truncate(self, size: int | None = None) -> int:
        """Resize the file, or leave it as it is."""
        try:
            return super().truncate(size)
        except OSError as error:
            self.error = self.error or error
            return self.tell()


@contextlib.contextmanager
def raise_failed_writes() -> Iterator[None]:
    """Make weights that cannot be written raise OSError, and nothing worse, after a block of code.

    HDF5 cannot close a file whose disk is full. It tries again when Python ends, and crashes. Here
    it writes to a Python file, which takes everything and reports the error once HDF5 has closed.
    Keras looks `h5py.File` up in the public module.
    """
    original = h5py.File
    opened: list[tuple[h5py.File, _ClosableFile]] = []

    def open_file(name: Any, mode: str = "r", **options: Any) -> h5py.File:
        if mode not in ("w", "a") or not isinstance(name, str | os.PathLike):
            return original(name, mode, **options)
        there = mode == "a" and Path(name).exists()
        file = _ClosableFile(os.fspath(name), "r+" if there else "w+")
        opened.append((original(file, mode, **options), file))
        return opened[-1][0]

    h5py.File = open_file
    try:
        yield
    finally:
        h5py.File = original
        for hdf5, file in opened:
            hdf5.close()
            file.close()
        for _, file in opened:
            if file.error is not None:
                raise OSError(file.error.errno, file.error.strerror, file.name)
