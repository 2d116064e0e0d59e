"""How KerasHub's layers attend and tell positions, written for KerasHub 0.32.

Private names of attention and position layers are read here alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_keras.utils.keras_hub_internals import KERAS, KERAS_HUB, Library, private

if TYPE_CHECKING:
    import keras

_SWITCHED_WINDOW = ("use_sliding_window_attention", "sliding_window_size")
ATTENTION_METHOD = "_compute_attention"
"""The method of every attention layer below that goes from queries, keys and values to states."""


class Projections(NamedTuple):
    """The layers from states to queries, keys and values, and from attended values to states."""

    query: keras.layers.Layer
    key: keras.layers.Layer
    value: keras.layers.Layer
    output: keras.layers.Layer


@dataclass(frozen=True)
class AttentionSettings:
    """What an attention layer does beside its two products."""

    scale: float  # factor of the scores q k'
    soft_cap: float | None = None  # the c of c tanh(s / c) on the scores
    window: int | None = None  # number of positions that a token sees, itself included
    dropout: keras.layers.Layer | None = None
    returns_weights: bool = False  # whether ATTENTION_METHOD returns (states, weights)
    slopes: tuple[float, ...] | None = None  # ALiBi: of each head's bias by position
    sinks: keras.Variable | None = None  # a score for each head that takes weight from tokens
    projections: Projections | None = None  # where `call` attends and there is no ATTENTION_METHOD
    output_dropout: keras.layers.Layer | None = None  # behind the projections' output
    key_value_heads: int | None = None  # those that its weights make; None: as many as it attends


WINDOW_METHOD = "_mask_sliding_window"
_FORGETS_WINDOW = {
    *("QwenAttention", "QwenMoeAttention", "Qwen3Attention", "Qwen3MoeAttention"),
    "Qwen3_5Attention",
}
"""Layers that leave their window out where they attend with JAX's fused operation."""


def window_mask(layer: keras.layers.Layer) -> Callable[..., Any] | None:
    """Return what adds a layer's window to a mask, where its own code forgets to on JAX.

    None where nothing is forgotten: the layer has no window, or no fault.
    """
    if type(layer).__name__ not in _FORGETS_WINDOW or not layer.sliding_window_size:
        return None
    if not getattr(layer, "use_sliding_window_attention", True):
        return None
    mask: Callable[..., Any] = private(layer, WINDOW_METHOD, KERAS_HUB)
    return mask


def _where(layer: keras.layers.Layer, flag: str, name: str, library: Library = KERAS_HUB) -> Any:
    return private(layer, name, library) if private(layer, flag, library) else None


def _multi_head(layer: keras.layers.Layer) -> AttentionSettings:
    dropout = _where(layer, "_dropout", "_dropout_layer", KERAS)
    scale = private(layer, "_inverse_sqrt_key_dim", KERAS)
    return AttentionSettings(scale, dropout=dropout, returns_weights=True)


def _llama(layer: keras.layers.Layer, **further: Any) -> AttentionSettings:
    return AttentionSettings(private(layer, "_inv_norm_factor", KERAS_HUB), **further)


def _gpt_neo_x(layer: keras.layers.Layer) -> AttentionSettings:
    return _llama(layer, dropout=_where(layer, "dropout", "_attn_dropout_layer"))


def _mistral(layer: keras.layers.Layer) -> AttentionSettings:
    return _llama(layer, window=private(layer, "_sliding_window", KERAS_HUB))


def _qwen(layer: keras.layers.Layer) -> AttentionSettings:
    return _llama(layer, window=_where(layer, *_SWITCHED_WINDOW))


def _qwen3(layer: keras.layers.Layer) -> AttentionSettings:
    return _llama(layer, window=private(layer, "sliding_window_size", KERAS_HUB) or None)


def _gemma(layer: keras.layers.Layer) -> AttentionSettings:
    if private(layer, "query_head_dim_normalize", KERAS_HUB):
        width = private(layer, "head_dim", KERAS_HUB)
    else:
        heads = private(layer, "num_query_heads", KERAS_HUB)
        width = private(layer, "hidden_dim", KERAS_HUB) // heads
    return AttentionSettings(
        scale=width**-0.5,
        soft_cap=private(layer, "logit_soft_cap", KERAS_HUB),
        window=_where(layer, *_SWITCHED_WINDOW),
        dropout=_where(layer, "dropout", "dropout_layer"),
    )


def _gemma4(layer: keras.layers.Layer) -> AttentionSettings:
    windowed = not private(layer, "is_global_attention", KERAS_HUB)
    return AttentionSettings(
        scale=1.0,  # queries and keys are normalized instead
        soft_cap=private(layer, "logit_soft_cap", KERAS_HUB),
        window=_where(layer, *_SWITCHED_WINDOW) if windowed else None,
        dropout=_where(layer, "dropout", "dropout_layer"),
    )


def _mixtral(layer: keras.layers.Layer) -> AttentionSettings:
    return _llama(layer, window=private(layer, "sliding_window", KERAS_HUB))


def _gpt_oss(layer: keras.layers.Layer) -> AttentionSettings:
    # Its mask lets a token see one position more than the window says.
    window = private(layer, "sliding_window", KERAS_HUB)
    sinks = private(layer, "sinks", KERAS_HUB)
    return _llama(layer, window=window + 1 if window else None, sinks=sinks)


def _bloom(layer: keras.layers.Layer) -> AttentionSettings:
    names = ("_query_dense", "_key_dense", "_value_dense", "_output_dense")
    dropout = _where(layer, "dropout", "_dropout_layer")
    return AttentionSettings(
        scale=private(layer, "inv_norm_factor", KERAS_HUB),
        slopes=_slopes(private(layer, "_alibi_layer", KERAS_HUB), layer),
        dropout=dropout,
        projections=Projections(*(private(layer, name, KERAS_HUB) for name in names)),
        output_dropout=dropout,
    )


def _falcon(layer: keras.layers.Layer) -> AttentionSettings:
    import keras_hub

    names = ("query_dense", "key_dense", "value_dense", "output_dense")
    scale = private(layer, "inv_norm_factor", KERAS_HUB)
    # The bias is added before the scores are scaled.
    slopes = tuple(scale * slope for slope in _slopes(keras_hub.layers.AlibiBias(), layer))
    return AttentionSettings(
        scale=scale,
        slopes=slopes,
        dropout=_where(layer, "attention_dropout_rate", "attention_dropout"),
        projections=Projections(*(private(layer, name, KERAS_HUB) for name in names)),
    )


def _slopes(bias: keras.layers.Layer, attention: keras.layers.Layer) -> tuple[float, ...]:
    heads = private(attention, "num_heads", KERAS_HUB)
    return tuple(private(bias, "_get_slopes", KERAS_HUB)(heads))


ATTENTION: dict[str, Callable[[keras.layers.Layer], AttentionSettings]] = {
    "CachedMultiHeadAttention": _multi_head,  # GPT-2, OPT
    "LlamaAttention": _llama,  # Llama, Llama 3
    "Phi3Attention": _llama,
    "GPTNeoXAttention": _gpt_neo_x,
    "CachedMistralAttention": _mistral,
    "QwenAttention": _qwen,
    "Qwen3Attention": _qwen3,
    "CachedGemmaAttention": _gemma,  # Gemma, Gemma 2
    "CachedGemma3Attention": _gemma,
    "Gemma4TextAttention": _gemma4,
    "CachedMixtralAttention": _mixtral,
    "QwenMoeAttention": _qwen,
    "Qwen3MoeAttention": _qwen3,
    "GptOssAttention": _gpt_oss,
    "SmolLM3Attention": _llama,
    "BloomAttention": _bloom,
    "FalconAttention": _falcon,
}
"""How to read the settings off each kind of attention layer that is known to pack exactly."""


def is_attention(layer: keras.layers.Layer) -> bool:
    """Tell whether tokens see each other in a layer, of a known kind or not."""
    return type(layer).__name__.endswith("Attention")


def attention_settings(layer: keras.layers.Layer) -> AttentionSettings | None:
    """Return the settings of an attention layer of a known kind; None for any other layer."""
    read = ATTENTION.get(type(layer).__name__)
    if read is None:
        return None
    settings = read(layer)
    if settings.projections is None:
        private(layer, ATTENTION_METHOD, KERAS_HUB)
    return replace(settings, key_value_heads=getattr(layer, "num_key_value_heads", None))


def is_bidirectional(layer: keras.layers.Layer) -> bool:
    """Tell whether an attention layer lets tokens see those behind them (Gemma 3 can)."""
    return getattr(layer, "use_bidirectional_attention", False)


def is_position(layer: keras.layers.Layer) -> bool:
    """Tell whether a layer adds positions and takes them as `call(inputs, positions=…)`."""
    import keras_hub

    kinds = keras_hub.layers.PositionEmbedding, keras_hub.layers.RotaryEmbedding
    return isinstance(layer, kinds)


def is_rotary_table(layer: keras.layers.Layer) -> bool:
    """Tell whether a layer returns the cosines and sines of a row's places (SmolLM3)."""
    return type(layer).__name__ == "SmolLM3RotaryEmbedding"


def is_recurrent(layer: keras.layers.Layer) -> bool:
    """Tell whether a layer carries a state along the row (Qwen 3.5, RWKV-7)."""
    return type(layer).__name__ in ("Qwen3_5GatedDeltaNet", "RWKV7TimeMix", "RWKV7ChannelMix")


def scales_by_row_length(layer: keras.layers.Layer) -> bool:
    """Tell whether a position layer scales positions by the length of the row (Phi-3 `su`)."""
    return type(layer).__name__ == "Phi3SuScaledRotaryEmbedding"
