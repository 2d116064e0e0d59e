"""f-divergences: how a log-ratio x = log π/π_ref becomes a reward (arXiv 2309.16240).

For a divergence D_f between policy and reference the implicit reward is f'(u) at u = e^x. Every
function here is that derivative, up to a constant that the difference of two rewards drops.

Example:
    >>> from keras import ops
    >>> x = ops.convert_to_tensor([0.0, 1.0])
    >>> for name, g in DIVERGENCES.items():
    ...     print(name, round(float(g(x, alpha=0.5)[1]), 4))
    reverse_kl 1.0
    forward_kl 0.6321
    js 0.3799
    alpha 0.7869
"""

from __future__ import annotations

import math
from collections.abc import Callable

from keras import ops

from dpo_keras.losses.numerics import Tensor, capped_expm1


def reverse_kl(x: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Give x, the reward of KL(π ‖ π_ref): plain DPO."""
    del alpha
    return x


def forward_kl(x: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Give 1 - e^(-x), the reward of KL(π_ref ‖ π).

    A response that the policy has all but given up is punished without bound. Beyond x = -30 the
    tangent goes on, see `capped_expm1`.
    """
    del alpha
    return -capped_expm1(-x)


def js(x: Tensor, *, alpha: float = 0.0) -> Tensor:
    """Give log 2 + log σ(x), the reward of the Jensen-Shannon divergence: bounded by log 2."""
    del alpha
    return math.log(2.0) + ops.log_sigmoid(x)


def alpha_divergence(x: Tensor, *, alpha: float) -> Tensor:
    """Give (e^((α-1)x) - 1) / (α - 1): forward KL at α = 0, reverse KL in the limit α = 1."""
    if alpha == 1.0:
        return x
    return capped_expm1((alpha - 1.0) * x) / (alpha - 1.0)


DIVERGENCES: dict[str, Callable[..., Tensor]] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "js": js,
    "alpha": alpha_divergence,
}
