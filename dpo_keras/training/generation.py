"""Responses from a policy, and the decoding loop that samples and exported models share.

`decode` is the loop. `generate_responses` compiles it and goes from strings to strings in Python;
`dpo_keras.serving` puts it into a graph that a model server runs.
"""

import functools
import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from dpo_keras.batching import Ragged, TextEncoder
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.model_inputs import (
    TextRows,
    blank_images,
    check_inputs,
    declared_inputs,
    full_logits,
)
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_families import RecurrentDecoding, recurrent_decoding

Draw: TypeAlias = Callable[[Tensor], Tensor]
"""Draws one index per row from log-probs `[batch, n]`: int32 `[batch]`."""
Choose: TypeAlias = Callable[[Tensor], Tensor]
"""Chooses the next token from logits `[batch, vocabulary]`: int32 `[batch]`."""
_Compiled: TypeAlias = tuple[Callable[[Tensor, Tensor, Tensor], Tensor], keras.random.SeedGenerator]

# Compiled once per policy and setting. The functions read the weights as they are at each call.
_compiled_functions: weakref.WeakKeyDictionary[
    object, dict[tuple[float, float, tuple[int, ...]], _Compiled]
] = weakref.WeakKeyDictionary()


def generate_responses(  # noqa: PLR0913 - public API, options by keyword
    policy: keras.Model,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Ragged,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    preprocessor: object | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    return_ended: bool = False,
) -> Any:
    """Sample one response to each prompt, tokenized exactly as for training.

    Args:
        policy: a KerasHub causal language model (its key-value cache is used), or any Keras model
            from `{"token_ids", "padding_mask"}` to logits.
        prompts: N strings, or N rows of token ids: `TokenizedPairs.prompt` where a chat template
            rendered a conversation, whose text alone does not determine the ids.
        max_new_tokens: the longest response, in tokens.
        temperature: softmax temperature; 0 takes the most likely token.
        top_p: share of the probability to sample from; 1 samples from all tokens.
        seed: of the sampling. The same seed, prompts and batch size give the same responses.
        batch_size: prompts per batch.
        max_length: tokens of prompt and response together; longer prompts are cut from the left. By
            default the number of positions of the model.
        preprocessor: what tokenizes; by default `policy.preprocessor`.
        on_batch: called with (responses done, N) after each batch.
        return_ended: whether to return which responses ended by themselves, too.

    Returns:
        N strings without special tokens. With `return_ended` a tuple of those and N booleans, False
        where a response was cut off at `max_new_tokens`.

    Raises:
        InputError: an argument is out of range, or there is no preprocessor.

    Example:
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [[ord(c) - 90 for c in t] for t in texts])
        ...     detokenize = staticmethod(lambda rows: ["".join(chr(90 + i) for i in rows[0])])
        >>> ids = {name: keras.Input((None,), name=name) for name in ("token_ids", "padding_mask")}
        >>> always_c = keras.layers.Lambda(lambda x: keras.ops.one_hot(0 * x + 9, 64) * 99)
        >>> policy = keras.Model(ids, always_c(ids["token_ids"]))
        >>> generate_responses(policy, ["a", "ab"], max_new_tokens=3, preprocessor=Letters())
        ['ccc', 'ccc']
    """
    preprocessor = preprocessor or getattr(policy, "preprocessor", None)
    problems = decoding_problems(max_new_tokens, temperature, top_p)
    if preprocessor is None:
        rule = "is needed to tokenize: the policy has none attached"
        problems.append(InputProblem("preprocessor", rule))
    if problems:
        raise InputError(problems)
    limit = max_length or getattr(getattr(policy, "backbone", policy), "max_sequence_length", None)
    if limit is not None and limit <= max_new_tokens:
        rule = f"must leave room for a prompt in {limit} tokens"
        raise InputError(InputProblem("max_new_tokens", rule, max_new_tokens))
    check_inputs(policy)
    encoder = TextEncoder(preprocessor)
    stops = sorted(encoder.ends)
    room = None if limit is None else limit - max_new_tokens
    rows = _prompt_ids(encoder, [prompts[row] for row in range(len(prompts))], room)
    if not rows:
        return ([], []) if return_ended else []
    # Few different lengths, because each one is compiled for itself.
    length = -(-(max(map(len, rows)) + max_new_tokens) // 16) * 16
    length = length if limit is None else min(length, limit)
    run, generator = _compiled(policy, stops, temperature, top_p)
    generator.state.assign([seed, 0])
    steps = tf.constant(max_new_tokens)
    responses: list[str] = []
    ended: list[bool] = []
    for start in range(0, len(rows), batch_size):
        chunk = rows[start : start + batch_size]
        filled = chunk + chunk[-1:] * (batch_size - len(chunk))
        token_ids, mask = _right_padded(filled, length, encoder.pad)
        lengths = np.array([len(row) for row in chunk])
        found = run(token_ids, mask, steps)[: len(chunk)]
        new = new_tokens(found, lengths, stops, max_new_tokens).to_list()
        responses += detokenized(encoder, new)
        ended += [len(row) < max_new_tokens for row in new]
        if on_batch is not None:
            on_batch(len(responses), len(rows))
    return (responses, ended) if return_ended else responses


def decoding_problems(max_new_tokens: int, temperature: float, top_p: float) -> list[InputProblem]:
    """Name the decoding arguments that are out of range."""
    rules = [
        ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "must be >= 1"),
        ("temperature", temperature, 0 <= temperature < float("inf"), "must be >= 0"),
        ("top_p", top_p, 0 < top_p <= 1, "must be in (0, 1]"),
    ]
    return [InputProblem(name, rule, value) for name, value, right, rule in rules if not right]


def detokenized(encoder: TextEncoder, rows: Sequence[list[int]]) -> list[str]:
    """Turn rows of token ids into texts."""
    # Some tokenizers turn an empty row into something other than "".
    return [_text(encoder.tokenizer.detokenize([row])) if row else "" for row in rows]


def _text(value: Any) -> str:
    while not isinstance(value, str | bytes):
        value = value.numpy() if isinstance(value, tf.Tensor) else value[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


# -- decoding ------------------------------------------------------------------------------------


def decode(
    policy: keras.Model,
    token_ids: Tensor,
    mask: Tensor,
    *,
    stops: Sequence[int],
    choose: Choose,
    max_new_tokens: int | Tensor,
) -> Tensor:
    """Write a response behind each prompt, token by token, until every row has a stop.

    KerasHub models with `call_with_cache` decode with their key-value cache; shorter prompts get
    more tokens while longer ones are completed, which `new_tokens` cuts. Any other model runs one
    forward pass over the whole text per token. `token_ids` and the result are int32
    `[batch, length]`, prompts on the left, with room for the responses; `mask` is True for the
    prompts' tokens, at least one per row. What follows a row's first stop is undefined.
    """
    loop = functools.partial(_loop, mask=mask, stops=stops, choose=choose)
    recurrent = recurrent_decoding(policy)
    if recurrent is not None:
        return _decode_with_state(recurrent, token_ids, loop)
    if isinstance(policy, keras_hub.models.CausalLM) and hasattr(policy, "call_with_cache"):
        return _decode_with_cache(policy, token_ids, mask, stops, loop)
    length = tf.shape(token_ids)[1]
    prompted = tf.cast(mask, tf.int32)

    def logits_at(token_ids: Tensor, cache: Tensor, place: Tensor) -> tuple[Tensor, Tensor]:
        seen = tf.sequence_mask(place, length, tf.int32)
        logits = full_logits(policy, TextRows(token_ids, seen, response=seen * (1 - prompted)))
        return tf.gather(logits, place - 1, batch_dims=1), cache

    lengths = tf.reduce_sum(prompted, axis=1)
    return loop(logits_at, token_ids, (), lengths, steps=max_new_tokens)


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
) -> Tensor:
    """Decode with KerasHub's cache of keys and values."""
    rows, length = tf.unstack(tf.shape(token_ids))
    # Where prompts see themselves as a whole, their cache is kept as it was filled.
    keep = "response_mask" in declared_inputs(policy)

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
        inputs = {"token_ids": token_ids, "padding_mask": mask, **blank_images(policy, token_ids)}
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


# -- generate_responses in Python ----------------------------------------------------------------


def _compiled(
    policy: keras.Model, stops: Sequence[int], temperature: float, top_p: float
) -> _Compiled:
    known = _compiled_functions.setdefault(policy, {})
    key = (temperature, top_p, tuple(stops))
    if key not in known:
        # The values of a dictionary with weak keys must not hold the keys.
        borrowed = weakref.ref(policy)
        generator = keras.random.SeedGenerator(0)

        def draw(log_probs: Tensor) -> Tensor:
            return keras.random.categorical(log_probs, 1, dtype="int32", seed=generator)[:, 0]

        # XLA, as in KerasHub's own generate(): without it, updates of the cache are slow. A model
        # of the user's own may hold operations that XLA does not have.
        @tf.function(jit_compile=isinstance(policy, keras_hub.models.CausalLM))
        def run(token_ids: Tensor, mask: Tensor, max_new_tokens: Tensor) -> Tensor:
            return decode(
                borrowed(),
                token_ids,
                mask,
                stops=stops,
                choose=token_choice(temperature, top_p, draw),
                max_new_tokens=max_new_tokens,
            )

        known[key] = (run, generator)
    return known[key]


def _prompt_ids(encoder: TextEncoder, prompts: list[Any], room: int | None) -> list[list[int]]:
    """Tokenize prompts that are strings; cut all from the left, keeping the start token."""
    strings = all(isinstance(prompt, str) for prompt in prompts)
    rows = []
    for row in encoder.prompts(prompts).tolist() if strings else prompts:
        ids = [int(token) for token in row]
        if room is not None and len(ids) > room:
            kept = [encoder.start] if ids[0] == encoder.start and room > 1 else []
            ids = kept + ids[len(ids) - room + len(kept) :]
        rows.append(ids)
    return rows


def _right_padded(rows: list[list[int]], length: int, pad: int) -> tuple[Tensor, Tensor]:
    token_ids = tf.ragged.constant(rows, tf.int32, ragged_rank=1)
    mask = tf.sequence_mask([len(row) for row in rows], length)
    return token_ids.to_tensor(pad, shape=(len(rows), length)), mask
