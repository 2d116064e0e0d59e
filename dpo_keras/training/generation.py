"""Responses from a policy: from strings to strings in Python."""

import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import keras
import keras_hub
import numpy as np
import tensorflow as tf

from dpo_keras.batching import Ragged, TextEncoder
from dpo_keras.batching.image_preprocessing import PairImages
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.dataset_scoring import image_arrays, shown_images
from dpo_keras.scoring.model_inputs import check_inputs
from dpo_keras.training.continuous_batching import decodes_continuously
from dpo_keras.training.decoding import (
    check_generates_from_images,
    decode,
    generate_tokens,
    new_tokens,
    token_choice,
)
from dpo_keras.utils import JSON, Tensor, backends

# Compiled once per policy and setting. The functions read the weights as they are at each call.
_compiled_functions: weakref.WeakKeyDictionary[object, dict[object, Callable[..., Tensor]]] = (
    weakref.WeakKeyDictionary()
)

# Prompts for each slot between two reports of progress: more keep the slots full for longer.
_PROMPTS_PER_SLOT = 8


class Sampling(NamedTuple):
    """How tokens are chosen."""

    temperature: float
    top_p: float
    stops: tuple[int, ...] = ()


def generate_responses(  # noqa: PLR0913 - public API, options by keyword
    policy: keras.Model,
    prompts: Sequence[str] | Sequence[Sequence[int]] | Ragged,
    *,
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | Sequence[int] = 0,
    batch_size: int = 32,
    max_length: int | None = None,
    preprocessor: object | None = None,
    on_batch: Callable[[int, int], None] | None = None,
    return_ended: bool = False,
    images: Sequence[Sequence[JSON]] | PairImages | None = None,
) -> Any:
    """Sample responses to prompts, tokenized exactly as for training.

    Policies that can be trained on packed rows read prompts of similar length together, and decode
    `batch_size` sequences at a time, each of which makes room for the next prompt when it ends. Any
    other policy decodes batch by batch, and each batch for as long as its longest response takes.

    Args:
        policy: a KerasHub causal language model (its key-value cache is used), or any Keras model
            from `{"token_ids", "padding_mask"}` to logits.
        prompts: N strings, or N rows of token ids: `TokenizedPairs.prompt` where a chat template
            rendered a conversation, whose text alone does not determine the ids.
        max_new_tokens: the longest response, in tokens.
        temperature: softmax temperature; 0 takes the most likely token.
        top_p: share of the probability to sample from; 1 samples from all tokens.
        seed: of the sampling. The same seed, prompts and batch size give the same responses. C
            seeds give C responses to each prompt, which is read once for all of them.
        batch_size: sequences that are decoded at a time.
        max_length: tokens of prompt and response together; longer prompts are cut from the left. By
            default the number of positions of the model.
        preprocessor: what tokenizes; by default `policy.preprocessor`.
        on_batch: called with (prompts done, N) now and then.
        return_ended: whether to return which responses ended by themselves, too.
        images: N lists of images, as `PreferencePair` takes them, for prompts that are strings;
            `TokenizedPairs.images` of the same rows for prompts that are ids.

    Returns:
        N strings without special tokens. With `return_ended` a tuple of those and N booleans, False
        where a response was cut off at `max_new_tokens`. With C seeds there are lists of C in place
        of strings and booleans.

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
    sampling = Sampling(temperature, top_p)
    encoder, limit = checked_arguments(policy, preprocessor, max_new_tokens, sampling, max_length)
    prompts, shown = _shown(policy, preprocessor, prompts, images)
    sampling = sampling._replace(stops=tuple(sorted(encoder.ends)))
    room = None if limit is None else limit - max_new_tokens
    rows = prompt_ids(encoder, [prompts[row] for row in range(len(prompts))], room)
    if not rows:
        return ([], []) if return_ended else []
    seeds = [seed] if isinstance(seed, int | np.integer) else list(seed)
    uniforms = uniform_numbers(seeds, len(rows), max_new_tokens, temperature)
    new: list[list[int]] = []
    if shown is None and not backends.uses_jax() and decodes_continuously(policy):
        batches = _continuous(policy, rows, uniforms, sampling, batch_size)
    else:
        # Few different lengths, because each one is compiled for itself.
        length = -(-(max(map(len, rows)) + max_new_tokens) // 16) * 16
        shape = batch_size, length if limit is None else min(length, limit)
        batches = _in_columns(policy, rows, uniforms, sampling, shape, encoder.pad, shown)
    for found in batches:
        new += found
        if on_batch is not None:
            on_batch(len(new) // len(seeds), len(rows))
    responses: list[Any] = detokenized(encoder, new)
    ended: list[Any] = [len(row) < max_new_tokens for row in new]
    if not isinstance(seed, int | np.integer):
        responses, ended = (_by_prompt(values, len(seeds)) for values in (responses, ended))
    return (responses, ended) if return_ended else responses


def checked_arguments(
    policy: keras.Model,
    preprocessor: object | None,
    max_new_tokens: int,
    sampling: Sampling,
    max_length: int | None,
) -> tuple[TextEncoder, int | None]:
    """Check what generation is asked for; return what tokenizes, and the longest sequence."""
    problems = decoding_problems(max_new_tokens, sampling.temperature, sampling.top_p)
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
    return TextEncoder(preprocessor), limit


def _by_prompt(values: list[Any], copies: int) -> list[list[Any]]:
    return [values[start : start + copies] for start in range(0, len(values), copies)]


def uniform_numbers(
    seeds: Sequence[int], prompts: int, max_new_tokens: int, temperature: float
) -> np.ndarray:
    """Return what each token is drawn by, float32 `[prompts, seeds, max_new_tokens]` in [0, 1).

    It depends on nothing but the seed and the prompt's number.
    """
    shape = (prompts, len(seeds), max_new_tokens)
    if temperature == 0:
        return np.zeros(shape, np.float32)
    drawn = [
        np.random.default_rng([seed % 2**63, number]).random(max_new_tokens, np.float32)
        for number in range(prompts)
        for seed in seeds
    ]
    return np.reshape(drawn, shape)


def _continuous(
    policy: keras.Model,
    rows: list[list[int]],
    uniforms: np.ndarray,
    sampling: Sampling,
    batch_size: int,
) -> Iterator[list[list[int]]]:
    """Generate with slots that are refilled; the new tokens of some prompts at a time."""
    run = compiled(policy, _continuous_function, sampling)
    slots = tf.constant(batch_size)
    step = _PROMPTS_PER_SLOT * batch_size
    for start in range(0, len(rows), step):
        prompts = tf.ragged.constant(rows[start : start + step], tf.int32, ragged_rank=1)
        yield run(prompts, uniforms[start : start + step], slots).to_list()


def _in_columns(
    policy: keras.Model,
    rows: list[list[int]],
    uniforms: np.ndarray,
    sampling: Sampling,
    shape: tuple[int, int],
    pad: int,
    shown: PairImages | None,
) -> Iterator[list[list[int]]]:
    """Generate batch by batch; the new tokens of one batch at a time."""
    run = compiled(policy, _columns_function, sampling)
    batch_size, length = shape
    copies, longest = uniforms.shape[1:]
    for start in range(0, len(rows), batch_size):
        # The last row is repeated to keep one shape; the responses of its copies are cut off.
        places = np.minimum(np.arange(start, start + batch_size), len(rows) - 1)
        filled = [rows[place] for place in places]
        token_ids, mask = _right_padded(filled, length, pad)
        lengths = np.array([len(row) for row in filled])
        seen = {} if shown is None else image_arrays(shown, places, filled, length)
        batch = {"token_ids": token_ids, "mask": mask, "images": seen}
        found = []
        for copy in range(copies):
            ids = run({**batch, "uniforms": uniforms[places, copy]})["token_ids"]
            found.append(new_tokens(ids, lengths, sampling.stops, longest).to_list())
        count = len(rows[start : start + batch_size])
        yield [found[copy][row] for row in range(count) for copy in range(copies)]


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


def compiled(
    policy: keras.Model,
    make: Callable[[Callable[[], Any], Sampling], Callable[..., Tensor]],
    sampling: Sampling,
) -> Callable[..., Tensor]:
    """Return what `make` compiles, made once for each policy, its weights, and each setting."""
    known = _compiled_functions.setdefault(policy, {})
    key = (make, sampling, tuple(map(id, _variables(policy))))
    if key not in known:
        # The values of a dictionary with weak keys must not hold the keys.
        known[key] = make(weakref.ref(policy), sampling)
    return known[key]


def _continuous_function(borrowed: Callable[[], Any], sampling: Sampling) -> Callable[..., Tensor]:
    specifications = [
        tf.RaggedTensorSpec([None, None], tf.int32),
        tf.TensorSpec([None, None, None], tf.float32),
        tf.TensorSpec([], tf.int32),
    ]
    choose = token_choice(sampling.temperature, sampling.top_p)

    # One trace for all lengths, without XLA, which compiles for each shape and takes seconds.
    @tf.function(input_signature=specifications, autograph=False)
    def run(prompts: tf.RaggedTensor, uniforms: Tensor, slots: Tensor) -> tf.RaggedTensor:
        return generate_tokens(
            borrowed(),
            prompts,
            uniforms,
            stops=sampling.stops,
            choose=choose,
            slots=slots,
            pad=0,
        )

    found: Callable[..., Tensor] = run
    return found


def _columns_function(borrowed: Callable[[], Any], sampling: Sampling) -> Callable[..., Tensor]:
    choose = token_choice(sampling.temperature, sampling.top_p)

    def run(batch: dict[str, Any]) -> dict[str, Tensor]:
        found = decode(borrowed(), stops=sampling.stops, choose=choose, **batch)
        return {"token_ids": found}

    # XLA, as in KerasHub's own generate(): without it, updates of the cache are slow. A model of
    # the user's own may hold operations that XLA does not have.
    whole = isinstance(borrowed(), keras_hub.models.CausalLM)
    return backends.compiled(run, _variables(borrowed()), jit_compile=whole)


def _variables(policy: object) -> list[keras.Variable]:
    return list(getattr(policy, "variables", ()))  # those of `legacy` have none to be replaced


def prompt_ids(encoder: TextEncoder, prompts: list[Any], room: int | None) -> list[list[int]]:
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


def _right_padded(rows: list[list[int]], length: int, pad: int) -> tuple[np.ndarray, np.ndarray]:
    token_ids = np.full((len(rows), length), pad, np.int32)
    for row, ids in zip(token_ids, rows, strict=True):
        row[: len(ids)] = ids
    return token_ids, np.arange(length) < np.array([[len(row)] for row in rows])
