"""The plots of held-out pairs: reliability and margins."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from dpo_keras.evaluation.canvas import FAINT, INK, TRAIN, legend_above, save_plot
from dpo_keras.evaluation.pair_figures import HeldOut


def reliability(after: HeldOut, before: HeldOut | None, path: pathlib.Path) -> bool:
    """Draws how often people agree with the model, by how sure it is.

    Args:
        after: the policy.
        before: an earlier one, drawn beside it; or None.
        path: a PNG file.

    Returns:
        False where calibration is undefined.
    """
    if after.calibration.agreement.value is None:
        return False

    def draw(figure: Any) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        ideal = {"color": INK, "linestyle": ":", "linewidth": 1, "zorder": 1}
        top.plot([0.5, 1], [0.5, 1], label="as often as it is sure", **ideal)
        _reliability_of(top, bottom, before, FAINT, "before", 0)
        _reliability_of(top, bottom, after, TRAIN, "after" if before is not None else "policy", 1)
        error = after.calibration.expected_calibration_error.value
        top.set_title(f"Reliability of P(chosen): calibration error {error:.3f}")
        top.set_ylabel("people agree")
        lowest = min(
            [0.5] + [b.agreement.low for b in after.calibration.bins if b.agreement.low is not None]
        )
        top.set_ylim(max(0.0, lowest - 0.03), 1.02)
        top.set_xlim(0.495, 1.005)
        bottom.set_ylabel("share of pairs")
        bottom.set_xlabel("the model's confidence, max(P, 1 − P)")
        bottom.set_ylim(0, None)
        legend_above(figure, top)

    save_plot(path, (5.2, 5.4), draw)
    return True


def margins(after: HeldOut, before: HeldOut | None, path: pathlib.Path) -> bool:
    """Draws the distribution of reward margins.

    Args:
        after: the policy.
        before: an earlier one, drawn beside it; or None.
        path: a PNG file.

    Returns:
        False where margins are not finite or no pair has weight.
    """
    found = {"after": _finite_margins(after), "before": _finite_margins(before)}
    if not len(found["after"]):
        return False
    spread = {name: v for name, v in found.items() if len(v) and np.ptp(v) > 1e-6}
    pooled = np.concatenate([*spread.values(), [0.0]])
    low, high = np.quantile(pooled, [0.002, 0.998])
    bins = min(40, max(8, int(2 * len(found["after"]) ** 0.5)))
    width = (high - low) / bins or 0.05
    # No bin reaches across 0: on its two sides are right and wrong.
    edges = np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width

    def draw(figure: Any) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for name, colour in (("before", FAINT), ("after", TRAIN)):
            values = found[name]
            accuracy = (before if name == "before" and before is not None else after).figures[
                "reward_accuracy"
            ]
            label = f"{name}: {accuracy.value:.1%} right" if accuracy.value is not None else name
            if name in spread:
                shares = np.full(len(values), 1 / len(values))
                axes.hist(
                    np.clip(values, edges[0], edges[-1]),
                    edges,
                    weights=shares,
                    color=colour,
                    alpha=0.55,
                    label=label,
                )
            elif len(values):
                axes.axvline(
                    values[0],
                    color=colour,
                    linewidth=3,
                    label=f"{name}: all pairs at {values[0]:.3g}",
                )
        axes.set_title("Reward margin of held-out pairs")
        axes.set_xlabel("S(chosen) − S(rejected), nats; right of 0 the policy agrees with people")
        axes.set_ylabel("share of pairs")
        legend_above(figure, axes)

    save_plot(path, (6.4, 3.6), draw)
    return True


def _reliability_of(
    top: Any, bottom: Any, held_out: HeldOut | None, colour: str, label: str, place: int
) -> None:
    if held_out is None or held_out.calibration.agreement.value is None:
        return
    bins = held_out.calibration.bins
    width = (bins[0].high - bins[0].low) / 2
    # Two policies stand side by side within a bin.
    left = np.array([b.low + place * width for b in bins])
    bottom.bar(left, [b.weight for b in bins], width * 0.92, align="edge", color=colour)
    full = [b for b in bins if b.confidence.value is not None]
    x = np.array([b.confidence.value for b in full], np.float64)
    y = np.array([b.agreement.value for b in full], np.float64)
    reach = np.array([[b.agreement.low, b.agreement.high] for b in full], np.float64).T
    errors = np.abs(reach - y)
    top.errorbar(
        x,
        y,
        errors,
        color=colour,
        marker="o",
        markersize=4.5,
        linewidth=1.4,
        elinewidth=0.9,
        label=label,
        zorder=2 + place,
    )


def _finite_margins(held_out: HeldOut | None) -> np.ndarray:
    if held_out is None or held_out.figures["reward_margin"].value is None:
        return np.zeros(0)
    # Seen from what people prefer, so that right of 0 is always right.
    side = np.where(held_out.pairs["preference"] < 0.5, -1.0, 1.0)
    return (side * held_out.reward_margin)[held_out.pairs["weight"] > 0]
