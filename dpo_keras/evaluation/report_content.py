"""What a report says, as plain data: one source for its three forms."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.evaluation.before_after import change, same_pairs
from dpo_keras.evaluation.findings import Finding, Measured
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.samples import Samples, side_by_side
from dpo_keras.preferences import PreferencePair, plain_text
from dpo_keras.utils.intervals import Estimate, short, undefined

# Name, label, meaning; those not named here are shown under their own name.
_HELD_OUT = {
    "reward_accuracy": ("Reward accuracy", "pairs scored as people prefer; score ties count half"),
    "loss": ("Loss", "preference loss and penalties, per pair"),
    "preference_loss": ("Preference loss", "without penalties"),
    "reward_margin": ("Reward margin", "S(chosen) − S(rejected), nats"),
    "chosen_reward": ("Chosen reward", "S(chosen)"),
    "rejected_reward": ("Rejected reward", "S(rejected)"),
    "chosen_logps": ("Chosen log-prob", "log π(chosen | prompt), nats a response"),
    "rejected_logps": ("Rejected log-prob", "log π(rejected | prompt), nats a response"),
    "kl": ("KL to the reference", "½ log-ratio² a token: nats of KL as long as it is small"),
    "entropy": ("Entropy", "of the policy, nats a token"),
}
_BY_LENGTH = {
    "chosen_longer": ("the preferred response is longer", ""),
    "chosen_shorter": ("the preferred response is shorter", ""),
    "equal": ("both have as many tokens", ""),
    "length_controlled": ("length-controlled", "mean of longer and shorter; 0.5 by length alone"),
}
_CALIBRATION = {
    "expected_calibration_error": (
        "Expected calibration error",
        "mean |confidence − agreement| over bins",
    ),
    "chance_level": ("… of a perfect model", "95 % of samples of this size stay below"),
    "brier": ("Brier score", "mean (P − y)²; 0.25 for a coin"),
    "log_loss": ("Log loss", "nats; 0.693 for a coin"),
    "label_entropy": ("… at best", "what soft preferences leave"),
    "confidence": ("Confidence", "mean of max(P, 1 − P)"),
    "agreement": ("Agreement", "people prefer what the model prefers"),
    "overconfidence": ("Overconfidence", "confidence − agreement"),
}
_SAMPLES = {
    "preferred": ("Preferred by the judge", ""),
    "tokens": ("Length", "tokens"),
    "ended": ("Ended by themselves", "not cut at max_new_tokens"),
    "empty": ("Empty", ""),
    "distinct_responses": ("Different from one another", ""),
    "distinct_1": ("Distinct tokens", "of all tokens written"),
    "distinct_2": ("Distinct pairs of tokens", "of all pairs written"),
}
_HIDDEN = {
    *("chosen_tokens", "rejected_tokens", "chosen_reference_logps", "rejected_reference_logps"),
}
WRONG_SHOWN = 5


def report_content(
    measured: Measured,
    findings: Sequence[Finding],
    *,
    title: str,
    details: Mapping[str, str],
    config_text: str | None,
    pairs: Sequence[PreferencePair] | None,
    samples_shown: int,
    notices: Sequence[str],
) -> dict[str, Any]:
    """Gathers all that the report's templates print.

    Args:
        measured: figures, samples and log.
        findings: what to know about them.
        title: heading of the report.
        details: names and values to print at the end.
        config_text: the run's configuration, or None.
        pairs: what was measured, to print those that the policy gets most wrong; or None.
        samples_shown: responses to print.
        notices: what could not be done.

    Returns:
        A dict of strings, numbers, lists and dicts.

    Raises:
        InputError: `pairs` are not those that were measured.
    """
    after, before = measured.after, measured.before
    return {
        "title": title,
        "headline": headline(measured),
        "findings": [finding.as_dict() for finding in findings],
        "count": len(after),
        "prompts": len(np.unique(after.pairs["prompt"])),
        "paired": before is not None and same_pairs(before, after),
        "held_out": _held_out_rows(after, before),
        "percentiles": {
            name: held_out.percentiles.get("reward_margin", {})
            for name, held_out in (("before", before), ("after", after))
            if held_out is not None
        },
        "by_length": _rows(
            _BY_LENGTH, after.by_length, before.by_length if before is not None else None
        ),
        "groups": _rows(
            {},
            _accuracies(after),
            _accuracies(before) if before is not None else None,
        ),
        "calibration": _rows(
            _CALIBRATION,
            after.calibration.figures,
            before.calibration.figures if before is not None else None,
        ),
        "calibration_note": after.note,
        "bins": [b.as_dict() for b in after.calibration.bins],
        "samples": _sample_rows(measured),
        "samples_count": len(measured.samples_after) if measured.samples_after else 0,
        "side_by_side": side_by_side(measured.samples_before, measured.samples_after, samples_shown)
        if measured.samples_after
        else [],
        "wrong": most_wrong(after, pairs) if pairs is not None else [],
        "details": {str(name): str(value) for name, value in details.items()},
        "config": config_text,
        "notices": list(notices),
    }


def headline(measured: Measured) -> list[str]:
    """The result in a sentence or two.

    Args:
        measured: figures and samples.
    """
    after, before = measured.after, measured.before
    lines = []
    accuracy = after.figures["reward_accuracy"]
    text = f"Held-out reward accuracy: {accuracy} on {accuracy.count:,} pairs"
    if before is not None and same_pairs(before, after):
        old = before.figures["reward_accuracy"]
        if old.value is not None and accuracy.value is not None:
            text += f", {short(old.value)} before: {_signed(_moved(measured))}"
    lines.append(text + ".")
    new = measured.samples_after.figures.get("preferred") if measured.samples_after else None
    if new is not None and measured.samples_after is not None:
        text = f"Share of generated responses that the judge prefers: {new} of {new.count:,}"
        if measured.samples_before is not None and "preferred" in measured.samples_before.figures:
            moved = change(measured.samples_before, measured.samples_after, "preferred")
            old = measured.samples_before.figures["preferred"]
            if old.value is not None and moved.value is not None:
                text += f", {short(old.value)} before: {_signed(moved)}"
        lines.append(text + ".")
    return lines


def most_wrong(
    held_out: HeldOut, pairs: Sequence[PreferencePair], count: int = WRONG_SHOWN
) -> list[dict[str, Any]]:
    """The pairs on which policy and people disagree most: worth reading for wrong labels.

    Args:
        held_out: the figures.
        pairs: the pairs as they were before tokenization.
        count: how many at most.

    Returns:
        `{"prompt", "chosen", "rejected", "probability", "margin", "id", "annotator", "group"}`
        each, the worst first; `probability` is the policy's P(chosen).

    Raises:
        InputError: there are fewer pairs than were measured.

    Example:
        >>> from dpo_keras.evaluation.held_out_figures import _NEEDED
        >>> columns = {name: np.zeros(2) for name in _NEEDED}
        >>> columns |= {"preference": np.ones(2), "weight": np.ones(2), "source": np.arange(2)}
        >>> columns |= {"chosen_reward": np.array([1.0, -1.0])}
        >>> pairs = [PreferencePair("Hi", "Hello!", "Bye.", id=name) for name in "ab"]
        >>> rows = most_wrong(HeldOut(columns), pairs)
        >>> [(row["id"], round(row["probability"], 3)) for row in rows]
        [('b', 0.269)]
    """
    source = held_out.pairs["source"].astype(np.int64)
    if len(source) and int(source.max()) >= len(pairs):
        raise InputError(
            f"pairs must be the pairs that were tokenized and measured: there are {len(pairs)} of "
            f"them, and pair {int(source.max())} was measured."
        )
    margin = np.sign(held_out.pairs["preference"] - 0.5) * held_out.reward_margin
    wrong = np.flatnonzero((margin < 0) & (held_out.decided > 0))
    rows = []
    for row in wrong[np.argsort(margin[wrong], kind="stable")][:count]:
        pair = pairs[int(source[row])]
        given = float(held_out.reward_margin[row])
        rows.append(
            {
                "prompt": plain_text(pair.prompt),
                "chosen": plain_text(pair.chosen),
                "rejected": plain_text(pair.rejected),
                "probability": float(0.5 * (1 + np.tanh(given / 2))),
                "margin": given,
                "id": pair.id,
                "annotator": pair.annotator,
                "group": pair.group,
            }
        )
    return rows


def _held_out_rows(after: HeldOut, before: HeldOut | None) -> list[dict[str, str]]:
    penalties = {
        name: (f"Penalty {name.partition('/')[2]}", "its weight included")
        for name in after.figures
        if name.startswith("penalty/")
    }
    shown = {name: figure for name, figure in after.figures.items() if name not in _HIDDEN}
    changes = None
    if before is not None and same_pairs(before, after):
        changes = {name: change(before, after, name) for name in shown}
    return _rows({**_HELD_OUT, **penalties}, shown, _of(before), changes)


def _sample_rows(measured: Measured) -> list[dict[str, str]]:
    after, before = measured.samples_after, measured.samples_before
    if after is None:
        return []
    verdict = {
        name: (f"… {name.replace('_', ' ')}", "") for name in after.figures if name not in _SAMPLES
    }
    first = {"preferred": _SAMPLES["preferred"]} if "preferred" in after.figures else {}
    changes = None
    if before is not None and before.prompts == after.prompts:
        changes = {name: change(before, after, name) for name in after.figures}
    return _rows({**first, **verdict, **_SAMPLES}, after.figures, _of(before), changes)


def _of(measured: HeldOut | Samples | None) -> dict[str, Estimate] | None:
    return None if measured is None else measured.figures


def _rows(
    labels: Mapping[str, tuple[str, str]],
    after: Mapping[str, Estimate],
    before: Mapping[str, Estimate] | None = None,
    changes: Mapping[str, Estimate] | None = None,
) -> list[dict[str, str]]:
    names = [name for name in labels if name in after]
    rows = []
    for name in [*names, *(name for name in after if name not in names)]:
        label, meaning = labels.get(name, (name, ""))
        row = {"name": name, "label": label, "meaning": meaning, "after": str(after[name])}
        if before is not None:
            row["before"] = str(before.get(name, undefined("not measured")))
        if changes is not None:
            row["change"] = _signed(changes[name])
        rows.append(row)
    return rows


def _accuracies(held_out: HeldOut) -> dict[str, Estimate]:
    return {name: figures["reward_accuracy"] for name, figures in held_out.groups.items()}


def _moved(measured: Measured) -> Estimate:
    assert measured.before is not None
    return change(measured.before, measured.after, "reward_accuracy")


def _signed(figure: Estimate) -> str:
    text = str(figure)
    return f"+{text}" if figure.value is not None and figure.value >= 0 else text
