"""From a report's content to text: Markdown and HTML through templates, JSON; nothing gets through.

Texts of the policy and of the data may hold HTML, Markdown, or control characters for a terminal.
"""

from __future__ import annotations

import base64
import json
import os
import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import jinja2

from dpo_keras.errors import InputError
from dpo_keras.evaluation.before_after import change, same_pairs
from dpo_keras.evaluation.findings import Finding, Measured, findings
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.plots import margins, reliability, training_curves
from dpo_keras.evaluation.report_content import report_content
from dpo_keras.evaluation.samples import Samples
from dpo_keras.evaluation.training_log import read_training_log
from dpo_keras.preferences import PreferencePair

_TEMPLATES = pathlib.Path(__file__).parent / "templates"
KINDS = {"markdown": "md", "html": "html", "json": "json"}
LONGEST = 1200  # characters of one text of the policy or of the data
# Delete, C1 controls, halves of characters, and marks that reorder the text around them.
_UNSAFE = r"[\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]"


def render(kind: str, content: dict[str, Any]) -> str:
    """Fills a template.

    Args:
        kind: "markdown" or "html".
        content: from `report_content`, with `plots` (name to path) and `captions`.

    Returns:
        The document.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=kind == "html",
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    filters = (visible, shown, cell, prose, fence, inline)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(f"report.{KINDS[kind]}.jinja").render(content)


def as_json(content: dict[str, Any]) -> str:
    r"""A dict as JSON text, with escapes for what cannot be shown or encoded.

    Args:
        content: holds no NaN.

    Example:
        >>> print(as_json({"text": "café \u202e\ud800"}), end="")
        {
         "text": "café \u202e\ud800"
        }
    """
    text = json.dumps(content, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    return re.sub(_UNSAFE, lambda found: f"\\u{ord(found[0]):04x}", text)


def visible(text: Any) -> str:
    r"""A text with pictures of its control characters: a terminal must not obey a policy.

    Args:
        text: anything; line feeds and tabs stay.

    Example:
        >>> print(visible("a\x1b[31mb\r\nc"))
        a␛[31mb
        c
    """
    text = str(text).replace("\r\n", "\n")
    text = re.sub(r"[\x00-\x08\x0b-\x1f]", lambda found: chr(0x2400 + ord(found[0])), text)
    return re.sub(_UNSAFE, "\ufffd", text)


def shown(text: Any) -> str:
    """A text of the policy or of the data: visible, and cut in its middle where it is long.

    Args:
        text: anything.

    Example:
        >>> len(shown("x" * 10_000)) < 1300
        True
    """
    text = visible(text)
    if len(text) <= LONGEST:
        return text
    half = LONGEST // 2
    return f"{text[:half]}\n[… {len(text) - 2 * half:,} characters left out …]\n{text[-half:]}"


def cell(text: Any) -> str:
    r"""A text as one line of Markdown, or a cell of a table, in which nothing is markup.

    Args:
        text: anything.

    Example:
        >>> print(cell("a|b <i>\n![x](http://y)"))
        a\|b \<i\> \!\[x\](http\://y)
    """
    return _escaped(" ".join(str(text).split()))


def prose(text: Any) -> str:
    r"""A sentence of ours as Markdown: code in backticks stays code, names from data do not act.

    Args:
        text: the sentence.

    Example:
        >>> print(prose("Use `ld_alpha` for group <b>."))
        Use `ld_alpha` for group \<b\>.
    """
    parts = re.split(r"(`[^`]*`)", visible(text))
    return "".join(part if part.startswith("`") else _escaped(part) for part in parts)


def fence(text: Any) -> str:
    """A text as a Markdown code block, in a fence longer than any run of backticks in it.

    Args:
        text: anything.

    Example:
        >>> print(fence("```"))
        ````text
        ```
        ````
    """
    text = visible(text)
    marks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{marks}text\n{text}\n{marks}"


def inline(path: pathlib.Path) -> str:
    """A file as base64, for a data URI.

    Args:
        path: the file.
    """
    return base64.b64encode(path.read_bytes()).decode("ascii")


def _escaped(text: str) -> str:
    # With these gone there are no tags, emphasis, links, images, formulas, mentions or entities;
    # and no bare addresses, which some readers turn into links.
    text = re.sub(r"([\\`*_\[\]<>#|~!&$@])", r"\\\1", visible(text))
    return re.sub(r":(?=//)|(?<=www)\.", r"\\\g<0>", text)


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
        >>> from dpo_keras.evaluation.held_out_figures import _NEEDED
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
