"""The report of an improvement: its rounds as a table and a plot, in HTML, JSON and PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import jinja2

from dpo_keras.app.improvement import Improvement
from dpo_keras.app.run_directory import versions
from dpo_keras.errors import InputError
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text
from dpo_keras.utils.intervals import Estimate
from dpo_keras.utils.reports import CHOSEN, INK, TRAIN, Plot, report_style, save_png, svg_address
from dpo_keras.utils.text import visible

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


class _Figure(NamedTuple):
    name: str
    title: str
    format: str
    level: float | None = None  # of a line to compare with
    share: bool = True


FIGURES = (
    _Figure("good", "Good replies", ".3f"),
    _Figure("wins", "Wins over round 0", ".3f", 0.5),
    _Figure("reward_accuracy", "Reward accuracy", ".3f", 0.5),
    _Figure("kl", "KL to round 0 (nats)", ".2f", 0.0, share=False),
    _Figure("tokens", "Length (tokens)", ".1f", share=False),
)
COLUMNS = ("round", *(one.title for one in FIGURES), "judgements", "in all", "pairs trained on")
_NOTE = (
    "Figures are of held-out prompts, with 95 % intervals. Good replies: by the data's ground "
    "truth. Wins: responses that the judge prefers to those of round 0; a tie is half a win. "
    "Reward accuracy: of the held-out pairs, by scores against round 0. KL: mean of "
    "log π(y) − log π₀(y) over the policy's responses. Judgements: those that the training took, "
    "without the comparisons for the wins."
)


def write_rounds(improvement: Improvement, rounds: Sequence[Mapping[str, JSON]]) -> dict[str, str]:
    """Write report.html, report.json and rounds.png; return their paths by kind."""
    folder, config = improvement.path, improvement.config
    judge = "people" if improvement.judge is None else improvement.judge.name
    paths = {"html": folder / "report.html", "json": folder / "report.json"}
    plot = rounds_plot(rounds)
    picture = ""
    try:
        picture = svg_address(plot)
        paths["plot"] = folder / "rounds.png"
        save_png(plot, paths["plot"])
    except InputError as error:  # without matplotlib
        improvement.progress.note(f"No plot. {error}")
    details = {
        "judge": judge,
        "selection": config.feedback.selection,
        "reference": improvement.settings.reference,
        "data": ", ".join(config.data.path or ()),
        **versions(),
    }
    page = _environment().get_template("rounds.html.jinja")
    text = page.render(
        title=f"{config.name}: {len(rounds) - 1} rounds",
        columns=COLUMNS,
        rows=[row(one, before) for one, before in zip(rounds, [None, *rounds], strict=False)],
        note=_NOTE,
        picture=picture,
        details={name: visible(str(value)) for name, value in details.items()},
        config=visible(config.resolved(), keep="\n"),
        style=report_style(),
    )
    write_text(paths["html"], text)
    from dpo_keras.evaluation.run_report import as_json

    write_text(paths["json"], as_json({"rounds": list(rounds), "details": details}))
    return {kind: str(path) for kind, path in paths.items()}


def row(this: Mapping[str, JSON], before: Mapping[str, JSON] | None) -> list[str]:
    """Return a round's cells, in the order of the columns."""
    figures = {name: Estimate.from_dict(one) for name, one in this["figures"].items()}
    cells = [
        "-" if figures[one.name].value is None else format(figures[one.name], one.format)
        for one in FIGURES
    ]
    spent = this["judgements"] - (before["judgements"] if before else 0)
    return [
        str(this["round"]),
        *cells,
        *(f"{n:,}" for n in (spent, this["judgements"], this["pairs"])),
    ]


def rounds_plot(rounds: Sequence[Mapping[str, JSON]]) -> Plot:
    """Plot each figure that was measured, and the judgements, over the rounds."""
    shown = [
        one for one in FIGURES if any(r["figures"][one.name]["value"] is not None for r in rounds)
    ]

    def draw(figure: Figure) -> None:
        panels = figure.subplots(2, 3).flat
        for axes, one in zip(panels, shown, strict=False):
            _draw_figure(axes, rounds, one)
        axes = figure.axes[len(shown)]
        axes.bar([r["round"] for r in rounds], [r["judgements"] for r in rounds], color=CHOSEN)
        axes.set_title("Judgements in all")
        axes.grid(visible=False, axis="x")
        for axes in figure.axes[len(shown) + 1 :]:
            axes.set_visible(False)
        for axes in figure.axes:
            axes.set_xticks([r["round"] for r in rounds])
            axes.set_xlim(-0.5, len(rounds) - 0.5)
            axes.set_xlabel("round")

    return Plot((8.4, 4.8), draw)


def _draw_figure(axes: Axes, rounds: Sequence[Mapping[str, JSON]], one: _Figure) -> None:
    found = [(r["round"], Estimate.from_dict(r["figures"][one.name])) for r in rounds]
    known = [(number, figure) for number, figure in found if figure.value is not None]
    if one.level is not None:
        axes.axhline(one.level, color=INK, linewidth=0.7, linestyle=":")
    axes.plot([n for n, _ in known], [f.value or 0.0 for _, f in known], "o-", color=TRAIN)
    for number, figure in known:
        if figure.low is not None and figure.high is not None:
            axes.plot([number] * 2, [figure.low, figure.high], color=TRAIN, linewidth=1.2)
    if one.share:
        axes.set_ylim(-0.02, 1.02)
    axes.set_title(one.title)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
