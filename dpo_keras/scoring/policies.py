"""What can be told of a policy without running it: its adapters and its vocabulary."""

from typing import Any

import keras
from keras import ops

from dpo_keras.errors import InputError


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


def vocabulary_size(model: Any) -> int | None:
    """The number of logits of a model, where it can be told without running it.

    Example:
        >>> vocabulary_size(keras.Sequential([keras.Input((2,)), keras.layers.Dense(7)]))
        7
    """
    shape = getattr(model, "output_shape", None)
    return shape[-1] if isinstance(shape, tuple) else None


def check_same_vocabulary(policy: Any, reference: Any) -> None:
    """Refuses a reference with other logits than the policy's, as far as that can be told.

    Args:
        policy: a model of Keras 3 or of tf-keras.
        reference: a model of the same.

    Raises:
        InputError: the vocabularies differ.

    Example:
        >>> policy, other = (
        ...     keras.Sequential([keras.Input((2,)), keras.layers.Dense(size)]) for size in (7, 8))
        >>> check_same_vocabulary(policy, policy)
        >>> check_same_vocabulary(policy, other)
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: reference has a vocabulary of 8 tokens and the ...
    """
    ours, theirs = vocabulary_size(policy), vocabulary_size(reference)
    if ours != theirs and None not in (ours, theirs):
        raise InputError(
            f"reference has a vocabulary of {theirs} tokens and the policy one of {ours}: "
            "log-probs of different tokens cannot be compared. Use a reference with the "
            "policy's tokenizer."
        )
