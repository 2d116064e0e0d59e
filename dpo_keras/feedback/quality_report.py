"""The quality of a round for people to read: tables for the terminal, HTML with plots, JSON."""

from __future__ import annotations

import base64
import io
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from dpo_keras.errors import InputError
from dpo_keras.feedback.annotator_quality import Person
from dpo_keras.feedback.estimate import Estimate
from dpo_keras.feedback.quality import NAMES, Quality

# Control characters, and marks that reorder the text around them: a name must not act.
_UNSAFE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Section:
    """One table of a report.

    Args:
        key: names its plot.
        title: of the section.
        columns: headings.
        rows: cells, as text.
        note: what is to be known to read it.
    """

    key: str
    title: str
    columns: tuple[str, ...]
    rows: list[tuple[str, ...]]
    note: str = ""


def headline(quality: Quality) -> str:
    """The round in one sentence.

    Args:
        quality: from `assess`.
    """
    counts = quality.counts
    return (
        f"{counts['judgements']:,} judgements of {counts['judged_pairs']:,} of "
        f"{counts['pairs']:,} pairs; {counts['skips']:,} skips, "
        f"{counts['checks']:,} hidden checks, {counts['repeats']:,} repeats."
    )


def sections(quality: Quality) -> list[Section]:
    """A report's tables.

    Args:
        quality: from `assess`.
    """
    figures = [(NAMES[name], one) for name, one in quality.agreement.items()]
    figures += [
        ("Contradicted pairs", quality.contradicted),
        ("Prompts with cycles", quality.cycles),
    ]
    policies = quality.strengths["policies"]
    ranked = sorted(policies.items(), key=lambda item: -(item[1].value or 0.0))
    return [
        Section(
            "agreement",
            "Agreement",
            ("figure", "value (95 % interval)", "over"),
            [(name, str(one), _of(one.count, name)) for name, one in figures],
            "Labels are first, second, tie and both bad. Intervals resample pairs.",
        ),
        Section(
            "people",
            "Annotators",
            ("name", "group", "judged", "skipped", "seconds", "agreement", "accuracy", "left",
             "longer", "checks", "repeats"),
            [_person(person) for person in quality.people],
            "Accuracy is Dawid and Skene's. Left and longer: share of decided judgements that went "
            "to the left, and to the longer response; p tests them (binomial, Holm's correction). "
            "Checks have a known answer; repeats are pairs that were shown twice.",
        ),
        Section(
            "policies",
            "Policies",
            ("policy", "strength (95 % interval)", "comparisons"),
            [(_clean(name), str(one), f"{one.count:,}") for name, one in ranked],
            "Bradley-Terry: P(A beats B) = 1 / (1 + exp(B - A)); a tie is half a win for each. "
            "Intervals resample prompts." if ranked else "The candidates do not name their makers.",
        ),
        Section(
            "labels",
            "Answers",
            ("answer", "count"),
            [(name, f"{count:,}") for name, count in quality.labels.items()],
        ),
    ]  # fmt: skip


def text(quality: Quality) -> str:
    """The report as plain text.

    Args:
        quality: from `assess`.
    """
    lines = [headline(quality)]
    lines += [f"! {_clean(finding)}" for finding in quality.findings()]
    for section in sections(quality):
        lines += ["", section.title]
        table = [section.columns, *section.rows] if section.rows else []
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        for row in table:
            cells = (cell.ljust(width) for cell, width in zip(row, widths, strict=True))
            lines.append("  " + "  ".join(cells).rstrip())
        if not section.rows:
            lines.append("  nothing yet" if section.key == "people" else f"  {section.note}")
    return "\n".join(lines)


def html(quality: Quality, *, plots: bool = True) -> str:
    """The report as one HTML document, plots and all.

    Args:
        quality: from `assess`.
        plots: draw them; this takes matplotlib.

    Raises:
        InputError: matplotlib is not there.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template("report.html.jinja").render(
        headline=headline(quality),
        findings=[_clean(finding) for finding in quality.findings()],
        sections=sections(quality),
        plots=_plots(quality) if plots else {},
    )


def write(quality: Quality, path: str | os.PathLike[str], *, plots: bool = True) -> None:
    """Writes the report; the suffix says how: .html, .json or .txt.

    Args:
        quality: from `assess`.
        path: the file.
        plots: draw them into HTML.

    Raises:
        InputError: another suffix, or the file cannot be written.
    """
    path = Path(path)
    made: dict[str, Callable[[], str]] = {
        ".html": lambda: html(quality, plots=plots),
        ".json": lambda: json.dumps(quality.as_dict(), indent=1, allow_nan=False) + "\n",
        ".txt": lambda: text(quality) + "\n",
    }
    if path.suffix not in made:
        raise InputError(f"output must end in .html, .json or .txt, got {str(path)!r}.")
    content = made[path.suffix]()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    except OSError as error:
        raise InputError(f"{path} cannot be written: {error.strerror}.") from error


def _person(person: Person) -> tuple[str, ...]:
    def rate(one: Estimate, p: float | None = None) -> str:
        if one.value is None:
            return "-"
        return f"{one.value:.0%}" + ("" if p is None or p >= 0.01 else f" (p = {p:.1g})")

    seconds = person.seconds.value
    return (
        _clean(person.name),
        _clean(person.group or ""),
        f"{person.judged:,}",
        f"{person.skipped:,}",
        "-" if seconds is None else f"{seconds:.1f}",
        rate(person.agreement),
        rate(person.accuracy),
        rate(person.left, person.left_p),
        rate(person.longer, person.longer_p),
        rate(person.gold),
        rate(person.repeats),
    )


def _of(count: int, name: str) -> str:
    return f"{count:,} {'prompts' if 'cycles' in name else 'pairs'}" if count else ""


def _clean(words: str) -> str:
    return _UNSAFE.sub("\ufffd", words)


def _plots(quality: Quality) -> dict[str, str]:
    found = {
        "agreement": [(NAMES[n], e) for n, e in quality.agreement.items()],
        "policies": list(quality.strengths["policies"].items()),
        "people": [(person.name, person.agreement) for person in quality.people],
    }
    titles = {
        "agreement": "agreement; 1 is perfect, kappas and alpha are 0 by chance",
        "policies": "Bradley-Terry strength",
        "people": "agreement with others",
    }
    return {
        key: _interval_plot(known, titles[key])
        for key, rows in found.items()
        if (known := [(name, one) for name, one in rows if one.value is not None])
    }


def _interval_plot(rows: list[tuple[str, Estimate]], title: str) -> str:
    try:
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError(
            f"Plots need matplotlib, which cannot be imported ({error}): install it with "
            "`pip install 'dpo-keras[plots]'`, or leave them out with --no-plots."
        ) from error
    style: dict[str, Any] = {"axes.spines.top": False, "axes.spines.right": False, "font.size": 9}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.0, 0.8 + 0.32 * len(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots()
        for place, (_, one) in enumerate(reversed(rows)):
            if one.low is not None and one.high is not None:
                axes.plot([one.low, one.high], [place, place], color="#2b3036", linewidth=1.5)
            axes.plot([one.value or 0.0], [place], "o", color="#0072B2")
        # Dollars and the like in names are no formulas.
        names = [_clean(name).replace("$", r"\$")[:40] for name, _ in reversed(rows)]
        axes.set_yticks(range(len(rows)), names)
        axes.set_ylim(-0.6, len(rows) - 0.4)
        axes.grid(axis="x", color="#e6e9ec")
        axes.set_xlabel(title)
        file = io.BytesIO()
        figure.savefig(file, dpi=130, format="png")
    return base64.b64encode(file.getvalue()).decode("ascii")
