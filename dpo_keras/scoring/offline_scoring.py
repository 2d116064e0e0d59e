"""Whether a model may be run on packed rows: by its kind, and by trying it."""

from collections.abc import Callable, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dpo_keras.batching import (
    Batching,
    Ragged,
    TokenizedPairs,
    batch_from_strings,
    collate,
    collate_packed,
    one_pass,
    pass_signature,
)
from dpo_keras.errors import InputError
from dpo_keras.scoring.scorer import ResponseScorer, split_backbone_and_head
from dpo_keras.scoring.tree_attention import why_not_packed

# Largest difference of a log-prob that is rounding, as a share of the log-prob.
_TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
_LOW_PRECISION = 5e-2
_LENGTHS = ((5, 3, 1), (1, 1, 4), (3, 2, 2), (1, 6, 1))


def supports_packing(policy: Any) -> str | None:
    """Why a policy cannot be run on packed rows; None where it can.

    Args:
        policy: a KerasHub causal language model, or any Keras model.

    Returns:
        A clause without a full stop, or None.

    Example:
        >>> supports_packing(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
        'Sequential is no KerasHub causal language model whose backbone and head can be taken apart'
    """
    parts = split_backbone_and_head(policy)
    if parts is None:
        return (
            f"{type(policy).__name__} is no KerasHub causal language model whose backbone and head "
            "can be taken apart"
        )
    return why_not_packed(parts[0])


def check_packing(scorer: ResponseScorer, seed: int = 0) -> float:
    """Scores a few pairs packed and unpacked, and refuses a model for which they differ.

    The pairs are random tokens: responses and prompts of one token among them, several trees in a
    row, and a row exactly full.

    Args:
        scorer: of the policy.
        seed: of the tokens.

    Returns:
        The largest difference of a log-prob, as a share of the largest log-prob.

    Raises:
        InputError: the policy cannot be packed, or its log-probs differ by more than rounding.
    """
    reason = supports_packing(scorer.policy)
    if reason is not None:
        raise InputError(f"batching must be 'buckets' for this policy: {reason}.")
    assert scorer.parts is not None
    backbone = scorer.parts[0]
    tokenized = _random_pairs(backbone.vocabulary_size, seed)
    count = len(tokenized)
    rows = [list(range(count)), [0]]
    length = int(sum(sum(lengths) for lengths in _LENGTHS))
    unpacked = _logps(scorer, collate(tokenized, list(range(count))))
    found = _logps(scorer, collate_packed(tokenized, rows, length=length))
    largest = float(np.abs(unpacked).max())
    # The same tree in a row of its own must score as it does among others.
    difference = max(
        float(np.abs(found[:count] - unpacked).max()),
        float(np.abs(found[count] - unpacked[0]).max()),
    )
    share = difference / largest
    tolerance = _TOLERANCE.get(backbone.compute_dtype, _LOW_PRECISION)
    if not share <= tolerance:
        raise InputError(
            f"batching must be 'buckets' for this policy: packed, the log-probs of "
            f"{type(backbone).__name__} differ from unpacked ones by {share:.1e} of their size, "
            f"where rounding explains {tolerance:.0e}."
        )
    return share


def _random_pairs(vocabulary_size: int, seed: int) -> TokenizedPairs:
    random = np.random.default_rng(seed)

    def tokens(column: int) -> Ragged:
        return Ragged.from_lists(
            [random.integers(0, vocabulary_size, lengths[column]) for lengths in _LENGTHS]
        )

    ones = np.ones(len(_LENGTHS), np.float32)
    return TokenizedPairs(tokens(0), tokens(1), tokens(2), ones, ones)


def _logps(scorer: ResponseScorer, batch: dict[str, Any]) -> np.ndarray:
    tensors = {name: keras.ops.convert_to_tensor(value) for name, value in batch.items()}
    return keras.ops.convert_to_numpy(scorer(tensors)["logps"])


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
