"""`dpo-keras compare`: two versions of a policy by people's choices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from dpo_keras.app.console import AsJson, Debug, Force, check_output, reporting
from dpo_keras.utils.deferred_imports import Deferred
from dpo_keras.utils.reports import FAINT, TRAIN, Plot, save_png

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from dpo_keras.feedback.version_comparison import VersionComparison

views = Deferred("dpo_keras.app.views")


def compare(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="SOURCE", help="A feedback store, or a served policy's log (JSONL)."
        ),
    ],
    version: Annotated[
        list[str] | None,
        typer.Option(
            "--version",
            "-v",
            help="A label; each is compared with the first. Default: all, sorted.",
        ),
    ] = None,
    annotator: Annotated[
        list[str] | None,
        typer.Option(
            "--annotator", "-a", help="Of a store: whose judgements count. Default: everybody's."
        ),
    ] = None,
    alpha: Annotated[
        float, typer.Option(help="Chance of a false verdict, over all looks and comparisons.")
    ] = 0.05,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the intervals over time here, as PNG.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Say which version people choose more often; look as often as you like, it does not cheat."""
    with reporting(as_json, debug) as terminal:
        check_output(plot, force, "--plot")
        from dpo_keras.feedback.version_comparison import compare_versions, read_choices

        choices = read_choices(source, annotator or ())
        found = compare_versions(choices, version or (), alpha=alpha)
        if plot is not None:
            save_png(intervals_over_time(found), plot, without="leave out --plot")
        content = {
            "comparisons": [one.as_dict() for one in found],
            "left_out": dict(choices.left_out),
        }
        terminal.result(content, *views.comparison_views(found, choices.left_out))
        if plot is not None:
            terminal.say(f"The plot is in {plot}.")


def intervals_over_time(comparisons: list[VersionComparison]) -> Plot:
    """Return a plot of how often each version wins, with its interval after each choice."""

    def draw(figure: Figure) -> None:
        rows = figure.subplots(len(comparisons), squeeze=False)[:, 0]
        for axes, one in zip(rows, comparisons, strict=True):
            if one.looks:
                share, low, high = zip(*one.intervals, strict=True)
                axes.fill_between(one.looks, low, high, color=TRAIN, alpha=0.15, linewidth=0)
                axes.plot(one.looks, share, color=TRAIN)
            if one.decided_after is not None:
                axes.axvline(one.decided_after, color=FAINT, linestyle=":")
            axes.axhline(0.5, color=FAINT)
            axes.set(ylim=(0, 1), xlabel="choices", ylabel=f"wins of {one.version}")
            axes.set_title(f"{one.version} against {one.against}: {one.verdict}")

    return Plot((6.0, 2.8 * len(comparisons)), draw)
