"""The steps of the method: scores -> probabilities -> log-likelihood ratio -> cross-entropy.

A pair of scores S₀ (chosen) and S₁ (rejected) states a Bradley-Terry model of the preference:

    P = softmax(S),   LLR = log P₀ - log P₁ = S₀ - S₁,   BCE = -y log P₀ - (1 - y) log P₁.
"""

from __future__ import annotations

from dpo_keras.utils import Tensor
from dpo_keras.utils.deferred_imports import ops


def preference_probabilities(scores: Tensor) -> Tensor:
    """Compute the probability that each of the two responses is the better one.

    P = softmax(S), over the two columns (Bradley & Terry 1952; arXiv 2305.18290, eq. 1).

    Args:
        scores: `[B, 2]`, column 0 chosen, column 1 rejected; in nats.

    Returns:
        `[B, 2]`; each row sums to one.

    Example:
        >>> from keras import ops
        >>> print(ops.convert_to_numpy(preference_probabilities([[2.5, 1.5]])).round(4))
        [[0.7311 0.2689]]
    """
    return ops.softmax(as_floating(scores), axis=-1)


def log_likelihood_ratio(scores: Tensor) -> Tensor:
    """Compute how much likelier the first response is to be the better one, in nats.

    LLR = log P₀ - log P₁ = S₀ - S₁. It is taken from the scores: probabilities round to 0 and 1
    from about 17 nats on in float32, and their logarithms with them.

    Args:
        scores: `[B, 2]`, column 0 chosen, column 1 rejected; in nats.

    Returns:
        `[B]`; positive where the first response is preferred.

    Example:
        >>> from keras import ops
        >>> ops.convert_to_numpy(log_likelihood_ratio([[2.5, 1.5], [-1e4, 1e4]])).tolist()
        [1.0, -20000.0]
    """
    scores = as_floating(scores)
    return scores[..., 0] - scores[..., 1]


def binary_cross_entropy(preference: Tensor, scores: Tensor) -> Tensor:
    """Compute the cross-entropy between the people's preference and the model's.

    BCE = -y log P₀ - (1 - y) log P₁ = -y log σ(LLR) - (1 - y) log σ(-LLR)
    (arXiv 2305.18290, eq. 7, with a soft label y).

    Args:
        preference: `[B]` or a number, y in [0, 1]: the probability that the first response is
            better.
        scores: `[B, 2]`, column 0 chosen, column 1 rejected; in nats.

    Returns:
        `[B]`, in nats, never negative, finite for scores of any finite size.

    Example:
        >>> from keras import ops
        >>> values = binary_cross_entropy([1.0, 0.5, 0.0], [[2.5, 1.5], [0.0, 0.0], [1e4, -1e4]])
        >>> print(ops.convert_to_numpy(values).round(4))
        [3.133e-01 6.931e-01 2.000e+04]
    """
    llr = log_likelihood_ratio(scores)
    preference = as_floating(preference, llr.dtype)
    return -preference * ops.log_sigmoid(llr) - (1.0 - preference) * ops.log_sigmoid(-llr)


def plackett_luce_nll(scores: Tensor, present: Tensor) -> Tensor:
    """Compute the negative log-likelihood of a ranking, the best response first.

    The best is chosen by softmax of all scores, the second by softmax of the others, and so on:

    -log P(1 > 2 > … > K) = Σ_k [log Σ_{j≥k} exp S_j - S_k]
    (Plackett 1975; arXiv 2305.18290, appendix A.3). With K = 2 it is the binary cross-entropy.

    Args:
        scores: `[B, K]`, from the best response to the worst; in nats.
        present: bool `[B, K]`, False for columns behind a ranking of fewer responses.

    Returns:
        `[B]`, in nats, never negative, finite for scores of any finite size.

    Example:
        >>> from keras import ops
        >>> value = plackett_luce_nll([[2.5, 1.5, 0.0]], [[True, True, False]])
        >>> print(ops.convert_to_numpy(value).round(4))
        [0.3133]
    """
    scores, present = as_floating(scores), ops.convert_to_tensor(present)
    total = ops.zeros_like(scores[:, 0])
    rest = ops.where(present[:, -1], scores[:, -1], NEVER)
    for column in range(scores.shape[-1] - 2, -1, -1):
        # log Σ_{j≥k} - S_k = softplus(log Σ_{j>k} - S_k), in which nothing overflows.
        own = scores[:, column]
        behind = -ops.log_sigmoid(own - rest)
        total = total + ops.where(present[:, column + 1], behind, 0.0)
        rest = ops.where(present[:, column], own + behind, NEVER)
    return total


NEVER = -1e30
"""The score of a response that there is none of: a place that is never chosen."""


def as_floating(value: Tensor, dtype: str | None = None) -> Tensor:
    """Convert to a float tensor: float64 stays, all else becomes float32 or `dtype`."""
    # A number becomes a tensor of its dtype at once: 0.9 by way of float32 is not 0.9 in float64.
    value = ops.convert_to_tensor(value, dtype if isinstance(value, float) else None)
    if dtype is None:
        dtype = "float64" if ops.dtype(value) == "float64" else "float32"
    return ops.cast(value, dtype)
