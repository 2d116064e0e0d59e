"""Tokenizers as TensorFlow ops that a server runs, with the ids that training saw."""

from __future__ import annotations

import json
from collections.abc import Callable

import keras_hub
import numpy as np
import tensorflow as tf
import tensorflow_text as tf_text
import tokenizers

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.serving.word_patterns import (
    BYTE_CHARACTERS,
    kept_places,
    literal,
    read_rules,
    split,
)
from dpo_keras.utils import JSON, Tensor
from dpo_keras.utils.keras_hub_tokenizers import python_tokenizer

_NO_RANK = np.iinfo(np.int64).max


class GraphTokenizer(tf.Module):
    """A tokenizer in a graph; a `tf.Module`, so that its tables are saved with the graph."""

    def tokenize(self, texts: Tensor) -> tf.RaggedTensor:
        """Return int32 `[batch, (tokens)]` of valid UTF-8 `[batch]`; add no start or end token."""
        return self._ids(texts)

    def detokenize(self, ids: tf.RaggedTensor) -> Tensor:
        """Return texts `[batch]` of int32 `[batch, (tokens)]`; invalid UTF-8 becomes U+FFFD."""
        return tf.strings.unicode_transcode(self._bytes(ids), "UTF-8", "UTF-8")

    def _ids(self, texts: Tensor) -> tf.RaggedTensor:
        raise NotImplementedError

    def _bytes(self, ids: tf.RaggedTensor) -> Tensor:
        raise NotImplementedError


class BytePairGraph(GraphTokenizer):
    """A byte-level `tokenizers.Tokenizer` in a graph, with exactly its ids.

    KerasHub's own graph path is unfit for a server: it keeps every word in a table that grows
    without end, and cuts text into words by another rule than the Python path used in training.

    All stretches of the text are merged at once. Text is cut wherever no token of the vocabulary
    holds the two neighbouring bytes, because no merge can cross such a place. Within a stretch the
    pair of lowest rank is merged first, and the leftmost one of equal rank.
    """

    def __init__(self, backend: tokenizers.Tokenizer):
        super().__init__()
        specification = json.loads(backend.to_str())
        self.rules = read_rules(specification)
        vocabulary = backend.get_vocab(with_added_tokens=True)
        self.size = 1 + max(vocabulary.values())
        byte_of = {character: byte for byte, character in enumerate(BYTE_CHARACTERS)}
        self.byte_ids = np.array([vocabulary.get(c, -1) for c in BYTE_CHARACTERS], np.int64)
        self._read_merges(specification["model"], byte_of)

        self.texts = np.full(self.size, b"", object)
        for token, number in vocabulary.items():
            spelled = all(c in byte_of for c in token)
            self.texts[number] = bytes(byte_of[c] for c in token) if spelled else token.encode()

        added = specification["added_tokens"]
        # Tokens of the first kind are found in the text as it was written.
        self.written, self.normalized = (
            _SpecialTokens({t["content"]: t["id"] for t in added if t["normalized"] == kind})
            for kind in (False, True)
        )
        self.whole_words: tf.lookup.StaticHashTable | None = None
        if self.rules.whole_words:
            words = specification["model"]["vocab"].items()
            ids = [number for token, number in words if set(token) <= byte_of.keys()]
            self.whole_words = _table([self.texts[number] for number in ids], ids, default=-1)
        # Traced once, for all signatures. String ops and lookup tables run on the CPU only.
        texts = [tf.TensorSpec([None], tf.string)]
        with tf.device("CPU:0"):
            tokenize = tf.function(self._tokenize, input_signature=texts, autograph=False)
            self._traced = tokenize.get_concrete_function()

    def _read_merges(self, model: dict[str, JSON], byte_of: dict[str, int]) -> None:
        vocabulary = model["vocab"]
        merges = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in model["merges"]]
        left = np.array([vocabulary[a] for a, _ in merges], np.int64)
        right = np.array([vocabulary[b] for _, b in merges], np.int64)
        made = np.array([vocabulary[a + b] for a, b in merges], np.int64)
        # Of two rules for one pair the last counts, as in the tokenizers library.
        ranks = {key: rank for rank, key in enumerate((left * self.size + right).tolist())}
        self.ranks = _table(list(ranks) or [-1], list(ranks.values()) or [_NO_RANK], _NO_RANK)
        self.made = np.append(made, -1)
        # Where every token is made before it is used, all equal pairs can be merged in one step:
        # no pair that a merge brings about could come before the pairs that are left.
        maker = np.full(self.size, -1, np.int64)
        np.maximum.at(maker, made, np.arange(len(made)))
        self.ordered = bool((np.maximum(maker[left], maker[right]) < np.arange(len(made))).all())
        neighbours = np.zeros((256, 256), bool)
        for a, b in merges:
            token = [byte_of[c] for c in a + b]
            neighbours[token[:-1], token[1:]] = True
        self.neighbours = neighbours.reshape(-1)

    def _ids(self, texts: Tensor) -> tf.RaggedTensor:
        return self._traced(texts)

    def _bytes(self, ids: tf.RaggedTensor) -> Tensor:
        pieces = ids.with_values(tf.gather(tf.constant(self.texts), ids.values))
        return tf.strings.reduce_join(pieces, axis=-1)

    def _tokenize(self, texts: Tensor) -> tf.RaggedTensor:
        words, row, special = self._words(texts)
        # One byte stands for a special token, whose id is known already.
        spelled = tf.where(special >= 0, "x", words)
        word = tf.repeat(tf.range(tf.size(words)), tf.strings.length(spelled))
        data = tf.cast(tf.io.decode_raw(tf.strings.reduce_join(spelled), tf.uint8), tf.int32)
        given = tf.gather(special, word)
        ids = tf.where(given >= 0, given, tf.gather(tf.constant(self.byte_ids), data))
        known = kept_places(ids >= 0)  # the tokenizers library skips bytes that have no token
        ids, word, data = (tf.gather(values, known) for values in (ids, word, data))
        joined = tf.gather(tf.constant(self.neighbours), data[:-1] * 256 + data[1:])
        cut = tf.pad((word[1:] != word[:-1]) | ~joined, [[1, 0]])[: tf.size(ids)]
        ids, word = self._merge(ids, word, tf.cumsum(tf.cast(cut, tf.int32)))
        return tf.RaggedTensor.from_value_rowids(
            tf.cast(ids, tf.int32),
            tf.gather(row, word),
            nrows=tf.size(texts, tf.int64),
            validate=False,
        )

    def _words(self, texts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return words `[n]`, the row of `texts` of each, and its id if it is special, else -1."""
        row = tf.range(tf.size(texts, tf.int64))
        cut = texts, row, tf.fill(tf.shape(texts), tf.constant(-1, tf.int64))
        if self.written.pattern:
            cut = _cut(*cut, self.written.split)
            cut = self.written.identify(*cut)
        if self.rules.composes:
            words, row, special = cut
            cut = tf.where(special < 0, tf_text.normalize_utf8(words, "NFC"), words), row, special
        if self.normalized.pattern:
            cut = _cut(*cut, self.normalized.split)
            cut = self.normalized.identify(*cut)
        for step in self.rules.steps:
            cut = _spaced(*cut) if step is None else _cut(*cut, step.split)
        words, row, special = cut
        if self.whole_words is not None:
            special = tf.where(special < 0, self.whole_words.lookup(words), special)
        return words, row, special

    def _merge(self, ids: Tensor, word: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
        """Apply the merge rules until none is left."""

        def find(ids: Tensor, stretch: Tensor) -> tuple[Tensor, Tensor]:
            stretch_of_pair = stretch[:-1]
            ranks = self.ranks.lookup(ids[:-1] * self.size + ids[1:])
            ranks = tf.where(stretch[1:] == stretch_of_pair, ranks, _NO_RANK)
            best = tf.math.unsorted_segment_min(ranks, stretch_of_pair, tf.size(ids))
            chosen = (ranks < _NO_RANK) & (ranks == tf.gather(best, stretch_of_pair))
            if self.ordered:
                return ranks, _every_other(chosen)
            return ranks, _first_of_each(chosen, stretch_of_pair)

        def body(
            ids: Tensor, word: Tensor, stretch: Tensor, ranks: Tensor, chosen: Tensor
        ) -> tuple[Tensor, ...]:
            made = tf.gather(tf.constant(self.made), tf.where(chosen, ranks, 0))
            ids = tf.concat([tf.where(chosen, made, ids[:-1]), ids[-1:]], axis=0)
            left = kept_places(tf.concat([[True], ~chosen], axis=0))
            ids, word, stretch = (tf.gather(values, left) for values in (ids, word, stretch))
            return ids, word, stretch, *find(ids, stretch)

        ids, word, *_ = tf.while_loop(
            lambda ids, word, stretch, ranks, chosen: tf.reduce_any(chosen),
            body,
            (ids, word, stretch, *find(ids, stretch)),
            shape_invariants=(tf.TensorShape([None]),) * 5,
        )
        return ids, word


class _SpecialTokens(tf.Module):
    """Tokens that are looked for in a text before it is cut into words."""

    def __init__(self, ids: dict[str, int]):
        super().__init__()
        # The longest first: the tokenizers library takes the longest match where several begin.
        self.pattern = "|".join(map(literal, sorted(ids, key=len, reverse=True)))
        self.ids = _table(list(ids) or [""], list(ids.values()) or [-1], default=-1)

    def split(self, texts: Tensor) -> tf.RaggedTensor:
        return split(texts, self.pattern)

    def identify(self, words: Tensor, row: Tensor, special: Tensor) -> tuple[Tensor, ...]:
        """Fill in the ids of words that are such tokens."""
        return words, row, tf.where(special < 0, self.ids.lookup(words), special)


def _cut(
    words: Tensor, row: Tensor, special: Tensor, split: Callable[[Tensor], tf.RaggedTensor]
) -> tuple[Tensor, ...]:
    """Cut words into pieces; a special token stays whole."""
    pieces = split(tf.where(special < 0, words, "x"))  # one letter is one piece
    origin = pieces.value_rowids()
    kind = tf.gather(special, origin)
    values = tf.where(kind < 0, pieces.values, tf.gather(words, origin))
    return values, tf.gather(row, origin), kind


def _spaced(words: Tensor, row: Tensor, special: Tensor) -> tuple[Tensor, ...]:
    """Put a space before each word that begins without one."""
    bare = (special < 0) & ~tf.strings.regex_full_match(words, r"(?s) .*|")
    return tf.where(bare, tf.strings.join([" ", words]), words), row, special


def _every_other(chosen: Tensor) -> Tensor:
    """Keep every other one of chosen places side by side, which overlap, from the left."""
    first = chosen & ~tf.pad(chosen, [[1, 0]])[:-1]
    place = tf.range(tf.size(chosen))
    begins = tf.concat([tf.gather(place, kept_places(first)), [0]], axis=0)
    begin = tf.gather(begins, tf.maximum(tf.cumsum(tf.cast(first, tf.int32)) - 1, 0))
    return chosen & ((place - begin) % 2 == 0)


def _first_of_each(chosen: Tensor, stretch: Tensor) -> Tensor:
    """Keep the first of the chosen places in each stretch."""
    place = tf.range(tf.size(chosen))
    candidates = tf.where(chosen, place, place.dtype.max)
    first = tf.math.unsorted_segment_min(candidates, stretch, tf.size(chosen) + 1)
    return chosen & (place == tf.gather(first, stretch))


def _table(
    keys: list[str] | list[bytes] | list[int], values: list[int], default: int
) -> tf.lookup.StaticHashTable:
    keys = tf.constant(keys, tf.int64 if isinstance(keys[0], int) else tf.string)
    initializer = tf.lookup.KeyValueTensorInitializer(keys, tf.constant(values, tf.int64))
    return tf.lookup.StaticHashTable(initializer, default)


class SentencePieceGraph(GraphTokenizer):
    """A serialized SentencePiece model as tensorflow_text's ops."""

    def __init__(self, proto: bytes):
        super().__init__()
        self.model = tf_text.SentencepieceTokenizer(model=proto, out_type=tf.int32)

    def _ids(self, texts: Tensor) -> tf.RaggedTensor:
        return self.model.tokenize(texts)

    def _bytes(self, ids: tf.RaggedTensor) -> Tensor:
        return self.model.detokenize(ids)


class TracedTokenizer(GraphTokenizer):
    """Any other KerasHub tokenizer without a cache, such as `ByteTokenizer`, traced."""

    def __init__(self, tokenizer: keras_hub.tokenizers.Tokenizer):
        super().__init__()
        # The tokenizer itself would be saved as a Keras layer. Its methods are traced here, because
        # eager calls take another path.
        texts = tf.TensorSpec([None], tf.string)
        ids = tf.RaggedTensorSpec([None, None], tf.int32)
        self._tokenize = tf.function(tokenizer.tokenize, input_signature=[texts])
        self._detokenize = tf.function(tokenizer.detokenize, input_signature=[ids])
        held = vars(tokenizer).values()
        self.resources = [
            v for v in held if isinstance(v, tf.Module) or hasattr(v, "resource_handle")
        ]

    def _ids(self, texts: Tensor) -> tf.RaggedTensor:
        ids = self._tokenize(texts)
        ids = tf.RaggedTensor.from_tensor(ids) if isinstance(ids, tf.Tensor) else ids
        return tf.cast(ids, tf.int32)

    def _bytes(self, ids: tf.RaggedTensor) -> Tensor:
        return self._detokenize(ids)


def graph_tokenizer(tokenizer: keras_hub.tokenizers.Tokenizer) -> GraphTokenizer:
    """Choose the form in which a policy's tokenizer goes into the graph."""
    kind = type(tokenizer).__name__
    if isinstance(tokenizer, keras_hub.tokenizers.BytePairTokenizer):
        backend = python_tokenizer(tokenizer)
        if backend is None:
            rule = f"has a {kind} with a cache that grows with every new word it serves"
            hint = (
                "Use a KerasHub release whose byte-pair tokenizers run on the tokenizers library "
                "(0.32 does), without _allow_python_workflow=False."
            )
            raise InputError(InputProblem("policy", rule, hint=hint))
        return BytePairGraph(backend)
    proto = getattr(tokenizer, "proto", None)
    plain = keras_hub.tokenizers.SentencePieceTokenizer.tokenize
    if isinstance(proto, bytes) and type(tokenizer).tokenize is plain:
        return SentencePieceGraph(proto)
    if isinstance(tokenizer, keras_hub.tokenizers.Tokenizer):
        return TracedTokenizer(tokenizer)
    rule = f"has a tokenizer ({kind}) that is not KerasHub's, so it cannot be put into the graph"
    hint = "Export with preprocessor=<a KerasHub preprocessor>."
    raise InputError(InputProblem("policy", rule, hint=hint))
