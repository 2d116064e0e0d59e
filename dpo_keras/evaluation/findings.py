"""Findings: warnings and notes that the figures support.

A check is a function from `Measured` to a text or None, with an entry in `CHECKS`. Where a figure
has a 95 % interval, the whole interval must lie on one side of the threshold.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.samples import Samples
from dpo_keras.evaluation.statistics import Measurement, change, mean
from dpo_keras.training.callbacks import TrainingLog
from dpo_keras.utils.intervals import Estimate, short, undefined

# Smaller differences than these are not reported, however certain they are.
LENGTH_GAP = 0.1  # accuracy where the chosen response is longer, against shorter
OVERFIT = 0.02  # relative rise of the held-out loss above its lowest value
CERTAINTY_GAP = 0.05  # confidence against agreement
LONGER = 1.25  # growth of generated responses
COLLAPSE = 0.5  # share of distinct responses, after / before
CUT = 0.2  # share of responses cut at max_new_tokens


@dataclass(frozen=True, slots=True)
class Finding:
    """A warning or note about the result.

    Attributes:
        code: a stable name, for programs.
        severity: "warning", or "note" for what may be harmless.
        text: what was found, what it means and what to do.
    """

    code: str
    severity: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """Return the finding, ready for JSON."""
        return {"code": self.code, "severity": self.severity, "text": self.text}


@dataclass(frozen=True)
class Measured:
    """Everything that the checks look at. None marks what was not measured."""

    after: HeldOut
    before: HeldOut | None = None
    samples_before: Samples | None = None
    samples_after: Samples | None = None
    log: TrainingLog | None = None
    trained_on: int = 0  # of the pairs after training, how many have a prompt that was trained on


def above(figure: Estimate, bound: float) -> bool:
    """Return whether the whole interval lies above a bound."""
    return figure.low is not None and figure.low > bound


def below(figure: Estimate, bound: float) -> bool:
    """Return whether the whole interval lies below a bound."""
    return figure.high is not None and figure.high < bound


def chosen_logps_fell(measured: Measured) -> str | None:
    """Report that chosen responses became less likely while the margin grew (trl#800)."""
    fall, growth, since = _course_of_chosen(measured)
    if fall.value is None or not (below(fall, 0) and above(growth, 0)):
        return None
    remedy = "add the penalty `nll` (arXiv 2404.19733), as in `penalties: {nll: 0.1}`"
    if "penalty/nll" in measured.after.pairs:
        remedy = "raise the weight of the penalty nll"
    return (
        f"Chosen responses are less likely than {since}, by {short(-fall.value)} nats each, while "
        "the reward margin grew: the policy learned more about what to avoid than about what to "
        "write, and probability moves to responses that are in neither column. Read the samples. "
        f"If they got worse, {remedy}, or give the loss the option `dpo_positive` (arXiv "
        "2402.13228), raise beta, or train for fewer steps (trl#800)."
    )


def _course_of_chosen(measured: Measured) -> tuple[Estimate, Estimate, str]:
    """Return the changes of the chosen log-probs and of the margin, and since when."""
    after, before = measured.after, measured.before
    if "chosen_logps" not in after.figures:
        return undefined("there are no pairs"), undefined("there are no pairs"), ""
    names = ("chosen_logps", "reward_margin")
    if before is not None and not after.difference_from(before):
        changed, grown = (change(before, after, name) for name in names)
        return changed, grown, "before the training"
    if "chosen_reference_logps" in after.pairs:
        ratio = after.pairs["chosen_logps"] - after.pairs["chosen_reference_logps"]
        since = mean(ratio, after.pairs["weight"], after.pairs["prompt"])
        return since, after.figures["reward_margin"], "under the reference"
    fall, growth = (_trend(measured.log or TrainingLog(), name) for name in names)
    return fall, growth, "in the first steps"


def _trend(log: TrainingLog, name: str) -> Estimate:
    """Return the mean of the last tenth of the steps minus that of the first tenth."""
    values = log.curve(name)[1]
    count = len(values) // 10
    first, last = mean(values[:count], of="step"), mean(values[len(values) - count :], of="step")
    if first.value is None or last.value is None or first.high is None or last.high is None:
        return undefined("the log is too short, or a value is not finite")
    difference = last.value - first.value
    reach = math.hypot(first.high - first.value, last.high - last.value)
    return Estimate(difference, difference - reach, difference + reach, len(values))


def training_broke(measured: Measured) -> str | None:
    """Report a loss or gradient that became NaN or infinite, in the log or on held-out pairs."""
    step = measured.log.broken_step() if measured.log is not None else None
    if step is not None:
        return (
            f"Loss or gradient norm is not finite at step {step}. Lower the learning rate, clip "
            "gradients (clip_norm), or use bfloat16 instead of float16."
        )
    margin = measured.after.figures["reward_margin"]
    if margin.value is None and margin.reason and "finite" in margin.reason:
        return f"The policy is broken: {margin.reason}. Go back to an earlier checkpoint."
    return None


def accuracy_at_chance(measured: Measured) -> str | None:
    """Report held-out accuracy whose interval includes 0.5."""
    accuracy = measured.after.figures["reward_accuracy"]
    if accuracy.value is None or above(accuracy, 0.5):
        return None
    return (
        f"Held-out reward accuracy, {accuracy}, is no better than chance on these "
        f"{accuracy.count:,} pairs. Use more pairs, more steps or a higher learning rate; "
        "`dpo-keras data inspect` shows contradictions."
    )


def accuracy_fell(measured: Measured) -> str | None:
    """Report that training lowered held-out accuracy."""
    fall = _change(measured.before, measured.after, "reward_accuracy")
    if not below(fall, 0):
        return None
    return f"Held-out reward accuracy fell: {fall}. Train for less, or look for overfitting."


def overfitting(measured: Measured) -> str | None:
    """Report that the held-out loss rose again during training."""
    steps, losses = measured.log.curve("val_loss") if measured.log else (None, None)
    if steps is None or losses is None or len(losses) < 2 or not np.isfinite(losses).all():
        return None
    lowest = int(np.argmin(losses))
    rise = float(losses[-1] - losses[lowest])
    if rise <= OVERFIT * abs(float(losses[lowest])):
        return None
    return (
        f"The held-out loss was lowest at step {int(steps[lowest]):,} ({short(losses[lowest])}) "
        f"and rose to {short(losses[-1])}: the end of the training did not help. Train for fewer "
        "epochs, or restore the best checkpoint."
    )


def length_bias(measured: Measured) -> str | None:
    """Report accuracy that depends on which response is longer."""
    if not measured.after.by_length:
        return None
    longer, shorter = (measured.after.by_length[f"chosen_{name}"] for name in ("longer", "shorter"))
    if longer.value is None or shorter.value is None:
        return None
    both = ((longer, shorter), (shorter, longer))
    disjoint = any(low.high is not None and above(high, low.high) for high, low in both)
    if not disjoint or abs(longer.value - shorter.value) < LENGTH_GAP:
        return None
    towards = "longer" if longer.value > shorter.value else "shorter"
    return (
        f"The policy leans towards {towards} responses: accuracy is {longer} where the preferred "
        f"response is longer and {shorter} where it is shorter. Length-normalized objectives "
        "(`sigmoid_norm`, `simpo`) or `ld_alpha` (arXiv 2409.06411) reduce this."
    )


def weak_groups(measured: Measured) -> str | None:
    """Report groups whose accuracy lies below the interval of the overall accuracy."""
    overall = measured.after.figures["reward_accuracy"]
    weak = {
        name: figures["reward_accuracy"]
        for name, figures in measured.after.groups.items()
        if overall.low is not None and below(figures["reward_accuracy"], overall.low)
    }
    if not weak:
        return None
    named = ", ".join(f"{name} {figure}" for name, figure in weak.items())
    return (
        f"Reward accuracy is clearly lower than on all pairs in: {named}. `group_robust` (arXiv "
        "2405.20304) weights such groups up."
    )


def overconfident(measured: Measured) -> str | None:
    """Report a P(chosen) that is more confident than people agree."""
    gap = measured.after.calibration.overconfidence
    if measured.after.note or not above(gap, CERTAINTY_GAP):
        return None
    return (
        f"P(chosen) is overconfident: {_confidence_and_agreement(measured)}. Label smoothing, the "
        "penalty `overconfidence`, or fewer epochs lower it."
    )


def underconfident(measured: Measured) -> str | None:
    """Report a P(chosen) that is less confident than people agree."""
    gap = measured.after.calibration.overconfidence
    if measured.after.note or not below(gap, -CERTAINTY_GAP):
        return None
    return (
        f"P(chosen) is underconfident: {_confidence_and_agreement(measured)}. The order of the "
        "pairs is better than their probabilities; more steps, or the penalty "
        "`insufficient_confidence`, raise the confidence."
    )


def _confidence_and_agreement(measured: Measured) -> str:
    found = measured.after.calibration
    return (
        f"mean confidence {found.confidence.value or 0:.0%}, "
        f"agreement with people {found.agreement.value or 0:.0%}"
    )


def preferred_fell(measured: Measured) -> str | None:
    """Report that the judge prefers fewer responses than before."""
    fall = _change(measured.samples_before, measured.samples_after, "preferred")
    if not below(fall, 0):
        return None
    return (
        f"The share of generated responses that the judge prefers fell: {fall}. Reward accuracy "
        "measures given responses, not those that the policy writes. A higher beta or a lower "
        "learning rate keeps the policy nearer to the reference."
    )


def responses_grew(measured: Measured) -> str | None:
    """Report that generated responses became much longer."""
    old, new = _sampled(measured, "tokens")
    grown = _change(measured.samples_before, measured.samples_after, "tokens")
    if not old or new is None or new / old < LONGER or not above(grown, 0):
        return None
    return (
        f"Generated responses grew from {short(old)} to {short(new)} tokens on average. If the "
        "length is not wanted, use `sigmoid_norm`, `simpo` or `ld_alpha`."
    )


def responses_collapsed(measured: Measured) -> str | None:
    """Report that different prompts get the same response more often than before."""
    old, new = _sampled(measured, "distinct_responses")
    if not old or new is None or new >= COLLAPSE * old:
        return None
    return (
        f"Only {new:.0%} of the generated responses differ from one another, after {old:.0%} "
        "before: the policy collapses to few texts. Raise beta or lower the learning rate."
    )


def responses_cut(measured: Measured) -> str | None:
    """Report that many responses were cut at max_new_tokens."""
    ended = measured.samples_after.figures.get("ended") if measured.samples_after else None
    if ended is None or ended.value is None or not below(ended, 1 - CUT):
        return None
    return (
        f"{1 - ended.value:.0%} of the generated responses were cut off. Raise max_new_tokens. If "
        "that does not help, the policy has not learned to end: the training pairs may have been "
        "cut, too (max_length)."
    )


def _sampled(measured: Measured, name: str) -> tuple[float | None, float | None]:
    """Return a figure of the samples before and after."""
    both = (measured.samples_before, measured.samples_after)
    old, new = (s.figures.get(name) if s is not None else None for s in both)
    return old.value if old else None, new.value if new else None


def _change(before: Measurement | None, after: Measurement | None, name: str) -> Estimate:
    if before is None or after is None or name not in after.figures:
        return undefined("it was not measured")
    return change(before, after, name)


def prompts_trained_on(measured: Measured) -> str | None:
    """Check that the pairs are new to the policy."""
    count, pairs = measured.trained_on, len(measured.after)
    if not count:
        return None
    return (
        f"The policy was trained on the prompts of {count:,} of these {pairs:,} pairs. Figures on "
        "them tell how well it remembers, not how well it does on new prompts. Measure on pairs "
        "that were held out."
    )


Check = Callable[[Measured], str | None]
CHECKS: dict[str, tuple[str, Check]] = {
    "training_broke": ("warning", training_broke),
    "prompts_trained_on": ("warning", prompts_trained_on),
    "accuracy_at_chance": ("warning", accuracy_at_chance),
    "accuracy_fell": ("warning", accuracy_fell),
    "preferred_fell": ("warning", preferred_fell),
    "chosen_logps_fell": ("warning", chosen_logps_fell),
    "overfitting": ("warning", overfitting),
    "responses_collapsed": ("warning", responses_collapsed),
    "responses_cut": ("warning", responses_cut),
    "responses_grew": ("warning", responses_grew),
    "length_bias": ("warning", length_bias),
    "weak_groups": ("warning", weak_groups),
    "overconfident": ("warning", overconfident),
    "underconfident": ("note", underconfident),
}


def findings(measured: Measured) -> list[Finding]:
    """Run every check; warnings come first."""
    texts = {code: check(measured) for code, (_, check) in CHECKS.items()}
    found = [Finding(code, CHECKS[code][0], text) for code, text in texts.items() if text]
    return sorted(found, key=lambda finding: finding.severity != "warning")
