"""New policies: random weights, and a byte-level BPE tokenizer trained on the training pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_keras.errors import InputError

if TYPE_CHECKING:
    from dpo_keras.app.config_sections import Scratch


def train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, special_tokens: tuple[str, ...]
) -> tuple[dict[str, int], list[str]]:
    """Trains a byte-level BPE on texts; the same texts give the same tokens.

    Args:
        texts: what to learn from.
        vocabulary_size: the most tokens it may have; few texts give fewer.
        special_tokens: they get the first ids, in this order.

    Returns:
        `(vocabulary, merges)` as KerasHub's `BytePairTokenizer` takes them: token to id, and
        "left right" lines in order of priority.

    Raises:
        InputError: if there is no text.

    Example:
        >>> vocabulary, merges = train_tokenizer(["low lower"] * 9, 300, ("<|endoftext|>",))
        >>> vocabulary["<|endoftext|>"], merges[0]
        (0, 'l o')
    """
    import itertools
    import json

    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    some = filter(None, texts)
    first = next(some, None)
    if first is None:
        raise InputError("a tokenizer needs text to learn from; there is no training pair.")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        min_frequency=2,
        special_tokens=list(special_tokens),
        # All 256 bytes, so that no text is unknown.
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(itertools.chain([first], some), trainer=trainer)
    learned = json.loads(bpe.to_str())["model"]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in learned["merges"]]
    return dict(sorted(learned["vocab"].items(), key=lambda item: item[1])), merges


def _gpt2(sizes: Scratch, vocabulary: dict[str, int], merges: list[str], dtype: str) -> Any:
    import keras_hub.models as hub

    backbone = hub.GPT2Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=sizes.num_layers,
        num_heads=sizes.num_heads,
        hidden_dim=sizes.hidden_dim,
        intermediate_dim=sizes.intermediate_dim,
        max_sequence_length=sizes.max_sequence_length,
        dropout=sizes.dropout,
        dtype=dtype,
    )
    tokenizer = hub.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    preprocessor = hub.GPT2CausalLMPreprocessor(
        tokenizer, sequence_length=sizes.max_sequence_length
    )
    return hub.GPT2CausalLM(backbone=backbone, preprocessor=preprocessor)


def _llama(sizes: Scratch, vocabulary: dict[str, int], merges: list[str], dtype: str) -> Any:
    import keras_hub.models as hub

    backbone = hub.Llama3Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=sizes.num_layers,
        num_query_heads=sizes.num_heads,
        num_key_value_heads=sizes.num_heads,
        hidden_dim=sizes.hidden_dim,
        intermediate_dim=sizes.intermediate_dim,
        dropout=sizes.dropout,
        dtype=dtype,
    )
    tokenizer = hub.Llama3Tokenizer(vocabulary=vocabulary, merges=merges)
    preprocessor = hub.Llama3CausalLMPreprocessor(
        tokenizer, sequence_length=sizes.max_sequence_length
    )
    return hub.Llama3CausalLM(backbone=backbone, preprocessor=preprocessor)


class Family(NamedTuple):
    """How one architecture is built.

    Args:
        build: `(sizes, vocabulary, merges, dtype) -> keras_hub CausalLM`.
        special_tokens: what its KerasHub tokenizer asks for; the first gets id 0, which KerasHub
            pads with.
    """

    build: Callable[[Scratch, dict[str, int], list[str], str], Any]
    special_tokens: tuple[str, ...]


FAMILIES = {
    "gpt2": Family(_gpt2, ("<|endoftext|>",)),
    "llama": Family(
        _llama,
        (
            "<|end_of_text|>",
            "<|begin_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
        ),
    ),
}


def build_policy(sizes: Scratch, texts: Iterable[str], dtype: str = "float32") -> Any:
    """Builds a policy with random weights and a tokenizer trained on `texts`.

    Args:
        sizes: the configuration's `model.scratch`. Its `vocabulary_size` is an upper bound: the
            model gets as many embeddings as the tokenizer has tokens.
        texts: what the tokenizer learns from: the training pairs, never the held-out ones.
        dtype: Keras dtype policy.

    Returns:
        A `keras_hub.models.CausalLM`. Its weights follow `keras.utils.set_random_seed`.

    Raises:
        InputError: if there is no text.
    """
    family = FAMILIES[sizes.family]
    vocabulary, merges = train_tokenizer(texts, sizes.vocabulary_size, family.special_tokens)
    return family.build(sizes, vocabulary, merges, dtype)
