"""LoRA adapters: which layers have them, their product in low rank, and how they are saved.

Keras adds two small kernels A and B to a layer and multiplies inputs by W + scale A B. Here they
are multiplied as x W + scale (x A) B, so that no other tensor of W's size is made, and no gradient.
"""

import functools
import inspect
import warnings
from collections.abc import Mapping, MutableMapping

import keras
import numpy as np
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.layer_overrides import Call, Override
from dpo_keras.utils import JSON, Tensor
from dpo_keras.utils.backends import made_after
from dpo_keras.utils.keras_hub_internals import ties_embeddings
from dpo_keras.utils.keras_hub_tokenizers import (
    complete_tokenizer_config,
    follow_rules,
    followed_rules,
)
from dpo_keras.utils.keras_internals import all_layers, base_kernel, unmerged_weights
from dpo_keras.utils.keras_quantization import (
    backward_equation,
    can_dequantize,
    dequantized_kernel,
    keep_inputs,
    kernel_parts,
    quantization_mode,
    quantizes_inputs,
    serialized_dtypes,
)

_KEEPS_INPUTS = "dpo_keras_keeps_inputs"
"""Key of a serialized policy: the places of quantized layers that do not round their inputs."""

_RULES = "dpo_keras_tokenizer_rules"
"""Key of a serialized policy: how its checkpoint cuts text into tokens."""


def adapted_layers(policy: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers of a policy that have LoRA enabled."""
    return [layer for layer in all_layers(policy) if getattr(layer, "lora_enabled", False)]


def adapter_variables(layers: list[keras.layers.Layer]) -> list[keras.Variable]:
    """Return the variables that LoRA added to layers."""
    return [variable for layer in layers for variable in layer.weights if "lora_" in variable.name]


def warn_of_frozen_kernels(policy: keras.Model) -> None:
    """Warn where kernels are quantized and no adapters train on top of them."""
    if any(map(quantization_mode, all_layers(policy))) and not adapted_layers(policy):
        warnings.warn(
            "policy is quantized and has no adapters: quantized kernels do not train, only what "
            "was left in floating point. Call dpo_keras.enable_lora(policy) before training.",
            UserWarning,
            stacklevel=3,
        )


def adapters_are_fresh(policy: keras.Model) -> bool:
    """Tell whether every product of adapters is still zero: the adapted model is the base model."""
    seconds = [v for v in adapter_variables(adapted_layers(policy)) if v.name.endswith("_b")]
    return bool(seconds) and all(not ops.convert_to_numpy(v).any() for v in seconds)


def low_rank_overrides(model: object) -> list[Override]:
    """Compute adapters' products in low rank, and those of quantized kernels one at a time.

    Of Keras 3 models' dense layers. Layers that round their inputs, too, stay as Keras has them.
    """
    layers = all_layers(model) if isinstance(model, keras.Model) else []
    return [
        Override(layer, "call" if quantization_mode(layer) is None else "quantized_call", call)
        for layer in layers
        if (call := _cheaper_call(layer)) is not None
    ]


def _cheaper_call(layer: keras.layers.Layer) -> Call | None:
    if can_dequantize(layer) and not quantizes_inputs(layer):
        return _low_rank_call(layer, _dequantizing_product(layer))
    adapted = getattr(layer, "lora_enabled", False) and quantization_mode(layer) is None
    if not adapted or not _can_factor(layer):
        return None

    def product(inputs: Tensor) -> Tensor:
        return _product(layer, inputs, ops.cast(base_kernel(layer), layer.compute_dtype))

    return _low_rank_call(layer, product)


def _can_factor(layer: keras.layers.Layer) -> bool:
    if isinstance(layer, keras.layers.Dense):
        return True
    if not isinstance(layer, keras.layers.EinsumDense):
        return False
    # B acts on the last axis of the kernel, which must be the last one of the output.
    kernel, output = layer.equation.split(",")[1].split("->")
    return kernel[-1] == output[-1] and kernel[-1] not in layer.equation.split(",")[0]


def _product(layer: keras.layers.Layer, inputs: Tensor, kernel: Tensor) -> Tensor:
    if isinstance(layer, keras.layers.Dense):
        return ops.matmul(inputs, kernel)
    return ops.einsum(layer.equation, inputs, kernel)


def _dequantizing_product(layer: keras.layers.Layer) -> Call:
    """Return x W of a quantized layer, with W in floating point for as long as it is multiplied."""

    def product(inputs: Tensor) -> Tensor:
        parts = kernel_parts(layer)

        @ops.custom_gradient
        def differentiable(inputs: Tensor) -> tuple[Tensor, Call]:
            def gradient(*args: Tensor, upstream: Tensor | None = None) -> Tensor:
                if upstream is None:
                    (upstream,) = args
                # Made again, or all kernels would be kept from the forward pass.
                kernel = dequantized_kernel(layer, made_after(upstream, parts))
                if isinstance(layer, keras.layers.Dense):
                    return ops.matmul(upstream, ops.transpose(kernel))
                return ops.einsum(backward_equation(layer), upstream, kernel)

            # Not before its turn: TensorFlow would make all kernels at once, at the start.
            kernel = dequantized_kernel(layer, made_after(inputs, parts))
            return _product(layer, inputs, kernel), gradient

        found: Tensor = differentiable(inputs)
        return found

    return product


def _low_rank_call(layer: keras.layers.Layer, product: Call) -> Call:
    def call(inputs: Tensor, training: bool | None = None) -> Tensor:
        inputs = ops.cast(inputs, layer.compute_dtype)
        states = product(inputs)
        if getattr(layer, "lora_enabled", False):
            # Adapters stay in float32 where the kernel does not.
            weights = layer.lora_kernel_a, layer.lora_kernel_b
            down, up = (ops.cast(weight, layer.compute_dtype) for weight in weights)
            scale = layer.lora_alpha / layer.lora_rank
            states = states + scale * ops.matmul(_product(layer, inputs, down), up)
        if layer.bias is not None:
            states = states + layer.bias
        return states if layer.activation is None else layer.activation(states)

    return call


def serialized_policy(policy: keras.Model) -> dict[str, JSON]:
    """Return a policy's configuration, ready to be part of another model's."""
    config: dict[str, JSON] = keras.saving.serialize_keras_object(policy)
    # KerasHub compiles its models with an optimizer that Keras fails to restore.
    config.pop("compile_config", None)
    backbone = getattr(policy, "backbone", None)
    quantized = [number for number, layer in enumerate(all_layers(policy)) if _keeps_inputs(layer)]
    if quantized:
        config[_KEEPS_INPUTS] = quantized
    if isinstance(backbone, keras.Model) and any(map(quantization_mode, all_layers(policy))):
        config["config"]["backbone"]["config"]["dtype"] = serialized_dtypes(backbone)
    # A Llama backbone leaves out of its configuration that its embeddings are tied.
    tied = ties_embeddings(backbone)
    if tied is not None and "tie_word_embeddings" in inspect.signature(type(backbone)).parameters:
        config["config"]["backbone"]["config"].setdefault("tie_word_embeddings", tied)
    complete_tokenizer_config(config, _tokenizer(policy))
    rules = followed_rules(_tokenizer(policy))
    if rules is not None:
        config[_RULES] = rules
    return config


def restored_policy(config: dict[str, JSON], custom_objects: JSON = None) -> keras.Model:
    """Build the model that `serialized_policy` describes."""
    config = dict(config)
    quantized = config.pop(_KEEPS_INPUTS, ())
    rules = config.pop(_RULES, None)
    policy = keras.saving.deserialize_keras_object(config, custom_objects)
    layers = all_layers(policy) if quantized else []
    for place in quantized:
        keep_inputs(layers[place])
    if rules is not None:
        follow_rules(_tokenizer(policy), rules)
    return policy


def _keeps_inputs(layer: keras.layers.Layer) -> bool:
    """Tell whether a layer's kernel is quantized, and its inputs are not."""
    quantized = quantization_mode(layer) in ("int8", "int4") and hasattr(layer, "inputs_quantizer")
    return quantized and not quantizes_inputs(layer)


def _tokenizer(policy: keras.Model) -> object:
    return getattr(getattr(policy, "preprocessor", None), "tokenizer", None)


def adapter_config(policy: keras.Model) -> dict[str, JSON] | None:
    """Return what `restore_adapters` needs to enable LoRA on a fresh copy; None without LoRA."""
    layers = adapted_layers(policy)
    if not layers:
        return None
    # Places among all layers, whose order the architecture fixes.
    index = {id(layer): number for number, layer in enumerate(all_layers(policy))}
    return {
        "ranks": [layer.lora_rank for layer in layers],
        "alphas": [layer.lora_alpha for layer in layers],
        "places": [index[id(layer)] for layer in layers],
        "trainable": [bool(variable.trainable) for variable in policy.weights],
    }


def restore_adapters(policy: keras.Model, config: dict[str, JSON] | None) -> None:
    """Enable LoRA as `adapter_config` read it.

    Layers that a model's own configuration names have LoRA already, though Keras 3.15 forgets a
    `Dense` layer's alpha and which weights are trained.
    """
    if config is None:
        return
    layers = all_layers(policy)
    for place, rank, alpha in zip(config["places"], config["ranks"], config["alphas"], strict=True):
        if not getattr(layers[place], "lora_enabled", False):
            layers[place].enable_lora(rank, lora_alpha=alpha)
        layers[place].lora_alpha = alpha
    for variable, trainable in zip(policy.weights, config["trainable"], strict=True):
        variable.trainable = trainable


@keras.saving.register_keras_serializable("dpo_keras")
class AdapterState(keras.layers.Layer):
    """Save and load the unmerged weights of a policy's adapted layers, scales included.

    Keras merges adapters into what it saves, and rounds quantized kernels anew.

    It owns no weights. Keras loads the attributes of a model in alphabetical order, so an attribute
    whose name follows the policy's has the last word on those weights.
    """

    def __init__(self, policy: keras.Model, **kwargs: object):
        super().__init__(trainable=False, **kwargs)
        self._policy_layers = functools.partial(adapted_layers, policy)
        self.built = True

    def _weights_by_key(self) -> dict[str, keras.Variable]:
        return {
            f"layer_{number}_{name}": variable
            for number, layer in enumerate(self._policy_layers())
            for name, variable in unmerged_weights(layer).items()
        }

    def save_own_variables(self, store: MutableMapping[str, np.ndarray]) -> None:
        """Write base kernels and adapters, not merged."""
        for key, variable in self._weights_by_key().items():
            store[key] = ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Mapping[str, np.ndarray]) -> None:
        """Read what `save_own_variables` wrote."""
        keys = set(store.keys())
        if not keys:  # saved by a version that kept merged weights only
            return
        for key, variable in self._weights_by_key().items():
            if key not in keys:
                rule = (
                    f"has quantized adapted layers, and the file has no {key}: dpo_keras 0.4 and "
                    "before left scales out, so its kernels cannot be read"
                )
                raise InputError(InputProblem("policy", rule, hint="Train the adapters again."))
            variable.assign(store[key])
