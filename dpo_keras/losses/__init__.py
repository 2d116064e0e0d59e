"""Objectives: from response log-probs to one loss per pair.

    outputs (policy, reference, lengths)
      -> scores S(x, y)          scores.py, divergences.py
      -> LLR = S₀ - S₁           bradley_terry.py
      -> loss on the pair        links.py, forms.py, batchwise.py
      -> + penalties             penalties.py

`objectives.py` is the table that puts them together, `DPOLoss` the Keras loss that applies it.

Example:
    >>> from keras import ops
    >>> from dpo_keras.losses import DPOLoss
    >>> loss = DPOLoss("sigmoid", beta=0.1, reduction=None)
    >>> outputs = {"policy": ops.convert_to_tensor([[-10.0, -20.0]]),
    ...            "reference": ops.convert_to_tensor([[-15.0, -15.0]]),
    ...            "lengths": ops.convert_to_tensor([[5, 5]])}
    >>> print(ops.convert_to_numpy(loss(ops.ones(1), outputs)).round(4))
    [0.3133]
"""

from dpo_keras.losses.bradley_terry import (
    binary_cross_entropy,
    log_likelihood_ratio,
    preference_probabilities,
)
from dpo_keras.losses.dpo_loss import DPOLoss
from dpo_keras.losses.objectives import OBJECTIVES, Objective, available
from dpo_keras.losses.penalties import (
    PENALTIES,
    insufficient_confidence,
    kl_to_reference,
    nll,
    overconfidence,
)
from dpo_keras.losses.scores import Outputs

__all__ = [
    "OBJECTIVES",
    "PENALTIES",
    "DPOLoss",
    "Objective",
    "Outputs",
    "available",
    "binary_cross_entropy",
    "insufficient_confidence",
    "kl_to_reference",
    "log_likelihood_ratio",
    "nll",
    "overconfidence",
    "preference_probabilities",
]
