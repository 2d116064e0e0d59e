"""Responses as they are written: the texts so far, while the policy goes on."""

import itertools
import queue
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import keras
import numpy as np
import tensorflow as tf

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.training.decoding import generate_tokens, token_choice
from dpo_keras.training.generation import (
    Sampling,
    checked_arguments,
    compiled,
    detokenized,
    prompt_ids,
    uniform_numbers,
)
from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import uses_jax
from dpo_keras.utils.keras_internals import native_slice_update


class Written(NamedTuple):
    """What there is of a response."""

    number: int  # of its prompt
    text: str  # all of it so far
    ended: bool  # nothing more follows


_Step: TypeAlias = tuple[np.ndarray, np.ndarray] | None
_streams: dict[int, Callable[[np.ndarray, np.ndarray], None]] = {}
_numbers = itertools.count()


def stream_responses(
    policy: keras.Model,
    prompts: Sequence[str] | Sequence[Sequence[int]],
    *,
    seeds: Sequence[int],
    max_new_tokens: int = 64,
    temperature: float = 1.0,
    top_p: float = 1.0,
    max_length: int | None = None,
    preprocessor: object | None = None,
) -> Generator[Written, None, None]:
    """Sample a response to each prompt, all together, and yield texts as tokens are chosen.

    A response is that of `generate_responses(policy, [prompt], seed=seed)`, but for rounding,
    whatever other prompts it is written together with. Where texts are taken more slowly than
    tokens come, only the newest text of a response is yielded.

    Args:
        policy: as `generate_responses` takes it.
        prompts: N strings, or N rows of token ids.
        seeds: N seeds, one for each prompt.
        max_new_tokens: the longest response, in tokens.
        temperature: softmax temperature; 0 takes the most likely token.
        top_p: share of the probability to sample from; 1 samples from all tokens.
        max_length: tokens of prompt and response together, by default the model's positions.
        preprocessor: what tokenizes; by default `policy.preprocessor`.

    Returns:
        A generator of `Written`; the last one of each prompt has `ended`. Its `close()` ends the
        decoding.

    Raises:
        InputError: an argument is out of range, there is no preprocessor, Keras runs on JAX, or a
            prompt leaves no room for the response: unlike `generate_responses`, it cuts nothing
            off.

    Example:
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [[ord(c) - 90 for c in t] for t in texts])
        ...     detokenize = staticmethod(lambda rows: ["".join(chr(90 + i) for i in rows[0])])
        >>> ids = {name: keras.Input((None,), name=name) for name in ("token_ids", "padding_mask")}
        >>> always_c = keras.layers.Lambda(lambda x: keras.ops.one_hot(0 * x + 9, 64) * 99)
        >>> policy = keras.Model(ids, always_c(ids["token_ids"]))
        >>> options = {"max_new_tokens": 3, "preprocessor": Letters()}
        >>> *_, last = stream_responses(policy, ["a"], seeds=[0], **options)
        >>> last
        Written(number=0, text='ccc', ended=True)
    """
    if uses_jax():
        rule = "is streamed on TensorFlow alone, and Keras runs on JAX"
        hint = "Call generate_responses, or set KERAS_BACKEND=tensorflow before Keras is imported."
        raise InputError(InputProblem("policy", rule, hint=hint))
    preprocessor = preprocessor or getattr(policy, "preprocessor", None)
    sampling = Sampling(temperature, top_p)
    encoder, limit = checked_arguments(policy, preprocessor, max_new_tokens, sampling, max_length)
    if len(seeds) != len(prompts):
        rule = f"must be as many as the {len(prompts)} prompts"
        raise InputError(InputProblem("seeds", rule, len(seeds)))
    rows = prompt_ids(encoder, list(prompts), None)
    longest = max(map(len, rows), default=0)
    if limit is not None and longest > limit - max_new_tokens:
        rule = f"must have {limit - max_new_tokens:,} tokens at most, got {longest:,}"
        raise InputError(InputProblem("prompts", rule))
    sampling = sampling._replace(stops=tuple(sorted(encoder.ends)))
    uniforms = [uniform_numbers([seed], 1, max_new_tokens, temperature)[0] for seed in seeds]
    run = compiled(policy, _streaming_function, sampling)

    def written(tokens: Sequence[list[int]], ended: Sequence[bool], changed: set[int]) -> Any:
        numbers = sorted(changed)
        texts = detokenized(encoder, [tokens[number] for number in numbers])
        return [Written(n, text, ended[n]) for n, text in zip(numbers, texts, strict=True)]

    return _stream(run, rows, np.array(uniforms), sampling.stops, written)


def _stream(
    run: Callable[..., Tensor],
    rows: list[list[int]],
    uniforms: np.ndarray,
    stops: Sequence[int],
    written: Callable[[list[list[int]], list[bool], set[int]], list[Written]],
) -> Generator[Written, None, None]:
    """Run a compiled decoder in a thread; yield what it has written."""
    if not rows:
        return
    steps: queue.SimpleQueue[_Step] = queue.SimpleQueue()
    failures: list[Exception] = []
    cancelled = threading.Event()
    number = next(_numbers)

    def hear(numbers: np.ndarray, tokens: np.ndarray) -> None:
        if cancelled.is_set():
            raise RuntimeError("nobody wants the rest")  # ends the loop in the graph
        steps.put((numbers, tokens))

    def decode() -> None:
        try:
            prompts = tf.ragged.constant(rows, tf.int32, ragged_rank=1)
            run(prompts, uniforms, tf.constant(len(rows)), tf.constant(number))
        except Exception as error:
            failures.append(error)
        steps.put(None)

    _streams[number] = hear
    thread = threading.Thread(target=decode, name="stream_responses", daemon=True)
    thread.start()
    tokens: list[list[int]] = [[] for _ in rows]
    ended = [False] * len(rows)
    longest = uniforms.shape[-1]
    try:
        for new in _heard(steps):
            changed = set()
            for row, token in new:
                if 0 <= row < len(rows) and not ended[row]:
                    if token not in stops:
                        tokens[row].append(token)
                    ended[row] = token in stops or len(tokens[row]) == longest
                    changed.add(row)
            yield from written(tokens, ended, changed)
        if failures:
            raise failures[0]
    finally:
        cancelled.set()
        thread.join()
        del _streams[number]


def _heard(steps: queue.SimpleQueue[_Step]) -> Iterator[list[tuple[int, int]]]:
    """Yield rows and tokens, each time all that have come, until there are no more."""
    while True:
        found = [steps.get()]
        while not steps.empty():
            found.append(steps.get())
        yield [
            pair
            for step in found
            if step is not None
            for pair in zip(step[0].tolist(), step[1].tolist(), strict=True)
        ]
        if found[-1] is None:
            return


def _streaming_function(borrowed: Callable[[], Any], sampling: Sampling) -> Callable[..., Tensor]:
    specifications = [
        tf.RaggedTensorSpec([None, None], tf.int32),
        tf.TensorSpec([None, 1, None], tf.float32),
        tf.TensorSpec([], tf.int32),
        tf.TensorSpec([], tf.int32),
    ]
    choose = token_choice(sampling.temperature, sampling.top_p)

    def hear(number: np.ndarray, rows: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        _streams[int(number)](rows, tokens)
        return tokens

    # Without XLA, which knows no Python; it would also compile for each shape.
    @tf.function(input_signature=specifications, autograph=False)
    def run(
        prompts: tf.RaggedTensor, uniforms: Tensor, slots: Tensor, number: Tensor
    ) -> tf.RaggedTensor:
        def report(rows: Tensor, tokens: Tensor) -> Tensor:
            heard = tf.numpy_function(hear, [number, rows, tokens], tf.int32)
            return tf.ensure_shape(heard, tokens.shape)

        with native_slice_update():
            return generate_tokens(
                borrowed(),
                prompts,
                uniforms,
                stops=sampling.stops,
                choose=choose,
                slots=slots,
                pad=0,
                report=report,
            )

    found: Callable[..., Tensor] = run
    return found
