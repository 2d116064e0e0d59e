"""Tiny policies with real tokenizers: byte-level BPE, and SentencePiece of two kinds."""

import functools
import itertools
from collections import Counter

import keras
import keras_hub
from assembling import GEMMA_PIECES, assemble, sentence_pieces
from tokenizers import pre_tokenizers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock!",
    "Hello, how are you? I am fine, thanks; don't worry.",
    "Please reset my password\nfor account 99-12.  Two  spaces.",
    "Ünïcödé text – naïve café 東京 你好 🙂",
] * 3
LENGTH = 64
GEMMA4_MARKS = ["<|turn>", "<turn|>", "<|image>", "<|image|>", "<image|>", "<|video|>"]
GROUPED = {"num_query_heads": 4, "num_key_value_heads": 2}


@functools.cache
def bpe(merges=140):
    """Vocabulary and merges of a byte-level BPE whose end of text is not the pad id 0.

    Trained here, because the trainer of the tokenizers library breaks ties by chance.
    """
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False)
    words = Counter(tuple(word) for text in CORPUS for word, _ in cut.pre_tokenize_str(text))
    tokens = ["<pad>", "<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    rules = []
    for _ in range(merges):
        pairs = Counter()
        for word, count in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += count
        best = max(pairs, key=lambda pair: (pairs[pair], pair))
        rules.append(" ".join(best))
        tokens.append("".join(best))
        words = Counter({_merge(word, best): count for word, count in words.items()})
    tokens = list(dict.fromkeys(tokens))
    return {token: number for number, token in enumerate(tokens)}, rules


def _merge(word, pair):
    merged, place = [], 0
    while place < len(word):
        width = 2 if word[place : place + 2] == pair else 1
        merged.append("".join(word[place : place + width]))
        place += width
    return tuple(merged)


def sentencepiece(kind):
    vision = ["<start_of_image>", "<img>", "<end_of_image>"]
    turns = ["<start_of_turn>", "<end_of_turn>"]
    options = {
        "gemma": {**GEMMA_PIECES, "user_defined_symbols": turns + vision},
        "gemma4": {**GEMMA_PIECES, "user_defined_symbols": GEMMA4_MARKS},
        "llama": {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2},
    }
    return sentence_pieces(CORPUS, 340, **options[kind])


def _scattered(seed, family, tokenizer, preprocessing=None, **sizes):
    """Large weights, so that the likeliest token is never in doubt."""
    preprocessing = {"sequence_length": LENGTH, **(preprocessing or {})}
    sizes = {"num_layers": 2, "hidden_dim": 32, "intermediate_dim": 64, **sizes}
    policy = assemble(family, tokenizer, preprocessing, **sizes)
    random = keras.random.SeedGenerator(seed)
    for weight in policy.backbone.weights:
        weight.assign(keras.random.normal(weight.shape, stddev=0.3, seed=random))
    return policy


def gpt2(seed=0, add_start_token=True, vocabulary=None):
    tokenizer = keras_hub.models.GPT2Tokenizer(*(vocabulary or bpe()))
    preprocessing = {"add_start_token": add_start_token}
    sizes = {"num_heads": 2, "max_sequence_length": LENGTH}
    return _scattered(seed, "GPT2", tokenizer, preprocessing, **sizes)


def qwen():
    """A tokenizer with the marks of turns and of reasoning, and one that only it looks up."""
    vocabulary, merges = bpe()
    special = ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    known = {text: len(vocabulary) + place for place, text in enumerate([*special, "<tool>"])}
    tokenizer = keras_hub.models.QwenTokenizer(
        {**vocabulary, **known}, merges, unsplittable_tokens=["<|endoftext|>", *special]
    )
    return keras_hub.models.QwenCausalLMPreprocessor(tokenizer, sequence_length=LENGTH)


def llama(seed=0):
    tokenizer = keras_hub.models.LlamaTokenizer(sentencepiece("llama"))
    return _scattered(seed, "Llama", tokenizer, **GROUPED)


def gemma3(seed=0):
    tokenizer = keras_hub.models.Gemma3Tokenizer(sentencepiece("gemma"))
    sizes = {
        **GROUPED,
        "image_size": 16,
        "head_dim": 8,
        "use_sliding_window_attention": True,
        "sliding_window_size": 8,
        "vision_encoder": None,
    }
    return _scattered(seed, "Gemma3", tokenizer, **sizes)


def gemma4(seed=0):
    """Keys and values shared by layers, inputs for each layer, windows: as in small Gemma 4."""
    tokenizer = keras_hub.models.Gemma4Tokenizer(sentencepiece("gemma4"))
    sizes = {
        **GROUPED,
        "image_size": 16,
        "num_layers": 3,
        "head_dim": 8,
        "global_head_dim": 16,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "sliding_window_size": 8,
        "num_kv_shared_layers": 1,
        "hidden_size_per_layer_input": 4,
        "final_logit_soft_cap": 30.0,
    }
    return _scattered(seed, "Gemma4", tokenizer, **sizes)


def plain(vocabulary_size, seed=0):
    """A Keras model that KerasHub knows nothing of."""
    keras.utils.set_random_seed(seed)
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
    states = keras.layers.Embedding(vocabulary_size, 16, embeddings_initializer="normal")(token_ids)
    states = states * keras.ops.cast(padding_mask, "float32")[..., None]
    states = keras.layers.GRU(16, return_sequences=True)(states)
    logits = keras.layers.Dense(vocabulary_size, kernel_initializer="he_normal")(states)
    return keras.Model({"token_ids": token_ids, "padding_mask": padding_mask}, logits)
