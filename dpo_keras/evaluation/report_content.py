"""Content of a report as plain data, the source of its three forms."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.evaluation.findings import Measured
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.samples import side_by_side
from dpo_keras.evaluation.statistics import Measurement, change
from dpo_keras.preferences import RatedResponse, Record, plain_text
from dpo_keras.utils import JSON
from dpo_keras.utils.intervals import Estimate, short, undefined

# Table -> figure -> (label, meaning). A figure without a label is shown under its name.
_LABELS: dict[str, dict[str, tuple[str, str]]] = json.loads(
    (Path(__file__).parent / "templates" / "labels.json").read_text(encoding="utf-8")
)
_HIDDEN = ("chosen_tokens", "rejected_tokens", "chosen_reference_logps", "rejected_reference_logps")
WRONG_SHOWN = 5


def report_content(
    measured: Measured, pairs: Sequence[Record] | None, samples_shown: int
) -> dict[str, JSON]:
    """Gather what the templates print: strings, numbers, lists and dicts."""
    after, before = measured.after, measured.before
    samples, samples_before = measured.samples_after, measured.samples_before
    measured_sets = [after] if before is None else [after, before]
    margins = {} if before is None else {"before": before.percentiles.get("reward_margin", {})}
    margins["after"] = after.percentiles.get("reward_margin", {})
    accuracies = [
        {group: figures["reward_accuracy"] for group, figures in held_out.groups.items()}
        for held_out in measured_sets
    ]
    return {
        "headline": headline(measured),
        "count": len(after),
        "prompts": after.prompt_count,
        "paired": _comparable(before, after),
        "held_out": _held_out_rows(after, before),
        "percentiles": margins,
        "by_length": _rows(_LABELS["by_length"], *(h.by_length for h in measured_sets)),
        "groups": _rows({}, *accuracies),
        "calibration": _rows(
            _LABELS["calibration"], *(h.calibration.figures for h in measured_sets)
        )
        if after.item == "pair"
        else [],
        "items": f"{after.item}s",
        "calibration_note": after.note,
        "samples": _sample_rows(measured),
        "samples_count": len(samples) if samples else 0,
        "side_by_side": side_by_side(samples_before, samples, samples_shown) if samples else [],
        "wrong": most_wrong(after, pairs) if pairs is not None else [],
    }


def headline(measured: Measured) -> list[str]:
    """State accuracy and preferred share, each with its change, in a sentence each."""
    accuracy = measured.after.figures["reward_accuracy"]
    text = f"Held-out reward accuracy: {accuracy} on {accuracy.count:,} {measured.after.item}s"
    lines = [text + _since(measured.before, measured.after, "reward_accuracy") + "."]
    samples = measured.samples_after
    if samples is not None and "preferred" in samples.figures:
        preferred = samples.figures["preferred"]
        text = f"Share of generated responses that the judge prefers: {preferred}"
        since = _since(measured.samples_before, samples, "preferred")
        lines.append(f"{text} of {preferred.count:,}{since}.")
    return lines


def _since(before: Measurement | None, after: Measurement, name: str) -> str:
    if before is None or name not in before.figures:
        return ""
    old, moved = before.figures[name].value, change(before, after, name)
    if old is None or moved.value is None:
        return ""
    return f", {short(old)} before: {_signed(moved)}"


def most_wrong(
    held_out: HeldOut, pairs: Sequence[Record], count: int = WRONG_SHOWN
) -> list[dict[str, JSON]]:
    """Return the pairs on which policy and people disagree most. Their labels may be wrong.

    Args:
        held_out: the figures.
        pairs: the pairs before tokenization.
        count: the largest number of pairs to return.

    Returns:
        `{"prompt", "chosen", "rejected", "probability", "margin", "id", "annotator", "group"}`
        each, the worst first; `probability` is the policy's P(chosen). Of rated responses,
        `response` and `rating` stand in place of the two.

    Raises:
        InputError: there are fewer pairs than were measured.

    Example:
        >>> from dpo_keras.evaluation.held_out_figures import NEEDED_COLUMNS
        >>> from dpo_keras.preferences import PreferencePair
        >>> columns = {name: np.zeros(2) for name in NEEDED_COLUMNS}
        >>> columns |= {"preference": np.ones(2), "weight": np.ones(2), "source": np.arange(2)}
        >>> columns |= {"chosen_reward": np.array([1.0, -1.0])}
        >>> from dpo_keras.preferences import PreferencePair
        >>> pairs = [PreferencePair("Hi", "Hello!", "Bye.", id=name) for name in "ab"]
        >>> rows = most_wrong(HeldOut(columns), pairs)
        >>> [(row["id"], round(row["probability"], 3)) for row in rows]
        [('b', 0.269)]
    """
    source = held_out.pairs["source"].astype(np.int64)
    if len(source) and int(source.max()) >= len(pairs):
        rule = (
            f"must be the pairs that were tokenized and measured: there are {len(pairs)} of "
            f"them, and pair {int(source.max())} was measured"
        )
        raise InputError(InputProblem("pairs", rule))
    margin = np.sign(held_out.pairs["preference"] - 0.5) * held_out.reward_margin
    wrong = np.flatnonzero((margin < 0) & (held_out.decided > 0))
    rows = []
    for row in wrong[np.argsort(margin[wrong], kind="stable")][:count]:
        pair = pairs[int(source[row])]
        llr = float(held_out.reward_margin[row])
        probability = float(0.5 * (1 + np.tanh(llr / 2)))  # sigmoid without overflow
        names = ("chosen", "rejected") if len(pair.responses) > 1 else ("response",)
        texts = {"prompt": plain_text(pair.prompt)}
        texts |= {n: plain_text(text) for n, text in zip(names, pair.responses, strict=True)}
        if isinstance(pair, RatedResponse):
            texts["rating"] = f"{pair.desirable:g}"
        about = {n: getattr(pair, n) for n in ("id", "annotator", "group")}
        rows.append({**texts, "probability": probability, "margin": llr, **about})
    return rows


def _held_out_rows(after: HeldOut, before: HeldOut | None) -> list[dict[str, str]]:
    penalties = {
        name: (f"Penalty {name.partition('/')[2]}", "its weight included")
        for name in after.figures
        if name.startswith("penalty/")
    }
    shown = {name: figure for name, figure in after.figures.items() if name not in _HIDDEN}
    return _compared_rows({**_LABELS["held_out"], **penalties}, shown, before, after)


def _sample_rows(measured: Measured) -> list[dict[str, str]]:
    after = measured.samples_after
    if after is None:
        return []
    known = _LABELS["samples"]
    parts = [name for name in after.figures if name not in known]
    verdict = {name: (f"… {name.replace('_', ' ')}", "") for name in parts}
    labels = {"preferred": known["preferred"], **verdict, **known}
    return _compared_rows(labels, after.figures, measured.samples_before, after)


def _compared_rows(
    labels: Mapping[str, tuple[str, str]],
    shown: Mapping[str, Estimate],
    before: Measurement | None,
    after: Measurement,
) -> list[dict[str, str]]:
    if before is None:
        return _rows(labels, shown)
    changes = {name: change(before, after, name) for name in shown}
    return _rows(labels, shown, before.figures, changes if _comparable(before, after) else None)


def _rows(
    labels: Mapping[str, tuple[str, str]],
    after: Mapping[str, Estimate],
    before: Mapping[str, Estimate] | None = None,
    changes: Mapping[str, Estimate] | None = None,
) -> list[dict[str, str]]:
    known = [name for name in labels if name in after]
    rows = []
    for name in [*known, *(name for name in after if name not in known)]:
        label, meaning = labels.get(name, (name, ""))
        row = {"name": name, "label": label, "meaning": meaning, "after": str(after[name])}
        if before is not None:
            row["before"] = str(before.get(name, undefined("not measured")))
        if changes is not None:
            row["change"] = _signed(changes[name])
        rows.append(row)
    return rows


def _comparable(before: Measurement | None, after: Measurement) -> bool:
    return before is not None and not after.difference_from(before)


def _signed(figure: Estimate) -> str:
    text = str(figure)
    return f"+{text}" if figure.value is not None and figure.value >= 0 else text
