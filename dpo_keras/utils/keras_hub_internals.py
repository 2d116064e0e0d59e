"""Private API of KerasHub, written for KerasHub 0.32: each use is one function."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

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
