"""Findings: what a reader of the figures should not miss.

A check is a function from a `Measured` to a sentence or None, and a line in `CHECKS`. It reports
only what the data support: the 95 % interval must lie on one side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from dpo_keras.evaluation.before_after import change, same_pairs
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.samples import Samples
from dpo_keras.evaluation.statistics import mean
from dpo_keras.evaluation.training_log import TrainingLog
from dpo_keras.utils.intervals import Estimate, short

LENGTH_GAP = 0.1  # difference in accuracy between longer and shorter that is worth a word
OVERFIT = 0.02  # relative rise of the held-out loss above its lowest
CERTAINTY_GAP = 0.05  # difference of confidence and agreement that is worth a word
LONGER = 1.25  # growth of generated responses that is worth a word
CUT = 0.2  # share of responses cut off that is worth a word


@dataclass(frozen=True, slots=True)
class Finding:
    """Something to know before trusting the result.

    Attributes:
        code: a stable name, for programs.
        severity: "warning", or "note" for what need not be wrong.
        text: what was seen, what it means and what to do.
    """

    code: str
    severity: str
    text: str

    def as_dict(self) -> dict[str, str]:
        """The finding, ready for JSON."""
        return {"code": self.code, "severity": self.severity, "text": self.text}


def findings(measured: Measured) -> list[Finding]:
    """Runs every check.

    Args:
        measured: figures, samples and log.

    Returns:
        What was found, warnings first.
    """
    found = [
        Finding(code, severity, text)
        for code, (severity, check) in CHECKS.items()
        if (text := check(measured)) is not None
    ]
    return sorted(found, key=lambda finding: finding.severity != "warning")


@dataclass(frozen=True)
class Measured:
    """All that checks look at; parts that were not measured are None."""

    after: HeldOut
    before: HeldOut | None = None
    samples_before: Samples | None = None
    samples_after: Samples | None = None
    log: TrainingLog | None = None


def above(figure: Estimate, bound: float) -> bool:
    """Whether the whole interval lies above a bound."""
    return figure.low is not None and figure.low > bound


def below(figure: Estimate, bound: float) -> bool:
    """Whether the whole interval lies below a bound."""
    return figure.high is not None and figure.high < bound


def chosen_logps_fell(measured: Measured) -> str | None:
    """The chosen responses became less likely while the margin grew (trl#800)."""
    fall, growth, since = _course_of_chosen(measured)
    if fall is None or growth is None or not (below(fall, 0) and above(growth, 0)):
        return None
    assert fall.value is not None
    has = {name for name in ("nll", "dpo_positive") if f"penalty/{name}" in measured.after.pairs}
    remedy = (
        f"raise the weight of the penalty {' and '.join(sorted(has))}"
        if has
        else "add the penalty `nll` (arXiv 2404.19733) or `dpo_positive` (arXiv 2402.13228), as in "
        "`loss.penalties: {nll: 0.1}`"
    )
    return (
        f"Chosen responses are less likely than {since}, by {short(-fall.value)} nats each, while "
        "the reward margin grew: the policy learned more of what to avoid than of what to write, "
        "and the probability goes to responses in neither column. Read the samples. "
        f"If they got worse, {remedy}, or raise beta, or train for less (trl#800)."
    )


def _course_of_chosen(measured: Measured) -> tuple[Estimate | None, Estimate | None, str]:
    after, before = measured.after, measured.before
    fall: Estimate | None
    growth: Estimate | None
    if before is not None and same_pairs(before, after):
        names = ("chosen_logps", "reward_margin")
        fall, growth = (change(before, after, name) for name in names)
        return fall, growth, "before the training"
    if "chosen_reference_logps" in after.pairs:
        ratio = after.pairs["chosen_logps"] - after.pairs["chosen_reference_logps"]
        fall = mean(ratio, after.pairs["weight"], after.pairs["prompt"])
        return fall, after.figures["reward_margin"], "under the reference"
    if measured.log is not None:
        fall, growth = (_trend(measured.log, name) for name in ("chosen_logps", "reward_margin"))
        return fall, growth, "in the first steps"
    return None, None, ""


def _trend(log: TrainingLog, name: str) -> Estimate | None:
    """Mean of the last tenth of the steps less that of the first."""
    values = log.curve(name)[1]
    count = len(values) // 10
    if count < 2:
        return None
    first, last = mean(values[:count], of="step"), mean(values[-count:], of="step")
    if first.value is None or last.value is None or first.high is None or last.high is None:
        return None
    difference = last.value - first.value
    reach = float(np.hypot(first.high - first.value, last.high - last.value))
    return Estimate(difference, difference - reach, difference + reach, len(values))


def training_broke(measured: Measured) -> str | None:
    """A loss or gradient that is no number, in the log or on the held-out pairs."""
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
    """Held-out accuracy that guessing reaches too."""
    accuracy = measured.after.figures["reward_accuracy"]
    if accuracy.value is None or above(accuracy, 0.5):
        return None
    return (
        f"Held-out reward accuracy, {accuracy}, cannot be told from guessing on these "
        f"{accuracy.count:,} pairs. More pairs, more steps or a higher learning rate; "
        "`dpo-keras data inspect` shows contradictions."
    )


def accuracy_fell(measured: Measured) -> str | None:
    """Training made held-out accuracy worse."""
    if measured.before is None:
        return None
    fall = change(measured.before, measured.after, "reward_accuracy")
    if not below(fall, 0):
        return None
    return f"Held-out reward accuracy fell: {fall}. Train for less, or look for overfitting."


def overfitting(measured: Measured) -> str | None:
    """The held-out loss has been lower in the course of the training."""
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
    """Accuracy that depends on which response is longer."""
    longer, shorter = (measured.after.by_length[f"chosen_{name}"] for name in ("longer", "shorter"))
    if longer.value is None or shorter.value is None:
        return None
    apart = _apart(longer, shorter)
    if not apart or abs(longer.value - shorter.value) < LENGTH_GAP:
        return None
    towards = "longer" if longer.value > shorter.value else "shorter"
    return (
        f"The policy leans towards {towards} responses: accuracy is {longer} where the preferred "
        f"response is longer and {shorter} where it is shorter. Length-normalized objectives "
        "(`sigmoid_norm`, `simpo`) or `ld_alpha` (arXiv 2409.06411) lessen this."
    )


def weak_groups(measured: Measured) -> str | None:
    """Groups on which the policy does clearly worse than on all pairs."""
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
    """P(chosen) nearer to 0 and 1 than the agreement with people bears out."""
    gap = measured.after.calibration.overconfidence
    if measured.after.note or gap.value is None or not above(gap, CERTAINTY_GAP):
        return None
    return (
        f"P(chosen) is too sure: on average {_percent(measured.after.calibration.confidence)} sure "
        f"and {_percent(measured.after.calibration.agreement)} right. Label smoothing, the penalty "
        "`overconfidence`, or fewer epochs lower it."
    )


def underconfident(measured: Measured) -> str | None:
    """P(chosen) nearer to one half than the agreement with people bears out."""
    gap = measured.after.calibration.overconfidence
    if measured.after.note or gap.value is None or not below(gap, -CERTAINTY_GAP):
        return None
    return (
        f"P(chosen) is less sure than it could be: on average "
        f"{_percent(measured.after.calibration.confidence)} sure and "
        f"{_percent(measured.after.calibration.agreement)} right. It orders pairs better than it "
        "rates them; more steps, or the penalty `insufficient_confidence`, raise it."
    )


def _apart(one: Estimate, other: Estimate) -> bool:
    return any(
        a.low is not None and b.high is not None and a.low > b.high
        for a, b in ((one, other), (other, one))
    )


def _percent(figure: Estimate) -> str:
    return "unknown" if figure.value is None else f"{figure.value:.0%}"


def preferred_fell(measured: Measured) -> str | None:
    """The policy writes preferred responses less often than before."""
    fall = _samples_change(measured, "preferred")
    if fall is None or not below(fall, 0):
        return None
    return (
        f"The share of generated responses that the judge prefers fell: {fall}. Reward accuracy "
        "is about given responses; what the policy writes is another matter. A higher beta or a "
        "lower learning rate keeps it nearer to the reference."
    )


def responses_grew(measured: Measured) -> str | None:
    """Generated responses became much longer."""
    grown = _samples_change(measured, "tokens")
    if grown is None or measured.samples_before is None or measured.samples_after is None:
        return None
    old, new = (
        s.figures["tokens"].value for s in (measured.samples_before, measured.samples_after)
    )
    if not old or new is None or new / old < LONGER or not above(grown, 0):
        return None
    return (
        f"Generated responses grew from {short(old)} to {short(new)} tokens on average. Where "
        "length is not what people asked for, use `sigmoid_norm`, `simpo` or `ld_alpha`."
    )


def responses_collapsed(measured: Measured) -> str | None:
    """Different prompts get the same response far more often than before."""
    if measured.samples_before is None or measured.samples_after is None:
        return None
    old, new = (
        s.figures.get("distinct_responses")
        for s in (measured.samples_before, measured.samples_after)
    )
    if old is None or new is None or not old.value or new.value is None:
        return None
    if new.value >= 0.5 * old.value:
        return None
    return (
        f"Only {new.value:.0%} of the generated responses are different from one another, after "
        f"{old.value:.0%} before: the policy is collapsing onto few texts. Raise beta or lower the "
        "learning rate."
    )


def responses_cut(measured: Measured) -> str | None:
    """Many responses reached the limit of tokens."""
    ended = measured.samples_after.figures.get("ended") if measured.samples_after else None
    if ended is None or not below(ended, 1 - CUT):
        return None
    assert ended.value is not None
    return (
        f"{1 - ended.value:.0%} of the generated responses were cut off. Raise max_new_tokens; if "
        "that does not help, the policy has not learned to end: the training pairs may have been "
        "cut themselves (max_length)."
    )


def _samples_change(measured: Measured, name: str) -> Estimate | None:
    before, after = measured.samples_before, measured.samples_after
    if before is None or after is None or name not in after.figures or name not in before.figures:
        return None
    return change(before, after, name)


Check = Callable[[Measured], str | None]
CHECKS: dict[str, tuple[str, Check]] = {
    "training_broke": ("warning", training_broke),
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
