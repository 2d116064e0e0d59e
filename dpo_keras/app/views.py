"""Results as people read them: rich tables and lines."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.markup import escape
from rich.table import Table

from dpo_keras.preferences.audit import share_text

if TYPE_CHECKING:
    from dpo_keras.app.runs import RunResult
    from dpo_keras.preferences import Preferences
    from dpo_keras.preferences.audit import Audit

_BAD_LINES = 20
# What an untrained model writes must not move the cursor or ring the bell.
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def _table(title: str | None, *columns: str, numbers: Iterable[int] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    right = set(numbers)
    for place, column in enumerate(columns):
        table.add_column(column, justify="right" if place in right else "left")
    return table


def data_views(pairs: Preferences, picture: Audit) -> list[Any]:
    """Draws what `dpo-keras data inspect` shows.

    Args:
        pairs: what was read, with its report.
        picture: its audit.
    """
    report = pairs.report
    views: list[Any] = [report.summary()]
    if report.problems:
        bad = _table("Bad lines (left out)", "line", "column", "what is wrong", numbers=[0])
        for problem in report.problems[:_BAD_LINES]:
            line = "all" if problem.line is None else str(problem.line)
            bad.add_row(line, escape(problem.field), escape(problem.message))
        if len(report.problems) > _BAD_LINES:
            bad.add_row("...", "", f"and {len(report.problems) - _BAD_LINES:,} more (--json: all)")
        views.append(bad)
    views += [_counts(picture), _lengths(picture)]
    if picture.annotators or picture.groups:
        views.append(_parts(picture))
    return views


def build_views(result: Mapping[str, Any]) -> list[Any]:
    """Draws what `dpo-keras data build` made.

    Args:
        result: of `dpo_keras.app.data_commands.build`.
    """
    shards = len(result["shards"])
    return [
        result["summary"],
        f"{result['pairs']:,} pairs ({result['bytes'] / 1e6:,.1f} MB in {shards:,} "
        f"shard{'s' if shards > 1 else ''}) are in {result['directory']}; train on them with "
        f"data.path={result['directory']}",
    ]


def _counts(picture: Audit) -> Table:
    table = _table("Pairs", "what", "count", numbers=[1])
    rows: dict[str, Any] = {
        "pairs": f"{picture.pairs:,}",
        "distinct prompts": f"{picture.prompts:,}",
        "ties (preference 0.5)": f"{picture.ties:,}",
        "soft preferences": f"{picture.soft:,}",
        "of weight 0": f"{picture.zero_weight:,}",
        "duplicates": f"{len(picture.duplicates):,}",
        "contradictions": f"{len(picture.contradictions):,}",
        "the longer response wins": share_text(picture.longer_wins),
        "the first response wins": "not known: the files do not say"
        if picture.first_wins is None
        else share_text(picture.first_wins),
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _lengths(picture: Audit) -> Table:
    table = _table("Lengths", "text", "unit", "mean", *["0", "10", "50", "90", "99", "100"])
    for column in table.columns[2:]:
        column.justify = "right"
    for name, units in picture.lengths.items():
        for unit, values in units.items():
            table.add_row(name, unit, *(f"{value:,.0f}" for value in values.values()))
    table.caption = "columns 0 to 100 are percentiles"
    return table


def _parts(picture: Audit) -> Table:
    table = _table("Who and what", "kind", "name", "pairs", numbers=[2])
    for kind, counts in (("annotator", picture.annotators), ("group", picture.groups)):
        for name, count in list(counts.items())[:_BAD_LINES]:
            table.add_row(kind, escape(name), f"{count:,}")
        if len(counts) > _BAD_LINES:
            table.add_row(kind, f"and {len(counts) - _BAD_LINES:,} more", "")
    return table


def loss_rows() -> list[dict[str, Any]]:
    """Lists the objectives with formula, source and options, for JSON and for the table."""
    from dpo_keras.losses import OBJECTIVES, available

    return [
        {
            "name": name,
            "formula": OBJECTIVES[name].formula,
            "summary": summary,
            "needs_reference": OBJECTIVES[name].needs_reference(),
            "options": sorted(OBJECTIVES[name].option_names()),
            "arxiv": OBJECTIVES[name].source,
        }
        for name, summary in available().items()
    ]


def loss_views(rows: Sequence[Mapping[str, Any]]) -> list[Any]:
    """Draws the table of objectives.

    Args:
        rows: from `loss_rows`.
    """
    table = _table(None, "loss.type", "loss of a pair", "what it does", "reference", "arXiv")
    for column in table.columns:
        column.overflow = "fold"  # a name that is cut off cannot be copied
    for row in rows:
        table.add_row(
            row["name"],
            escape(row["formula"]),
            escape(row["summary"]),
            "yes" if row["needs_reference"] else "no",
            row["arxiv"],
        )
    return [
        table,
        "c, r: log-ratios to the reference of chosen and rejected; c̄, r̄: per token; Δ = c - r; "
        "ε: label_smoothing.",
    ]


def run_views(result: RunResult) -> list[Any]:
    """Draws the outcome of a run.

    Args:
        result: from `runs.train`.
    """
    views: list[Any] = []
    if result.before is not None and result.after is not None:
        for title, key in (
            ("Held-out pairs", "figures"),
            ("Responses to held-out prompts", "responses"),
        ):
            if key in result.after:
                columns = {"before": result.before[key], "after": result.after[key]}
                views.append(figure_table(title, columns))
    if result.samples:
        views.append(sample_table(result.samples))
    views += [f"The report says: {finding}" for finding in result.findings]
    if result.export is not None:
        views += export_views(result.export)
    files = {"run": result.directory, **result.report}
    views += [f"{kind}: {path}" for kind, path in files.items()]
    return views


def evaluation_views(result: Mapping[str, Any]) -> list[Any]:
    """Draws an evaluation.

    Args:
        result: from `runs.evaluate`.
    """
    title = f"{result['file']}: {result['pairs']:,} pairs, {result['dropped']:,} dropped"
    views: list[Any] = [figure_table(title, {"value (95 % interval)": result["figures"]})]
    views += [f"The report says: {finding}" for finding in result["findings"]]
    return views + [f"{kind}: {path}" for kind, path in result["report"].items()]


def export_views(result: Mapping[str, Any]) -> list[Any]:
    """Draws an export and what it answered.

    Args:
        result: from `runs.export_run`.
    """
    table = _table(
        "The exported model, asked in a process without Keras", "signature", "request", "response"
    )
    for name, call in result["answer"].items():
        table.add_row(name, _fields(call["request"]), _fields(call["response"]))
    return [table, f"exported: {result['path']}"]


def _fields(values: Mapping[str, Any]) -> str:
    return "\n".join(
        f"[dim]{name}[/dim] {escape(_short(f'{v:.4f}' if isinstance(v, float) else str(v)))}"
        for name, v in values.items()
    )


def figure_table(title: str, columns: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> Table:
    """Draws figures with their intervals side by side.

    Args:
        title: above the table.
        columns: heading to figures by name, for instance before and after.
    """
    from dpo_keras.utils.intervals import Estimate

    table = _table(title, "figure", *columns, numbers=range(1, len(columns) + 1))
    names = dict.fromkeys(name for figures in columns.values() for name in figures)
    for name in names:
        cells = (
            str(Estimate.from_dict(dict(figures[name]))) if name in figures else ""
            for figures in columns.values()
        )
        table.add_row(name, *cells)
    return table


def sample_table(samples: Sequence[Mapping[str, Any]]) -> Table:
    """Draws responses before and after, side by side.

    Args:
        samples: from `dpo_keras.evaluation.side_by_side`.
    """
    table = Table(title="Samples on held-out prompts", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, ratio=1, overflow="fold")
    for sample in samples:
        cells = [escape(_short(str(sample["prompt"])))]
        for name in ("before", "after"):
            good = sample.get(f"{name}_preferred")
            mark = "" if good is None else "[green]good:[/green] " if good else "[red]bad:[/red] "
            cells.append(mark + escape(_short(str(sample.get(name, "")))))
        table.add_row(*cells)
    return table


def _short(text: str, width: int = 400) -> str:
    # The end of a prompt is what is answered.
    text = _CONTROL.sub("\N{REPLACEMENT CHARACTER}", text.strip())
    return text if len(text) <= width else "... " + text[-width:]


def candidate_views(candidates: Sequence[Mapping[str, Any]], shown: int = 5) -> list[Any]:
    """Draws the first candidates.

    Args:
        candidates: mappings with `prompt` and `responses`.
        shown: how many prompts.
    """
    views: list[Any] = []
    for record in candidates[:shown]:
        table = Table(title=escape(_short(_prompt_text(record["prompt"]))), title_justify="left")
        table.add_column("")
        table.add_column("response", overflow="fold")
        for number, response in enumerate(record["responses"], start=1):
            table.add_row(str(number), escape(_short(response)))
        views.append(table)
    if len(candidates) > shown:
        views.append(f"... and {len(candidates) - shown:,} more prompts (--output or --json: all)")
    return views


def _prompt_text(prompt: Any) -> str:
    return prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
