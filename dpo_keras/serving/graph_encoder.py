"""Strings to batches inside a graph: what `dpo_keras.batching` does in Python."""

from __future__ import annotations

from collections.abc import Sequence

import tensorflow as tf

from dpo_keras.batching import Batch, ChatTemplate, TextEncoder, prompt_share, tokenize_pairs
from dpo_keras.batching.encoders import PROBES
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import PreferencePair
from dpo_keras.serving.graph_templates import read_turns
from dpo_keras.serving.graph_tokenizers import graph_tokenizer
from dpo_keras.utils import Tensor


class GraphEncoder(tf.Module):
    """Tokenizes prompts and responses as `tokenize_pairs` does, and lays them out as batches.

    `ends` are ids that count as a response's end token. Generation stops at `stops`: at `ends`, and
    at the template's own end of turn.
    """

    def __init__(self, preprocessor: object, max_length: int, template: ChatTemplate | None = None):
        super().__init__()
        encoder = TextEncoder(preprocessor)
        self.tokenizer = graph_tokenizer(encoder.tokenizer)
        self.max_length = max_length
        self.start, self.end, self.pad = encoder.start, encoder.end, encoder.pad
        self.ends = sorted(encoder.ends)
        self.stops = self.ends
        self._anchor = (encoder.anchor, encoder.anchor_length)
        self._turns = None
        # The template "plain" leaves strings as they are.
        if template is not None and template.name != "plain":
            self._turns = read_turns(encoder, template)
            self.stops = sorted({*self.ends, *self._turns[1].after[:1]})

    def prompts(self, texts: Tensor) -> tf.RaggedTensor:
        """Tokenize prompts `[batch]`, start token included: int32 `[batch, (tokens)]`."""
        # String ops and lookup tables run on the CPU only.
        with tf.device("CPU:0"):
            texts = _valid(texts)
            if self._turns is None:
                ids = self.tokenizer.tokenize(texts)
            else:
                ids = self._turns[0].tokenize(texts, self.tokenizer, *self._anchor)
        if self.start is None:
            return ids
        return tf.concat([rows_of(self.start, ~self._begins(ids)), ids], axis=1)

    def responses(self, texts: Tensor) -> tf.RaggedTensor:
        """Tokenize responses `[batch]`, end token included: int32 `[batch, (tokens)]`."""
        with tf.device("CPU:0"):
            texts = _valid(texts)
            if self._turns is None:
                anchor, length = self._anchor
                ids = self.tokenizer.tokenize(tf.strings.join([anchor, texts]))[:, length:]
            else:
                ids = self._turns[1].tokenize(texts, self.tokenizer, *self._anchor)
        last = tf.gather(tf.pad(ids.values, [[1, 0]], constant_values=-1), ids.row_limits())
        ended = (ids.row_lengths() > 0) & _among(last, self.ends)
        return tf.concat([ids, rows_of(self.end, ~ended)], axis=1)

    def truncate_prompts(self, ids: tf.RaggedTensor, room: Tensor) -> tf.RaggedTensor:
        """Cut prompts from the left to `room` tokens; the start token stays, and one more."""
        lengths = ids.row_lengths()
        begins = tf.cast(self._begins(ids), tf.int64)
        kept = tf.minimum(lengths, tf.maximum(room, tf.minimum(begins + 1, lengths)))
        tail = _cut(ids, lengths - kept + begins, lengths)
        return tf.concat([_cut(ids, tf.zeros_like(begins), begins), tail], axis=1)

    def encode(
        self, prompts: Tensor, responses: Sequence[Tensor]
    ) -> tuple[tf.RaggedTensor, list[tf.RaggedTensor]]:
        """Tokenize and truncate to `max_length`: prompts from the left, then responses.

        The longest response of a row decides how much of its prompt is cut, to `prompt_share`.
        """
        prompt = self.prompts(prompts)
        parts = [self.responses(texts) for texts in responses]
        longest = tf.reduce_max(tf.stack([part.row_lengths() for part in parts]), axis=0)
        least = tf.constant(prompt_share(self.max_length), tf.int64)
        prompt = self.truncate_prompts(prompt, tf.maximum(self.max_length - longest, least))
        room = self.max_length - prompt.row_lengths()
        return prompt, [_first(part, tf.minimum(part.row_lengths(), room)) for part in parts]

    def batch(self, prompts: Tensor, responses: Sequence[Tensor]) -> Batch:
        """Tokenize, truncate and lay out one row per prompt, with one or two responses.

        A response's first token counts only where something comes before it: an empty prompt under
        a tokenizer without start token predicts nothing.
        """
        prompt, parts = self.encode(prompts, responses)
        before = prompt.row_lengths()
        sequences = [tf.concat([prompt, part], axis=1) for part in parts]
        used = tf.stack([sequence.row_lengths() for sequence in sequences], axis=1)
        length = tf.maximum(tf.reduce_max(used), 1)
        # One position at least, because attention that sees nothing gives NaN.
        mask = tf.sequence_mask(tf.maximum(used, 1), length, tf.int32)
        unpredicted = tf.cast(before == 0, tf.int64)
        source, target, owner = [], [], []
        for number, part in enumerate(parts):
            scored = _cut(part, tf.minimum(unpredicted, part.row_lengths()), part.row_lengths())
            count = scored.row_lengths()
            # The token at position t is predicted by the hidden state at t - 1.
            first = number * length + before + unpredicted - 1
            source.append(tf.cast(tf.ragged.range(first, first + count), tf.int32))
            target.append(scored)
            owner.append(scored.with_values(tf.fill(tf.shape(scored.values), number)))
        shape = tf.stack([tf.constant(-1, tf.int64), length])
        dense = [sequence.to_tensor(self.pad, shape=shape) for sequence in sequences]
        return {
            "token_ids": tf.stack(dense, axis=1),
            "padding_mask": mask,
            "source": _slots(source, 0),
            "target": _slots(target, 0),
            "owner": _slots(owner, -1),
            "weight": tf.ones_like(used[:, :1], tf.float32),
            **neutral_columns(tf.shape(used)[0]),
        }

    def _begins(self, ids: tf.RaggedTensor) -> Tensor:
        """Tell which rows begin with the start token."""
        starts = [] if self.start is None else [self.start]
        first = tf.gather(tf.pad(ids.values, [[0, 1]], constant_values=-1), ids.row_starts())
        return (ids.row_lengths() > 0) & _among(first, starts)


def neutral_columns(rows: int | Tensor) -> Batch:
    """Return the columns that some losses ask for, though no score depends on them: all 0."""
    return {"margin": tf.zeros([rows, 1]), "group": tf.zeros([rows, 1], tf.int32)}


def check_tokenization(
    graph: GraphEncoder,
    preprocessor: object,
    template: ChatTemplate | None = None,
    texts: Sequence[str] = PROBES,
) -> None:
    """Raise InputError for the first text to which the graph gives other ids than training."""
    special = TextEncoder(preprocessor).special_tokens + list(template.markers if template else ())
    texts = [*texts, *(f"a {token} b{token}" for token in special[:20])]
    texts = [text for text in texts if text.strip()]
    others = texts[1:] + texts[:1]
    pairs = [PreferencePair(*row, "x") for row in zip(texts, others, strict=True)]
    expected = tokenize_pairs(pairs, preprocessor, max_length=graph.max_length, template=template)
    kept = range(len(pairs)) if expected.source is None else expected.source
    kind = type(TextEncoder(preprocessor).tokenizer).__name__
    try:
        # The tokenizer runs as a graph here, too. What the encoder adds runs op by op: to trace it
        # takes longer, and each signature does so later.
        prompt, parts = graph.encode(
            tf.constant(texts), [tf.constant(others), tf.fill([len(texts)], "x")]
        )
    except (ValueError, TypeError, tf.errors.OpError) as error:
        rule = f"has a tokenizer ({kind}) that cannot run in a graph: {str(error).splitlines()[0]}"
        raise InputError(InputProblem("policy", rule)) from error
    columns = (
        ("prompt", expected.prompt, prompt, texts),
        ("response", expected.chosen, parts[0], others),
    )
    for name, python, found, given in columns:
        for row, number in enumerate(kept):
            ids = found[number].numpy().tolist()
            if ids != python[row].tolist():
                rule = (
                    f"has a tokenizer ({kind}) that gives other ids in a graph than in training, "
                    "so the served model would not be the one that was trained. For the "
                    f"{name} {given[number]!r}: {python[row].tolist()} in training, {ids} in the "
                    "graph"
                )
                raise InputError(InputProblem("policy", rule))


def _valid(texts: Tensor) -> Tensor:
    # A request may hold any bytes; patterns and tokenizers expect UTF-8.
    return tf.strings.unicode_transcode(texts, "UTF-8", "UTF-8")


def rows_of(token: int, wanted: Tensor) -> tf.RaggedTensor:
    """Return one token in each row where it is wanted `[batch]`, none in the others."""
    count = tf.cast(wanted, tf.int64)
    tokens = tf.repeat(tf.constant(token, tf.int32), tf.reduce_sum(count))
    return tf.RaggedTensor.from_row_lengths(tokens, count, validate=False)


def _among(ids: Tensor, wanted: Sequence[int]) -> Tensor:
    return tf.reduce_any(ids[:, None] == tf.constant(list(wanted), tf.int32)[None, :], axis=1)


def _cut(ids: tf.RaggedTensor, starts: Tensor, stops: Tensor) -> tf.RaggedTensor:
    """Make row i `ids[i, starts[i]:stops[i]]`."""
    begins = ids.row_starts()
    places = tf.ragged.range(begins + starts, begins + stops, row_splits_dtype=tf.int64)
    return places.with_values(tf.gather(ids.values, places.values))


def _first(ids: tf.RaggedTensor, count: Tensor) -> tf.RaggedTensor:
    return _cut(ids, tf.zeros_like(count), count)


def _slots(parts: Sequence[tf.RaggedTensor], fill: int) -> Tensor:
    # An empty slot behind all others: a batch of empty responses still has a slot.
    dense = tf.concat(list(parts), axis=1).to_tensor(fill)
    return tf.pad(dense, [[0, 0], [0, 1]], constant_values=fill)
