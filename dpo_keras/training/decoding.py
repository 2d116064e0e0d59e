"""The decoder that samples, candidates, evaluation and exported models share.

`dpo_keras.training.generation` compiles `generate_tokens`; `dpo_keras.serving` puts it into a graph
that a model server runs. Policies that run on packed rows decode continuously; `decode` is for the
others, column by column.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import keras_hub
import tensorflow as tf
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.layer_overrides import overridden_methods, window_overrides
from dpo_keras.scoring.model_inputs import (
    TextRows,
    blank_images,
    declared_inputs,
    full_logits,
    image_overrides,
)
from dpo_keras.training.continuous_batching import (
    Choose,
    Report,
    decode_continuously,
    decodes_continuously,
    until_stop,
)
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_families import (
    RecurrentDecoding,
    caches_without_positions,
    recurrent_decoding,
)

# Weights that are added up at a time when a token is drawn.
_BLOCK = 128
# Nuclei rarely hold more tokens; sorting the whole vocabulary takes eight times as long.
_NUCLEUS = 256


def generate_tokens(  # noqa: PLR0913 - the one decoder's settings
    policy: keras.Model,
    prompts: tf.RaggedTensor,
    uniforms: Tensor,
    *,
    stops: Sequence[int],
    choose: Choose,
    slots: int | Tensor,
    pad: int,
    report: Report | None = None,
) -> tf.RaggedTensor:
    """Generate the responses to prompts of text; leave out the stop that ends them.

    Arguments and result are those of `decode_continuously`, for any policy. `pad` fills the rows of
    those that do not.
    """
    if decodes_continuously(policy):
        return decode_continuously(
            policy, prompts, uniforms, stops=stops, choose=choose, slots=slots, report=report
        )
    copies, longest = tf.unstack(tf.shape(uniforms)[1:])
    lengths = tf.repeat(prompts.row_lengths(), copies)
    ids = tf.repeat(prompts.to_tensor(pad), copies, axis=0)
    ids = tf.pad(ids, [[0, 0], [0, longest]], constant_values=pad)
    mask = tf.sequence_mask(lengths, tf.shape(ids, tf.int64)[1])
    drawn = tf.reshape(uniforms, (-1, longest))
    found = decode(policy, ids, mask, stops=stops, choose=choose, uniforms=drawn, report=report)
    return new_tokens(found, lengths, stops, longest)


def decode(
    policy: keras.Model,
    token_ids: Tensor,
    mask: Tensor,
    *,
    stops: Sequence[int],
    choose: Choose,
    uniforms: Tensor,
    images: Mapping[str, Tensor] | None = None,
    report: Report | None = None,
) -> Tensor:
    """Write a response behind each prompt, token by token, until every row has a stop.

    KerasHub models with `call_with_cache` decode with their key-value cache; shorter prompts get
    more tokens while longer ones are completed, which `new_tokens` cuts. Any other model runs one
    forward pass over the whole text per token. `token_ids` and the result are int32
    `[batch, length]`, prompts on the left, with room for the responses; `mask` is True for the
    prompts' tokens, at least one per row. `uniforms` `[batch, T]` are what `choose` draws the T
    tokens of the longest response by. What follows a row's first stop is undefined. `images` are
    those of the prompts, as in a batch; see `check_generates_from_images`. `report` hears of every
    token.
    """
    loop = functools.partial(
        _loop, mask=mask, stops=stops, choose=choose, uniforms=uniforms, report=report
    )
    recurrent = recurrent_decoding(policy)
    if recurrent is not None:
        with overridden_methods(window_overrides(policy.backbone)):
            return _decode_with_state(recurrent, token_ids, loop)
    if generates_from_images(policy):
        return _decode_with_cache(policy, token_ids, mask, stops, loop, images or {})
    prompted = ops.cast(mask, "int32")
    places = ops.arange(ops.shape(token_ids)[1])

    def logits_at(token_ids: Tensor, cache: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        seen = ops.cast(places < place[:, None], "int32")
        logits = full_logits(policy, TextRows(token_ids, seen, response=seen * (1 - prompted)))
        return _at(logits, place - 1), cache

    lengths = ops.sum(prompted, axis=1)
    return loop(logits_at, token_ids, (), lengths, steps=ops.shape(uniforms)[1])


def generates_from_images(policy: keras.Model) -> bool:
    """Tell whether `decode` uses KerasHub's cache of keys and values, its only path with images."""
    cached = isinstance(policy, keras_hub.models.CausalLM) and hasattr(policy, "call_with_cache")
    return cached and not caches_without_positions(policy) and recurrent_decoding(policy) is None


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

    def logits_at(token_ids: Tensor, cache: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        last = place[0] - 1
        return recurrent.step(token_ids[:, last, None], cache, last)

    start = recurrent.empty_cache(token_ids)
    first = ops.ones_like(token_ids[:, 0])
    return loop(logits_at, token_ids, start, first, steps=ops.shape(token_ids)[1] - 1)


def _decode_with_cache(
    policy: keras.Model,
    token_ids: Tensor,
    mask: Tensor,
    stops: Sequence[int],
    loop: Callable[..., Tensor],
    images: Mapping[str, Tensor],
) -> Tensor:
    """Decode with KerasHub's cache of keys and values."""
    length = ops.shape(token_ids)[1]
    # Where prompts see themselves as a whole, or images, their cache is kept as it was filled.
    keep = "response_mask" in declared_inputs(policy) or bool(images)

    def sampler(
        *, next: Callable[..., Tensor], prompt: Tensor, cache: Tensor, index: Tensor, **_: Any
    ) -> Tensor:
        # KerasHub's cache has one index for all rows: rows move on column by column.
        def logits_at(token_ids: Tensor, cache: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
            logits, _, cache = next(token_ids, cache, place[0])
            return logits, cache

        place = ops.zeros_like(prompt[:, 0]) + ops.cast(index, "int32")
        return loop(logits_at, prompt, cache, place, steps=length - place[0], keep=keep)

    before = getattr(policy, "sampler", None)
    # `generate_step` fills the cache with the prompts and leaves the loop to the sampler.
    policy.sampler = sampler
    try:
        inputs = {"token_ids": token_ids, "padding_mask": mask}
        inputs |= images or blank_images(policy, token_ids)
        rows_of_one = {**images, "token_ids": token_ids[:, None]}
        overrides = [*image_overrides(policy, rows_of_one), *window_overrides(policy.backbone)]
        with overridden_methods(overrides):
            return policy.generate_step(inputs, list(stops))["token_ids"]
    finally:
        policy.sampler = before


def _loop(  # noqa: PLR0913 - what a loop is made of
    logits_at: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]],
    token_ids: Tensor,
    cache: Tensor,
    place: Tensor,
    *,
    mask: Tensor,
    stops: Sequence[int],
    choose: Choose,
    uniforms: Tensor,
    steps: Tensor,
    report: Report | None,
    keep: bool = False,
) -> Tensor:
    """Fill `token_ids` from `place` `[batch]` on; `logits_at` gives the logits for that place.

    `keep` leaves the cache of a row as it is where the prompt has the token of that place.
    """
    rows, places = ops.arange(ops.shape(token_ids)[0]), ops.arange(ops.shape(token_ids)[1])
    lengths = ops.sum(ops.cast(mask, "int32"), axis=1)
    last = ops.shape(uniforms)[1] - 1

    def unfinished(token_ids: Tensor, cache: Tensor, place: Tensor, done: Tensor) -> Tensor:
        return ~ops.all(done)

    def step(
        token_ids: Tensor, cache: Tensor, place: Tensor, done: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, found = logits_at(token_ids, cache, place)
        here = places == place[:, None]
        prompted = ops.any(mask & here, axis=1)
        cache = _kept(prompted, cache, found) if keep else found
        drawn = _at(uniforms, ops.clip(place - lengths, 0, last))
        given = ops.sum(ops.where(here, token_ids, 0), axis=1)
        token = ops.where(prompted, given, choose(logits, drawn))
        if report is not None:
            token = report(ops.where(prompted, -1, rows), token)
        ends = ops.any(token[:, None] == ops.convert_to_tensor(stops, "int32"), axis=1)
        token_ids = ops.where(here, token[:, None], token_ids)
        return token_ids, cache, place + 1, done | (~prompted & ends)

    start = (token_ids, cache, place, ops.zeros_like(place, "bool"))
    found: Tensor = ops.while_loop(unfinished, step, start, maximum_iterations=steps)[0]
    return found


def _kept(rows: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Take the cache `before` in the given rows (bool `[batch]`), `after` in the others."""

    def taken(one: Tensor, other: Tensor) -> Tensor:
        return ops.where(ops.reshape(rows, [-1] + [1] * (len(one.shape) - 1)), one, other)

    return keras.tree.map_structure(taken, before, after)


def token_choice(temperature: float, top_p: float) -> Choose:
    """Return the rule that chooses the next token: at temperature 0 the most likely one.

    Otherwise a uniform number draws from the smallest set of most likely tokens whose probabilities
    reach `top_p` (Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751).
    """

    def choose(logits: Tensor, uniforms: Tensor) -> Tensor:
        logits = ops.cast(logits, "float32")
        if temperature == 0:
            return ops.cast(ops.argmax(logits, axis=-1), "int32")
        # In proportion to the probabilities.
        largest = ops.max(logits, axis=-1, keepdims=True)
        weights = ops.exp((logits - largest) / temperature)
        if top_p == 1:
            return _drawn(weights, uniforms)
        goal = top_p * ops.sum(weights, axis=-1, keepdims=True)

        def nucleus(ranked: Tensor, order: Tensor) -> Tensor:
            before = ops.pad(ops.cumsum(ranked, axis=-1)[:, :-1], [[0, 0], [1, 0]])
            # Strictly below, so that the most likely token always stays.
            return _at(order, _drawn(ops.where(before < goal, ranked, 0.0), uniforms))

        size = weights.shape[-1]
        ranked, order = ops.top_k(weights, min(size, _NUCLEUS))
        found: Tensor = ops.cond(
            ops.all(ops.sum(ranked, axis=-1, keepdims=True) >= goal),
            lambda: nucleus(ranked, order),
            lambda: nucleus(*ops.top_k(weights, size)),
        )
        return found

    return choose


def _drawn(weights: Tensor, uniforms: Tensor) -> Tensor:
    """Draw the index at which the sum of weights `[rows, n]` exceeds each row's share of it."""
    blocks = ops.pad(weights, [[0, 0], [0, -weights.shape[-1] % _BLOCK]])
    blocks = ops.reshape(blocks, (ops.shape(blocks)[0], -1, _BLOCK))
    # First among blocks, then within one: faster and more exact than one long sum.
    sums = ops.sum(blocks, axis=-1)
    ends = ops.cumsum(sums, axis=-1)
    goal = uniforms[:, None] * ends[:, -1:]
    block = _count(ends <= goal)
    inside = _at(blocks, block)
    goal -= _at(ends - sums, block)[:, None]
    place = _count(ops.cumsum(inside, axis=-1) <= goal)
    # Rounding must not lead to an index of weight 0.
    last = ops.max(ops.where(inside > 0, ops.arange(_BLOCK), 0), axis=-1)
    return block * _BLOCK + ops.minimum(place, last)


def _at(values: Tensor, places: Tensor) -> Tensor:
    """Return what each row `[n, …]` of values has at its place."""
    rows, size, *rest = ops.shape(values)
    flat = ops.reshape(values, (rows * size, *rest))
    return ops.take(flat, ops.arange(rows) * size + places, axis=0)


def _count(values: Tensor) -> Tensor:
    return ops.sum(ops.cast(values, "int32"), axis=-1)


def new_tokens(
    token_ids: Tensor, lengths: Tensor, stops: Sequence[int], max_new_tokens: int | Tensor
) -> tf.RaggedTensor:
    """Cut the responses, without stops, out of what `decode` returns; `lengths` of the prompts."""
    places = tf.cast(lengths, tf.int64)[:, None] + tf.range(tf.cast(max_new_tokens, tf.int64))
    return until_stop(tf.gather(token_ids, places, batch_dims=1), tf.constant(stops))
