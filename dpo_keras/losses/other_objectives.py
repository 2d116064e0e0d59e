"""Objectives that judge each response by itself, need no reference, or compare a whole batch.

The bases and the symbols are those of `objectives.py`.
"""

from __future__ import annotations

from dpo_keras.losses.bradley_terry import (
    NEVER,
    binary_cross_entropy,
    log_likelihood_ratio,
    plackett_luce_nll,
)
from dpo_keras.losses.objectives import (
    GapObjective,
    ImplicitReward,
    Logistic,
    Objective,
    PairObjective,
    objective,
)
from dpo_keras.losses.penalties import nll
from dpo_keras.losses.scores import (
    Outputs,
    alpha_reward,
    log_odds,
    log_prob,
    log_ratio,
    mean_log_prob,
)
from dpo_keras.utils import Tensor
from dpo_keras.utils.deferred_imports import ops


@objective
class NCA(ImplicitReward, PairObjective):
    """Judges each reward by itself, which keeps the chosen one from falling."""

    formula = "-log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)"
    source = "2402.05369"

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return (
            -ops.log_sigmoid(chosen)
            - 0.5 * ops.log_sigmoid(-chosen)
            - 0.5 * ops.log_sigmoid(-rejected)
        )


@objective
class BCO(ImplicitReward, PairObjective):
    """A classifier of good and bad responses; δ a running mean with shift_momentum, else 0."""

    formula = "-log σ(βc - δ) - log σ(-(βr - δ))"
    source = "2404.04656"

    shift_momentum: float | None = None

    def centred_scores(self, outputs: Outputs) -> Tensor:
        return self.scores(outputs) - outputs.get("reward_shift", 0.0)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -ops.log_sigmoid(chosen) - ops.log_sigmoid(-rejected)


@objective
class SPPO(PairObjective):
    """Self-play: the two log-ratios to +1/(2β) and -1/(2β), each by itself."""

    formula = "(c - 1/(2β))² + (r + 1/(2β))²"
    source = "2405.00675"
    reads = frozenset({"policy", "reference"})
    probabilistic = False

    def scores(self, outputs: Outputs) -> Tensor:
        return log_ratio(outputs, beta=self.beta)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ops.square((chosen - 0.5) / self.beta) + ops.square((rejected + 0.5) / self.beta)


@objective
class APOZero(ImplicitReward, PairObjective):
    """Raises the chosen, lowers the rejected: for data better than the model."""

    formula = "1 - σ(βc) + σ(βr)"
    source = "2408.06266"

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ops.sigmoid(-chosen) + ops.sigmoid(rejected)


@objective
class APODown(ImplicitReward, PairObjective):
    """Lowers both, the rejected further: for data worse than the model."""

    formula = "σ(βc) + 1 - σ(βΔ)"
    source = "2408.06266"

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ops.sigmoid(chosen) + ops.sigmoid(rejected - chosen)


@objective
class SimPO(Logistic):
    """Log-probs per token with a target margin; no reference (β 2 to 2.5 is usual)."""

    formula = "-log σ(β(π̄⁺ - π̄⁻) - γ)"
    source = "2405.14734"  # eq. 6
    reads = frozenset({"policy", "lengths"})

    gamma: float = 0.5

    def scores(self, outputs: Outputs) -> Tensor:
        return mean_log_prob(outputs, beta=self.beta)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return super().pair_loss(chosen - self.gamma, rejected)


@objective
class PolicyLogProb(Objective):
    """Scores are log-probs of the policy alone, β log π."""

    def scores(self, outputs: Outputs) -> Tensor:
        return log_prob(outputs, beta=self.beta)


@objective
class CPO(PolicyLogProb, Logistic):
    """DPO against a uniform reference plus supervision on the chosen; no reference."""

    formula = "-log σ(β(π⁺ - π⁻)) + α·NLL(chosen)"
    source = "2401.08417"
    reads = frozenset({"policy", "lengths"})

    cpo_alpha: float = 1.0

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        return super().loss(preference, outputs) + self.cpo_alpha * nll(preference, outputs)


@objective
class SLiC(PolicyLogProb, GapObjective):
    """Sequence-likelihood calibration: a hinge on log-probs; no reference."""

    formula = "max(0, 1 - β(π⁺ - π⁻))"
    source = "2305.10425"
    reads = frozenset({"policy"})

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ops.relu(1.0 - (chosen - rejected))


@objective
class ORPO(GapObjective):
    """Supervision and preference in one stage, from a base model; no reference."""

    formula = "NLL(chosen) - β log σ(log odds ratio), odds of mean log-probs"
    source = "2403.07691"  # eq. 7
    reads = frozenset({"policy", "lengths"})

    def scores(self, outputs: Outputs) -> Tensor:
        return log_odds(outputs)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return -self.beta * ops.log_sigmoid(chosen - rejected)

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        return super().loss(preference, outputs) + nll(preference, outputs)


@objective
class AlphaPO(SimPO):
    """SimPO with a shaped reward: α sets how hard unlikely responses pull; no reference."""

    formula = "SimPO with reward (1 - p^(-α)) / α"
    source = "2501.03884"

    alphapo_alpha: float = 0.25

    def scores(self, outputs: Outputs) -> Tensor:
        return alpha_reward(outputs, beta=self.beta, alphapo_alpha=self.alphapo_alpha)


@objective
class SFT(PolicyLogProb):
    """Mean negative log-likelihood of the chosen tokens; no reference."""

    formula = "NLL(chosen)"
    source = "2404.19733"
    reads = frozenset({"policy", "lengths"})
    probabilistic = False

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        return nll(preference, outputs)


@objective
class AOT(Objective):
    """The batch's margins, as a distribution, above the reference's (optimal transport).

    The k-th smallest margin is compared with the reference's k-th smallest. The loss goes to the
    pair that holds the k-th place, so that weights and groups still refer to pairs.

    Pairs with y < ½ are turned around first, since a margin has to point toward the preferred
    response. A tie stays as it is written. Rows of weight zero are padding and take no place.
    """

    formula = "-log σ(βδ), δ = sort(π⁺ - π⁻) - sort(ref⁺ - ref⁻)"
    source = "2406.05882"
    reads = frozenset({"policy", "reference"})
    probabilistic = False
    batchwise = True

    label_smoothing: float = 0.0

    def scores(self, outputs: Outputs) -> Tensor:
        return log_ratio(outputs, beta=self.beta)

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        margin = log_likelihood_ratio(_toward_preferred(preference, outputs["policy"]))
        reference = log_likelihood_ratio(_toward_preferred(preference, outputs["reference"]))
        gap = margin - _of_equal_rank(margin, reference, outputs)
        return self.dominance(preference, self.beta * gap)

    def dominance(self, preference: Tensor, gap: Tensor) -> Tensor:
        """Compute the cross-entropy of the gaps `[N]`, the label turned as the columns were."""
        decided = ops.maximum(preference, 1.0 - preference)
        label = decided * (1.0 - self.label_smoothing) + (1.0 - decided) * self.label_smoothing
        return binary_cross_entropy(label, ops.stack([gap, ops.zeros_like(gap)], axis=-1))


@objective
class AOTUnpaired(AOT, ImplicitReward):
    """The chosen rewards, as a distribution, above the rejected ones; pairs do not matter."""

    formula = "-log σ(βδ), δ = sort(c) - sort(r)"

    def scores(self, outputs: Outputs) -> Tensor:
        return ImplicitReward.scores(self, outputs)

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        rewards = _toward_preferred(preference, self.scores(outputs))
        gap = rewards[:, 0] - _of_equal_rank(rewards[:, 0], rewards[:, 1], outputs)
        return self.dominance(preference, gap)


def _toward_preferred(preference: Tensor, values: Tensor) -> Tensor:
    """Turn the two columns `[N, 2]` around where the second response is preferred."""
    return ops.where((preference < 0.5)[:, None], values[:, ::-1], values)


def _of_equal_rank(values: Tensor, others: Tensor, outputs: Outputs) -> Tensor:
    """Return, for each entry of `values` `[N]`, the entry of `others` `[N]` of the same rank."""
    if "weight" in outputs:
        # Padding goes to the end of both orders, so it only ever meets padding.
        last = 1.0 + ops.maximum(ops.max(values), ops.max(others))
        padding = outputs["weight"] == 0
        values = ops.where(padding, last, values)
        others = ops.where(padding, last, others)
    rank = ops.argsort(ops.argsort(values))
    return ops.take(ops.take(others, ops.argsort(others)), rank)


@objective
class Reward(Logistic):
    """Bradley-Terry on the scores of a reward model (RewardModel)."""

    formula = "-log σ(r⁺ - r⁻)"
    source = "2203.02155"  # eq. 1
    reads = frozenset({"policy"})
    of_policies = False

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Leave out WPO, whose weights are probabilities of tokens."""
        return super().option_names() - {"wpo", "wpo_max_weight"}

    def scores(self, outputs: Outputs) -> Tensor:
        """Return the rewards: a reward model's outputs stand where a policy's log-probs do."""
        return outputs["policy"]


@objective
class PlackettLuce(ImplicitReward):
    """DPO on rankings: the likelihood of the order; sigmoid on pairs."""

    formula = "Σ_k [log Σ_{j≥k} exp(βc_j) - βc_k], best first"
    source = "2305.18290"  # appendix A.3
    reads = frozenset({"policy", "reference", "lengths"})
    ranks = True

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Leave out LD-DPO, which compares the lengths of two responses."""
        return super().option_names() - {"ld_alpha"}

    def scores(self, outputs: Outputs) -> Tensor:
        """Compute S `[N, K]`; behind a ranking of fewer responses, what is never chosen."""
        return ops.where(outputs["lengths"] > 0, super().scores(outputs), NEVER)

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        """Mix, by the label y, the order given and that with the first two exchanged.

        Of rankings y is 1. The mixture makes ties and soft labels of pairs what they are elsewhere.
        """
        present = outputs["lengths"] > 0
        ranked = self.scores(outputs)
        exchanged = ops.concatenate([ranked[:, 1::-1], ranked[:, 2:]], axis=-1)
        return preference * plackett_luce_nll(ranked, present) + (
            1.0 - preference
        ) * plackett_luce_nll(exchanged, present)
