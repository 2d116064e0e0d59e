"""Tiny policies of KerasHub's families, assembled around tokenizers that the tests train."""

import io

import keras_hub
import sentencepiece

# Which pieces stand where in Gemma's vocabulary.
GEMMA_PIECES = {
    "pad_id": 0,
    "eos_id": 1,
    "bos_id": 2,
    "unk_id": 3,
    "pad_piece": "<pad>",
    "bos_piece": "<bos>",
    "eos_piece": "<eos>",
}


def sentence_pieces(texts, vocab_size, **options):
    """Trains a SentencePiece model that falls back to bytes; returns its bytes."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        byte_fallback=True,
        hard_vocab_limit=False,
        minloglevel=2,
        **options,
    )
    return model.getvalue()


def assemble(family, tokenizer, preprocessing, **sizes):
    """A policy with its preprocessor, as large a vocabulary as its tokenizer has, fresh weights."""
    part = {
        name: getattr(keras_hub.models, family + name)
        for name in ("Backbone", "CausalLMPreprocessor", "CausalLM")
    }
    backbone = part["Backbone"](vocabulary_size=tokenizer.vocabulary_size(), **sizes)
    preprocessor = part["CausalLMPreprocessor"](tokenizer, **preprocessing)
    return part["CausalLM"](backbone=backbone, preprocessor=preprocessor)
