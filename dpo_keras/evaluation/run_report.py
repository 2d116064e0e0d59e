"""Reports as Markdown, HTML and JSON, in which foreign text can do nothing.

Responses and data may hold HTML, Markdown, or control characters for a terminal.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2

from dpo_keras.errors import InputError
from dpo_keras.evaluation.findings import Finding, Measured, findings
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.plots import margins, reliability, training_curves, training_panels
from dpo_keras.evaluation.report_content import report_content
from dpo_keras.evaluation.samples import Samples
from dpo_keras.evaluation.statistics import Measurement, change
from dpo_keras.preferences import Record
from dpo_keras.training.callbacks import read_training_log
from dpo_keras.utils import JSON
from dpo_keras.utils import text as texts
from dpo_keras.utils.atomic_files import write_text
from dpo_keras.utils.reports import Plot, report_style, save_png, svg_address

_TEMPLATES = Path(__file__).parent / "templates"
_SUFFIXES = {"markdown": "md", "html": "html", "json": "json"}
_LONGEST = 1200  # characters of one text of the policy or of the data
# Line feeds, tabs, and the joiners and marks of direction that Arabic, Hebrew, Persian and Indic
# texts and emoji need. Overrides of the direction are not among them.
_KEPT = "\n\t\u200c\u200d\u200e\u200f"
_CAPTIONS = {
    "training_curves": "Training curves. Faint: each step; strong: the running mean, or each step "
    "of a short run; dots: the held-out pairs.",
    "margins": "Difference of the scores of the two responses of each held-out pair: right of 0 "
    "the policy agrees with people.",
    "reliability": "Agreement of people with the policy, by its confidence. Above the line the "
    "policy is right more often than its confidence says. Bars: 95 % intervals. Bins of fewer "
    "than 5 pairs are merged with their neighbours.",
}


@dataclass(frozen=True)
class Report:
    """Result of `write_report`.

    Attributes:
        paths: files by name: `markdown`, `html`, `json`, and the plots that were drawn.
        findings: warnings and notes about the result.
        notices: what could not be done, and why.
    """

    paths: dict[str, Path]
    findings: list[Finding] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def write_report(  # noqa: PLR0913 - public: one argument for each part of a report
    directory: str | os.PathLike[str],
    after: HeldOut,
    *,
    before: HeldOut | None = None,
    samples_before: Samples | None = None,
    samples_after: Samples | None = None,
    metrics_jsonl: str | os.PathLike[str] | None = None,
    config_text: str | None = None,
    pairs: Sequence[Record] | None = None,
    title: str = "Preference training",
    details: Mapping[str, object] | None = None,
    samples_shown: int = 8,
    plots: bool | None = None,
    trained_on: int = 0,
) -> Report:
    """Write report.md, report.html (one file that loads nothing) and report.json.

    Everything but `after` is optional; the report omits what is not given. Foreign text is escaped.

    Args:
        directory: created if missing. An earlier report in it is overwritten.
        after: held-out figures of the policy.
        before: held-out figures of the policy before training.
        samples_before: samples of the policy before training.
        samples_after: samples of the policy.
        metrics_jsonl: the log that `callbacks.RunLog` wrote, for the training curves.
        config_text: the run's configuration.
        pairs: the pairs that were tokenized and measured, to print the most wrong ones.
        title: heading.
        details: names and values to print: data, versions, seeds.
        samples_shown: number of responses to print side by side, from the first on.
        plots: True draws them, False does not, None draws them if matplotlib is installed.
        trained_on: number of the pairs whose prompts the policy was trained on.

    Returns:
        The files, the findings, and what could not be done.

    Raises:
        InputError: `plots=True` without matplotlib; `metrics_jsonl` cannot be read; `pairs` are
            not those that were measured.

    Example:
        >>> import tempfile, numpy as np
        >>> from dpo_keras.evaluation.held_out_figures import NEEDED_COLUMNS
        >>> columns = {name: np.zeros(99) for name in NEEDED_COLUMNS}
        >>> columns |= {"preference": np.ones(99), "weight": np.ones(99), "prompt": np.arange(99)}
        >>> columns |= {"chosen_reward": np.linspace(-0.3, 1.0, 99)}
        >>> report = write_report(tempfile.mkdtemp(), HeldOut(columns), plots=False)
        >>> sorted(report.paths)
        ['html', 'json', 'markdown']
        >>> [finding.code for finding in report.findings]
        ['underconfident']
    """
    log = None if metrics_jsonl is None else read_training_log(metrics_jsonl)
    measured = Measured(after, before, samples_before, samples_after, log, trained_on)
    found, notices = findings(measured), _notices(measured)
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    drawn, images = _draw(folder, measured, plots, notices)
    content = {
        **report_content(measured, pairs, samples_shown),
        "title": title,
        "findings": [finding.as_dict() for finding in found],
        "details": {str(name): str(value) for name, value in (details or {}).items()},
        "config": config_text,
        "notices": notices,
    }
    paths = {kind: folder / f"report.{suffix}" for kind, suffix in _SUFFIXES.items()}
    filled = {**content, "plots": drawn, "images": images, "captions": _CAPTIONS}
    filled["style"] = report_style()
    write_text(paths["markdown"], _render("markdown", filled))
    write_text(paths["html"], _render("html", filled))
    write_text(paths["json"], as_json(_unrounded(measured, content)))
    for name in _CAPTIONS.keys() - drawn.keys():
        # A plot of an earlier report would show other figures.
        (folder / f"{name}.png").unlink(missing_ok=True)
    return Report({**paths, **drawn}, found, notices)


def _notices(measured: Measured) -> list[str]:
    notices = []
    before, log = measured.before, measured.log
    if before is not None and measured.after.difference_from(before):
        notices.append("The figures before are of other pairs than those after.")
    old, new = measured.samples_before, measured.samples_after
    if old is not None and new is not None and new.difference_from(old):
        notices.append("The responses before are to other prompts than those after.")
    if log is not None and log.unreadable:
        notices.append(f"{log.unreadable} lines of the training log could not be read.")
    return notices


def _draw(
    folder: Path, measured: Measured, wanted: bool | None, notices: list[str]
) -> tuple[dict[str, Path], dict[str, list[str]]]:
    """Draw PNG files for Markdown and addresses of SVG images for HTML, by the plot's name.

    Without matplotlib, add a notice, or raise if plots are wanted.
    """
    after, before, log = measured.after, measured.before, measured.log
    plots: dict[str, tuple[Plot | None, list[Plot]]] = {}
    if log is not None:
        plots["training_curves"] = (training_curves(log), training_panels(log))
    for name, plot in (
        ("margins", margins(after, before)),
        ("reliability", reliability(after, before)),
    ):
        plots[name] = (plot, [] if plot is None else [plot])
    paths: dict[str, Path] = {}
    images: dict[str, list[str]] = {}
    try:
        for name, (whole, panels) in plots.items():
            if whole is not None and wanted is not False:
                save_png(whole, folder / f"{name}.png")
                paths[name], images[name] = folder / f"{name}.png", [*map(svg_address, panels)]
    except InputError as error:
        if wanted:
            raise
        notices.append(f"No plots. {error}")
    return paths, images


def _unrounded(measured: Measured, content: Mapping[str, JSON]) -> dict[str, JSON]:
    """Return the figures for programs."""
    held_out = {"before": measured.before, "after": measured.after}
    samples = {"before": measured.samples_before, "after": measured.samples_after}

    def changes(before: Measurement | None, after: Measurement | None) -> dict[str, JSON]:
        if before is None or after is None:
            return {}
        return {name: change(before, after, name).as_dict() for name in after.figures}

    return {
        **{name: content[name] for name in ("title", "findings", "details", "config", "notices")},
        "held_out": {name: h.as_dict() for name, h in held_out.items() if h is not None},
        "samples": {name: s.as_dict() for name, s in samples.items() if s is not None},
        "changes": changes(**held_out) | changes(**samples),
        "most_wrong": content["wrong"],
    }


def _render(kind: str, content: Mapping[str, JSON]) -> str:
    """Fill the template of a kind, "markdown" or "html"."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=kind == "html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (visible, shown, cell, prose, fence)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(f"report.{_SUFFIXES[kind]}.jinja").render(content)


def as_json(content: Mapping[str, JSON]) -> str:
    """Return JSON text in which everything that is not printable is a JSON escape."""
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    # JSON escapes only the controls below 0x20. The result stays lossless.
    hidden = r"[\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]"
    return re.sub(hidden, lambda found: f"\\u{ord(found[0]):04x}", text)


def visible(text: object) -> str:
    """Return a text with escapes for the control characters that a terminal would obey."""
    return texts.visible(str(text).replace("\r\n", "\n"), keep=_KEPT)


def shown(text: object) -> str:
    """Return a visible text, cut in the middle if it is long."""
    found = visible(text)
    if len(found) <= _LONGEST:
        return found
    half = _LONGEST // 2
    return f"{found[:half]}\n[… {len(found) - 2 * half:,} characters left out …]\n{found[-half:]}"


def cell(text: object) -> str:
    """Return a text as one line of Markdown, or a cell of a table, without any markup."""
    return _escaped(" ".join(str(text).split()))


def prose(text: object) -> str:
    """Return a finding as Markdown: code in backticks stays code, all else is plain text."""
    parts = re.split(r"(`[^`]*`)", visible(text))
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def fence(text: object) -> str:
    """Return a text as a Markdown code block, in a fence longer than its runs of backticks."""
    found = visible(text)
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", found)), default=0))
    return f"{marks}text\n{found}\n{marks}"


def _escaped(text: str) -> str:
    # Without these characters there are no tags, emphasis, links, images, formulas, mentions,
    # entities, or bare addresses that some readers turn into links.
    text = re.sub(r"([\\`*_\[\]<>#|~!&$@])", r"\\\1", visible(text))
    return re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", text)
