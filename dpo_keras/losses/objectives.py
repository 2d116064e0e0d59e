"""DPO and its relatives: each objective is a small class whose body is the formula of its paper.

In the formulas of a pair whose first response won, c and r are the log-ratios log π/π_ref of the
chosen and the rejected response, Δ = c - r, a bar is the mean over a response's tokens, π⁺ and π⁻
are the policy's own log-probs, S⁺ and S⁻ are the two scores, and σ is the sigmoid.

To add an objective, write a class like `Hinge` and enter it in `OBJECTIVES` (options.py). Its
fields are the options that it takes. The bases add scores and the modifiers that fit:

* `PairObjective`: any loss on the two scores. Options `wpo`, `wpo_max_weight`.
* `GapObjective`: a loss on the LLR alone, S⁺ - S⁻. Option `margin` as well.
* `ImplicitReward`: scores β·g(log π/π_ref). Options `divergence`, `divergence_alpha`, `ld_alpha`.
* `ImplicitRewardGap`: both, with the option `dpo_positive`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from dpo_keras.losses.bradley_terry import (
    binary_cross_entropy,
    log_likelihood_ratio,
    preference_probabilities,
)
from dpo_keras.losses.scores import Outputs, log_ratio, mean_log_ratio
from dpo_keras.utils import Tensor
from dpo_keras.utils.deferred_imports import ops

objective = dataclass(frozen=True, kw_only=True)
"""Decorator of every objective: its fields, and those of all its bases, are its options."""


@objective
class Objective(ABC):
    """A preference objective: scores of the responses, and a loss for each pair.

    The first line of a subclass's docstring is its summary, in tables and on the command line.

    Attributes:
        formula: the loss of a pair whose first response won.
        source: arXiv identifiers.
        reads: names of the outputs that it reads, modifiers apart.
        probabilistic: whether softmax(scores) is what the loss speaks about, so that a penalty on
            its confidence means something.
        batchwise: whether the loss of one pair depends on the other pairs of the batch.
        unpaired: whether it takes rated responses, with a mismatched response in column 1.
    """

    formula: ClassVar[str]
    source: ClassVar[str]
    reads: ClassVar[frozenset[str]]
    probabilistic: ClassVar[bool] = True
    batchwise: ClassVar[bool] = False
    unpaired: ClassVar[bool] = False

    beta: float
    """β > 0, strength of the tie to the reference; scale of the scores."""

    @abstractmethod
    def scores(self, outputs: Outputs) -> Tensor:
        """Compute S, what the softmax over the two responses is taken over: `[N, 2]`, in nats."""

    @abstractmethod
    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        """Compute the loss of each pair `[N]` from labels y `[N]` and the scorer's outputs."""

    @classmethod
    def summary(cls) -> str:
        """Return what the objective does, in one line."""
        return (cls.__doc__ or "").split("\n", maxsplit=1)[0]

    @classmethod
    def option_names(cls) -> frozenset[str]:
        """Return the names of every option that changes this objective's loss."""
        own = {field.name for field in fields(cls)}  # type: ignore[arg-type]
        return frozenset(own | {"group_robust"})

    @classmethod
    def needs_reference(cls) -> bool:
        """Tell whether the reference's log-probs are used."""
        return "reference" in cls.reads

    @classmethod
    def from_settings(cls, settings: Mapping[str, Any]) -> Objective:
        """Make the objective with those of the settings that it takes."""
        own = cls.option_names() - {"group_robust"}
        return cls(**{name: value for name, value in settings.items() if name in own})


@objective
class PairObjective(Objective):
    """A loss on the two scores of a pair: a subclass writes `pair_loss`."""

    wpo: bool = False
    wpo_max_weight: float | None = None

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Compute the loss `[N]` of pairs whose chosen response won, from their scores S⁺, S⁻."""
        raise NotImplementedError

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        """Mix the two cases: y·ℓ(first response won) + (1 - y)·ℓ(second response won).

        This is how a soft label enters every objective. Swapping the two responses and taking 1 - y
        changes nothing.
        """
        pair_scores = self.centred_scores(outputs)
        first, second = pair_scores[:, 0], pair_scores[:, 1]
        if_first, if_second = self.margins(outputs)
        value = preference * self.pair_loss(first - if_first, second) + (
            1.0 - preference
        ) * self.pair_loss(second - if_second, first)
        return self.weighted(value, outputs)

    def weighted(self, value: Tensor, outputs: Outputs) -> Tensor:
        """Weight losses by w⁺w⁻, w = exp(mean of log p_t - log Σ p²), with `wpo`: WPO.

        arXiv 2406.11827: how much the pair is in the policy's own style; one where every token is
        as likely as a draw from the policy is on average. No gradient flows through it.
        """
        if not self.wpo:
            return value
        # log p - log Σ p² is below log of the vocabulary: only faulty input comes near this bound.
        weight = ops.exp(ops.minimum(ops.sum(outputs["wpo_log_weight"], axis=-1), 60.0))
        bound = self.wpo_max_weight
        return value * (weight if bound is None else ops.minimum(weight, bound))

    def centred_scores(self, outputs: Outputs) -> Tensor:
        """Return the scores that the loss compares; an objective may take a baseline off them."""
        return self.scores(outputs)

    def margins(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return what the LLR must exceed if the first response won, and if the second did."""
        return 0.0, 0.0


@objective
class GapObjective(PairObjective):
    """A loss on the LLR, S⁺ - S⁻, alone. With `margin`, Δ - m/β replaces Δ (arXiv 2402.10571)."""

    margin: bool = False

    def margins(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Return the pair's margin, for either case."""
        return (outputs["margin"], outputs["margin"]) if self.margin else (0.0, 0.0)


@objective
class ImplicitReward(Objective):
    """Scores are implicit rewards, β·g(log π - log π_ref)."""

    reads = frozenset({"policy", "reference"})

    divergence: str = "reverse_kl"
    divergence_alpha: float = 0.5
    ld_alpha: float | None = None

    def scores(self, outputs: Outputs) -> Tensor:
        """Compute S = β·g(log π - log π_ref) (arXiv 2305.18290, eq. 5; 2309.16240)."""
        return log_ratio(
            outputs,
            beta=self.beta,
            divergence=self.divergence,
            divergence_alpha=self.divergence_alpha,
            ld_alpha=self.ld_alpha,
        )


@objective
class ImplicitRewardGap(ImplicitReward, GapObjective):
    """A loss on the gap between two implicit rewards.

    With `dpo_positive`, λ, the margin grows by what the response that won has lost against the
    reference: -log σ(β(Δ - λ·max(0, -c))) for `sigmoid` (arXiv 2402.13228).
    """

    dpo_positive: float = 0.0

    def margins(self, outputs: Outputs) -> tuple[Tensor, Tensor]:
        """Add to the margin what the winning response lost against the reference."""
        first, second = super().margins(outputs)
        if not self.dpo_positive:
            return first, second
        shortfall = ops.relu(outputs["reference"] - outputs["policy"])
        extra = self.beta * self.dpo_positive * shortfall
        return first + extra[:, 0], second + extra[:, 1]


@objective
class Logistic(GapObjective):
    """The cross-entropy of the label under softmax(S); the base of DPO and its relatives."""

    label_smoothing: float = 0.0

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """Compute -(1-ε) log P⁺ - ε log P⁻, P = softmax(S)."""
        return binary_cross_entropy(
            1.0 - self.label_smoothing, ops.stack([chosen, rejected], axis=-1)
        )


@objective
class Sigmoid(ImplicitRewardGap, Logistic):
    """DPO: the Bradley-Terry likelihood of the preferences; cDPO with label_smoothing."""

    formula = "-log σ(βΔ)"
    source = "2305.18290"  # eq. 7


@objective
class Hinge(ImplicitRewardGap):
    """Max-margin: no more push once the margin is one."""

    formula = "max(0, 1 - βΔ)"
    source = "2305.10425, 2309.06657"

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ops.relu(1.0 - (chosen - rejected))


@objective
class IPO(GapObjective):
    """Draws the margin to 1/(2β): stays bounded where labels never contradict each other."""

    formula = "(c̄ - r̄ - 1/(2β))²"
    source = "2310.12036"  # eq. 17; the paper has sums
    reads = frozenset({"policy", "reference", "lengths"})
    probabilistic = False

    length_normalize: bool = True

    def scores(self, outputs: Outputs) -> Tensor:
        score = mean_log_ratio if self.length_normalize else log_ratio
        return score(outputs, beta=self.beta)

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        return ops.square((chosen - rejected - 0.5) / self.beta)


@objective
class EXO(ImplicitReward, PairObjective):
    """Reverse KL to the labels: seeks the mode; needs label_smoothing > 0."""

    formula = "KL((σ(βΔ), σ(-βΔ)) ‖ (1-ε, ε))"
    source = "2402.00856"

    label_smoothing: float

    def loss(self, preference: Tensor, outputs: Outputs) -> Tensor:
        smoothing, pair_scores = self.label_smoothing, self.scores(outputs)
        target = preference * (1.0 - smoothing) + (1.0 - preference) * smoothing
        p = preference_probabilities(pair_scores)
        llr = log_likelihood_ratio(pair_scores)
        divergence = p[:, 0] * (ops.log_sigmoid(llr) - ops.log(target)) + p[:, 1] * (
            ops.log_sigmoid(-llr) - ops.log(1.0 - target)
        )
        return self.weighted(divergence, outputs)


@objective
class Robust(ImplicitRewardGap):
    """Unbiased under labels flipped at a known rate ε = label_smoothing.

    Its mean over labels flipped at rate ε is the clean `sigmoid` loss. It falls without bound on a
    pair that is right beyond doubt, as an unbiased estimate must.
    """

    formula = "[-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1-2ε)"
    source = "2403.00409"

    label_smoothing: float = 0.0

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        rate, llr = self.label_smoothing, chosen - rejected
        right, wrong = -ops.log_sigmoid(llr), -ops.log_sigmoid(-llr)
        return ((1.0 - rate) * right - rate * wrong) / (1.0 - 2.0 * rate)


@objective
class DiscoPOP(ImplicitRewardGap):
    """A gated mix of logistic and exponential loss, found by search."""

    formula = "(1-m)(-log σ(βΔ)) + m e^(-βΔ), m = σ(βΔ/τ)"
    source = "2406.08414"

    discopop_tau: float = 0.05

    def pair_loss(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        llr = chosen - rejected
        # m e^(-z) as exp(log m - z): no z can make it overflow while τ is at most one.
        exponential = ops.exp(ops.log_sigmoid(llr / self.discopop_tau) - llr)
        return ops.sigmoid(-llr / self.discopop_tau) * -ops.log_sigmoid(llr) + exponential


@objective
class SigmoidNorm(Logistic):
    """DPO on log-ratios per token: no reward for length."""

    formula = "-log σ(β(c̄ - r̄))"
    source = "2411.15124"
    reads = frozenset({"policy", "reference", "lengths"})

    def scores(self, outputs: Outputs) -> Tensor:
        return mean_log_ratio(outputs, beta=self.beta)
