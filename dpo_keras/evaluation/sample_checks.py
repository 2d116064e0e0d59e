"""Checks of what the policy writes: worse, longer, all the same, or without an end."""

from __future__ import annotations

from dpo_keras.evaluation.before_after import change
from dpo_keras.evaluation.checks import Measured, above, below
from dpo_keras.utils.intervals import Estimate, short

LONGER = 1.25  # growth of generated responses that is worth a word
CUT = 0.2  # share of responses cut off that is worth a word


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
