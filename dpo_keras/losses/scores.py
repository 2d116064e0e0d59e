"""Scores S(x, y) of a response: what the softmax over the two responses is taken over.

Each function maps the scorer's `outputs` (`policy`, `reference`, `lengths`, each `[N, 2]`) to
scores `[N, 2]` in nats. Its keyword-only arguments are the options that it uses: `DPOLoss` reads
them off the signature.

Example:
    >>> from keras import ops
    >>> outputs = {"policy": ops.convert_to_tensor([[-10.0, -30.0]]),
    ...            "reference": ops.convert_to_tensor([[-15.0, -25.0]]),
    ...            "lengths": ops.convert_to_tensor([[5.0, 10.0]])}
    >>> print(ops.convert_to_numpy(mean_log_ratio(outputs, beta=0.1)).round(4))
    [[ 0.1  -0.05]]
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict

from keras import ops

from dpo_keras.losses.divergences import DIVERGENCES
from dpo_keras.losses.numerics import Tensor, as_floating, capped_expm1, log1mexp


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


def per_token(values: Tensor, outputs: Outputs) -> Tensor:
    """Divide sums over response tokens by the number of tokens (an empty response counts as one).

    Example:
        >>> from keras import ops
        >>> outputs = {"lengths": ops.convert_to_tensor([[2.0, 0.0]])}
        >>> ops.convert_to_numpy(per_token([[4.0, 0.0]], outputs)).tolist()
        [[2.0, 0.0]]
    """
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
    """Give the implicit reward β·g(log π - log π_ref).

    arXiv 2305.18290, eq. 5; g by divergence, arXiv 2309.16240. With `ld_alpha` (LD-DPO,
    arXiv 2409.06411) the tokens beyond the shorter response's length count α only:
    log p = shared + α (whole - shared), for policy and reference.

    Args:
        outputs: `policy`, `reference` `[N, 2]`; with `ld_alpha`, `policy_shared` and
            `reference_shared` too: sums over each response's first min(n⁺, n⁻) tokens.
        beta: strength of the tie to the reference, > 0.
        divergence: a name in `DIVERGENCES`.
        divergence_alpha: α of `divergence="alpha"`.
        ld_alpha: α of LD-DPO in [0, 1]; None leaves log-probs as they are, as 1 does.

    Returns:
        `[N, 2]`, in nats.

    Example:
        >>> from keras import ops
        >>> outputs = {"policy": ops.convert_to_tensor([[-10.0, -30.0]]),
        ...            "reference": ops.convert_to_tensor([[-15.0, -25.0]])}
        >>> ops.convert_to_numpy(log_ratio(outputs, beta=0.1)).tolist()
        [[0.5, -0.5]]
    """
    ratio = outputs["policy"] - outputs["reference"]
    if ld_alpha is not None:
        shared = outputs["policy_shared"] - outputs["reference_shared"]
        ratio = shared + ld_alpha * (ratio - shared)
    return beta * DIVERGENCES[divergence](ratio, alpha=divergence_alpha)


def plain_log_ratio(outputs: Outputs, *, beta: float) -> Tensor:
    """Give β (log π - log π_ref), for losses whose derivation fixes the reverse KL."""
    return beta * (outputs["policy"] - outputs["reference"])


def mean_log_ratio(outputs: Outputs, *, beta: float) -> Tensor:
    """Give the implicit reward per token, β (log π - log π_ref) / n (arXiv 2411.15124)."""
    return beta * per_token(outputs["policy"] - outputs["reference"], outputs)


def ipo_log_ratio(outputs: Outputs, *, beta: float, length_normalize: bool = True) -> Tensor:
    """Give β (log π - log π_ref), per token unless `length_normalize` is false.

    arXiv 2310.12036, eq. 17, uses the sums; the average is what TRL and most reported runs use.
    """
    if length_normalize:
        return mean_log_ratio(outputs, beta=beta)
    return plain_log_ratio(outputs, beta=beta)


def log_prob(outputs: Outputs, *, beta: float) -> Tensor:
    """Give β log π, without a reference (arXiv 2401.08417, 2305.10425)."""
    return beta * outputs["policy"]


def mean_log_prob(outputs: Outputs, *, beta: float) -> Tensor:
    """Give β log π / n, without a reference (SimPO, arXiv 2405.14734, eq. 4)."""
    return beta * per_token(outputs["policy"], outputs)


def alpha_reward(outputs: Outputs, *, beta: float, alphapo_alpha: float = 0.25) -> Tensor:
    """Give β (1 - p^(-α)) / α with log p = log π / n (AlphaPO, arXiv 2501.03884).

    α = 0 is its limit β log p (SimPO). Where p^(-α) exceeds e^30 it goes on along its tangent.
    """
    mean = per_token(outputs["policy"], outputs)
    if alphapo_alpha == 0:
        return beta * mean
    return -beta / alphapo_alpha * capped_expm1(-alphapo_alpha * mean)


def log_odds(outputs: Outputs) -> Tensor:
    """Give log(p / (1 - p)) with log p = log π / n (ORPO, arXiv 2403.07691, eq. 4).

    p is taken as at most exp(-1e-6), where the odds are still finite.
    """
    mean = ops.minimum(per_token(outputs["policy"], outputs), -1e-6)
    return mean - log1mexp(mean)


NEEDS: dict[Callable[..., Tensor], frozenset[str]] = {
    log_ratio: frozenset({"policy", "reference"}),
    plain_log_ratio: frozenset({"policy", "reference"}),
    mean_log_ratio: frozenset({"policy", "reference", "lengths"}),
    ipo_log_ratio: frozenset({"policy", "reference", "lengths"}),
    log_prob: frozenset({"policy"}),
    mean_log_prob: frozenset({"policy", "lengths"}),
    alpha_reward: frozenset({"policy", "lengths"}),
    log_odds: frozenset({"policy", "lengths"}),
}
