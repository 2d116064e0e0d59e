"""The decoding loop that samples and exported models share.

`dpo_keras.training.generation` compiles it; `dpo_keras.serving` puts it into a graph that a model
server runs.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import keras
import keras_hub
import tensorflow as tf

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.layer_overrides import overridden_methods
from dpo_keras.scoring.model_inputs import (
    TextRows,
    blank_images,
    declared_inputs,
    full_logits,
    image_overrides,
)
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_families import RecurrentDecoding, recurrent_decoding

Draw: TypeAlias = Callable[[Tensor], Tensor]
"""Draws one index per row from log-probs `[batch, n]`: int32 `[batch]`."""
Choose: TypeAlias = Callable[[Tensor], Tensor]
"""Chooses the next token from logits `[batch, vocabulary]`: int32 `[batch]`."""


def decode(
    policy: keras.Model,
    token_ids: Tensor,
    mask: Tensor,
    *,
    stops: Sequence[int],
    choose: Choose,
    max_new_tokens: int | Tensor,
    images: Mapping[str, Tensor] | None = None,
) -> Tensor:
    """Write a response behind each prompt, token by token, until every row has a stop.

    KerasHub models with `call_with_cache` decode with their key-value cache; shorter prompts get
    more tokens while longer ones are completed, which `new_tokens` cuts. Any other model runs one
    forward pass over the whole text per token. `token_ids` and the result are int32
    `[batch, length]`, prompts on the left, with room for the responses; `mask` is True for the
    prompts' tokens, at least one per row. What follows a row's first stop is undefined. `images`
    are those of the prompts, as in a batch; see `check_generates_from_images`.
    """
    loop = functools.partial(_loop, mask=mask, stops=stops, choose=choose)
    recurrent = recurrent_decoding(policy)
    if recurrent is not None:
        return _decode_with_state(recurrent, token_ids, loop)
    if generates_from_images(policy):
        return _decode_with_cache(policy, token_ids, mask, stops, loop, images or {})
    length = tf.shape(token_ids)[1]
    prompted = tf.cast(mask, tf.int32)

    def logits_at(token_ids: Tensor, cache: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        seen = tf.sequence_mask(place, length, tf.int32)
        logits = full_logits(policy, TextRows(token_ids, seen, response=seen * (1 - prompted)))
        return tf.gather(logits, place - 1, batch_dims=1), cache

    lengths = tf.reduce_sum(prompted, axis=1)
    return loop(logits_at, token_ids, (), lengths, steps=max_new_tokens)


def generates_from_images(policy: keras.Model) -> bool:
    """Tell whether `decode` uses KerasHub's cache of keys and values, its only path with images."""
    cached = isinstance(policy, keras_hub.models.CausalLM) and hasattr(policy, "call_with_cache")
    return cached and recurrent_decoding(policy) is None


def check_generates_from_images(policy: keras.Model) -> None:
    """Refuse images where `decode` does not show them to the policy."""
    if not generates_from_images(policy):
        rule = f"are not read in the generation of {type(policy).__name__}"
        raise InputError(InputProblem("images", rule, hint="Give prompts without images."))


def _decode_with_state(
    recurrent: RecurrentDecoding, token_ids: Tensor, loop: Callable[..., Tensor]
) -> Tensor:
    """Decode with a state for each row, which reads prompts token by token, too.

    KerasHub reads whole prompts first and then their last tokens once more. Keys and values do not
    change by that; a state remembers both.
    """
    rows, length = tf.unstack(tf.shape(token_ids))

    def logits_at(token_ids: Tensor, cache: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        last = place[0] - 1
        return recurrent.step(token_ids[:, last, None], cache, last)

    start = recurrent.empty_cache(token_ids)
    return loop(logits_at, token_ids, start, tf.ones((rows,), tf.int32), steps=length - 1)


def _decode_with_cache(
    policy: keras.Model,
    token_ids: Tensor,
    mask: Tensor,
    stops: Sequence[int],
    loop: Callable[..., Tensor],
    images: Mapping[str, Tensor],
) -> Tensor:
    """Decode with KerasHub's cache of keys and values."""
    rows, length = tf.unstack(tf.shape(token_ids))
    # Where prompts see themselves as a whole, or images, their cache is kept as it was filled.
    keep = "response_mask" in declared_inputs(policy) or bool(images)

    def sampler(
        *, next: Callable[..., Tensor], prompt: Tensor, cache: Tensor, index: Tensor, **_: Any
    ) -> Tensor:
        # KerasHub's cache has one index for all rows: rows move on column by column.
        def logits_at(token_ids: Tensor, cache: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
            logits, _, cache = next(token_ids, cache, place[0])
            return logits, cache

        place = tf.fill([rows], tf.cast(index, tf.int32))
        return loop(logits_at, prompt, cache, place, steps=length - place[0], keep=keep)

    before = getattr(policy, "sampler", None)
    # `generate_step` fills the cache with the prompts and leaves the loop to the sampler.
    policy.sampler = sampler
    try:
        inputs = {"token_ids": token_ids, "padding_mask": mask}
        inputs |= images or blank_images(policy, token_ids)
        rows_of_one = {**images, "token_ids": token_ids[:, None]}
        with overridden_methods(image_overrides(policy, rows_of_one)):
            return policy.generate_step(inputs, list(stops))["token_ids"]
    finally:
        policy.sampler = before


def _loop(
    logits_at: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    token_ids: Tensor,
    cache: Tensor,
    place: Tensor,
    *,
    mask: Tensor,
    stops: Sequence[int],
    choose: Choose,
    steps: Tensor,
    keep: bool = False,
) -> Tensor:
    """Fill `token_ids` from `place` `[batch]` on; `logits_at` gives the logits for that place.

    `keep` leaves the cache of a row as it is where the prompt has the token of that place.
    """
    rows = tf.range(tf.shape(token_ids)[0])

    def unfinished(token_ids: Tensor, cache: Tensor, place: Tensor, done: Tensor) -> Tensor:
        return ~tf.reduce_all(done)

    def step(
        token_ids: Tensor, cache: Tensor, place: Tensor, done: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, found = logits_at(token_ids, cache, place)
        at = tf.stack([rows, place], axis=1)
        prompted = tf.gather_nd(mask, at)
        cache = _kept(prompted, cache, found) if keep else found
        token = tf.where(prompted, tf.gather_nd(token_ids, at), choose(logits))
        done |= ~prompted & tf.reduce_any(token[:, None] == tf.constant(stops), axis=1)
        return tf.tensor_scatter_nd_update(token_ids, at, token), cache, place + 1, done

    start = (token_ids, cache, place, tf.zeros_like(place, tf.bool))
    return tf.while_loop(unfinished, step, start, maximum_iterations=steps)[0]


def _kept(rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Take the cache `before` in the given rows (bool `[batch]`), `after` in the others."""

    def taken(one: Tensor, other: Tensor) -> Tensor:
        return tf.where(tf.reshape(rows, [-1] + [1] * (len(one.shape) - 1)), one, other)

    return keras.tree.map_structure(taken, before, after)


def token_choice(temperature: float, top_p: float, draw: Draw) -> Choose:
    """Return the rule that chooses the next token: at temperature 0 the most likely one.

    Otherwise `draw` samples from the smallest set of most likely tokens whose probabilities reach
    `top_p` (Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751).
    """

    def choose(logits: Tensor) -> Tensor:
        probabilities = tf.nn.softmax(tf.cast(logits, tf.float32) / (temperature or 1.0))
        if temperature == 0:
            return tf.argmax(probabilities, axis=-1, output_type=tf.int32)
        if top_p == 1:
            return draw(tf.math.log(probabilities))
        ranked, order = tf.math.top_k(probabilities, tf.shape(probabilities)[-1])
        before = tf.cumsum(ranked, axis=-1, exclusive=True)
        # Strictly below, so that the most likely token always stays.
        drawn = draw(tf.math.log(tf.where(before < top_p, ranked, 0.0)))
        return tf.gather(order, drawn[:, None], batch_dims=1)[:, 0]

    return choose


def new_tokens(
    token_ids: Tensor, lengths: Tensor, stops: Sequence[int], max_new_tokens: int
) -> tf.RaggedTensor:
    """Cut the responses, without stops, out of what `decode` returns; `lengths` of the prompts."""
    places = tf.cast(lengths, tf.int64)[:, None] + tf.range(max_new_tokens, dtype=tf.int64)
    new = tf.gather(token_ids, places, batch_dims=1)
    stopped = tf.reduce_any(new[..., None] == tf.constant(stops), axis=-1)
    return tf.ragged.boolean_mask(new, tf.cumsum(tf.cast(stopped, tf.int32), axis=1) == 0)
