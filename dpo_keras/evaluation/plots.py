"""The plots of a run's report. A function returns None where there is nothing to draw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dpo_keras.evaluation.calibration import Bin
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.training.callbacks import TrainingLog
from dpo_keras.utils.reports import CHOSEN, FAINT, INK, PAPER, REJECTED, TRAIN, Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def _legend_above(figure: Figure, axes: Axes) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))


class _Panel(NamedTuple):
    title: str
    series: list[tuple[str, str, str]]  # logged name, label, colour
    level: float | None = None
    limits: tuple[float, float] | None = None
    log: bool = False


_PANELS = [
    _Panel("Loss", [("loss", "", TRAIN)]),
    _Panel("Reward accuracy", [("reward_accuracy", "", TRAIN)], 0.5, (-0.02, 1.02)),
    _Panel("Reward margin (nats)", [("reward_margin", "", TRAIN)], 0.0),
    _Panel(
        "Rewards (nats)",
        [("chosen_reward", "chosen", CHOSEN), ("rejected_reward", "rejected", REJECTED)],
        0.0,
    ),
    _Panel(
        "Rewards (nats)",
        [("desirable_reward", "good", CHOSEN), ("undesirable_reward", "bad", REJECTED)],
        0.0,
    ),
    _Panel(
        "Log-probs (nats per response)",
        [("chosen_logps", "chosen", CHOSEN), ("rejected_logps", "rejected", REJECTED)],
    ),
    _Panel(
        "Log-probs (nats per response)",
        [("desirable_logps", "good", CHOSEN), ("undesirable_logps", "bad", REJECTED)],
    ),
    _Panel("KL to reference (estimate)", [("kl", "", TRAIN)]),
    _Panel("Entropy (nats per token)", [("entropy", "", TRAIN)]),
    _Panel("Gradient norm", [("grad_norm", "", TRAIN)], log=True),
]
_SMOOTHED = 20  # shorter curves have no running mean


_DRAWN = 1000  # a longer curve is drawn as the least and greatest of as many stretches of steps


def training_panels(log: TrainingLog) -> list[Plot]:
    """Return a plot for each logged quantity: each step, its running mean, and held-out values."""

    def plot(panel: _Panel) -> Plot:
        def draw(figure: Figure) -> None:
            axes = figure.subplots()
            _draw_panel(axes, log, panel)
            axes.set_xlabel("step")

        return Plot((2.8, 2.1), draw)

    return [plot(panel) for panel in _panels(log)]


def training_curves(log: TrainingLog) -> Plot | None:
    """Return the panels of `training_panels` as one plot, in rows without gaps."""
    panels = _panels(log)
    if not panels:
        return None
    columns = 4 if len(panels) in (4, 7, 8) else min(3, len(panels))
    rows = np.array_split(np.arange(len(panels)), -(-len(panels) // columns))

    def draw(figure: Figure) -> None:
        grid = figure.add_gridspec(len(rows), 12)
        for row, numbers in enumerate(rows):
            width = 12 // len(numbers)
            for place, number in enumerate(numbers):
                axes = figure.add_subplot(grid[row, place * width : (place + 1) * width])
                _draw_panel(axes, log, panels[number])
                if row == len(rows) - 1:
                    axes.set_xlabel("step")
        _curve_legend(figure, log)

    return Plot((3.4 * columns, 2.5 * len(rows) + 0.4), draw)


def _panels(log: TrainingLog) -> list[_Panel]:
    colours = [TRAIN, REJECTED, CHOSEN, INK]
    penalties = [
        (name, name.partition("/")[2], colours[number % len(colours)])
        for number, name in enumerate(n for n in log.names if n.startswith("penalty/"))
    ]
    return [
        panel
        for panel in [*_PANELS, _Panel("Penalties, weighted", penalties)]
        if any(len(log.curve(name)[0]) for name, _, _ in panel.series)
    ]


def _draw_panel(axes: Axes, log: TrainingLog, panel: _Panel) -> None:
    for name, label, colour in panel.series:
        x, y = log.curve(name)
        y = np.where(np.isfinite(y), y, np.nan)
        if len(y) >= _SMOOTHED:
            axes.plot(*_thinned(x, y), color=colour, alpha=0.25, linewidth=0.7)
            y = _running_mean(y)
        axes.plot(*_thinned(x, y), color=colour, linewidth=1.6, label=label)
        held_x, held_y = log.curve(f"val_{name}")
        axes.plot(held_x, held_y, "o", color=colour, markeredgecolor=PAPER, markersize=6.5)
    if any(label for _, label, _ in panel.series):
        axes.legend(loc="best", handlelength=1.2)
    if panel.level is not None:
        axes.axhline(panel.level, color=INK, linewidth=0.7, linestyle=":")
    if panel.limits is not None:
        axes.set_ylim(*panel.limits)
    axes.ticklabel_format(useOffset=False)
    axes.locator_params(axis="x", integer=True)
    if panel.log and all((log.curve(name)[1] > 0).all() for name, _, _ in panel.series):
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(panel.title)


def _curve_legend(figure: Figure, log: TrainingLog) -> None:
    from matplotlib.lines import Line2D

    step = Line2D([], [], color=TRAIN, alpha=0.35, linewidth=0.9, label="each step")
    line = Line2D([], [], color=TRAIN, linewidth=1.6, label="running mean")
    dot = Line2D([], [], color=TRAIN, linestyle="", marker="o", label="held-out pairs")
    dot.set(markersize=7, markeredgecolor=PAPER)
    handles = [step, line]
    if len(log.steps) < _SMOOTHED:
        line.set_label("each step")
        handles = [line]
    if any(name.startswith("val_") for epoch in log.epochs for name in epoch):
        handles.append(dot)
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keep the least and the greatest value of each stretch of steps, of a curve of many."""
    if len(y) <= 2 * _DRAWN:
        return x, y
    kept = []
    for stretch in np.array_split(np.arange(len(y)), _DRAWN):
        ranked = stretch[np.argsort(y[stretch])]  # NaN comes last
        ranked = ranked[np.isfinite(y[ranked])]
        kept += sorted({int(ranked[0]), int(ranked[-1])}) if len(ranked) else [int(stretch[0])]
    return x[kept], y[kept]


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Compute the Gaussian mean around each step, over about 1/20 of the run, without lag."""
    width = max(1.0, len(values) / 60)
    reach = np.arange(-int(3 * width), int(3 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    finite = np.isfinite(values)
    ends = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), kernel)[ends]
    weight = np.convolve(finite.astype(np.float64), kernel)[ends]
    return np.where(finite, total / np.maximum(weight, 1e-12), np.nan)


def reliability(after: HeldOut, before: HeldOut | None) -> Plot | None:
    """Plot how often people agree with the model, by its confidence."""
    if after.calibration.agreement.value is None:
        return None

    def draw(figure: Figure) -> None:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        ideal = {"color": INK, "linestyle": ":", "linewidth": 1, "zorder": 1}
        top.plot([0.5, 1], [0.5, 1], label="as sure as right", **ideal)
        _draw_bins(top, bottom, before, FAINT, "before", 0)
        _draw_bins(top, bottom, after, TRAIN, "after" if before is not None else "policy", 1)
        top.set_title("Reliability of P(chosen)")
        top.set_ylabel("people agree")
        top.set_ylim(-0.02, 1.02)
        top.set_xlim(0.495, 1.005)
        bottom.set_ylabel("share of pairs")
        bottom.set_xlabel("confidence, max(P, 1 − P)")
        bottom.set_ylim(0, None)
        _legend_above(figure, top)

    return Plot((3.8, 4.0), draw)


def _draw_bins(
    top: Axes, bottom: Axes, held_out: HeldOut | None, colour: str, label: str, place: int
) -> None:
    """Draw one policy's bins; `place` 0 is the left half of each bin, 1 the right half."""
    if held_out is None or held_out.calibration.agreement.value is None:
        return
    bins = held_out.calibration.bins
    width = (bins[0].high - bins[0].low) / 2
    left = np.array([b.low + place * width for b in bins])
    bottom.bar(left, [b.weight for b in bins], width * 0.92, align="edge", color=colour)
    full: list[Bin] = [
        b for b in held_out.calibration.merged_bins if b.confidence.value is not None
    ]
    x = np.array([b.confidence.value for b in full], np.float64)
    y = np.array([b.agreement.value for b in full], np.float64)
    ends = np.array([[b.agreement.low, b.agreement.high] for b in full], np.float64).T
    style: dict[str, Any] = {"marker": "o", "markersize": 4.5, "linewidth": 1.4, "elinewidth": 0.9}
    top.errorbar(x, y, np.abs(ends - y), color=colour, label=label, zorder=2 + place, **style)


def margins(after: HeldOut, before: HeldOut | None) -> Plot | None:
    """Plot the distribution of reward margins, positive where the policy agrees with people."""
    found = {"after": _finite_margins(after), "before": _finite_margins(before)}
    if not len(found["after"]):
        return None
    spread = {name: v for name, v in found.items() if len(v) and np.ptp(v) > 1e-6}
    low, high = np.quantile(np.concatenate([*spread.values(), [0.0]]), [0.002, 0.998])
    bins = min(40, max(8, int(2 * len(found["after"]) ** 0.5)))
    width = (high - low) / bins or 0.05
    # No bin contains both signs: below 0 the policy is wrong, above 0 it is right.
    edges = (np.arange(np.floor(low / width), np.ceil(high / width) + 1) * width).tolist()

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axvline(0, color=INK, linewidth=0.8)
        for name, held_out, colour in (("before", before, FAINT), ("after", after, TRAIN)):
            values = found[name]
            if held_out is None or not len(values):
                continue
            accuracy = held_out.figures["reward_accuracy"].value
            label = name if accuracy is None else f"{name}: {accuracy:.1%} right"
            if name in spread:
                shares = np.full(len(values), 1 / len(values))
                inside = np.clip(values, edges[0], edges[-1])
                style: dict[str, Any] = {"color": colour, "alpha": 0.55, "label": label}
                axes.hist(inside, edges, weights=shares, **style)
            else:
                label = f"{name}: all pairs at {values[0]:.3g}"
                axes.axvline(values[0], color=colour, linewidth=3, label=label)
        rated = after.item != "pair"
        axes.set_title(f"Reward margin of held-out {after.item}s")
        axes.set_xlabel(
            "reward less reference point, nats" if rated else "S(chosen) − S(rejected), nats"
        )
        axes.set_ylabel(f"share of {after.item}s")
        _legend_above(figure, axes)

    return Plot((4.0, 2.8), draw)


def _finite_margins(held_out: HeldOut | None) -> np.ndarray:
    if held_out is None or held_out.figures["reward_margin"].value is None:
        return np.zeros(0)
    # The sign is that of people's preference, so that positive always means right.
    side = np.where(held_out.pairs["preference"] < 0.5, -1.0, 1.0)
    return (side * held_out.reward_margin)[held_out.pairs["weight"] > 0]
