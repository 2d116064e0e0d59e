"""Packed rows through KerasHub's backbones, which take neither positions nor a mask.

While a backbone runs on a packed batch, its position layers are given the positions of the batch,
and its attention layers attend within trees (`TreeLayout.attend`) in place of their own product of
queries and keys. Everything else is the backbone's own code. `ATTENTION` says how to read scale,
soft cap and window off each kind of attention layer; a kind that is not there is not packed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import keras
import keras_hub

from dpo_keras.scoring.layer_overrides import Swap
from dpo_keras.scoring.tree_layout import TreeLayout


@dataclasses.dataclass(frozen=True)
class Attention:
    """What one attention layer does beside the products.

    Attributes:
        scale: of its scores.
        soft_cap: of its scores, or None.
        window: tokens it looks back over, itself included; None for all.
        dropout: the layer that drops attention weights, or None.
        with_scores: whether it returns the weights, too.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    dropout: Any = None
    with_scores: bool = False


def _multi_head(layer: Any) -> Attention:
    dropout = layer._dropout_layer if layer._dropout > 0 else None
    return Attention(layer._inverse_sqrt_key_dim, dropout=dropout, with_scores=True)


def _plain(layer: Any) -> Attention:
    return Attention(layer._inv_norm_factor)


def _neox(layer: Any) -> Attention:
    dropout = layer._attn_dropout_layer if layer.dropout else None
    return Attention(layer._inv_norm_factor, dropout=dropout)


def _mistral(layer: Any) -> Attention:
    return Attention(layer._inv_norm_factor, window=layer._sliding_window)


def _qwen(layer: Any) -> Attention:
    window = layer.sliding_window_size if layer.use_sliding_window_attention else None
    return Attention(layer._inv_norm_factor, window=window)


def _qwen3(layer: Any) -> Attention:
    return Attention(layer._inv_norm_factor, window=layer.sliding_window_size or None)


def _gemma(layer: Any) -> Attention:
    width = layer.hidden_dim // layer.num_query_heads
    width = layer.head_dim if layer.query_head_dim_normalize else width
    window = layer.sliding_window_size if layer.use_sliding_window_attention else None
    dropout = layer.dropout_layer if layer.dropout else None
    return Attention(width**-0.5, layer.logit_soft_cap, window, dropout)


ATTENTION: dict[str, Callable[[Any], Attention]] = {
    "CachedMultiHeadAttention": _multi_head,  # GPT-2, OPT
    "LlamaAttention": _plain,  # Llama, Llama 3
    "Phi3Attention": _plain,
    "GPTNeoXAttention": _neox,
    "CachedMistralAttention": _mistral,
    "QwenAttention": _qwen,
    "Qwen3Attention": _qwen3,
    "CachedGemmaAttention": _gemma,  # Gemma, Gemma 2
    "CachedGemma3Attention": _gemma,
}
_POSITIONS = (keras_hub.layers.PositionEmbedding, keras_hub.layers.RotaryEmbedding)


def attention_layers(backbone: keras.Model) -> list[Any]:
    """The layers of a backbone in which tokens see each other, known or not.

    Example:
        >>> attention_layers(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
        []
    """
    return [
        layer
        for layer in backbone._flatten_layers()
        if type(layer).__name__ in ATTENTION or type(layer).__name__.endswith("Attention")
    ]


def why_not_packed(backbone: keras.Model) -> str | None:
    """Why a backbone's attention cannot be confined to trees; None where it can.

    Args:
        backbone: a KerasHub backbone.

    Returns:
        A clause without a full stop.

    Example:
        >>> why_not_packed(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
        'Sequential has no attention layers that dpo_keras knows'
    """
    layers = attention_layers(backbone)
    name = type(backbone).__name__
    if not layers:
        return f"{name} has no attention layers that dpo_keras knows"
    unknown = sorted({type(layer).__name__ for layer in layers} - set(ATTENTION))
    if unknown:
        return f"{name} attends through {', '.join(unknown)}, which dpo_keras has not proven"
    if any(getattr(layer, "use_bidirectional_attention", False) for layer in layers):
        return f"{name} lets tokens see those behind them"
    places = [layer for layer in backbone._flatten_layers() if isinstance(layer, _POSITIONS)]
    if any(type(layer).__name__ == "Phi3SuScaledRotaryEmbedding" for layer in places):
        return f"{name} scales its rotary positions by the length of a row"
    if not places:
        return f"{name} has no position layers that dpo_keras knows"
    return None


def tree_calls(backbone: keras.Model, layout: TreeLayout) -> list[Swap]:
    """What the layers of a backbone do on packed rows.

    Args:
        backbone: one for which `why_not_packed` gives None.
        layout: of the batch.

    Returns:
        What `swapped` takes.
    """
    swaps: list[Swap] = []
    for layer in backbone._flatten_layers():
        if isinstance(layer, _POSITIONS):
            swaps.append((layer, "call", _at_positions(layer.call, layout)))
        elif type(layer).__name__ in ATTENTION:
            attention = ATTENTION[type(layer).__name__](layer)
            swaps.append((layer, "_compute_attention", _within_trees(attention, layout)))
    return swaps


def _at_positions(call: Callable[..., Any], layout: TreeLayout) -> Callable[..., Any]:
    def at_positions(inputs: Any, *_: Any, **__: Any) -> Any:
        return call(inputs, positions=layout.positions)

    return at_positions


def _within_trees(attention: Attention, layout: TreeLayout) -> Callable[..., Any]:
    def within_trees(
        query: Any, key: Any, value: Any, *_: Any, training: bool | None = None, **__: Any
    ) -> Any:
        dropout = attention.dropout if training else None
        found = layout.attend(
            query,
            key,
            value,
            attention.scale,
            attention.soft_cap,
            attention.window,
            None if dropout is None else lambda weights: dropout(weights, training=True),
        )
        return (found, None) if attention.with_scores else found

    return within_trees
