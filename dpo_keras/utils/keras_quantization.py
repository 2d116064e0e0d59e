"""Private names of Keras' quantized layers, each used in one function here. For Keras 3.15.

A quantized kernel is an int8 tensor q with scales s, one for each output or for each group of
inputs. Three layouts occur:

    int8            q [inputs…, outputs…],                     W = q / s
    int4            two values to a byte,                      W = q / s
    int4 in groups  two values to a byte, with zero points z,  W = s (q - z)
"""

from __future__ import annotations

import re
from typing import Any

import keras
from keras import ops

from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_internals import KERAS, private

_PARTS = ("kernel_scale", "kernel_zero", "g_idx", "embeddings_scale", "embeddings_zero")
DENSE = (keras.layers.Dense, keras.layers.EinsumDense)


def quantization_mode(layer: object) -> str | None:
    """Return "int8", "int4", "gptq" and so on; None for a layer in floating point."""
    return getattr(layer, "quantization_mode", None)


def quantization_state(layer: keras.layers.Layer) -> dict[str, keras.Variable]:
    """Return what turns a quantized kernel or embedding into numbers, by Keras' names."""
    if quantization_mode(layer) is None:
        return {}
    found = {name: getattr(layer, name, None) for name in _PARTS}
    return {name: variable for name, variable in found.items() if variable is not None}


def quantizes_inputs(layer: keras.layers.Layer) -> bool:
    """Tell whether a layer rounds its inputs to int8, too."""
    return getattr(layer, "inputs_quantizer", None) is not None


def keep_inputs(layer: keras.layers.Layer) -> None:
    """Let a quantized layer multiply its inputs as they are, as Keras' configurations can say.

    Keras 3.15 saves the setting with no model that KerasHub builds: it is lost in loading.
    """
    private(layer, "inputs_quantizer", KERAS)
    layer.inputs_quantizer = None


def rounded_inputs(layer: keras.layers.Layer, inputs: Tensor) -> Tensor:
    """Return inputs as a quantized layer rounds them; the gradient passes straight through.

    Keras 3.15 has no gradient through the rounding in front of a quantized head.
    """
    if not quantizes_inputs(layer):
        return inputs
    values, scale = layer.inputs_quantizer(inputs)
    rounded = ops.divide(ops.cast(values, inputs.dtype), ops.cast(scale, inputs.dtype))
    return inputs + ops.stop_gradient(rounded - inputs)


def float_dtype(layer: keras.layers.Layer) -> str:
    """Return the dtype policy that a layer would have if it were not quantized."""
    stored, computed = layer.dtype_policy.variable_dtype, layer.dtype_policy.compute_dtype
    return str(stored if stored == computed else f"mixed_{computed}")


def serialized_dtypes(backbone: keras.Model) -> dict[str, Any]:
    """Return the dtypes of a backbone's layers, as its configuration holds them.

    Keras 3.15 leaves out all but the modes of quantized layers: a model in bfloat16 would be loaded
    in the dtype of the program that loads it.
    """
    policies = keras.dtype_policies.DTypePolicyMap(default_policy=float_dtype(backbone))
    for layer in private(backbone, "_flatten_layers", KERAS)():
        if quantization_mode(layer) is not None and layer is not backbone:
            config = {**layer.dtype_policy.get_config(), "source_name": float_dtype(layer)}
            # KerasHub leaves the names of these blocks to Keras, which numbers them as they come.
            path = re.sub(r"(moe_block)(_\d+)?/", r"\1(_\\d+)?/", layer.path)
            policies[path] = type(layer.dtype_policy).from_config(config)
    serialized: dict[str, Any] = keras.dtype_policies.serialize(policies)
    return serialized


def can_dequantize(layer: object) -> bool:
    """Tell whether `dequantized_kernel` knows a dense layer's layout."""
    return isinstance(layer, DENSE) and quantization_mode(layer) in ("int8", "int4")


def kernel_parts(layer: keras.layers.Layer) -> dict[str, Tensor]:
    """Return the tensors of a quantized dense layer's kernel, for `dequantized_kernel`."""
    parts = {"kernel": private(layer, "_kernel", KERAS), **quantization_state(layer)}
    return {name: ops.convert_to_tensor(value) for name, value in parts.items()}


def dequantized_kernel(layer: keras.layers.Layer, parts: dict[str, Tensor]) -> Tensor:
    """Return the kernel of a dense layer as numbers, in the dtype that the layer computes in."""
    kernel, scale = parts["kernel"], parts["kernel_scale"]
    if quantization_mode(layer) == "int8":
        if isinstance(layer, keras.layers.EinsumDense):
            scale = private(layer, "_adjust_scale_for_dequant", KERAS)(scale)
        return ops.cast(ops.cast(kernel, layer.compute_dtype) / scale, layer.compute_dtype)
    name = "_orig_output_dim" if isinstance(layer, keras.layers.Dense) else _COLUMNS
    kernel = keras.quantizers.unpack_int4(kernel, private(layer, name, KERAS), axis=-1)
    kernel = _scaled(layer, kernel, scale, parts.get("kernel_zero"), parts.get("g_idx"))
    if isinstance(layer, keras.layers.EinsumDense):
        kernel = ops.reshape(kernel, private(layer, "original_kernel_shape", KERAS))
    return kernel


_COLUMNS = "_int4_unpacked_column_size"


def _scaled(
    layer: keras.layers.Layer,
    values: Tensor,
    scale: Tensor,
    zero: Tensor | None,
    groups: Tensor | None,
) -> Tensor:
    """Return s (q - z), or q / s without zero points; groups run along the first axis."""
    if zero is None or groups is None:
        return ops.cast(ops.cast(values, layer.compute_dtype) / scale, layer.compute_dtype)
    rows, columns = values.shape
    size = min(private(layer, "_int4_block_size", KERAS), rows)
    zero = ops.cast(zero, scale.dtype)
    if rows % size:
        groups = ops.cast(groups, "int32")
        scale, zero = ops.take(scale, groups, axis=0), ops.take(zero, groups, axis=0)
    else:  # groups are neighbours: without a matrix of scales and one of zero points
        values = ops.reshape(values, (rows // size, size, columns))
        scale, zero = scale[:, None], zero[:, None]
    numbers = ops.cast((ops.cast(values, scale.dtype) - zero) * scale, layer.compute_dtype)
    return ops.reshape(numbers, (rows, columns))


def backward_equation(layer: keras.layers.EinsumDense) -> str:
    """Return the einsum from a layer's upstream gradient and kernel to its inputs' gradient."""
    return str(private(layer, "_custom_gradient_equation", KERAS))


def head_parts(layer: keras.layers.ReversibleEmbedding) -> dict[str, Tensor]:
    """Return the tensors of a quantized embedding as a head, for `dequantized_head`."""
    if private(layer, "tie_weights", KERAS):
        found = {
            "kernel": private(layer, "_embeddings", KERAS),
            "scale": layer.embeddings_scale,
            "zero": getattr(layer, "embeddings_zero", None),
        }
    else:
        found = {
            "kernel": layer.reverse_embeddings,
            "scale": layer.reverse_embeddings_scale,
            "zero": getattr(layer, "reverse_embeddings_zero", None),
        }
    found["groups"] = getattr(layer, "g_idx", None)
    return {name: ops.convert_to_tensor(v) for name, v in found.items() if v is not None}


def dequantized_head(layer: keras.layers.ReversibleEmbedding, parts: dict[str, Tensor]) -> Tensor:
    """Return the projection `[D, V]` of a quantized embedding as numbers."""
    kernel, scale, zero = parts["kernel"], parts["scale"], parts.get("zero")
    if private(layer, "tie_weights", KERAS):
        kernel, scale = ops.transpose(kernel), ops.transpose(scale)
        zero = None if zero is None else ops.transpose(zero)
    if quantization_mode(layer) == "int4":
        kernel = keras.quantizers.unpack_int4(kernel, layer.output_dim, axis=0)
    return _scaled(layer, kernel, scale, zero, parts.get("groups"))


def copy_in_floating_point(layer: keras.layers.Layer, target: keras.layers.Layer) -> None:
    """Give a layer in floating point the weights of another that may be quantized and adapted."""
    own = [v for v in _own_variables(layer) if not v.name.startswith("lora_")]
    if quantization_mode(layer) is None:
        for source, variable in zip(own, _own_variables(target), strict=True):
            variable.assign(source)
        if getattr(layer, "lora_enabled", False):
            embeds = isinstance(layer, keras.layers.Embedding)
            base = private(target, "_embeddings" if embeds else "_kernel", KERAS)
            base.assign(layer.embeddings if embeds else layer.kernel)
    elif isinstance(layer, keras.layers.Embedding):
        _copy_embedding(layer, target)
    else:
        kernel = dequantized_kernel(layer, kernel_parts(layer))
        if layer.lora_enabled:
            scale = layer.lora_alpha / layer.lora_rank
            kernel = kernel + scale * ops.matmul(layer.lora_kernel_a, layer.lora_kernel_b)
        private(target, "_kernel", KERAS).assign(kernel)
        if layer.bias is not None:
            target.bias.assign(layer.bias)


def _own_variables(layer: keras.layers.Layer) -> list[keras.Variable]:
    return [
        *private(layer, "_trainable_variables", KERAS),
        *private(layer, "_non_trainable_variables", KERAS),
    ]


def _copy_embedding(layer: keras.layers.Embedding, target: keras.layers.Embedding) -> None:
    numbers = ops.arange(layer.input_dim)
    private(target, "_embeddings", KERAS).assign(private(layer, "quantized_call", KERAS)(numbers))
    if not getattr(layer, "tie_weights", True):
        target.reverse_embeddings.assign(dequantized_head(layer, head_parts(layer)))


# -- GPTQ ----------------------------------------------------------------------------------


def takes_gptq(layer: keras.layers.Layer) -> bool:
    """Tell whether Keras 3.15 reads a kernel's rows and columns right when it calibrates.

    It takes the longest axis of a kernel for the model's width, and the axes in front of it for
    one: heads in front of the inputs, as in Gemma, are calibrated on the wrong numbers.
    """
    if isinstance(layer, keras.layers.Dense):
        return True
    shape = tuple(layer.kernel.shape)
    kernel, output = layer.equation.split(",")[1].split("->")
    reduced = [label not in output for label in kernel]
    longest = shape.index(max(shape))
    split = 1 if len(shape) == 2 or longest == 0 else 2
    return len(shape) in (2, 3) and all(reduced[:split]) and not any(reduced[split:])


def store_gptq_as_int4(layer: keras.layers.Layer) -> None:
    """Keep a calibrated kernel of 4 bits in the layout of int4, which has the same numbers.

    Keras 3.15 gives adapters to int4 and not to GPTQ. Both are s (q - z), with q from 0 to 15 in
    one layout, from -8 to 7 in the other, and rows and columns exchanged.
    """
    dense = isinstance(layer, keras.layers.Dense)
    columns = layer.units if dense else private(layer, "gptq_unpacked_column_size", KERAS)
    shape = private(layer, "kernel_shape" if dense else "original_kernel_shape", KERAS)
    values = keras.quantizers.unpack_int4(layer.quantized_kernel, columns, axis=0, dtype="uint8")
    kernel = ops.transpose(ops.cast(values, "int32")) - 8
    scale, groups = ops.transpose(layer.kernel_scale), ops.convert_to_tensor(layer.g_idx)
    zero = ops.transpose(ops.cast(layer.kernel_zero, "int32")) - 8
    policy = layer.dtype_policy
    size = policy.group_size if policy.group_size > 0 else int(layer.g_idx.shape[0])
    for name in ("quantized_kernel", "kernel_scale", "kernel_zero", "g_idx"):
        delattr(layer, name)
    config = keras.quantizers.Int4QuantizationConfig(block_size=size)
    layer.quantization_config = config
    tracker = private(layer, "_tracker", KERAS)
    tracker.unlock()
    private(layer, "quantized_build", KERAS)(tuple(shape), "int4", config)
    tracker.lock()
    layer.dtype_policy = f"int4/{size}_from_{float_dtype(layer)}"
    packed, _, _ = keras.quantizers.pack_int4(ops.cast(kernel, "int8"), axis=-1)
    new: dict[str, Any] = {"kernel_scale": scale, "kernel_zero": zero, "g_idx": groups}
    for name, value in {"_kernel": packed, **new}.items():
        variable = private(layer, name, KERAS)
        variable.assign(ops.cast(value, variable.dtype))
