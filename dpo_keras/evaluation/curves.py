"""The course of a training, from its log."""

from __future__ import annotations

import pathlib
from typing import Any

import numpy as np

from dpo_keras.evaluation.canvas import CHOSEN, INK, REJECTED, TRAIN, save_plot
from dpo_keras.evaluation.training_log import TrainingLog

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
