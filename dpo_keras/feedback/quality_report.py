"""The quality of a round for people to read: plain text, HTML with plots, or JSON."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.annotator_quality import AnnotatorQuality, p_value
from dpo_keras.feedback.quality import NAMES, Quality
from dpo_keras.utils.atomic_files import write_text
from dpo_keras.utils.intervals import Estimate
from dpo_keras.utils.reports import INK, TRAIN, Plot, report_style, svg_address
from dpo_keras.utils.text import shortened, visible

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Section:
    """One table of a report."""

    key: str  # names the plot of the section
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""  # how to read the table

    def without_blanks(self) -> Section:
        """Return the section without the columns in which no row has a value."""
        kept = [
            number
            for number in range(len(self.columns))
            if any(row[number] not in ("", "-") for row in self.rows)
        ]
        columns = tuple(self.columns[number] for number in kept)
        return replace(
            self, columns=columns, rows=[tuple(row[number] for number in kept) for row in self.rows]
        )


def headline(quality: Quality) -> str:
    """Return the round in one sentence."""
    counts = quality.counts
    return (
        f"{counts['judgements']:,} judgements of {counts['judged_pairs']:,} of "
        f"{counts['pairs']:,} pairs; {counts['skips']:,} skips, "
        f"{counts['checks']:,} hidden checks, {counts['repeats']:,} repeats."
    )


_STRENGTHS = (
    "Bradley-Terry: P(A beats B) = 1 / (1 + exp(B - A)); a tie is half a win for each. "
    "Intervals resample prompts."
)


def sections(quality: Quality) -> list[Section]:
    """Return the tables of a report."""
    figures = [(NAMES[name], figure, "pairs") for name, figure in quality.agreement.items()]
    figures.append(("Contradicted pairs", quality.contradicted, "pairs"))
    figures.append(("Prompts with cycles", quality.cycles, "prompts"))
    strengths = quality.strengths.estimates
    ranking = sorted(strengths.items(), key=lambda item: -(item[1].value or 0.0))
    found = [
        Section(
            "agreement",
            "Agreement",
            ("figure", "value (95 % interval)", "over"),
            [
                (name, f"{figure:.2f}", f"{figure.count:,} {units}" if figure.count else "")
                for name, figure, units in figures
            ],
            "Labels are first, second, tie and both bad. Intervals resample pairs.",
        ),
        Section(
            "people",
            "Annotators",
            ("name", "kind", "group", "judged", "skipped", "seconds", "agreement", "accuracy",
             "left", "longer", "checks", "repeats"),
            [_annotator_row(person) for person in quality.people],
            "Accuracy is Dawid and Skene's. Left and longer: share of decided judgements that went "
            "to the left, and to the longer response. p tests left against half, and longer among "
            "the judgements that differ from the estimated label (binomial, Holm's correction). "
            "Checks have a known answer; repeats are pairs that were shown twice. Neither counts "
            "as judged.",
        ),
        Section(
            "policies",
            "Policies",
            ("policy", "strength (95 % interval)", "comparisons"),
            [
                (visible(name), f"{strength:.2f}", f"{strength.count:,}")
                for name, strength in ranking
            ],
            _STRENGTHS if ranking else "The candidates do not name their makers.",
        ),
        Section(
            "labels",
            "Answers",
            ("answer", "count"),
            [(name, f"{count:,}") for name, count in quality.labels.items()],
        ),
    ]  # fmt: skip
    return [section.without_blanks() for section in found]


def _annotator_row(person: AnnotatorQuality) -> tuple[str, ...]:
    def percent(estimate: Estimate, p: float | None = None) -> str:
        if estimate.value is None:
            return "-"
        return f"{estimate.value:.0%}" + ("" if p is None else f" ({p_value(p)})")

    seconds = person.seconds.value
    return (
        visible(person.name),
        "judge" if person.judge else "",
        visible(person.group or ""),
        f"{person.judged:,}",
        f"{person.skipped:,}",
        "-" if seconds is None else f"{seconds:.1f}",
        percent(person.agreement),
        percent(person.accuracy),
        percent(person.left, person.left_p),
        percent(person.longer, person.longer_p),
        percent(person.gold),
        percent(person.repeats),
    )


def text(quality: Quality) -> str:
    """Return the report as plain text."""
    lines = [headline(quality)]
    lines += [f"! {visible(finding)}" for finding in quality.findings()]
    for section in sections(quality):
        lines += ["", section.title]
        if not section.rows:
            lines.append("  nothing yet" if section.key == "people" else f"  {section.note}")
            continue
        table = [section.columns, *section.rows]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
    return "\n".join(lines)


def html(quality: Quality, *, plots: bool = True) -> str:
    """Return the report as one HTML document; its plots take matplotlib."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        headline=headline(quality),
        findings=[visible(finding) for finding in quality.findings()],
        sections=sections(quality),
        plots=_plots(quality) if plots else {},
        style=report_style(),
    )


def write(quality: Quality, path: str | os.PathLike[str], *, plots: bool = True) -> None:
    """Write the report to a file in the format of its suffix: .html, .json or .txt."""
    path = Path(path)
    formats: dict[str, Callable[[], str]] = {
        ".html": lambda: html(quality, plots=plots),
        ".json": lambda: json.dumps(quality.as_dict(), indent=1, allow_nan=False) + "\n",
        ".txt": lambda: text(quality) + "\n",
    }
    if path.suffix not in formats:
        raise InputError(InputProblem("output", "must end in .html, .json or .txt", str(path)))
    content = formats[path.suffix]()
    try:
        write_text(path, content)
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def _plots(quality: Quality) -> dict[str, str]:
    """Draw the plot of each section that has values, as the address of an SVG image."""
    agreement = {NAMES[name]: figure for name, figure in quality.agreement.items()}
    people = {person.name: person.agreement for person in quality.people}
    plots = {
        "agreement": _plot(agreement, "agreement; 1 is perfect", limit=1.0),
        "policies": _plot(quality.strengths.estimates, "Bradley-Terry strength"),
        "people": _plot(people, "agreement with others", limit=1.0),
    }
    without = "leave them out with --no-plots"
    return {key: svg_address(plot, without) for key, plot in plots.items() if plot is not None}


def _plot(estimates: dict[str, Estimate], title: str, limit: float | None = None) -> Plot | None:
    """Plot estimates with their intervals; None if none has a value.

    With a limit the axis goes from 0, or a negative value, to the limit.
    """
    known = [(name, one) for name, one in reversed(estimates.items()) if one.value is not None]
    if not known:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.subplots()
        for place, (_, estimate) in enumerate(known):
            if estimate.low is not None and estimate.high is not None:
                interval = [estimate.low, estimate.high]
                axes.plot(interval, [place, place], color=INK, linewidth=1.5)
            axes.plot([estimate.value or 0.0], [place], "o", color=TRAIN)
        # A dollar in a name does not begin a formula.
        names = [shortened(visible(name), 20).replace("$", r"\$") for name, _ in known]
        axes.set_yticks(range(len(known)), names)
        axes.set_ylim(-0.6, len(known) - 0.4)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel(title)
        if limit is not None:
            values = [v for _, one in known for v in (one.value, one.low) if v is not None]
            axes.set_xlim(min(0.0, *values) - 0.02, limit + 0.02)

    return Plot((3.6, 0.7 + 0.32 * len(known)), draw)
