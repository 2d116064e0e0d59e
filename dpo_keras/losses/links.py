"""Preference losses, each a pure function of a few lines.

Three shapes, told by the first arguments:

* `(llr)`: a loss on the log-likelihood ratio `[N]`, for the case that the first response won;
* `(chosen, rejected)`: a loss on the two scores `[N]` apart, for the same case;
* `(llr, preference)`: a loss that takes the label y itself.

`objectives.py` says how a soft label mixes both cases. Keyword-only arguments are the options that
a loss uses: `DPOLoss` reads them off the signature.

Example:
    >>> from keras import ops
    >>> llr = ops.convert_to_tensor([1.0, -1.0])
    >>> print(ops.convert_to_numpy(sigmoid(llr)).round(4))
    [0.3133 1.3133]
    >>> ops.convert_to_numpy(hinge(llr)).tolist()
    [0.0, 2.0]
"""

from __future__ import annotations

import math

from keras import ops

from dpo_keras.losses.numerics import Tensor


def sigmoid(llr: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Give -(1-ε) log σ(z) - ε log σ(-z): DPO (arXiv 2305.18290, eq. 7), cDPO with ε > 0."""
    hit, miss = -ops.log_sigmoid(llr), -ops.log_sigmoid(-llr)
    return (1.0 - label_smoothing) * hit + label_smoothing * miss


def simpo(llr: Tensor, *, gamma: float = 0.5, label_smoothing: float = 0.0) -> Tensor:
    """Give -log σ(z - γ): the margin must exceed γ (arXiv 2405.14734, eq. 6)."""
    return sigmoid(llr - gamma, label_smoothing=label_smoothing)


def hinge(llr: Tensor) -> Tensor:
    """Give max(0, 1 - z): no more push beyond a margin of one (arXiv 2305.10425, 2309.06657)."""
    return ops.relu(1.0 - llr)


def ipo(llr: Tensor, *, beta: float) -> Tensor:
    """Give ((z - ½) / β)²: the log-ratio margin is drawn to 1/(2β) (arXiv 2310.12036, eq. 17)."""
    return ops.square((llr - 0.5) / beta)


def exo_pair(llr: Tensor, preference: Tensor, *, label_smoothing: float) -> Tensor:
    """Give KL(P ‖ (t, 1-t)), t = y(1-ε) + (1-y)ε (EXO, arXiv 2402.00856)."""
    target = preference * (1.0 - label_smoothing) + (1.0 - preference) * label_smoothing
    return ops.sigmoid(llr) * (ops.log_sigmoid(llr) - ops.log(target)) + ops.sigmoid(-llr) * (
        ops.log_sigmoid(-llr) - ops.log(1.0 - target)
    )


def robust(llr: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Give [-(1-ε) log σ(z) + ε log σ(-z)] / (1-2ε) (arXiv 2403.00409).

    Its mean over labels flipped at rate ε is the clean `sigmoid` loss. It falls without bound on a
    pair that is right beyond doubt, as an unbiased estimate must.
    """
    hit, miss = -ops.log_sigmoid(llr), -ops.log_sigmoid(-llr)
    return ((1.0 - label_smoothing) * hit - label_smoothing * miss) / (1.0 - 2.0 * label_smoothing)


def discopop(llr: Tensor, *, discopop_tau: float = 0.05) -> Tensor:
    """Give (1-m)(-log σ(z)) + m e^(-z), m = σ(z/τ) (arXiv 2406.08414).

    m e^(-z) is formed as exp(log m - z), which no z can make overflow while τ is at most one.
    """
    log_gate = ops.log_sigmoid(llr / discopop_tau)
    logistic = ops.sigmoid(-llr / discopop_tau) * -ops.log_sigmoid(llr)
    return logistic + ops.exp(log_gate - llr)


def odds_ratio(llr: Tensor, *, beta: float) -> Tensor:
    """Give -β log σ(log odds ratio) (ORPO, arXiv 2403.07691, eq. 7)."""
    return -beta * ops.log_sigmoid(llr)


def nca_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Give -log σ(S⁺) - ½ log σ(-S⁺) - ½ log σ(-S⁻): rewards, not gaps (arXiv 2402.05369)."""
    return (
        -ops.log_sigmoid(chosen) - 0.5 * ops.log_sigmoid(-chosen) - 0.5 * ops.log_sigmoid(-rejected)
    )


def bco_pair(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Give -log σ(S⁺) - log σ(-S⁻), S less the running mean δ (BCO, arXiv 2404.04656)."""
    return -ops.log_sigmoid(chosen) - ops.log_sigmoid(-rejected)


def sppo_hard(chosen: Tensor, rejected: Tensor, *, beta: float) -> Tensor:
    """Give ((S⁺-½)/β)² + ((S⁻+½)/β)²: log-ratios to ±1/(2β) (arXiv 2405.00675)."""
    return ops.square((chosen - 0.5) / beta) + ops.square((rejected + 0.5) / beta)


def apo_zero(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Give 1 - σ(S⁺) + σ(S⁻): chosen up, rejected down (arXiv 2408.06266)."""
    return ops.sigmoid(-chosen) + ops.sigmoid(rejected)


def apo_down(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Give σ(S⁺) + 1 - σ(S⁺ - S⁻): both down, rejected further (arXiv 2408.06266)."""
    return ops.sigmoid(chosen) + ops.sigmoid(rejected - chosen)


def uniform_confidence(llr: Tensor) -> Tensor:
    """Give KL(P ‖ U) = log 2 - H(P) of P = (σ(z), σ(-z)): from 0 (undecided) to log 2 (certain).

    Example:
        >>> from keras import ops
        >>> round(float(uniform_confidence(ops.convert_to_tensor([1.0]))[0]), 4)
        0.1109
    """
    return (
        math.log(2.0)
        + ops.sigmoid(llr) * ops.log_sigmoid(llr)
        + ops.sigmoid(-llr) * ops.log_sigmoid(-llr)
    )
