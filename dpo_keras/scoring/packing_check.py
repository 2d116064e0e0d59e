"""Check that packed rows score exactly as rows of one pair: by a model's layers, and by trial."""

import keras
import numpy as np

from dpo_keras.batching import Batch, Ragged, TokenizedPairs, collate, collate_packed
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.language_model_head import split_backbone_and_head
from dpo_keras.scoring.scorer import ResponseScorer
from dpo_keras.utils.backends import compiled, uses_jax
from dpo_keras.utils.keras_hub_attention import (
    ATTENTION,
    attention_settings,
    is_attention,
    is_bidirectional,
    is_position,
    is_recurrent,
    is_rotary_table,
    scales_by_row_length,
)
from dpo_keras.utils.keras_hub_families import media_encoders
from dpo_keras.utils.keras_internals import all_layers

# Largest difference of a log-prob that is rounding, as a share of the log-prob.
_TOLERANCE = {"float32": 2e-5, "float64": 1e-9}
_LOW_PRECISION = 5e-2
# Prompt, chosen and rejected tokens of each trial pair, a tree of its own.
_LENGTHS = ((5, 3, 1), (1, 1, 4), (3, 2, 2), (1, 6, 1))
# A tree of several pairs: three responses to one prompt, two of which begin alike, each in two
# pairs; and a later turn, whose prompt continues prompt and response. The numbers are tokens.
_PROMPT, _ANSWERS = (1, 2, 3, 4), ((5, 6, 7), (5, 6, 8, 9), (2, 1))
_FOREST = (
    *((_PROMPT, _ANSWERS[i], _ANSWERS[j]) for i, j in ((0, 1), (0, 2), (1, 2))),
    ((*_PROMPT, *_ANSWERS[0], 3), (4, 2), (4, 3, 1)),
)


def packing_obstacle(policy: object) -> str | None:
    """Return why a policy cannot run on packed rows; None where it can.

    Args:
        policy: a KerasHub causal language model, or any other model.

    Returns:
        A clause without a full stop, or None.

    Example:
        >>> packing_obstacle(keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)]))
        'Sequential is no KerasHub causal language model whose backbone and head can be taken apart'
    """
    recurrent = _recurrent_layers(policy)
    if recurrent:
        return (
            f"{type(policy).__name__} is recurrent ({', '.join(recurrent)}): its state would run "
            "from one text of a row into the next"
        )
    parts = split_backbone_and_head(policy)
    if parts is None:
        return (
            f"{type(policy).__name__} is no KerasHub causal language model whose backbone and head "
            "can be taken apart"
        )
    # Encoders of images and sounds do not run on packed rows, which are of text.
    idle = {id(layer) for found in media_encoders(parts[0]) for layer in all_layers(found.encoder)}
    layers = [layer for layer in all_layers(parts[0]) if id(layer) not in idle]
    attention = [layer for layer in layers if is_attention(layer)]
    positions = [layer for layer in layers if is_position(layer) or is_rotary_table(layer)]
    unknown = sorted({type(layer).__name__ for layer in attention} - set(ATTENTION))
    reason = None
    if not attention:
        reason = "has no attention layers that dpo_keras knows"
    elif unknown:
        reason = f"attends through {', '.join(unknown)}, which dpo_keras has not proven"
    elif any(is_bidirectional(layer) for layer in attention):
        reason = "lets tokens see those behind them"
    elif any(scales_by_row_length(layer) for layer in positions):
        reason = "scales its rotary positions by the length of a row"
    elif not positions and not any(_counts_positions(layer) for layer in attention):
        reason = "has no position layers that dpo_keras knows"
    return None if reason is None else f"{type(parts[0]).__name__} {reason}"


def _recurrent_layers(policy: object) -> list[str]:
    layers = all_layers(policy) if isinstance(policy, keras.Model) else []
    return sorted({type(layer).__name__ for layer in layers if is_recurrent(layer)})


def _counts_positions(layer: keras.layers.Layer) -> bool:
    settings = attention_settings(layer)
    return settings is not None and settings.slopes is not None


def check_packing(scorer: ResponseScorer, seed: int = 0) -> float:
    """Score a few pairs of random tokens packed and unpacked, and check that log-probs are equal.

    Among them are prompts and responses of one token, several trees in a row, a full row, and a
    tree of several pairs.

    Args:
        scorer: the policy's.
        seed: seed of the tokens.

    Returns:
        The largest difference of a log-prob, as a share of the largest log-prob.

    Raises:
        InputError: the policy cannot be packed, or its log-probs differ by more than rounding. The
            problem's argument is `batching`.
    """
    reason = packing_obstacle(scorer.policy)
    if reason is not None:
        raise _needs_buckets(reason)
    assert scorer.parts is not None
    backbone = scorer.parts[0]
    tokenized, trees = _trial_pairs(backbone.vocabulary_size, seed)
    count, alone = len(tokenized), len(_LENGTHS)
    rows = [list(range(alone)), [0], list(range(alone, count))]
    length = sum(sum(lengths) for lengths in _LENGTHS)
    unpacked = _logps(scorer, collate(tokenized, list(range(count))))
    batch = collate_packed(tokenized, rows, length=length, trees=trees)
    packed = _logps(scorer, batch)[batch["weight"].reshape(-1) > 0]
    # The first tree stands in a row of its own as well, where it must score the same.
    expected = np.concatenate([unpacked[:alone], unpacked[:1], unpacked[alone:]])
    differences = np.abs(packed - expected)
    share = float(differences.max() / np.abs(expected).max())
    tolerance = _TOLERANCE.get(backbone.compute_dtype, _LOW_PRECISION)
    if not share <= tolerance:
        raise _needs_buckets(
            f"packed, the log-probs of {type(backbone).__name__} differ from unpacked ones by "
            f"{share:.1e} of their size, where rounding explains {tolerance:.0e}"
        )
    return share


def _needs_buckets(reason: str) -> InputError:
    return InputError(InputProblem("batching", f"must be 'buckets' for this policy: {reason}"))


def _trial_pairs(vocabulary_size: int, seed: int) -> tuple[TokenizedPairs, np.ndarray]:
    """Return the pairs of the trial, and the tree of each."""
    random = np.random.default_rng(seed)
    words = random.integers(0, vocabulary_size, 10)

    def tokens(column: int) -> Ragged:
        alone = [random.integers(0, vocabulary_size, lengths[column]) for lengths in _LENGTHS]
        return Ragged.from_lists([*alone, *(words[list(texts[column])] for texts in _FOREST)])

    trees = np.minimum(np.arange(len(_LENGTHS) + len(_FOREST)), len(_LENGTHS))
    ones = np.ones(len(trees), np.float32)
    return TokenizedPairs(tokens(0), tokens(1), tokens(2), ones, ones), trees


def _logps(scorer: ResponseScorer, batch: Batch) -> np.ndarray:
    if uses_jax():  # which compiles each operation outside of a compiled function
        found = compiled(lambda given: {"logps": scorer(given)["logps"]}, scorer.variables)
        logps: np.ndarray = found(batch)["logps"]
        return logps
    tensors = keras.tree.map_structure(keras.ops.convert_to_tensor, dict(batch))
    return np.asarray(keras.ops.convert_to_numpy(scorer(tensors)["logps"]))
