r"""Mends how KerasHub's byte-pair tokenizers cut text into words.

A byte-level BPE merges bytes within words only, and which words there are is up to a regular
expression that belongs to the vocabulary as much as its merges do. KerasHub 0.32 hands that
expression to the `tokenizers` library as a literal string, which never occurs in any text: nothing
is cut, merges run across words, and about a third of ordinary texts get tokens that the model was
not trained on (mostly around line feeds and runs of spaces). It also has one expression, Llama 3's,
for all families.

`mend_word_splits` puts the family's own expression in its place. It changes the tokenizer itself,
so that KerasHub's `generate` on the same model sees the same tokens.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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


def mend_word_splits(tokenizer: Any) -> bool:
    """Gives a KerasHub byte-pair tokenizer the word boundaries of its own family.

    Args:
        tokenizer: any tokenizer; only KerasHub's byte-pair ones of known families are changed, and
            only where their expression is the literal string described above.

    Returns:
        Whether the tokenizer cuts words by its family's expression now.

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


# What KerasHub 0.32's converters of Hugging Face checkpoints read beside the weights, by the
# `model_type` of config.json.
TOKENIZER_FILES = {
    "gpt2": ("vocab.json", "merges.txt"),
    "llama": ("tokenizer.json", "tokenizer_config.json"),
    **dict.fromkeys(("qwen2", "qwen3", "smollm3", "gpt_oss"), ("tokenizer.json",)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "mixtral"), ("tokenizer.model",)),
}


def save_preset(model: Any, directory: Path) -> None:
    """Write a KerasHub model as a preset directory that loads again.

    KerasHub 0.32 leaves `tie_word_embeddings` out of Llama's `get_config`, so that a model with
    tied embeddings would not load. Its files get it here.
    """
    model.save_to_preset(str(directory))
    tied = getattr(model.backbone, "tie_word_embeddings", None)
    if tied is None or "tie_word_embeddings" in model.backbone.get_config():
        return
    for name, keys in (("config.json", ()), ("task.json", ("config", "backbone"))):
        content = json.loads((directory / name).read_text(encoding="utf-8"))
        part = content
        for key in keys:
            part = part[key]
        part["config"]["tie_word_embeddings"] = tied
        (directory / name).write_text(json.dumps(content, indent=4), encoding="utf-8")
