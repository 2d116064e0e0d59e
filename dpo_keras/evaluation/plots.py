"""Style and canvas of all plots: matplotlib without pyplot, so no window system and no state."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.training_log import TrainingLog

# Okabe and Ito's colours, told apart by colour-blind readers and in grey.
TRAIN, CHOSEN, REJECTED, FAINT, INK = "#0072B2", "#009E73", "#D55E00", "#9aa4ad", "#2b3036"
_STYLE = {
    "font.size": 9,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#e6e9ec",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "legend.frameon": False,
    "legend.fontsize": 8,
}


def save_plot(path: pathlib.Path, size: tuple[float, float], draw: Callable[[Any], None]) -> None:
    """Draws a figure into a PNG file.

    Args:
        path: the file.
        size: width and height in inches; 150 dots each.
        draw: called with the empty `matplotlib.figure.Figure`.

    Raises:
        InputError: matplotlib is not there.
    """
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"Plots need matplotlib, which cannot be imported ({error}): install it with "
            "`pip install 'dpo-keras[plots]'`, or pass plots=False."
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        figure.savefig(path, dpi=150)


def legend_above(figure: Any, axes: Any) -> None:
    """Puts the legend of some axes above them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper right", ncols=len(labels))


Panel = tuple[str, list[tuple[str, str, str]], dict[str, Any]]
_PANELS: list[Panel] = [
    ("Loss", [("loss", "", TRAIN)], {}),
    ("Reward accuracy", [("reward_accuracy", "", TRAIN)], {"level": 0.5, "limits": (-0.02, 1.02)}),
    ("Reward margin (nats)", [("reward_margin", "", TRAIN)], {"level": 0.0}),
    (
        "Rewards (nats)",
        [("chosen_reward", "chosen", CHOSEN), ("rejected_reward", "rejected", REJECTED)],
        {"level": 0.0},
    ),
    (
        "Log-probs (nats a response)",
        [("chosen_logps", "chosen", CHOSEN), ("rejected_logps", "rejected", REJECTED)],
        {},
    ),
    ("KL to reference (estimate)", [("kl", "", TRAIN)], {}),
    ("Entropy (nats a token)", [("entropy", "", TRAIN)], {}),
    ("Gradient norm", [("grad_norm", "", TRAIN)], {"log": True}),
]


def training_curves(log: TrainingLog, path: pathlib.Path) -> bool:
    """Draws what was logged in training: each step, its running mean, and held-out values.

    Args:
        log: the log.
        path: a PNG file.

    Returns:
        False where there is nothing to draw (then no file is written).
    """
    penalties = [name for name in log.names if name.startswith("penalty/")]
    colours = [TRAIN, REJECTED, CHOSEN, INK]
    series = [
        (name, name.partition("/")[2], colours[i % len(colours)])
        for i, name in enumerate(penalties)
    ]
    panels = [*_PANELS, ("Penalties, weighted", series, {})]
    panels = [p for p in panels if any(len(log.curve(name)[0]) for name, _, _ in p[1])]
    if not panels:
        return False
    columns = 4 if len(panels) in (4, 7, 8) else min(3, len(panels))
    rows = -(-len(panels) // columns)

    def draw(figure: Any) -> None:
        grid = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for axes, (title, series, options) in zip(grid, panels, strict=False):
            _curves(axes, log, title, series, options)
        for axes in grid[len(panels) :]:
            axes.axis("off")
        for axes in grid[max(0, len(panels) - columns) : len(panels)]:
            axes.set_xlabel("step")
        _key(
            figure,
            _smooth(len(log.steps)),
            any(n.startswith("val_") for e in log.epochs for n in e),
        )

    save_plot(path, (3.4 * columns, 2.5 * rows + 0.4), draw)
    return True


def _curves(
    axes: Any,
    log: TrainingLog,
    title: str,
    series: list[tuple[str, str, str]],
    options: dict[str, Any],
) -> None:
    for name, label, colour in series:
        x, y = log.curve(name)
        y = np.where(np.isfinite(y), y, np.nan)
        if _smooth(len(y)):
            axes.plot(x, y, color=colour, alpha=0.25, linewidth=0.7)
        axes.plot(
            x, _running_mean(y) if _smooth(len(y)) else y, color=colour, linewidth=1.6, label=label
        )
        held_x, held_y = log.curve(f"val_{name}")
        axes.plot(held_x, held_y, "o", color=colour, markeredgecolor="white", markersize=6.5)
    if any(label for _, label, _ in series):
        axes.legend(loc="best", handlelength=1.2)
    if "level" in options:
        axes.axhline(options["level"], color=INK, linewidth=0.7, linestyle=":")
    if "limits" in options:
        axes.set_ylim(*options["limits"])
    axes.ticklabel_format(useOffset=False)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if options.get("log") and all((log.curve(name)[1] > 0).all() for name, _, _ in series):
        from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_title(title)


def _smooth(steps: int) -> bool:
    return steps >= 20


def _key(figure: Any, smooth: bool, held_out: bool) -> None:
    from matplotlib.lines import Line2D

    mean = Line2D(
        [], [], color=TRAIN, linewidth=1.6, label="running mean" if smooth else "each step"
    )
    handles = [mean]
    if smooth:
        faint: dict[str, Any] = {"color": TRAIN, "alpha": 0.35, "linewidth": 0.9}
        handles = [Line2D([], [], label="each step", **faint), mean]
    if held_out:
        dot: dict[str, Any] = {
            "marker": "o",
            "linestyle": "",
            "markeredgecolor": "white",
            "markersize": 7,
        }
        handles.append(Line2D([], [], color=TRAIN, label="held-out pairs", **dot))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles))


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Gaussian mean around each step, over about a twentieth of the run: it does not lag."""
    width = max(1.0, len(values) / 60)
    reach = np.arange(-int(3 * width), int(3 * width) + 1)
    kernel = np.exp(-0.5 * (reach / width) ** 2)
    finite = np.isfinite(values)
    ends = slice(len(reach) // 2, len(reach) // 2 + len(values))
    total = np.convolve(np.where(finite, values, 0.0), kernel)[ends]
    weight = np.convolve(finite.astype(np.float64), kernel)[ends]
    return np.where(finite, total / np.maximum(weight, 1e-12), np.nan)


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
