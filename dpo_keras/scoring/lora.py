"""LoRA adapters: which layers have them, their product in low rank, and how they are saved."""

import inspect
from collections.abc import Callable
from typing import Any

import keras
from keras import ops

from dpo_keras.scoring.layer_overrides import Swap


def adapted_layers(policy: keras.Model) -> list[Any]:
    """The layers of `policy` with LoRA switched on.

    Example:
        >>> adapted_layers(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
        []
    """
    return [layer for layer in policy._flatten_layers() if getattr(layer, "lora_enabled", False)]


def adapter_variables(layers: list[Any]) -> list[Any]:
    """The variables that LoRA added to layers.

    Args:
        layers: from `adapted_layers`.

    Example:
        >>> layer = keras.layers.Dense(2)
        >>> layer.build((1, 3))
        >>> layer.enable_lora(1)
        >>> [variable.name for variable in adapter_variables([layer])]
        ['lora_kernel_a', 'lora_kernel_b']
    """
    return [variable for layer in layers for variable in layer.weights if "lora_" in variable.name]


def adapters_are_fresh(policy: keras.Model) -> bool:
    """Whether every LoRA product is still zero, so that the adapted model is the base model."""
    seconds = [v for v in adapter_variables(adapted_layers(policy)) if v.name.endswith("_b")]
    return bool(seconds) and all(not ops.convert_to_numpy(v).any() for v in seconds)


def low_rank_calls(model: keras.Model) -> list[Swap]:
    """The calls of all layers with LoRA switched on, factored.

    Args:
        model: any model; layers of other kinds, and quantized ones, are left as they are, and so
            is whatever is no model of Keras 3.

    Returns:
        What `swapped` takes.

    Example:
        >>> layer = keras.layers.Dense(3)
        >>> layer.build((None, 2))
        >>> model = keras.Sequential([keras.Input((2,)), layer])
        >>> low_rank_calls(model)
        []
        >>> layer.enable_lora(1)
        >>> len(low_rank_calls(model))
        1
    """
    if not isinstance(model, keras.Model):
        return []
    return [
        (layer, "call", _factored(layer))
        for layer in model._flatten_layers()
        if getattr(layer, "lora_enabled", False) and _can_factor(layer)
    ]


def _can_factor(layer: Any) -> bool:
    if getattr(layer, "quantization_mode", None) is not None:
        return False
    if isinstance(layer, keras.layers.Dense):
        return True
    if not isinstance(layer, keras.layers.EinsumDense):
        return False
    # B acts on the last axis of the kernel, which must be the last one of the output.
    kernel, output = layer.equation.split(",")[1].split("->")
    return kernel[-1] == output[-1] and kernel[-1] not in layer.equation.split(",")[0]


def _factored(layer: Any) -> Callable[..., Any]:
    scale = layer.lora_alpha / layer.lora_rank

    def product(inputs: Any, kernel: Any) -> Any:
        if isinstance(layer, keras.layers.Dense):
            return ops.matmul(inputs, kernel)
        return ops.einsum(layer.equation, inputs, kernel)

    def call(inputs: Any, training: bool | None = None) -> Any:
        # Adapters stay in float32 where the kernel does not.
        down, up, kernel = (
            ops.cast(weight, layer.compute_dtype)
            for weight in (layer.lora_kernel_a, layer.lora_kernel_b, layer._kernel)
        )
        states = product(inputs, kernel) + scale * ops.matmul(product(inputs, down), up)
        if layer.bias is not None:
            states = states + layer.bias
        return states if layer.activation is None else layer.activation(states)

    return call


def serialized_policy(policy: keras.Model) -> dict[str, Any]:
    """A policy's configuration, ready to be part of another's.

    KerasHub compiles its models when they are made, with an optimizer that nobody asked for and
    that Keras then fails to restore; it is left out. A Llama backbone does not say in its
    configuration that its embeddings are tied; it is said for it.

    Args:
        policy: any serializable model.

    Returns:
        What `keras.saving.deserialize_keras_object` takes.
    """
    config = keras.saving.serialize_keras_object(policy)
    config.pop("compile_config", None)
    backbone = getattr(policy, "backbone", None)
    tied = getattr(getattr(backbone, "token_embedding", None), "tie_weights", None)
    if tied is not None and "tie_word_embeddings" in inspect.signature(type(backbone)).parameters:
        config["config"]["backbone"]["config"].setdefault("tie_word_embeddings", tied)
    return config


def adapter_config(policy: keras.Model) -> dict[str, Any] | None:
    """What `restore_adapters` needs to enable LoRA on a fresh copy of `policy`.

    Args:
        policy: a model.

    Returns:
        None without LoRA; else rank, alpha and the places of adapted layers in
        `policy._flatten_layers()`, the order of which is a matter of the architecture.
    """
    layers = adapted_layers(policy)
    if not layers:
        return None
    everything = list(policy._flatten_layers())
    return {
        "ranks": [layer.lora_rank for layer in layers],
        "alphas": [layer.lora_alpha for layer in layers],
        "places": [next(i for i, e in enumerate(everything) if e is layer) for layer in layers],
        "trainable": [bool(variable.trainable) for variable in policy.weights],
    }


def restore_adapters(policy: keras.Model, config: dict[str, Any] | None) -> None:
    """Enables LoRA on a policy as it was when `adapter_config` looked at it.

    Args:
        policy: the same architecture, adapters not enabled yet (a model whose own configuration
            remembers its adapters is left as it is).
        config: from `adapter_config`, or None for nothing.
    """
    if config is None or adapted_layers(policy):
        return
    everything = list(policy._flatten_layers())
    for place, rank, alpha in zip(config["places"], config["ranks"], config["alphas"], strict=True):
        everything[place].enable_lora(rank, lora_alpha=alpha)
    for variable, trainable in zip(policy.weights, config["trainable"], strict=True):
        variable.trainable = trainable


@keras.saving.register_keras_serializable("dpo_keras")
class AdapterState(keras.layers.Layer):
    """Saves and loads the unmerged weights of a policy's adapted layers.

    It owns no weights. Keras loads the attributes of a model in alphabetical order, so under a
    name behind the policy's it has the last word on those weights.

    Args:
        policy: the model with adapters.
    """

    def __init__(self, policy: keras.Model, **kwargs: Any):
        super().__init__(trainable=False, **kwargs)
        self._policy_layers = lambda: adapted_layers(policy)
        self.built = True

    def _weights_by_key(self) -> dict[str, Any]:
        return {
            f"layer_{number}_{name}": variable
            for number, layer in enumerate(self._policy_layers())
            for name, variable in _own_weights(layer)
        }

    def save_own_variables(self, store: Any) -> None:
        """Writes base kernels and adapters apart."""
        for key, variable in self._weights_by_key().items():
            store[key] = keras.ops.convert_to_numpy(variable)

    def load_own_variables(self, store: Any) -> None:
        """Reads what `save_own_variables` wrote."""
        for key, variable in self._weights_by_key().items():
            variable.assign(store[key])


_OWN = (
    "_kernel",
    "_embeddings",
    "lora_kernel_a",
    "lora_kernel_b",
    "lora_embeddings_a",
    "lora_embeddings_b",
)


def _own_weights(layer: Any) -> list[tuple[str, Any]]:
    found = [(name, getattr(layer, name, None)) for name in _OWN]
    return [(name, variable) for name, variable in found if variable is not None]
