"""Byte-pair tokens are those that the vocabulary was made for, and KerasHub still has the names."""

import json

import keras_hub
import pytest
import tensorflow as tf
from tokenizers import ByteLevelBPETokenizer, Regex, pre_tokenizers

from dpo_keras.batching import TextEncoder
from dpo_keras.serving.word_patterns import WordPattern
from dpo_keras.utils.keras_hub_tokenizers import (
    WORD_SPLITS,
    fast_byte_pair_encoding,
    mend_word_splits,
)

TEXTS = [
    "\n\nHuman: How do I bake bread?\n\nAssistant: Mix flour, water  and   yeast.",
    "It's 12345 degrees;  they've   gone…\n\n\n  indented\ttabs \n",
    "Grüße, 日本語 und 🙂🙂!! we'll see",
    "   ",
]


@pytest.fixture(scope="module")
def original():
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(TEXTS * 20, vocab_size=500, special_tokens=["<|endoftext|>"])
    return trainer


@pytest.fixture(scope="module")
def tokenizer(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bpe")
    original.save_model(str(folder))
    vocabulary = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)


def test_gpt2_text_gets_the_tokens_of_the_original_library(original, tokenizer):
    expected = [original.encode(text).ids for text in TEXTS]
    assert TextEncoder(tokenizer).tokenize(TEXTS) == expected
    # KerasHub's own call on the same tokenizer agrees from then on, so generate() does too.
    assert [list(ids) for ids in tokenizer(TEXTS)] == expected


def test_kerashub_still_has_the_private_names_that_are_used(tokenizer):
    """KerasHub 0.32: `BytePairTokenizer.tokenize`, `_tokenizer` and `_use_tf_workflow`."""
    assert mend_word_splits(tokenizer), "KerasHub moved its backend: see mend_word_splits"
    encode = fast_byte_pair_encoding(tokenizer)
    assert encode is not None, "KerasHub moved tokenize or its backend: see fast_byte_pair_encoding"
    assert encode(TEXTS) == [list(ids) for ids in tokenizer(TEXTS)]


def test_the_families_with_word_splits_are_those_of_kerashub():
    missing = [name for name in WORD_SPLITS if not hasattr(keras_hub.models, name)]
    assert not missing, f"KerasHub renamed these tokenizers: {missing}"


@pytest.mark.parametrize(("name", "words"), [("Llama3Tokenizer", 2), ("QwenTokenizer", 5)])
def test_llama_3_cuts_numbers_by_three_digits_and_qwen_by_one(name, words):
    split = pre_tokenizers.Split(Regex(WORD_SPLITS[name]), behavior="isolated")
    assert len(split.pre_tokenize_str("12345")) == words
    assert [word for word, _ in split.pre_tokenize_str("a\n\nb  c")] == [
        "a",
        "\n\n",
        "b",
        " ",
        " c",
    ]


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("Qwen3MoeTokenizer", "e\u0301t", ["e", "\u0301t"]),
        ("Qwen3_5Tokenizer", "e\u0301t", ["e\u0301t"]),
        ("GptOssTokenizer", "helloWorld's 12345", ["hello", "World's", " ", "123", "45"]),
        ("BloomTokenizer", "don't (stop), 12a", ["don't", " (", "stop", "),", " 12a"]),
        ("FalconTokenizer", "don't 12a", ["don", "'t", " 12", "a"]),
    ],
)
def test_each_family_cuts_words_as_its_vocabulary_was_made_for(name, text, words):
    split = pre_tokenizers.Split(Regex(WORD_SPLITS[name]), behavior="isolated")
    assert [word for word, _ in split.pre_tokenize_str(text)] == words
    # A served graph does the same.
    found = WordPattern.read({"Regex": WORD_SPLITS[name]}).split(tf.constant([text]))
    assert [word.decode() for word in found[0].numpy()] == words


def test_other_tokenizers_stay_as_they_are():
    class Mine:
        def tokenize(self, texts):
            return [[1]] * len(texts)

    assert not mend_word_splits(Mine())
