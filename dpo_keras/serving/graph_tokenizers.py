"""A policy's tokenizer as TensorFlow ops: strings to ids and back inside a SavedModel."""

from __future__ import annotations

from typing import Any, Protocol

import keras_hub
import tensorflow as tf
import tensorflow_text as tf_text

from dpo_keras.errors import InputError
from dpo_keras.serving.byte_pair import BytePairGraph


class GraphTokenizer(Protocol):
    """What the graph needs of a tokenizer; a `tf.Module`, so that its tables are saved with it."""

    def tokenize(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """String `[batch]` to int32 `[batch, (tokens)]`, without start or end token."""

    def detokenize(self, ids: tf.RaggedTensor) -> tf.Tensor:
        """int32 `[batch, (tokens)]` to string `[batch]`, valid UTF-8."""


class SentencePieceGraph(tf.Module):
    """A SentencePiece model as tensorflow_text's ops.

    Args:
        proto: the serialized SentencePiece model.
    """

    def __init__(self, proto: bytes):
        super().__init__()
        self.model = tf_text.SentencepieceTokenizer(model=proto, out_type=tf.int32)

    def tokenize(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """String `[batch]` to int32 `[batch, (tokens)]`."""
        return self.model.tokenize(texts)

    def detokenize(self, ids: tf.RaggedTensor) -> tf.Tensor:
        """int32 `[batch, (tokens)]` to string `[batch]`; invalid UTF-8 becomes U+FFFD."""
        return tf.strings.unicode_transcode(self.model.detokenize(ids), "UTF-8", "UTF-8")


class TracedTokenizer(tf.Module):
    """Any other KerasHub tokenizer, by the path that it takes itself when it is traced.

    Args:
        tokenizer: a KerasHub tokenizer without a cache, such as `ByteTokenizer`.
    """

    def __init__(self, tokenizer: Any):
        super().__init__()
        # Not the tokenizer itself: as a Keras layer it would be saved as one. Traced, because
        # called as they are they would take another path.
        texts = tf.TensorSpec([None], tf.string)
        ids = tf.RaggedTensorSpec([None, None], tf.int32)
        self._tokenize = tf.function(tokenizer.tokenize, input_signature=[texts])
        self._detokenize = tf.function(tokenizer.detokenize, input_signature=[ids])
        self.resources = [v for v in vars(tokenizer).values() if _holds_a_table(v)]

    def tokenize(self, texts: tf.Tensor) -> tf.RaggedTensor:
        """String `[batch]` to int32 `[batch, (tokens)]`."""
        ids = self._tokenize(texts)
        ids = tf.RaggedTensor.from_tensor(ids) if isinstance(ids, tf.Tensor) else ids
        return tf.cast(ids, tf.int32)

    def detokenize(self, ids: tf.RaggedTensor) -> tf.Tensor:
        """int32 `[batch, (tokens)]` to string `[batch]`; invalid UTF-8 becomes U+FFFD."""
        return tf.strings.unicode_transcode(self._detokenize(ids), "UTF-8", "UTF-8")


def _holds_a_table(value: Any) -> bool:
    return isinstance(value, tf.Module) or hasattr(value, "resource_handle")


def graph_tokenizer(tokenizer: Any) -> GraphTokenizer:
    """Chooses the form in which a tokenizer goes into the graph.

    Args:
        tokenizer: the policy's KerasHub tokenizer.

    Returns:
        A module that gives the ids that the tokenizer gives in Python (`check_tokenization` in
        `dpo_keras.serving.graph_encoder` makes sure).

    Raises:
        InputError: the tokenizer cannot run in a graph.

    Example:
        >>> tokenizer = keras_hub.tokenizers.ByteTokenizer()
        >>> graph_tokenizer(tokenizer).tokenize(tf.constant(["ab", ""])).to_list()
        [[97, 98], []]
    """
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        # KerasHub keeps the tokenizers library's object, which its Python path runs on, to itself.
        backend = getattr(tokenizer, "_tokenizer", None)
        if backend is None:
            raise InputError(
                f"policy: its {type(tokenizer).__name__} tokenizes by TensorFlow ops with a cache "
                "that grows with every new word it serves. Use a KerasHub release whose byte-pair "
                "tokenizers run on the tokenizers library (0.32 does), without "
                "_allow_python_workflow=False."
            )
        return BytePairGraph(backend)
    proto = getattr(tokenizer, "proto", None)
    plain = keras_hub.tokenizers.SentencePieceTokenizer.tokenize
    if isinstance(proto, bytes) and type(tokenizer).tokenize is plain:
        return SentencePieceGraph(proto)
    if isinstance(tokenizer, keras_hub.tokenizers.Tokenizer):
        return TracedTokenizer(tokenizer)
    raise InputError(
        f"policy: its tokenizer ({type(tokenizer).__name__}) is not a KerasHub tokenizer, so it "
        "cannot be put into the graph. Export with preprocessor=<a KerasHub preprocessor>."
    )
