"""Tiny real tokenizers: a byte-level BPE as GPT-2's, SentencePiece as Llama's and as Gemma's."""

import io
import json

import keras_hub
import pytest
import sentencepiece
from tokenizers import ByteLevelBPETokenizer

from dpo_keras.preferences import PreferencePair

TEXTS = [
    "The quick brown fox jumped over the lazy dog. ",
    "Human: How do I bake bread at home?\n\nAssistant: Mix flour, water, salt and yeast.",
    "user model system assistant [INST] [/INST] <<SYS>> hello there, hello again",
    "Hi! Hello! yes no four five 2+2=4 why what when who",
] * 8


def byte_pairs(folder, *special):
    """Trains a byte-level BPE; returns vocabulary and merges, the special tokens first."""
    trainer = ByteLevelBPETokenizer()
    trainer.train_from_iterator(
        TEXTS, vocab_size=420, special_tokens=list(special), show_progress=False
    )
    trainer.save_model(str(folder))
    merges = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()[1:]
    return json.loads((folder / "vocab.json").read_text(encoding="utf-8")), merges


def sentence_pieces(**options):
    """Trains a byte-fallback SentencePiece model; returns its bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        # As in the real ones the line feed is no piece of its own, but a byte.
        sentence_iterator=(line for text in TEXTS for line in text.split("\n") if line),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        byte_fallback=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory):
    """GPT-2's preprocessor: the start token is the end token, pad is 0."""
    vocabulary, merges = byte_pairs(tmp_path_factory.mktemp("gpt2"), "!", "<|endoftext|>")
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary=vocabulary, merges=merges)
    return keras_hub.models.GPT2CausalLMPreprocessor(tokenizer, sequence_length=64)


@pytest.fixture(scope="session")
def llama3(tmp_path_factory):
    """Llama 3's preprocessor: distinct start and end, `<|eot_id|>` as a second end."""
    special = (
        "<|begin_of_text|>",
        "<|end_of_text|>",
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    )
    vocabulary, merges = byte_pairs(tmp_path_factory.mktemp("llama3"), "!", *special)
    tokenizer = keras_hub.models.Llama3Tokenizer(vocabulary=vocabulary, merges=merges)
    return keras_hub.models.Llama3CausalLMPreprocessor(tokenizer, sequence_length=64)


@pytest.fixture(scope="session")
def qwen(tmp_path_factory):
    """Qwen's preprocessor: no start token; ChatML marks, and those of reasoning, are tokens."""
    special = ("!", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
    vocabulary, merges = byte_pairs(tmp_path_factory.mktemp("qwen"), *special)
    tokenizer = keras_hub.models.QwenTokenizer(
        vocabulary=vocabulary, merges=merges, unsplittable_tokens=list(special[1:])
    )
    return keras_hub.models.QwenCausalLMPreprocessor(tokenizer, sequence_length=64)


@pytest.fixture(scope="session")
def llama():
    """Llama 2's preprocessor: SentencePiece that puts a word boundary before every text."""
    proto = sentence_pieces(add_dummy_prefix=True)
    return keras_hub.models.LlamaCausalLMPreprocessor(
        keras_hub.models.LlamaTokenizer(proto), sequence_length=64
    )


@pytest.fixture(scope="session")
def gemma():
    """Gemma's preprocessor: SentencePiece without that boundary, turn marks in the vocabulary."""
    proto = sentence_pieces(
        add_dummy_prefix=False,
        pad_id=0,
        eos_id=1,
        bos_id=2,
        unk_id=3,
        pad_piece="<pad>",
        bos_piece="<bos>",
        eos_piece="<eos>",
        user_defined_symbols=["<start_of_turn>", "<end_of_turn>"],
    )
    return keras_hub.models.GemmaCausalLMPreprocessor(
        keras_hub.models.GemmaTokenizer(proto), sequence_length=64
    )


class Letters:
    """One token per letter, so that lengths and ids can be read off the text."""

    start_token_id, end_token_id, pad_token_id = 1, 2, 0

    @staticmethod
    def tokenize(texts):
        return [[ord(letter) for letter in text] for text in texts]


@pytest.fixture
def letters():
    return Letters()


@pytest.fixture(scope="session")
def pair():
    """Makes a pair: pair(prompt, chosen, rejected, **fields)."""
    return PreferencePair
