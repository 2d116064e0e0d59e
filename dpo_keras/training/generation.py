"""Responses from a policy: from strings to strings in Python."""

import weakref
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from dpo_keras.batching import Ragged, TextEncoder
from dpo_keras.batching.image_preprocessing import PairImages
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.dataset_scoring import image_arrays, shown_images
from dpo_keras.scoring.model_inputs import check_inputs
from dpo_keras.training.decoding import (
    check_generates_from_images,
    decode,
    new_tokens,
    token_choice,
)
from dpo_keras.utils import JSON, Tensor

_Compiled: TypeAlias = tuple[Callable[..., Tensor], keras.random.SeedGenerator]

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
    images: Sequence[Sequence[JSON]] | PairImages | None = None,
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
        images: N lists of images, as `PreferencePair` takes them, for prompts that are strings;
            `TokenizedPairs.images` of the same rows for prompts that are ids.

    Returns:
        N strings without special tokens. With `return_ended` a tuple of those and N booleans, False
        where a response was cut off at `max_new_tokens`.

    Raises:
        InputError: an argument is out of range, there is no preprocessor, or the policy does not
            generate from images.

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
    prompts, shown = _shown(policy, preprocessor, prompts, images)
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
        # The last row is repeated to keep one shape; the responses of its copies are cut off.
        places = np.minimum(np.arange(start, start + batch_size), len(rows) - 1)
        filled = [rows[place] for place in places]
        token_ids, mask = _right_padded(filled, length, encoder.pad)
        lengths = np.array([len(row) for row in chunk])
        seen = {} if shown is None else image_arrays(shown, places, filled, length)
        found = run(token_ids, mask, steps, seen)[: len(chunk)]
        new = new_tokens(found, lengths, stops, max_new_tokens).to_list()
        responses += detokenized(encoder, new)
        ended += [len(row) < max_new_tokens for row in new]
        if on_batch is not None:
            on_batch(len(responses), len(rows))
    return (responses, ended) if return_ended else responses


def _shown(
    policy: keras.Model,
    preprocessor: object,
    prompts: Any,
    images: Sequence[Sequence[JSON]] | PairImages | None,
) -> tuple[Any, PairImages | None]:
    """Return prompts with the tokens of their images, and the images."""
    if images is None:
        return prompts, None
    check_generates_from_images(policy)
    if isinstance(images, PairImages):
        return prompts, images
    return shown_images(preprocessor, prompts, images)


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
        def run(
            token_ids: Tensor, mask: Tensor, max_new_tokens: Tensor, images: dict[str, Tensor]
        ) -> Tensor:
            return decode(
                borrowed(),
                token_ids,
                mask,
                stops=stops,
                choose=token_choice(temperature, top_p, draw),
                max_new_tokens=max_new_tokens,
                images=images,
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
