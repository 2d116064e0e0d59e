"""The report of a run: one page that tells whether the training worked, and how that is known."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dpo_keras.errors import InputError
from dpo_keras.evaluation.checks import Measured
from dpo_keras.evaluation.comparison import change, same_pairs
from dpo_keras.evaluation.content import report_content
from dpo_keras.evaluation.curves import training_curves
from dpo_keras.evaluation.findings import Finding, findings
from dpo_keras.evaluation.pair_figures import HeldOut
from dpo_keras.evaluation.plots import margins, reliability
from dpo_keras.evaluation.rendering import KINDS, as_json, render
from dpo_keras.evaluation.samples import Samples
from dpo_keras.evaluation.training_log import read_training_log
from dpo_keras.preferences import PreferencePair

_CAPTIONS = {
    "training_curves": "The training: each step, its running mean, and the held-out pairs.",
    "margins": "How far apart the policy scores the two responses of each held-out pair.",
    "reliability": "How often people agree with the policy, by how sure it is. Above the line it "
    "is right more often than it says. Bars: 95 % intervals.",
}


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote and found.

    Attributes:
        paths: files by name: `markdown`, `html`, `json`, and the plots that could be drawn.
        findings: what to know before trusting the result.
        notices: what could not be done, and why.
    """

    paths: dict[str, pathlib.Path]
    findings: list[Finding] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def write_report(
    directory: str | os.PathLike[str],
    after: HeldOut,
    *,
    before: HeldOut | None = None,
    samples_before: Samples | None = None,
    samples_after: Samples | None = None,
    metrics_jsonl: str | os.PathLike[str] | None = None,
    config_text: str | None = None,
    pairs: Sequence[PreferencePair] | None = None,
    title: str = "Preference training",
    details: Mapping[str, Any] | None = None,
    samples_shown: int = 8,
    plots: bool | None = None,
) -> Report:
    """Writes report.md, report.html (one file, nothing loaded from elsewhere) and report.json.

    Everything but `after` is optional; what is not given is left out. Texts of the policy and of
    the data are escaped: they may hold HTML, Markdown or control characters.

    Args:
        directory: made if it is not there; an earlier report in it is overwritten.
        after: held-out figures of the policy.
        before: of the policy before the training.
        samples_before: what the policy wrote before.
        samples_after: what it writes now.
        metrics_jsonl: the log that `callbacks.RunLog` wrote, for the training curves.
        config_text: the run's configuration.
        pairs: the pairs that were tokenized and measured, to print the most wrong ones.
        title: heading.
        details: names and values to print: data, versions, seeds.
        samples_shown: responses to print side by side, from the first on.
        plots: True draws them, False does not, None draws them where matplotlib is installed.

    Returns:
        The files, what was found, and what could not be done.

    Raises:
        InputError: `plots=True` without matplotlib; `metrics_jsonl` or `pairs` that do not fit.

    Example:
        >>> import tempfile, numpy as np
        >>> from dpo_keras.evaluation.pair_figures import _NEEDED
        >>> columns = {name: np.zeros(99) for name in _NEEDED}
        >>> columns |= {"preference": np.ones(99), "weight": np.ones(99), "prompt": np.arange(99)}
        >>> columns |= {"chosen_reward": np.linspace(-0.3, 1.0, 99)}
        >>> report = write_report(tempfile.mkdtemp(), HeldOut(columns), plots=False)
        >>> sorted(report.paths)
        ['html', 'json', 'markdown']
        >>> [finding.code for finding in report.findings]
        ['underconfident']
    """
    log = None if metrics_jsonl is None else read_training_log(metrics_jsonl)
    measured = Measured(after, before, samples_before, samples_after, log)
    notices = _notices(measured)
    found = findings(measured)
    folder = pathlib.Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {} if plots is False else _draw(folder, measured, notices if plots is None else None)
    content = report_content(
        measured,
        found,
        title=title,
        details=details or {},
        config_text=config_text,
        pairs=pairs,
        samples_shown=samples_shown,
        notices=notices,
    )
    paths = {kind: folder / f"report.{end}" for kind, end in KINDS.items()}
    for kind in ("markdown", "html"):
        text = render(kind, {**content, "plots": drawn, "captions": _CAPTIONS})
        paths[kind].write_text(text, encoding="utf-8")
    paths["json"].write_text(as_json(_plain(measured, content)), encoding="utf-8")
    for name in _CAPTIONS.keys() - drawn.keys():
        # Of an earlier report: it would speak of other figures.
        (folder / f"{name}.png").unlink(missing_ok=True)
    return Report({**paths, **drawn}, found, notices)


def _notices(measured: Measured) -> list[str]:
    notices = []
    before, log = measured.before, measured.log
    if before is not None and not same_pairs(before, measured.after):
        notices.append("The figures before are of other pairs than those after.")
    samples = (measured.samples_before, measured.samples_after)
    if (
        samples[0] is not None
        and samples[1] is not None
        and samples[0].prompts != samples[1].prompts
    ):
        notices.append("The responses before are to other prompts than those after.")
    if log is not None and log.unreadable:
        notices.append(f"{log.unreadable} lines of the training log could not be read.")
    return notices


def _draw(
    folder: pathlib.Path, measured: Measured, notices: list[str] | None
) -> dict[str, pathlib.Path]:
    """Draws what there is; without matplotlib an error, or a notice where those are kept."""
    after, before, log = measured.after, measured.before, measured.log
    plots: dict[str, Callable[[pathlib.Path], bool]] = {
        "training_curves": lambda path: log is not None and training_curves(log, path),
        "margins": lambda path: margins(after, before, path),
        "reliability": lambda path: reliability(after, before, path),
    }
    paths = {name: folder / f"{name}.png" for name in plots}
    try:
        return {name: path for name, path in paths.items() if plots[name](path)}
    except InputError as error:
        if notices is None:
            raise
        notices.append(f"No plots. {error}")
        return {}


def _plain(measured: Measured, content: dict[str, Any]) -> dict[str, Any]:
    """The figures for programs, unrounded."""
    both = {"before": measured.before, "after": measured.after}
    samples = {"before": measured.samples_before, "after": measured.samples_after}
    found: dict[str, Any] = {
        "title": content["title"],
        "findings": content["findings"],
        "held_out": {name: h.as_dict() for name, h in both.items() if h is not None},
        "samples": {name: s.as_dict() for name, s in samples.items() if s is not None},
        "changes": {},
        "most_wrong": content["wrong"],
        "details": content["details"],
        "config": content["config"],
        "notices": content["notices"],
    }
    pairs: list[tuple[Any, Any]] = [
        (measured.before, measured.after),
        (measured.samples_before, measured.samples_after),
    ]
    for before, after in pairs:
        if before is not None and after is not None:
            changes = {name: change(before, after, name).as_dict() for name in after.figures}
            found["changes"].update(changes)
    return found
