"""What single families of KerasHub do otherwise than the rest (written for KerasHub 0.32)."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_keras.utils.keras_hub_internals import KERAS_HUB, private
from dpo_keras.utils.keras_internals import all_layers

if TYPE_CHECKING:
    import keras


def backbone_class(family: Any) -> type | None:
    """Return the class of the backbone of a model, of its class, or of a preset."""
    if family is None:
        return None
    if isinstance(family, str | os.PathLike):
        from keras_hub.src.utils import preset_utils

        loader = private(preset_utils, "get_preset_loader", KERAS_HUB)(os.fspath(family))
        found: type = loader.check_backbone_class()
        return found
    family = getattr(family, "backbone_cls", None) or getattr(family, "backbone", family)
    return family if isinstance(family, type) else type(family)


class MediaEncoder(NamedTuple):
    """An encoder of images or sounds, and the layer that puts its states among those of tokens."""

    encoder: keras.layers.Layer
    interleave: keras.layers.Layer
    inputs: frozenset[str]  # by which a backbone takes what is encoded


def media_encoders(backbone: object) -> list[MediaEncoder]:
    """Return the encoders that a backbone can do without (Gemma 3, Gemma 4, Qwen 3.5)."""
    kinds = {
        "vision_encoder": ("interleave_embeddings", {"images", "pixel_values"}),
        "audio_encoder": ("audio_interleave_embeddings", {"audio_mel"}),
    }
    found = []
    for name, (interleave, inputs) in kinds.items():
        encoder, layer = getattr(backbone, name, None), getattr(backbone, interleave, None)
        if encoder is not None and layer is not None:
            found.append(MediaEncoder(encoder, layer, frozenset(inputs)))
    return found


def image_encoder(backbone: object) -> keras.layers.Layer | None:
    """Return the encoder of images of a backbone (PaliGemma calls it `vit_encoder`)."""
    return getattr(backbone, "vision_encoder", None) or getattr(backbone, "vit_encoder", None)


def patch_encoder(backbone: object) -> MediaEncoder | None:
    """Return Qwen 3.5's encoder of images, which are of any size; None for other models.

    KerasHub 0.32 computes positions and windows in Python from the sizes of images, so that it
    does not run in a graph, and makes one batch of all rows.
    """
    found = media_encoders(backbone)
    if not found or type(found[0].encoder).__name__ != "Qwen3_5VisionEncoder":
        return None
    return found[0]


def rotary_attention_layers(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the layers whose `call` takes positions in images, as `position_ids` (M-RoPE).

    KerasHub 0.32 gives them any in generation only.
    """
    layers = [layer for layer in all_layers(model) if type(layer).__name__ == "Qwen3_5Attention"]
    return [layer for layer in layers if layer.mrope_section is not None]


def leading_image_states(backbone: object) -> int | None:
    """Return how many states of an image precede those of tokens; None where none ever do."""
    for name in ("image_sequence_length", "num_query_tokens"):  # PaliGemma, BLIP-2
        count: int | None = getattr(backbone, name, None)
        if count is not None:
            return count
    return None


class ReversedEmbedding(NamedTuple):
    """An embedding whose transpose makes logits of hidden states."""

    embedding: keras.layers.Embedding
    soft_cap: float | None


def reversed_embedding(policy: Any) -> ReversedEmbedding | None:
    """Return the head of Gemma 3n, whose functional model has another; None for other models.

    KerasHub 0.32 transposes the embeddings while it builds that model. It keeps them as a constant:
    training does not move them, and loading does not restore them.
    """
    if type(policy).__name__ != "Gemma3nCausalLM":
        return None
    language_model = policy.backbone.language_model
    embedding = private(private(language_model, "embed_tokens", KERAS_HUB), "embedding", KERAS_HUB)
    return ReversedEmbedding(embedding, private(language_model, "final_logit_soft_cap", KERAS_HUB))


def recurrence_owners(model: keras.layers.Layer) -> dict[str, list[tuple[object, str]]]:
    """Return where a model looks up the recurrences of its layers: (owner, name), by rule."""
    owners: dict[str, list[tuple[object, str]]] = {}
    for layer in all_layers(model):
        kind = type(layer)
        if kind.__name__ == "Qwen3_5GatedDeltaNet":
            module = importlib.import_module(kind.__module__)
            private(module, "_chunk_gated_delta_rule", KERAS_HUB)
            owners["gated_delta_rule"] = [(module, "_chunk_gated_delta_rule")]
        elif kind.__name__ == "RWKV7TimeMix":
            names = "RWKV7_OP", "RWKV7_OP_RNN", "RWKV7_OP_INFERENCE"
            # Another operation than the one in Python is a compiled kernel.
            python = [
                n for n in names if private(layer, n, KERAS_HUB).__module__ == kind.__module__
            ]
            owners.setdefault("generalized_delta_rule", []).extend((layer, n) for n in python)
    return owners


class RecurrentDecoding(NamedTuple):
    """How a model whose layers keep a state reads one token after the other."""

    empty_cache: Callable[[Any], Any]  # of rows of token ids
    step: Callable[
        [Any, Any, Any], tuple[Any, Any]
    ]  # (ids [batch, 1], cache, place) -> (logits, …)


def recurrent_decoding(policy: Any) -> RecurrentDecoding | None:
    """Return how Qwen 3.5 and RWKV-7 decode; None for a model without a recurrent state."""
    kind = type(policy).__name__
    if kind not in ("Qwen3_5CausalLM", "Qwen3_5MoeCausalLM", "RWKV7CausalLM"):
        return None
    from keras import ops

    def empty_cache(token_ids: Any) -> Any:
        found = []

        def unread(_: Any, cache: Any, *__: Any, **___: Any) -> tuple[None, None, Any]:
            found.append(cache)
            return None, None, cache

        policy.__dict__["call_with_cache"] = unread
        try:
            private(policy, "_build_cache", KERAS_HUB)(token_ids, None)
        finally:
            del policy.__dict__["call_with_cache"]
        # A list would become a tuple in a loop.
        return tuple(found[0])

    def step(token_ids: Any, cache: Any, place: Any) -> tuple[Any, Any]:
        if kind == "RWKV7CausalLM":  # without a mask, id 0 would be padding
            options = {"padding_mask": ops.ones_like(token_ids)}
        else:
            options = {"cache_update_index": place}
        logits, _, cache = policy.call_with_cache(token_ids, cache, **options)
        return ops.squeeze(logits, axis=1), tuple(cache)

    return RecurrentDecoding(empty_cache, step)


def caches_without_positions(policy: object) -> bool:
    """Tell whether a model's keys and values in a cache do not know where they are (GPT-NeoX).

    KerasHub 0.32 turns the query of each new token as if it were the first of the text.
    """
    return type(policy).__name__ == "GPTNeoXCausalLM"


def drafts_for_another_model(model: object) -> bool:
    """Tell whether a model is an assistant in speculative decoding (Gemma 4)."""
    return type(model).__name__ == "Gemma4AssistantCausalLM"
