"""The table of preference objectives: score -> loss on the pair, one line each.

A new objective is a pure function (in `links.py` or `scores.py`) and a line in `OBJECTIVES`. The
options it takes are read off the two functions' keyword-only arguments; modifiers follow from its
form.

Example:
    >>> sorted(OBJECTIVES["ipo"].options)
    ['beta', 'group_robust', 'length_normalize', 'margin', 'wpo', 'wpo_max_weight']
    >>> OBJECTIVES["simpo"].needs_reference
    False
    >>> available()["hinge"]
    'Max-margin: no more push once the margin is one.'
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from dpo_keras.losses import batchwise, links, scores
from dpo_keras.losses.forms import on_centred_scores, on_label, on_llr, on_outputs, on_scores
from dpo_keras.losses.numerics import Tensor
from dpo_keras.losses.penalties import nll


def keyword_only(function: Callable[..., Any]) -> dict[str, Any]:
    """Map a function's keyword-only arguments to their defaults (`inspect.Parameter.empty`)."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True)
class Objective:
    """One preference objective.

    Attributes:
        formula: the loss of a pair whose first response won.
        summary: what it does, in one line.
        source: arXiv identifiers.
        score: `(outputs, *, options) -> [N, 2]`, see `scores.py`.
        form: how `loss` meets the pair and its label, see `forms.py`.
        loss: the pure function, see `links.py`.
        nll: weight of the preferred response's mean negative log-likelihood: a number, or the name
            of the option that holds it.
        probabilistic: whether softmax(scores) is what the loss speaks about, so that a penalty on
            its confidence means something.
    """

    formula: str
    summary: str
    source: str
    score: Callable[..., Tensor]
    form: Callable[..., Tensor]
    loss: Callable[..., Tensor]
    nll: float | str = 0.0
    probabilistic: bool = True

    @property
    def needs(self) -> frozenset[str]:
        """Names of the scorer's outputs that the loss reads, modifiers apart."""
        return scores.NEEDS[self.score] | (PER_TOKEN if self.nll or self.loss is nll else set())

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs are used."""
        return "reference" in self.needs

    @property
    def batchwise(self) -> bool:
        """Whether the loss of one pair depends on the other pairs of the batch."""
        return self.loss in (batchwise.aot, batchwise.aot_unpaired)

    @property
    def defaults(self) -> dict[str, Any]:
        """Options of the two functions, with their defaults."""
        own = {self.nll: 1.0} if isinstance(self.nll, str) else {}
        return {**keyword_only(self.score), **keyword_only(self.loss), **own}

    @property
    def options(self) -> frozenset[str]:
        """Names of every option that changes this objective's loss."""
        modifiers = {"group_robust"}
        if self.form is on_llr:
            modifiers |= {"margin"}
        if self.form is on_centred_scores:
            modifiers |= {"shift_momentum"}
        if self.form is not on_outputs:
            modifiers |= {"wpo", "wpo_max_weight"}
        return frozenset(modifiers | self.defaults.keys())

    def takes_penalty(self, name: str) -> bool:
        """Whether a penalty of this name has a meaning beside this loss."""
        if name in ("insufficient_confidence", "overconfidence"):
            return self.probabilistic
        if name == "dpo_positive":
            return self.form is on_llr and self.score is scores.log_ratio
        return True


PER_TOKEN = frozenset({"policy", "lengths"})

OBJECTIVES: dict[str, Objective] = {
    "sigmoid": Objective(
        "-log σ(βΔ)",
        "DPO: the Bradley-Terry likelihood of the preferences; cDPO with label_smoothing.",
        "2305.18290",
        scores.log_ratio,
        on_llr,
        links.sigmoid,
    ),
    "hinge": Objective(
        "max(0, 1 - βΔ)",
        "Max-margin: no more push once the margin is one.",
        "2305.10425, 2309.06657",
        scores.log_ratio,
        on_llr,
        links.hinge,
    ),
    "ipo": Objective(
        "(c̄ - r̄ - 1/(2β))²",
        "Draws the margin to 1/(2β): stays bounded where labels never contradict each other.",
        "2310.12036",
        scores.ipo_log_ratio,
        on_llr,
        links.ipo,
        probabilistic=False,
    ),
    "exo_pair": Objective(
        "KL((σ(βΔ), σ(-βΔ)) ‖ (1-ε, ε))",
        "Reverse KL to the labels: seeks the mode; needs label_smoothing > 0.",
        "2402.00856",
        scores.log_ratio,
        on_label,
        links.exo_pair,
    ),
    "nca_pair": Objective(
        "-log σ(βc) - ½ log σ(-βc) - ½ log σ(-βr)",
        "Judges each reward by itself, which keeps the chosen one from falling.",
        "2402.05369",
        scores.log_ratio,
        on_scores,
        links.nca_pair,
    ),
    "robust": Objective(
        "[-(1-ε) log σ(βΔ) + ε log σ(-βΔ)] / (1-2ε)",
        "Unbiased under labels flipped at a known rate ε = label_smoothing.",
        "2403.00409",
        scores.log_ratio,
        on_llr,
        links.robust,
    ),
    "bco_pair": Objective(
        "-log σ(βc - δ) - log σ(-(βr - δ))",
        "A classifier of good and bad responses; δ a running mean with shift_momentum, else 0.",
        "2404.04656",
        scores.log_ratio,
        on_centred_scores,
        links.bco_pair,
    ),
    "sppo_hard": Objective(
        "(c - 1/(2β))² + (r + 1/(2β))²",
        "Self-play: the two log-ratios to +1/(2β) and -1/(2β), each by itself.",
        "2405.00675",
        scores.plain_log_ratio,
        on_scores,
        links.sppo_hard,
        probabilistic=False,
    ),
    "aot": Objective(
        "-log σ(βδ), δ = sort(π⁺ - π⁻) - sort(ref⁺ - ref⁻)",
        "The batch's margins, as a distribution, above the reference's (optimal transport).",
        "2406.05882",
        scores.plain_log_ratio,
        on_outputs,
        batchwise.aot,
        probabilistic=False,
    ),
    "aot_unpaired": Objective(
        "-log σ(βδ), δ = sort(c) - sort(r)",
        "The chosen rewards, as a distribution, above the rejected ones; pairs do not matter.",
        "2406.05882",
        scores.log_ratio,
        on_outputs,
        batchwise.aot_unpaired,
        probabilistic=False,
    ),
    "apo_zero": Objective(
        "1 - σ(βc) + σ(βr)",
        "Raises the chosen, lowers the rejected: for data better than the model.",
        "2408.06266",
        scores.log_ratio,
        on_scores,
        links.apo_zero,
    ),
    "apo_down": Objective(
        "σ(βc) + 1 - σ(βΔ)",
        "Lowers both, the rejected further: for data worse than the model.",
        "2408.06266",
        scores.log_ratio,
        on_scores,
        links.apo_down,
    ),
    "discopop": Objective(
        "(1-m)(-log σ(βΔ)) + m e^(-βΔ), m = σ(βΔ/τ)",
        "A gated mix of logistic and exponential loss, found by search.",
        "2406.08414",
        scores.log_ratio,
        on_llr,
        links.discopop,
    ),
    "sigmoid_norm": Objective(
        "-log σ(β(c̄ - r̄))",
        "DPO on log-ratios per token: no reward for length.",
        "2411.15124",
        scores.mean_log_ratio,
        on_llr,
        links.sigmoid,
    ),
    "simpo": Objective(
        "-log σ(β(π̄⁺ - π̄⁻) - γ)",
        "Log-probs per token with a target margin; no reference (β 2 to 2.5 is usual).",
        "2405.14734",
        scores.mean_log_prob,
        on_llr,
        links.simpo,
    ),
    "cpo": Objective(
        "-log σ(β(π⁺ - π⁻)) + α·NLL(chosen)",
        "DPO against a uniform reference plus supervision on the chosen; no reference.",
        "2401.08417",
        scores.log_prob,
        on_llr,
        links.sigmoid,
        nll="cpo_alpha",
    ),
    "slic": Objective(
        "max(0, 1 - β(π⁺ - π⁻))",
        "Sequence-likelihood calibration: a hinge on log-probs; no reference.",
        "2305.10425",
        scores.log_prob,
        on_llr,
        links.hinge,
    ),
    "orpo": Objective(
        "NLL(chosen) - β log σ(log odds ratio), odds of mean log-probs",
        "Supervision and preference in one stage, from a base model; no reference.",
        "2403.07691",
        scores.log_odds,
        on_llr,
        links.odds_ratio,
        nll=1.0,
    ),
    "alphapo": Objective(
        "SimPO with reward (1 - p^(-α)) / α",
        "SimPO with a shaped reward: α sets how hard unlikely responses pull; no reference.",
        "2501.03884",
        scores.alpha_reward,
        on_llr,
        links.simpo,
    ),
    "sft": Objective(
        "NLL(chosen)",
        "Mean negative log-likelihood of the chosen tokens; no reference.",
        "2404.19733",
        scores.log_prob,
        on_outputs,
        nll,
        probabilistic=False,
    ),
}


def available() -> dict[str, str]:
    """List the names that `DPOLoss(loss_type=…)` takes, each with one line on what it does.

    Returns:
        Name -> summary, in the order of the table.

    Example:
        >>> list(available())[:3]
        ['sigmoid', 'hinge', 'ipo']
    """
    return {name: objective.summary for name, objective in OBJECTIVES.items()}
