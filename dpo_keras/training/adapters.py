"""LoRA adapters that survive saving.

Keras writes an adapted layer as its merged kernel and loads it with empty adapters; KerasHub's
configurations do not mention adapters at all, and `save_lora_weights` leaves out the biases that
it trains. For preference training that loses the reference, which is the base model *without* the
adapters (trl#6443 is the same fault elsewhere). So the state is written here, unmerged.
"""

import inspect
from typing import Any

import keras

from dpo_keras.scoring.policies import adapted_layers


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
