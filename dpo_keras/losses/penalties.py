"""Penalties: terms that are added to a preference loss, each with a weight of its own.

Every penalty is a function `(preference [N], scores [N, 2], outputs) -> [N]`, and so may yours be:
pass the function in place of a name. Penalties read labels so that swapping the two responses and
taking 1 - y leaves them as they were.

Example:
    >>> from keras import ops
    >>> scores = ops.convert_to_tensor([[4.0, 0.0], [0.0, 0.0], [0.0, 4.0]])
    >>> sure = insufficient_confidence(ops.ones(3), scores, {})
    >>> print(ops.convert_to_numpy(sure).round(4))
    [0.0901 0.6931 0.6931]
    >>> print(ops.convert_to_numpy(overconfidence(ops.ones(3), scores, {})).round(4))
    [0.6031 0.     0.6031]
"""

from __future__ import annotations

import math
from collections.abc import Callable

from keras import ops

from dpo_keras.losses.bradley_terry import log_likelihood_ratio
from dpo_keras.losses.links import uniform_confidence
from dpo_keras.losses.numerics import Tensor, as_floating
from dpo_keras.losses.scores import Outputs, per_token


def insufficient_confidence(preference: Tensor, scores: Tensor, outputs: Outputs) -> Tensor:
    """Penalize two probabilities that are alike, never favouring the wrong response.

    log 2 - |2y - 1| · KL(P ‖ U) where the model prefers what people prefer, else log 2.

    For y = 1 and a pair that is right this is log 2 - KL(P ‖ U) = H(P): log 2 undecided, 0 certain.
    Taken everywhere, H(P) would be as small for a pair that is wrong and certain, and its gradient
    would drive each wrong pair further into the wrong. So a wrong pair bears the whole log 2 and
    no gradient: there the cross-entropy alone decides. Value and slope meet at LLR = 0, as H is
    flat there. |2y - 1| lets people who are undecided themselves (y = ½) pull neither way.

    Args:
        preference: `[N]`, y in [0, 1].
        scores: `[N, 2]`, in nats.
        outputs: not used.

    Returns:
        `[N]`, in [0, log 2].

    Example:
        >>> from keras import ops
        >>> llr = ops.convert_to_tensor([[0.0, 0.0], [20.0, 0.0], [-20.0, 0.0]])
        >>> print(ops.convert_to_numpy(insufficient_confidence(ops.ones(3), llr, {})).round(4))
        [0.6931 0.     0.6931]
    """
    del outputs
    llr = log_likelihood_ratio(scores)
    direction = 2.0 * as_floating(preference, llr.dtype) - 1.0
    agreement = ops.relu(ops.sign(direction) * llr)
    return math.log(2.0) - ops.abs(direction) * uniform_confidence(agreement)


def overconfidence(preference: Tensor, scores: Tensor, outputs: Outputs) -> Tensor:
    """Penalize certainty, right or wrong: KL(P ‖ U) = log 2 - H(P).

    Its gradient draws every pair toward LLR = 0, so a pair that is wrong and certain gets better.

    Args:
        preference: not used.
        scores: `[N, 2]`, in nats.
        outputs: not used.

    Returns:
        `[N]`, in [0, log 2]: 0 undecided, log 2 certain.

    Example:
        >>> from keras import ops
        >>> value = overconfidence(ops.ones(1), ops.convert_to_tensor([[2.5, 1.5]]), {})
        >>> round(float(value[0]), 4)
        0.1109
    """
    del preference, outputs
    return uniform_confidence(log_likelihood_ratio(scores))


def kl_to_reference(preference: Tensor, scores: Tensor, outputs: Outputs) -> Tensor:
    """Penalize distance from the reference on both responses: mean of x² / 2n, x = log π/π_ref.

    An estimate of KL(π ‖ π_ref) in nats per token. ½x² is the estimator whose mean agrees with the
    divergence to second order whichever of the two models wrote the response, which offline pairs
    leave open; it is never negative and zero only at x = 0. The plain log-ratio is neither, and
    e^(-x) - 1 + x is beyond float32 at log-ratios that are ordinary for a rejected response.

    Args:
        preference: not used.
        scores: not used.
        outputs: `policy`, `reference`, `lengths`, each `[N, 2]`.

    Returns:
        `[N]`, in nats per token.

    Example:
        >>> from keras import ops
        >>> outputs = {"policy": ops.convert_to_tensor([[-12.0, -20.0]]),
        ...            "reference": ops.convert_to_tensor([[-10.0, -20.0]]),
        ...            "lengths": ops.convert_to_tensor([[4.0, 4.0]])}
        >>> float(kl_to_reference(None, None, outputs)[0])
        0.25
    """
    del preference, scores
    ratio = as_floating(outputs["policy"]) - as_floating(outputs["reference"])
    # Not ops.mean: on JAX, Keras takes the mean of float64 in float32.
    return 0.5 * ops.sum(per_token(0.5 * ops.square(ratio), outputs), axis=-1)


def nll(preference: Tensor, scores: Tensor, outputs: Outputs) -> Tensor:
    """Penalize a preferred response that the policy finds unlikely (RPO, arXiv 2404.19733).

    -y log π(chosen)/n⁺ - (1 - y) log π(rejected)/n⁻: for y = 1 the chosen tokens' mean negative
    log-likelihood. It keeps the chosen response's probability from falling as the margin grows.

    Args:
        preference: `[N]`, y in [0, 1].
        scores: not used.
        outputs: `policy`, `lengths`, each `[N, 2]`.

    Returns:
        `[N]`, in nats per token.

    Example:
        >>> from keras import ops
        >>> outputs = {"policy": ops.convert_to_tensor([[-12.0, -20.0]]),
        ...            "lengths": ops.convert_to_tensor([[4.0, 4.0]])}
        >>> float(nll(ops.ones(1), None, outputs)[0])
        3.0
    """
    del scores
    per_response = -per_token(outputs["policy"], outputs)
    preference = as_floating(preference, per_response.dtype)
    return preference * per_response[:, 0] + (1.0 - preference) * per_response[:, 1]


def dpo_positive(preference: Tensor, scores: Tensor, outputs: Outputs) -> Tensor:
    """Give how far the preferred response's log-ratio fell below zero (arXiv 2402.13228).

    max(0, log π_ref(y) - log π(y)) for either response, were it the preferred one. DPO-positive
    takes λ of it off the margin *inside* the loss, -log σ(β(Δ - λ·max(0, -c))); so `DPOLoss` adds
    the difference that this makes to the preference loss, not this amount itself.

    Args:
        preference: not used.
        scores: not used.
        outputs: `policy`, `reference`, each `[N, 2]`.

    Returns:
        `[N, 2]`, in nats.

    Example:
        >>> from keras import ops
        >>> outputs = {"policy": ops.convert_to_tensor([[-12.0, -20.0]]),
        ...            "reference": ops.convert_to_tensor([[-10.0, -25.0]])}
        >>> ops.convert_to_numpy(dpo_positive(None, None, outputs)).tolist()
        [[2.0, 0.0]]
    """
    del preference, scores
    return ops.relu(as_floating(outputs["reference"]) - as_floating(outputs["policy"]))


PENALTIES: dict[str, Callable[..., Tensor]] = {
    "insufficient_confidence": insufficient_confidence,
    "overconfidence": overconfidence,
    "kl_to_reference": kl_to_reference,
    "nll": nll,
    "dpo_positive": dpo_positive,
}

PENALTY_NEEDS: dict[str, frozenset[str]] = {
    "kl_to_reference": frozenset({"policy", "reference", "lengths"}),
    "nll": frozenset({"policy", "lengths"}),
    "dpo_positive": frozenset({"policy", "reference"}),
}
