"""Generation as a graph that a model server can run: no XLA, no Python."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import keras
import keras_hub
import tensorflow as tf

from dpo_keras.serving.graph_encoder import GraphEncoder, rows_of

Choose = Callable[[tf.Tensor], tf.Tensor]


@contextlib.contextmanager
def native_slice_update() -> Iterator[None]:
    """While this is open, `keras.ops.slice_update` is a plain TensorFlow op.

    KerasHub writes its key-value caches with `keras.ops.slice_update`, which is
    `XlaDynamicUpdateSlice` on TensorFlow. Model servers are built without XLA, and fail on it at
    the first request. `TensorStridedSliceUpdate` computes the same (start indices clamped so that
    the update fits), in place where it can. Replacing the function on the public module is enough,
    because models look it up there in each call.
    """
    original = keras.ops.slice_update

    def slice_update(inputs: Any, start_indices: Any, updates: Any) -> tf.Tensor:
        inputs = tf.convert_to_tensor(inputs)
        updates = tf.cast(updates, inputs.dtype)
        size = tf.shape(updates)
        start = tf.stack([tf.cast(index, tf.int32) for index in start_indices])
        start = tf.clip_by_value(start, 0, tf.shape(inputs) - size)
        updated = tf.raw_ops.TensorStridedSliceUpdate(
            input=inputs, begin=start, end=start + size, strides=tf.ones_like(start), value=updates
        )
        updated.set_shape(inputs.shape)
        return updated

    keras.ops.slice_update = slice_update
    try:
        yield
    finally:
        keras.ops.slice_update = original


def sampling(temperature: float, top_p: float) -> Choose:
    """How the next token is chosen.

    Args:
        temperature: 0 takes the likeliest token.
        top_p: with a temperature, the share of the probability to sample from.

    Returns:
        A function from probabilities `[batch, vocabulary]` (temperature applied) to int32
        `[batch]`. Sampling is fresh in every request.

    Example:
        >>> sampling(0.0, 1.0)(tf.constant([[0.1, 0.7, 0.2]])).numpy().tolist()
        [1]
        >>> sampling(1.0, 0.5)(tf.constant([[0.1, 0.7, 0.2]])).numpy().tolist()
        [1]
    """

    def greedy(probabilities: tf.Tensor) -> tf.Tensor:
        return tf.argmax(probabilities, axis=-1, output_type=tf.int32)

    def nucleus(probabilities: tf.Tensor) -> tf.Tensor:
        ranked, order = tf.math.top_k(probabilities, tf.shape(probabilities)[-1])
        before = tf.cumsum(ranked, axis=-1, exclusive=True)
        # Strictly below, so that the likeliest token always stays.
        logits = tf.math.log(tf.where(before < top_p, ranked, 0.0))
        # Both seeds 0: seeded by chance, where tf.random would bake the exporter's seed in.
        drawn = tf.raw_ops.Multinomial(
            logits=logits, num_samples=1, seed=0, seed2=0, output_dtype=tf.int32
        )
        return tf.gather(order, drawn, batch_dims=1)[:, 0]

    return greedy if temperature == 0 else nucleus


class _Sampler(keras_hub.samplers.Sampler):
    """A KerasHub sampler around a choice."""

    def __init__(self, choose: Choose, temperature: float):
        super().__init__(temperature=temperature or 1.0)
        self.choose = choose

    def get_next_token(self, probabilities: tf.Tensor) -> tf.Tensor:
        return self.choose(probabilities)


def prompt_ids(encoder: GraphEncoder, prompts: tf.Tensor, max_new_tokens: int) -> tf.RaggedTensor:
    """Tokenizes prompts for generation.

    Args:
        encoder: tokenizes; its `max_length` is the longest prompt and response together.
        prompts: string `[batch]`.
        max_new_tokens: room to leave for the response.

    Returns:
        int32 `[batch, (tokens)]`, at least one token each, cut from the left.
    """
    room = tf.constant(encoder.max_length - max_new_tokens, tf.int64)
    ids = encoder.truncate_prompts(encoder.prompts(prompts), room)
    # Something has to predict the first token; GPT-2 began its texts with the end token too.
    return tf.concat([rows_of(encoder.end, ids.row_lengths() == 0), ids], axis=1)


def generate_ids(
    policy: keras.Model,
    ids: tf.RaggedTensor,
    *,
    stops: list[int],
    pad: int,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
) -> tf.RaggedTensor:
    """Generates a response to each prompt.

    KerasHub's causal language models decode with their own key-value cache (`generate_step`); any
    other Keras model by one whole forward pass per token.

    Args:
        policy: maps `{"token_ids", "padding_mask"}` to logits.
        ids: int32 `[batch, (tokens)]` prompts, at least one token each.
        stops: ids that end a response.
        pad: id that fills sequences up.
        max_new_tokens: longest response.
        temperature: 0 is greedy.
        top_p: see `sampling`.

    Returns:
        int32 `[batch, (tokens)]`: the new tokens, up to the first stop, which is left out.
    """
    before = ids.row_lengths()
    # Where a place not yet written looks like a stop, KerasHub takes the response for finished.
    fill = next(token for token in itertools.chain([pad], itertools.count()) if token not in stops)
    token_ids = tf.pad(ids.to_tensor(fill), [[0, 0], [0, max_new_tokens]], constant_values=fill)
    mask = tf.sequence_mask(before, tf.shape(token_ids, tf.int64)[1])
    choose = sampling(temperature, top_p)
    if isinstance(policy, keras_hub.models.CausalLM):
        found = _with_cache(policy, token_ids, mask, stops, choose, temperature)
    else:
        found = _without_cache(policy, token_ids, mask, stops, choose, temperature)
    places = before[:, None] + tf.range(max_new_tokens, dtype=tf.int64)[None, :]
    new = tf.gather(found, places, batch_dims=1)
    ended = tf.reduce_any(new[..., None] == tf.constant(stops), axis=-1)
    kept = tf.cumsum(tf.cast(ended, tf.int32), axis=1) == 0
    return tf.ragged.boolean_mask(new, kept)


def _with_cache(
    policy: Any,
    token_ids: tf.Tensor,
    mask: tf.Tensor,
    stops: list[int],
    choose: Choose,
    temperature: float,
) -> tf.Tensor:
    before = getattr(policy, "sampler", None)
    policy.sampler = _Sampler(choose, temperature)
    try:
        with native_slice_update():
            inputs = {"token_ids": token_ids, "padding_mask": mask}
            return policy.generate_step(inputs, stops)["token_ids"]
    finally:
        policy.sampler = before


def _without_cache(
    policy: keras.Model,
    token_ids: tf.Tensor,
    mask: tf.Tensor,
    stops: list[int],
    choose: Choose,
    temperature: float,
) -> tf.Tensor:
    rows, length = tf.shape(token_ids)[0], tf.shape(token_ids)[1]
    lengths = tf.reduce_sum(tf.cast(mask, tf.int32), axis=1)

    def unfinished(token_ids: tf.Tensor, lengths: tf.Tensor, done: tf.Tensor) -> tf.Tensor:
        return ~tf.reduce_all(done) & (tf.reduce_max(lengths) < length)

    def step(
        token_ids: tf.Tensor, lengths: tf.Tensor, done: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
        mask = tf.sequence_mask(lengths, length, tf.int32)
        logits = policy({"token_ids": token_ids, "padding_mask": mask}, training=False)
        last = tf.cast(tf.gather(logits, lengths - 1, batch_dims=1), tf.float32)
        token = choose(tf.nn.softmax(last / (temperature or 1.0)))
        places = tf.stack([tf.range(rows), lengths], axis=1)
        token_ids = tf.tensor_scatter_nd_update(token_ids, places, token)
        done |= tf.reduce_any(token[:, None] == tf.constant(stops), axis=1)
        return token_ids, lengths + 1, done

    return tf.while_loop(unfinished, step, (token_ids, lengths, tf.zeros_like(lengths, tf.bool)))[0]
