"""Style and canvas of all plots: matplotlib without pyplot, so no window system and no state."""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

from dpo_keras.errors import InputError

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
