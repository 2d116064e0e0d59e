"""From strings, or tokenized pairs, to log-probs: the scorer on its own."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dpo_keras.batching import (
    Batching,
    TokenizedPairs,
    batch_from_strings,
    one_pass,
    pass_signature,
)
from dpo_keras.errors import InputError
from dpo_keras.scoring.packed import check_packing
from dpo_keras.scoring.scorer import ResponseScorer


def _compiled(scorer: ResponseScorer) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
    """One trace for batches of any length."""
    functions: dict[tuple[str, ...], Any] = {}

    def run(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        names = tuple(sorted(batch))
        if names not in functions:
            functions[names] = tf.function(
                lambda given: {key: scorer(given)[key] for key in ("logps", "lengths")},
                input_signature=[pass_signature(batch)],
            )
        return {key: value.numpy() for key, value in functions[names](batch).items()}

    return run


def score_pairs(
    model: keras.Model,
    tokenized: TokenizedPairs,
    *,
    batch_size: int = 16,
    batching: Batching = "buckets",
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Log-probs of both responses of every pair.

    Args:
        model: a KerasHub causal language model, or any Keras model from token ids and mask to
            logits.
        tokenized: N pairs.
        batch_size: pairs at a time; in the mean, where packed.
        batching: "buckets", or "packed" for models that `supports_packing` has nothing against.
        on_batch: called with (pairs done, N) after each batch.

    Returns:
        `[N, 2]` float32: log pi(chosen | prompt), log pi(rejected | prompt), in nats.

    Raises:
        InputError: packed, and the model cannot be run so.
    """
    scorer = ResponseScorer(model)
    if batching == "packed":
        check_packing(scorer)
    run = _compiled(scorer)
    logps = np.zeros((len(tokenized), 2), np.float32)
    done = 0
    for part in one_pass(tokenized, batch_size, batching):
        done += part.put(run(part.batch)["logps"], logps)
        if on_batch is not None:
            on_batch(done, len(tokenized))
    return logps


def response_log_probs(
    model: keras.Model,
    prompts: Sequence[str],
    responses: Sequence[str],
    *,
    preprocessor: Any = None,
    batch_size: int = 16,
    max_length: int | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Log pi(response | prompt) of each response, summed over its tokens, its end token included.

        log pi(y | x) = sum_t log pi(y_t | x, y_<t)

    Prompt and response are tokenized apart and joined as ids; the start token comes as the model's
    preprocessor adds it.

    Args:
        model: a KerasHub causal language model, or any Keras model from
            `{"token_ids", "padding_mask"}` to logits.
        prompts: N strings.
        responses: N strings.
        preprocessor: a KerasHub preprocessor or tokenizer; by default `model.preprocessor`.
        batch_size: responses at a time.
        max_length: cut prompts from the left, then responses from the right, to this many tokens;
            None leaves all.

    Returns:
        `(logps, lengths)`: `[N]` float32 in nats, and `[N]` int32 response tokens.

    Raises:
        InputError: no preprocessor, or lists of different length.

    Example:
        >>> import keras_hub
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [[ord(c) - 90 for c in t] for t in texts])
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=64, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> model = keras_hub.models.GPT2CausalLM(backbone)
        >>> logps, lengths = response_log_probs(model, ["a"], ["bc"], preprocessor=Letters())
        >>> lengths
        array([3], dtype=int32)
    """
    preprocessor = preprocessor or getattr(model, "preprocessor", None)
    if preprocessor is None:
        raise InputError("preprocessor is needed to tokenize: the model has none attached.")
    if not prompts:
        return np.zeros(0, np.float32), np.zeros(0, np.int32)
    run = _compiled(ResponseScorer(model))
    batch = batch_from_strings(preprocessor, prompts, responses, max_length=max_length)
    logps, lengths = [], []
    for start in range(0, len(prompts), batch_size):
        rows = {
            name: _full(value[start : start + batch_size], batch_size)
            for name, value in batch.items()
        }
        found = run(rows)
        logps.append(found["logps"][:, 0])
        lengths.append(found["lengths"][:, 0])
    return np.concatenate(logps)[: len(prompts)], np.concatenate(lengths)[: len(prompts)]


def _full(rows: np.ndarray, batch_size: int) -> np.ndarray:
    # The last rows are repeated to keep one shape; their results are cut off.
    missing = batch_size - len(rows)
    return np.concatenate([rows, np.repeat(rows[-1:], missing, axis=0)]) if missing else rows
