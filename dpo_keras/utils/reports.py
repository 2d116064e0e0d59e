"""What the reports of runs and of feedback share: their style, and plots for light and dark.

Plots are drawn by matplotlib without pyplot: no window system, no global state.
"""

from __future__ import annotations

import base64
import importlib.resources
import io
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_keras.errors import InputError
from dpo_keras.utils.atomic_files import replaced

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The colours of Okabe and Ito: distinct for colour-blind readers and in grey.
TRAIN, CHOSEN, REJECTED, FAINT, INK = "#0072b2", "#009e73", "#d55e00", "#9aa4ad", "#2b3036"
GRID, PAPER = "#e6e9ec", "#ffffff"
# What each colour becomes on a dark page.
_DARK = {
    **{TRAIN: "#56b4e9", CHOSEN: "#3ecf9b", REJECTED: "#ff9d5c"},
    **{FAINT: "#7b8794", INK: "#d7dde3", GRID: "#2a323a", PAPER: "#14181c"},
}
_STYLE: dict[str, Any] = {
    **{"font.size": 9, "axes.titlesize": 10, "legend.fontsize": 8, "svg.fonttype": "none"},
    **{"axes.titleweight": "bold", "axes.titlelocation": "left", "svg.hashsalt": "dpo_keras"},
    **{"axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": FAINT},
    **{"axes.grid": True, "axes.axisbelow": True, "grid.color": GRID, "legend.frameon": False},
    **dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK),
    **dict.fromkeys(("xtick.labelsize", "ytick.labelsize"), 8),
}


class Plot(NamedTuple):
    """A plot that is yet to be drawn."""

    size: tuple[float, float]  # inches
    draw: Callable[[Figure], None]


@cache
def report_style() -> str:
    """Return the CSS of reports."""
    return importlib.resources.files(__package__).joinpath("report.css").read_text("utf-8")


def save_png(plot: Plot, path: Path, without: str = "pass plots=False") -> None:
    """Draw a plot and save it as PNG, 150 dots per inch.

    `without` says how to do without plots, for the error if matplotlib is missing.
    """
    with replaced(path) as partial:
        _save(plot, partial, without, format="png", dpi=150)


def svg_address(plot: Plot, without: str = "pass plots=False") -> str:
    """Draw a plot as SVG that follows the light or dark of its page; return its `data:` address."""
    file = io.BytesIO()
    unsigned = {"Date": None, "Creator": None, "Format": None, "Type": None}
    _save(plot, file, without, format="svg", transparent=True, metadata=unsigned)
    text = file.getvalue().decode("utf-8")
    light, dark = [], []
    for number, (colour, on_dark) in enumerate(_DARK.items()):
        text = text.replace(colour, f"var(--c{number})")
        light.append(f"--c{number}:{colour}")
        dark.append(f"--c{number}:{on_dark}")
    style = (
        f":root{{{';'.join(light)}}}@media(prefers-color-scheme:dark){{:root{{{';'.join(dark)}}}}}"
    )
    text = text.replace("<defs>", f"<style>{style}</style><defs>", 1)
    # The reader's own font; matplotlib's is that of the machine which drew.
    text = re.sub(r"(font: [^;']*px |font-family: )'[^;]*;", r"\1system-ui, sans-serif;", text)
    return "data:image/svg+xml;base64," + base64.b64encode(text.encode()).decode("ascii")


def _save(plot: Plot, target: Path | io.BytesIO, without: str, **options: Any) -> None:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"Plots need matplotlib, which cannot be imported ({error}): install it with "
            f"`pip install 'dpo-keras[plots]'`, or {without}."
        ) from error
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=plot.size, layout="constrained")
        FigureCanvasAgg(figure)
        plot.draw(figure)
        figure.savefig(target, **options)
