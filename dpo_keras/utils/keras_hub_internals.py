"""Private API of KerasHub, written for KerasHub 0.32: each use is one function."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_keras.utils.private_api import KERAS, KERAS_HUB, private

if TYPE_CHECKING:
    import keras
    import tokenizers

# How each family cuts text into words before it merges bytes. Llama 3's and Qwen's differ in the
# number of digits that a word may hold.
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # openai/gpt-2
_MODERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|{digits}"
    r"| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3 = _MODERN.format(digits=r"\p{N}{1,3}")
QWEN = _MODERN.format(digits=r"\p{N}")

# By the names of KerasHub's classes; other families keep what they have.
WORD_SPLITS = {
    "GPT2Tokenizer": GPT2,
    "OPTTokenizer": GPT2,
    "GPTNeoXTokenizer": GPT2,
    "Llama3Tokenizer": LLAMA3,
    "SmolLM3Tokenizer": LLAMA3,
    "QwenTokenizer": QWEN,
    "Qwen3Tokenizer": QWEN,
}


def mend_word_splits(tokenizer: object) -> bool:
    """Make a KerasHub byte-pair tokenizer cut words as its own family does.

    A byte-level BPE merges bytes within words only, and the regular expression that finds the words
    belongs to the vocabulary as much as its merges do. KerasHub 0.32 passes the expression to the
    `tokenizers` library as a literal string, which occurs in no text. Nothing is cut, merges cross
    word boundaries, and about a third of ordinary texts get tokens that the model was not trained
    on, mostly around line feeds and runs of spaces. KerasHub also uses one expression, Llama 3's,
    for all families.

    The tokenizer itself is changed, so that KerasHub's `generate` sees the same tokens.

    Args:
        tokenizer: any tokenizer. Only byte-pair tokenizers of the families in `WORD_SPLITS` change.

    Returns:
        Whether the tokenizer now cuts words by the expression of its family.

    Example:
        >>> mend_word_splits(object())
        False
    """
    pattern = WORD_SPLITS.get(type(tokenizer).__name__)
    backend: Any = getattr(tokenizer, "_tokenizer", None)
    if pattern is None or not hasattr(backend, "pre_tokenizer"):
        return False
    from tokenizers import Regex, pre_tokenizers

    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(
                add_prefix_space=bool(getattr(tokenizer, "add_prefix_space", False)),
                use_regex=False,
            ),
        ]
    )
    return True


def fast_byte_pair_encoding(
    tokenizer: object,
) -> Callable[[list[str]], list[list[int]]] | None:
    """Return a byte-pair tokenizer's encoding of a batch, without the offsets of the tokens.

    KerasHub 0.32 asks the `tokenizers` library for the offsets too and drops them, which takes a
    fifth of the time.

    Args:
        tokenizer: any tokenizer.

    Returns:
        A function from texts to token ids; None where the tokenizer's own `tokenize` may do more.
    """
    method = getattr(type(tokenizer), "tokenize", None)
    # A family that overrides `tokenize` may do more than encode.
    if getattr(method, "__qualname__", "") != "BytePairTokenizer.tokenize":
        return None
    encode = getattr(getattr(tokenizer, "_tokenizer", None), "encode_batch_fast", None)
    in_python = getattr(tokenizer, "_use_tf_workflow", lambda: True)() is False
    if encode is None or not in_python or "int" not in str(getattr(tokenizer, "compute_dtype", "")):
        return None
    return lambda texts: [encoding.ids for encoding in encode(texts)]


# -- attention and position layers (written for KerasHub 0.32) -----------------------------

ATTENTION_METHOD = "_compute_attention"
"""The method of every attention layer below that goes from queries, keys and values to states."""


@dataclass(frozen=True)
class AttentionSettings:
    """What an attention layer does beside its two products.

    Attributes:
        scale: factor of the scores q k'.
        soft_cap: the c of cap(s) = c tanh(s / c) on the scores; None for no cap.
        window: number of positions that a token sees, itself included; None for all.
        dropout: layer that drops attention weights, or None.
        returns_weights: whether `ATTENTION_METHOD` returns `(states, weights)`.
    """

    scale: float
    soft_cap: float | None = None
    window: int | None = None
    dropout: keras.layers.Layer | None = None
    returns_weights: bool = False


def _multi_head(layer: keras.layers.Layer) -> AttentionSettings:
    dropout = private(layer, "_dropout_layer", KERAS) if private(layer, "_dropout", KERAS) else None
    scale = private(layer, "_inverse_sqrt_key_dim", KERAS)
    return AttentionSettings(scale, dropout=dropout, returns_weights=True)


def _llama(layer: keras.layers.Layer) -> AttentionSettings:
    return AttentionSettings(private(layer, "_inv_norm_factor", KERAS_HUB))


def _gpt_neo_x(layer: keras.layers.Layer) -> AttentionSettings:
    active = private(layer, "dropout", KERAS_HUB)
    dropout = private(layer, "_attn_dropout_layer", KERAS_HUB) if active else None
    return AttentionSettings(private(layer, "_inv_norm_factor", KERAS_HUB), dropout=dropout)


def _mistral(layer: keras.layers.Layer) -> AttentionSettings:
    window = private(layer, "_sliding_window", KERAS_HUB)
    return AttentionSettings(private(layer, "_inv_norm_factor", KERAS_HUB), window=window)


def _qwen(layer: keras.layers.Layer) -> AttentionSettings:
    scale = private(layer, "_inv_norm_factor", KERAS_HUB)
    return AttentionSettings(scale, window=_switched_window(layer))


def _qwen3(layer: keras.layers.Layer) -> AttentionSettings:
    window = private(layer, "sliding_window_size", KERAS_HUB) or None
    return AttentionSettings(private(layer, "_inv_norm_factor", KERAS_HUB), window=window)


def _gemma(layer: keras.layers.Layer) -> AttentionSettings:
    if private(layer, "query_head_dim_normalize", KERAS_HUB):
        width = private(layer, "head_dim", KERAS_HUB)
    else:
        heads = private(layer, "num_query_heads", KERAS_HUB)
        width = private(layer, "hidden_dim", KERAS_HUB) // heads
    active = private(layer, "dropout", KERAS_HUB)
    return AttentionSettings(
        scale=width**-0.5,
        soft_cap=private(layer, "logit_soft_cap", KERAS_HUB),
        window=_switched_window(layer),
        dropout=private(layer, "dropout_layer", KERAS_HUB) if active else None,
    )


def _switched_window(layer: keras.layers.Layer) -> int | None:
    active = private(layer, "use_sliding_window_attention", KERAS_HUB)
    return private(layer, "sliding_window_size", KERAS_HUB) if active else None


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
    private(layer, ATTENTION_METHOD, KERAS_HUB)
    return read(layer)


def is_bidirectional(layer: keras.layers.Layer) -> bool:
    """Tell whether an attention layer lets tokens see those behind them (Gemma 3 can)."""
    return getattr(layer, "use_bidirectional_attention", False)


def is_position(layer: keras.layers.Layer) -> bool:
    """Tell whether a layer adds positions and takes them as `call(inputs, positions=…)`."""
    import keras_hub

    kinds = keras_hub.layers.PositionEmbedding, keras_hub.layers.RotaryEmbedding
    return isinstance(layer, kinds)


def scales_by_row_length(layer: keras.layers.Layer) -> bool:
    """Tell whether a position layer scales positions by the length of the row (Phi-3 `su`)."""
    return type(layer).__name__ == "Phi3SuScaledRotaryEmbedding"


# -- blocks, norms and embeddings (written for KerasHub 0.32) ------------------------------

_NORMS = (
    "LayerNormalization",
    "LlamaLayerNorm",
    "MistralLayerNormalization",
    "Phi3LayerNorm",
    "Qwen3LayerNorm",
    "QwenLayerNorm",
    "RMSNormalization",
)


def transformer_blocks(backbone: keras.Model) -> list[keras.layers.Layer]:
    """Return the transformer blocks of a backbone in order; empty where it shows none."""
    return list(getattr(backbone, "transformer_layers", ()))


def norm_settings(layer: keras.layers.Layer) -> dict[str, object] | None:
    """Return the settings that a norm computes with; None for a layer of another kind.

    `get_config` does not do: some of KerasHub's norms have none of their own.
    """
    if type(layer).__name__ not in _NORMS:
        return None
    optional = {name: getattr(layer, name, None) for name in ("axis", "rms_scaling")}
    return {"epsilon": private(layer, "epsilon", KERAS_HUB), **optional}


class ReversibleSettings(NamedTuple):
    """How a `ReversibleEmbedding` projects hidden states to logits.

    Attributes:
        tied: whether it projects by the transposed embeddings.
        soft_cap: the c of cap(z) = c tanh(z / c) on the logits; None for no cap.
        dtype: of the product; None for the layer's compute dtype.
    """

    tied: bool
    soft_cap: float | None
    dtype: str | None


def reversible_settings(layer: keras.layers.Layer) -> ReversibleSettings:
    """Return how a `ReversibleEmbedding` projects hidden states to logits."""
    names = ("tie_weights", "logit_soft_cap", "reverse_dtype")
    return ReversibleSettings(*(private(layer, name, KERAS) for name in names))


def ties_embeddings(backbone: keras.Model | None) -> bool | None:
    """Tell whether a backbone's head is its token embedding; None where it does not show it."""
    return getattr(getattr(backbone, "token_embedding", None), "tie_weights", None)


def python_tokenizer(tokenizer: object) -> tokenizers.Tokenizer | None:
    """Return the `tokenizers.Tokenizer` in a byte-pair tokenizer (KerasHub 0.32); None without one.

    KerasHub's Python path runs on it. There is no public way to it.
    """
    return getattr(tokenizer, "_tokenizer", None)
