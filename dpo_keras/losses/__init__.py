"""Objectives: from response log-probs to one loss per pair.

    outputs (policy, reference, lengths)
      -> scores S(y|x)                    scores.py
      -> P = softmax(S), LLR = S₀ - S₁    bradley_terry.py
      -> loss of the pair                 objectives.py, other_objectives.py
      -> + penalties                      penalties.py
      -> loss of the step                 step_loss.py

`DPOLoss` (dpo_loss.py) is the Keras loss that goes this way; options.py has the names it takes.
"""

from typing import TYPE_CHECKING

from dpo_keras.losses.bradley_terry import (
    binary_cross_entropy,
    log_likelihood_ratio,
    preference_probabilities,
)
from dpo_keras.losses.objectives import Objective
from dpo_keras.losses.options import OBJECTIVES, available
from dpo_keras.losses.penalties import (
    PENALTIES,
    insufficient_confidence,
    kl_to_reference,
    nll,
    overconfidence,
)
from dpo_keras.losses.scores import Outputs
from dpo_keras.utils.deferred_imports import deferred_names

if TYPE_CHECKING:
    from dpo_keras.losses.dpo_loss import DPOLoss

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

# The names of objectives and options are known without Keras; `DPOLoss` is a Keras loss.
__getattr__ = deferred_names(__name__, {"DPOLoss": "dpo_loss"})
