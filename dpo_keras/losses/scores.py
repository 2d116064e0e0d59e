"""Scores S(x, y) of a response: what the softmax over the two responses is taken over.

Each function maps the scorer's `outputs` (`policy`, `reference`, `lengths`, each `[N, 2]`) to
scores `[N, 2]` in nats.
"""

from __future__ import annotations

import math
from typing import TypedDict

from dpo_keras.losses.bradley_terry import as_floating
from dpo_keras.utils import Tensor
from dpo_keras.utils.deferred_imports import ops


class Outputs(TypedDict, total=False):
    """What the scorer returns for a batch of N pairs; column 0 is chosen, column 1 rejected."""

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    policy_shared: Tensor
    reference_shared: Tensor
    wpo_log_weight: Tensor
    entropy: Tensor
    margin: Tensor
    group: Tensor
    weight: Tensor
    rated: Tensor
    collected: list[Tensor]
    reward_shift: Tensor
    probabilities: Tensor
    llr: Tensor


def per_token(values: Tensor, outputs: Outputs) -> Tensor:
    """Divide sums over response tokens by their number (an empty response counts as one)."""
    values = as_floating(values)
    return values / ops.maximum(ops.cast(outputs["lengths"], values.dtype), 1.0)


def log_ratio(
    outputs: Outputs,
    *,
    beta: float,
    divergence: str = "reverse_kl",
    divergence_alpha: float = 0.5,
    ld_alpha: float | None = None,
) -> Tensor:
    """Compute the implicit reward β·g(log π - log π_ref) (arXiv 2305.18290, eq. 5).

    g is the reward of `divergence` (arXiv 2309.16240). With `ld_alpha` (LD-DPO, arXiv 2409.06411)
    the tokens beyond the shorter response's length count α only: log p = shared + α (whole -
    shared), for policy and reference.
    """
    ratio = outputs["policy"] - outputs["reference"]
    if ld_alpha is not None:
        shared = outputs["policy_shared"] - outputs["reference_shared"]
        ratio = shared + ld_alpha * (ratio - shared)
    return beta * divergence_reward(ratio, divergence, divergence_alpha)


def mean_log_ratio(outputs: Outputs, *, beta: float) -> Tensor:
    """Compute the implicit reward per token, β (log π - log π_ref) / n (arXiv 2411.15124)."""
    return beta * per_token(outputs["policy"] - outputs["reference"], outputs)


def log_prob(outputs: Outputs, *, beta: float) -> Tensor:
    """Compute β log π, without a reference (arXiv 2401.08417, 2305.10425)."""
    return beta * outputs["policy"]


def mean_log_prob(outputs: Outputs, *, beta: float) -> Tensor:
    """Compute β log π / n, without a reference (SimPO, arXiv 2405.14734, eq. 4)."""
    return beta * per_token(outputs["policy"], outputs)


def alpha_reward(outputs: Outputs, *, beta: float, alphapo_alpha: float = 0.25) -> Tensor:
    """Compute β (1 - p^(-α)) / α with log p = log π / n (AlphaPO, arXiv 2501.03884).

    α = 0 is its limit β log p (SimPO). Where p^(-α) exceeds e^30 it goes on along its tangent.
    """
    mean = per_token(outputs["policy"], outputs)
    if alphapo_alpha == 0:
        return beta * mean
    return -beta / alphapo_alpha * capped_expm1(-alphapo_alpha * mean)


def log_odds(outputs: Outputs) -> Tensor:
    """Compute log(p / (1 - p)) with log p = log π / n (ORPO, arXiv 2403.07691, eq. 4).

    p is taken as at most exp(-1e-6), where the odds are still finite.
    """
    mean = ops.minimum(per_token(outputs["policy"], outputs), -1e-6)
    return mean - log1mexp(mean)


DIVERGENCES = ("reverse_kl", "forward_kl", "js", "alpha")
"""Names of the f-divergences that `divergence_reward` knows."""


def divergence_reward(x: Tensor, divergence: str, alpha: float = 0.5) -> Tensor:
    """Turn a log-ratio x = log π/π_ref into the reward of an f-divergence (arXiv 2309.16240).

    The reward is f'(u) at u = e^x, up to a constant that the difference of two rewards drops:

        reverse_kl   x                               KL(π ‖ π_ref): plain DPO
        forward_kl   1 - e^(-x)                      KL(π_ref ‖ π): no response may vanish
        js           log 2 + log σ(x)                Jensen-Shannon: bounded by log 2
        alpha        (e^((α-1)x) - 1) / (α - 1)      forward KL at α = 0, reverse KL at α = 1

    Example:
        >>> from keras import ops
        >>> x = ops.convert_to_tensor([0.0, 1.0])
        >>> [round(float(divergence_reward(x, name)[1]), 4) for name in DIVERGENCES]
        [1.0, 0.6321, 0.3799, 0.7869]
    """
    if divergence == "forward_kl":
        return -capped_expm1(-x)
    if divergence == "js":
        return math.log(2.0) + ops.log_sigmoid(x)
    if divergence == "alpha" and alpha != 1.0:
        return capped_expm1((alpha - 1.0) * x) / (alpha - 1.0)
    return x


EXP_LIMIT = 30.0
"""Where `capped_expm1` turns into its tangent: e^30 squared, as in a gradient's norm, leaves
float32 half its range."""


def capped_expm1(exponent: Tensor) -> Tensor:
    """Compute exp(x) - 1, continued by its tangent where x > 30.

    A log-ratio of some thousand nats is ordinary for a long response, and exp of it is not finite.
    Clipping would end the gradient exactly where the response is furthest off. The tangent keeps
    value and gradient finite, and the order of any two values as it was.
    """
    within = ops.minimum(exponent, EXP_LIMIT)
    beyond = ops.maximum(exponent - EXP_LIMIT, 0.0)
    return ops.expm1(within) + ops.exp(ops.full_like(exponent, EXP_LIMIT)) * beyond


def log1mexp(log_p: Tensor) -> Tensor:
    """Compute log(1 - exp(x)) for x < 0, finite: x is taken as at most -1e-6."""
    return ops.log(-ops.expm1(ops.minimum(log_p, -1e-6)))
