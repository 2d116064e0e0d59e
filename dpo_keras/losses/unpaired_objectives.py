"""Objectives on rated responses: one response of a prompt, and whether people found it good.

Column 0 is the rated response, and the label y is P(it is good). Column 1 is a response to another
prompt: such mismatched pairs estimate how far the policy has moved from the reference. The other
symbols are those of `objectives.py`; a row of weight 0 is padding.
"""

from __future__ import annotations

from dpo_keras.losses.objectives import Objective, objective
from dpo_keras.losses.scores import Outputs, log_ratio
from dpo_keras.utils import Tensor
from dpo_keras.utils.deferred_imports import ops


@objective
class KTO(Objective):
    """Kahneman-Tversky: learns from thumbs, each reply by itself."""

    formula = "y λ_D σ(β(z - c)) + (1-y) λ_U σ(β(c - z)), z = max(0, mean log-ratio of mismatches)"
    source = "2402.01306"  # eq. 8
    reads = frozenset({"policy", "reference"})
    probabilistic = False
    batchwise = True
    unpaired = True

    desirable_weight: float = 1.0
    undesirable_weight: float = 1.0

    def scores(self, outputs: Outputs) -> Tensor:
        return log_ratio(outputs, beta=self.beta)

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        """Compute y λ_D (1 - σ(βc - βz)) + (1 - y) λ_U (1 - σ(βz - βc)) of each response, `[N]`."""
        rewards = self.scores(outputs)
        advantage = rewards[:, 0] - kl_baseline(rewards, outputs)
        desirable = self.desirable_weight * ops.sigmoid(-advantage)
        undesirable = self.undesirable_weight * ops.sigmoid(advantage)
        return preference * desirable + (1.0 - preference) * undesirable


def kl_baseline(rewards: Tensor, outputs: Outputs) -> Tensor:
    """Compute βz = max(0, Σ wᵢ βmᵢ / Σ wᵢ), m the log-ratios of the mismatches; no gradient flows.

    The estimate of β·KL(π ‖ π_ref) is over all rows given: a step passes those of all replicas.
    """
    mismatched = ops.stop_gradient(rewards[:, 1])
    weight = ops.cast(outputs.get("weight", ops.ones_like(mismatched)), mismatched.dtype)
    total = ops.sum(ops.where(weight > 0, weight * mismatched, 0.0))
    return ops.relu(ops.divide_no_nan(total, ops.sum(weight)))
