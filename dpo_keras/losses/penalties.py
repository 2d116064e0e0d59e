"""Penalties: terms that are added to a preference loss, each with a weight of its own.

Each is a pure function of what it reads. Your own penalty is a function
`(preference [N], scores [N, 2], outputs) -> [N]` that is passed in place of a name. Penalties read
labels so that swapping the two responses and taking 1 - y changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from dpo_keras.losses.bradley_terry import (
    as_floating,
    log_likelihood_ratio,
    preference_probabilities,
)
from dpo_keras.losses.scores import Outputs, per_token
from dpo_keras.utils import Tensor
from dpo_keras.utils.deferred_imports import ops


def insufficient_confidence(preference: Tensor, scores: Tensor) -> Tensor:
    """Penalize two probabilities that are alike, never favouring the wrong response.

    log 2 - |2y - 1| · KL(P ‖ U) where the model prefers what people prefer, else log 2.

    For y = 1 and a right pair this is H(P): log 2 undecided, 0 certain. Everywhere, H(P) would
    reward a pair that is wrong and certain. So a wrong pair bears the whole log 2 and no gradient:
    there the cross-entropy alone decides. Value and slope meet at LLR = 0, where H is flat.
    |2y - 1| lets people who are undecided themselves (y = ½) pull neither way.

    Args:
        preference: `[N]`, y in [0, 1].
        scores: `[N, 2]`, in nats.

    Returns:
        `[N]`, in [0, log 2].

    Example:
        >>> from keras import ops
        >>> llr = ops.convert_to_tensor([[0.0, 0.0], [20.0, 0.0], [-20.0, 0.0]])
        >>> print(ops.convert_to_numpy(insufficient_confidence(ops.ones(3), llr)).round(4))
        [0.6931 0.     0.6931]
    """
    llr = log_likelihood_ratio(scores)
    direction = 2.0 * as_floating(preference, llr.dtype) - 1.0
    agreement = ops.relu(ops.sign(direction) * llr)
    agreeing = ops.stack([agreement, ops.zeros_like(agreement)], axis=-1)
    return math.log(2.0) - ops.abs(direction) * overconfidence(agreeing)


def overconfidence(scores: Tensor) -> Tensor:
    """Penalize certainty, right or wrong: KL(P ‖ U) = log 2 - H(P).

    Its gradient draws every pair toward LLR = 0, so a pair that is wrong and certain gets better.

    Args:
        scores: `[N, 2]`, in nats.

    Returns:
        `[N]`, in [0, log 2]: 0 undecided, log 2 certain.

    Example:
        >>> from keras import ops
        >>> value = overconfidence(ops.convert_to_tensor([[2.5, 1.5]]))
        >>> round(float(value[0]), 4)
        0.1109
    """
    llr = log_likelihood_ratio(scores)
    p = preference_probabilities(scores)
    return math.log(2.0) + p[..., 0] * ops.log_sigmoid(llr) + p[..., 1] * ops.log_sigmoid(-llr)


def kl_to_reference(outputs: Outputs) -> Tensor:
    """Penalize distance from the reference on all responses: mean of x² / 2n, x = log π/π_ref.

    An estimate of KL(π ‖ π_ref) in nats per token. ½x² is the estimator whose mean agrees with the
    divergence to second order whichever of the two models wrote the response, which offline pairs
    leave open; it is never negative and zero only at x = 0. The plain log-ratio is neither, and
    e^(-x) - 1 + x is beyond float32 at log-ratios that are ordinary for a rejected response.

    Args:
        outputs: `policy`, `reference`, `lengths`, each `[N, 2]`.

    Returns:
        `[N]`, in nats per token.

    Example:
        >>> from keras import ops
        >>> outputs = {"policy": ops.convert_to_tensor([[-12.0, -20.0]]),
        ...            "reference": ops.convert_to_tensor([[-10.0, -20.0]]),
        ...            "lengths": ops.convert_to_tensor([[4.0, 4.0]])}
        >>> float(kl_to_reference(outputs)[0])
        0.25
    """
    ratio = as_floating(outputs["policy"]) - as_floating(outputs["reference"])
    # Not ops.mean: on JAX, Keras takes the mean of float64 in float32.
    total = ops.sum(per_token(0.5 * ops.square(ratio), outputs), axis=-1)
    if ratio.shape[-1] == 2:
        return 0.5 * total
    present = ops.sum(ops.cast(outputs["lengths"] > 0, total.dtype), axis=-1)
    return total / ops.maximum(present, 1.0)


def nll(preference: Tensor, outputs: Outputs) -> Tensor:
    """Penalize a preferred response that the policy finds unlikely (RPO, arXiv 2404.19733).

    -y log π(chosen)/n⁺ - (1 - y) log π(rejected)/n⁻: for y = 1 the chosen tokens' mean negative
    log-likelihood. It keeps the chosen response's probability from falling as the margin grows.
    Of rated responses only column 0 counts, with y.

    Args:
        preference: `[N]`, y in [0, 1].
        outputs: `policy`, `lengths`, each `[N, 2]`.

    Returns:
        `[N]`, in nats per token.

    Example:
        >>> from keras import ops
        >>> outputs = {"policy": ops.convert_to_tensor([[-12.0, -20.0]]),
        ...            "lengths": ops.convert_to_tensor([[4.0, 4.0]])}
        >>> float(nll(ops.ones(1), outputs)[0])
        3.0
    """
    per_response = -per_token(outputs["policy"], outputs)
    preference = as_floating(preference, per_response.dtype)
    if "rated" in outputs:
        return preference * per_response[:, 0]
    return preference * per_response[:, 0] + (1.0 - preference) * per_response[:, 1]


@dataclass(frozen=True)
class Penalty:
    """A penalty by name: its term, the outputs that it reads, and where it has a meaning."""

    term: Callable[[Tensor, Tensor, Outputs], Tensor]
    reads: frozenset[str] = frozenset()
    about_probabilities: bool = False
    """Whether it goes only with a loss that speaks about softmax(scores)."""


PENALTIES: dict[str, Penalty] = {
    "insufficient_confidence": Penalty(
        lambda preference, scores, outputs: insufficient_confidence(preference, scores),
        about_probabilities=True,
    ),
    "overconfidence": Penalty(
        lambda preference, scores, outputs: overconfidence(scores),
        about_probabilities=True,
    ),
    "kl_to_reference": Penalty(
        lambda preference, scores, outputs: kl_to_reference(outputs),
        frozenset({"policy", "reference", "lengths"}),
    ),
    "nll": Penalty(
        lambda preference, scores, outputs: nll(preference, outputs),
        frozenset({"policy", "lengths"}),
    ),
}
"""Penalties by the name that `DPOLoss` takes."""
