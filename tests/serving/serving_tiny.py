"""Tiny policies with real tokenizers: byte-level BPE, and SentencePiece of two kinds."""

import functools
import io
import itertools
from collections import Counter

import keras
import keras_hub
from tokenizers import pre_tokenizers

CORPUS = [
    "The quick brown fox jumps over the lazy dog. It's 12345 o'clock!",
    "Hello, how are you? I am fine, thanks; don't worry.",
    "Please reset my password\nfor account 99-12.  Two  spaces.",
    "Ünïcödé text – naïve café 東京 你好 🙂",
] * 3
LENGTH = 64


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
    import sentencepiece

    gemma = {
        "pad_id": 0,
        "eos_id": 1,
        "bos_id": 2,
        "unk_id": 3,
        "pad_piece": "<pad>",
        "bos_piece": "<bos>",
        "eos_piece": "<eos>",
        "user_defined_symbols": [
            "<start_of_turn>",
            "<end_of_turn>",
            "<start_of_image>",
            "<img>",
            "<end_of_image>",
        ],
    }
    llama = {"pad_id": -1, "unk_id": 0, "bos_id": 1, "eos_id": 2}
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS),
        model_writer=file,
        vocab_size=340,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **(gemma if kind == "gemma" else llama),
    )
    return file.getvalue()


def _scatter(backbone, seed):
    # Large weights, so that the likeliest token is never in doubt.
    random = keras.random.SeedGenerator(seed)
    for weight in backbone.weights:
        weight.assign(keras.random.normal(weight.shape, stddev=0.3, seed=random))


def gpt2(seed=0, add_start_token=True, vocabulary=None):
    vocabulary, merges = vocabulary or bpe()
    preprocessor = keras_hub.models.GPT2CausalLMPreprocessor(
        keras_hub.models.GPT2Tokenizer(vocabulary, merges),
        sequence_length=LENGTH,
        add_start_token=add_start_token,
    )
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=len(vocabulary),
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
        max_sequence_length=LENGTH,
    )
    _scatter(backbone, seed)
    return keras_hub.models.GPT2CausalLM(backbone=backbone, preprocessor=preprocessor)


def llama(seed=0):
    tokenizer = keras_hub.models.LlamaTokenizer(sentencepiece("llama"))
    backbone = keras_hub.models.LlamaBackbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        hidden_dim=32,
        intermediate_dim=64,
    )
    _scatter(backbone, seed)
    preprocessor = keras_hub.models.LlamaCausalLMPreprocessor(tokenizer, sequence_length=LENGTH)
    return keras_hub.models.LlamaCausalLM(backbone=backbone, preprocessor=preprocessor)


def gemma3(seed=0):
    tokenizer = keras_hub.models.Gemma3Tokenizer(sentencepiece("gemma"))
    backbone = keras_hub.models.Gemma3Backbone(
        vocabulary_size=tokenizer.vocabulary_size(),
        image_size=16,
        num_layers=2,
        num_query_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        hidden_dim=32,
        intermediate_dim=64,
        use_sliding_window_attention=True,
        sliding_window_size=8,
        vision_encoder=None,
    )
    _scatter(backbone, seed)
    preprocessor = keras_hub.models.Gemma3CausalLMPreprocessor(tokenizer, sequence_length=LENGTH)
    return keras_hub.models.Gemma3CausalLM(backbone=backbone, preprocessor=preprocessor)


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
