"""Responses from a policy: for samples during training, and for judging it afterwards."""

import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from dpo_keras.batching import Ragged, TextEncoder
from dpo_keras.errors import InputError

# Compiled once per policy and setting; the function reads the weights as they are at its call.
_functions: Any = weakref.WeakKeyDictionary()


def generate_responses(
    policy: keras.Model,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Ragged,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    max_length: int | None = None,
    preprocessor: Any = None,
    on_batch: Callable[[int, int], None] | None = None,
    return_ended: bool = False,
) -> Any:
    """Samples one response to each prompt, tokenized exactly as for training.

    Args:
        policy: a KerasHub causal language model (its key-value cache is used), or any Keras model
            from `{"token_ids", "padding_mask"}` to logits.
        prompts: N strings, or N rows of token ids (`TokenizedPairs.prompt`: what a chat template
            made of a conversation is exact only so).
        max_new_tokens: the longest response, in tokens.
        temperature: of sampling; 0 takes the likeliest token.
        top_p: share of the probability to sample from; 1 takes all.
        seed: of the sampling; the same seed, prompts and batch size give the same responses.
        batch_size: prompts at a time.
        max_length: longest prompt and response; longer prompts are cut from the left. By default
            what the model's positions allow.
        preprocessor: by default `policy.preprocessor`.
        on_batch: called with (responses done, N).
        return_ended: tell also which responses ended by themselves.

    Returns:
        N strings, special tokens left out; with `return_ended`, those and N booleans, False where
        a response was cut off at `max_new_tokens`.

    Raises:
        InputError: an argument out of range, or no preprocessor.
    """
    preprocessor = preprocessor or getattr(policy, "preprocessor", None)
    problems = []
    if preprocessor is None:
        problems.append("preprocessor is needed to tokenize: the policy has none attached.")
    if max_new_tokens < 1:
        problems.append(f"max_new_tokens must be >= 1, got {max_new_tokens}.")
    if not temperature >= 0:
        problems.append(f"temperature must be >= 0, got {temperature}.")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must be in (0, 1], got {top_p}.")
    if problems:
        raise InputError(problems)
    encoder = TextEncoder(preprocessor)
    limit = max_length or _longest(policy)
    if limit is not None and limit <= max_new_tokens:
        raise InputError(
            f"max_new_tokens must leave room for a prompt in {limit} tokens, got {max_new_tokens}."
        )
    room = None if limit is None else limit - max_new_tokens
    rows: list[Any] = list(prompts)  # type: ignore[arg-type]
    encoded: Any = encoder.prompts(rows).tolist() if all(isinstance(r, str) for r in rows) else rows
    ids = [_cut([int(token) for token in row], room, encoder.start) for row in encoded]
    if not ids:
        return ([], []) if return_ended else []
    longest = max(len(row) for row in ids)
    length = -(-(longest + max_new_tokens) // 16) * 16
    length = length if limit is None else min(length, limit)
    run = _function(policy, encoder, temperature, top_p, seed)
    responses: list[str] = []
    ended: list[bool] = []
    for start in range(0, len(ids), batch_size):
        chunk = ids[start : start + batch_size]
        filled = chunk + chunk[-1:] * (batch_size - len(chunk))
        token_ids, mask = _right_padded(filled, length, _filler(encoder))
        found = run(token_ids, mask, max_new_tokens)[: len(chunk)]
        new = [
            out[len(row) : len(row) + max_new_tokens]
            for row, out in zip(chunk, found.tolist(), strict=True)
        ]
        answers = [_until_end(ids, encoder.ends) for ids in new]
        responses += _texts(encoder, answers)
        ended += [len(answer) < len(ids) for answer, ids in zip(answers, new, strict=True)]
        if on_batch is not None:
            on_batch(len(responses), len(ids))
    return (responses, ended) if return_ended else responses


def _longest(policy: keras.Model) -> int | None:
    backbone = getattr(policy, "backbone", policy)
    return getattr(backbone, "max_sequence_length", None)


def _filler(encoder: TextEncoder) -> int:
    # KerasHub's GPT-2 pads with id 0 whatever token that is; where it is the end token, places
    # not yet written would look like an end, and nothing would be generated at all.
    return next(token for token in (encoder.pad, *range(3)) if token not in encoder.ends)


def _cut(ids: list[int], room: int | None, start: int | None) -> list[int]:
    if room is None or len(ids) <= room:
        return ids
    if start is not None and ids[0] == start and room > 1:
        return [start, *ids[len(ids) - room + 1 :]]
    return ids[len(ids) - room :]


def _right_padded(rows: list[list[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    token_ids = np.full((len(rows), length), pad, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for number, row in enumerate(rows):
        token_ids[number, : len(row)] = row
        mask[number, : len(row)] = True
    return token_ids, mask


def _until_end(ids: list[int], ends: Collection[int]) -> list[int]:
    stops = [place for place, token in enumerate(ids) if token in ends]
    return ids[: stops[0]] if stops else ids


def _texts(encoder: TextEncoder, rows: list[list[int]]) -> list[str]:
    # An empty row would come back from some tokenizers as something other than "".
    return [_text(encoder.tokenizer.detokenize([row])) if row else "" for row in rows]


def _text(value: Any) -> str:
    while not isinstance(value, str | bytes):
        value = value.numpy() if isinstance(value, tf.Tensor) else value[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value


def _function(
    policy: keras.Model, encoder: TextEncoder, temperature: float, top_p: float, seed: int
) -> Callable[[np.ndarray, np.ndarray, int], np.ndarray]:
    if not isinstance(policy, keras_hub.models.CausalLM):
        return lambda ids, mask, new: _plain(policy, ids, mask, new, temperature, top_p, seed)
    known = _functions.setdefault(policy, {})
    key = (temperature, top_p, tuple(encoder.ends))
    if key not in known:
        sampler = _sampler(temperature, top_p)
        stops = list(encoder.ends)
        # Not the policy itself: what a dictionary with weak keys holds must not hold the key.
        borrowed = weakref.ref(policy)

        # XLA, as KerasHub's own generate(): outside it, its cache updates are slow.
        @tf.function(jit_compile=True, reduce_retracing=False)
        def generate(token_ids: Any, mask: Any) -> Any:
            model: Any = borrowed()
            before = getattr(model, "sampler", None)
            model.sampler = sampler
            try:
                inputs = {"token_ids": token_ids, "padding_mask": mask}
                return model.generate_step(inputs, stops)["token_ids"]
            finally:
                model.sampler = before

        known[key] = (generate, sampler)
    generate, sampler = known[key]

    def run(token_ids: np.ndarray, mask: np.ndarray, _: int) -> np.ndarray:
        return generate(tf.constant(token_ids), tf.constant(mask)).numpy()

    for variable in sampler.variables:
        variable.assign(np.array([seed, 0], np.uint32))
    return run


def _sampler(temperature: float, top_p: float) -> Any:
    if temperature == 0:
        return keras_hub.samplers.GreedySampler()
    if top_p < 1:
        return keras_hub.samplers.TopPSampler(p=top_p, temperature=temperature, seed=0)
    return keras_hub.samplers.RandomSampler(temperature=temperature, seed=0)


def _plain(
    policy: keras.Model,
    token_ids: np.ndarray,
    mask: np.ndarray,
    new: int,
    temperature: float,
    top_p: float,
    seed: int,
) -> np.ndarray:
    """Generation by one whole forward pass per token: slow, and right for any causal model."""
    random = np.random.default_rng(seed)
    token_ids, lengths = token_ids.copy(), mask.sum(axis=1)
    rows = np.arange(len(token_ids))
    forward = tf.function(lambda ids, mask: policy({"token_ids": ids, "padding_mask": mask}))
    for _ in range(min(new, token_ids.shape[1] - int(lengths.max()))):
        mask = (np.arange(token_ids.shape[1]) < lengths[:, None]).astype(np.int32)
        logits = forward(tf.constant(token_ids), tf.constant(mask)).numpy()[rows, lengths - 1]
        token_ids[rows, lengths] = _draw(logits.astype(np.float64), temperature, top_p, random)
        lengths = lengths + 1
    return token_ids


def _draw(logits: np.ndarray, temperature: float, top_p: float, random: Any) -> np.ndarray:
    if temperature == 0:
        return logits.argmax(axis=-1)
    scaled = logits / temperature
    probs = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    probs /= probs.sum(axis=-1, keepdims=True)
    order = np.argsort(-probs, axis=-1)
    ranked = np.take_along_axis(probs, order, axis=-1)
    ranked = np.where(ranked.cumsum(axis=-1) - ranked < top_p, ranked, 0.0)
    edges = ranked.cumsum(axis=-1)
    drawn = random.random((len(logits), 1)) * edges[:, -1:]
    picked = (edges < drawn).sum(axis=-1, keepdims=True)
    return np.take_along_axis(order, picked, axis=-1)[:, 0]
