"""Whether a model may be run on packed rows: by its kind, and by trying it."""

from typing import Any

import keras
import numpy as np

from dpo_keras.batching import Ragged, TokenizedPairs, collate, collate_packed
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
