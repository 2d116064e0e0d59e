"""Results as people read them: rich tables and lines."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from dpo_keras.app.console import duration
from dpo_keras.app.run_clock import megabytes, outcome_lines
from dpo_keras.preferences import Message
from dpo_keras.preferences.audit import Audit, share_text
from dpo_keras.preferences.read_report import grouped
from dpo_keras.utils import JSON
from dpo_keras.utils.text import visible

if TYPE_CHECKING:
    from dpo_keras.app.runs import RunResult
    from dpo_keras.feedback.version_comparison import VersionComparison
    from dpo_keras.preferences import Preferences, RatedResponses
    from dpo_keras.preferences.audit import RatedAudit

_BAD_LINES = 20


def _table(title: str | None, *columns: str, numbers: Iterable[int] = ()) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold")
    right = set(numbers)
    for place, column in enumerate(columns):
        # A name that is cut off cannot be copied.
        table.add_column(column, justify="right" if place in right else "left", overflow="fold")
    return table


def data_views(
    pairs: Preferences | RatedResponses, picture: Audit | RatedAudit
) -> list[RenderableType]:
    """Draw what `dpo-keras data inspect` shows: the report of reading, and the audit."""
    report = pairs.report
    views: list[RenderableType] = [report.summary()]
    if report.problems:
        bad = _table("Bad records (left out)", "where", "column", "what is wrong")
        groups = grouped(report.problems)
        for group in groups[:_BAD_LINES]:
            where = f"{group.source} {group.places}" if len(report.sources) > 1 else group.places
            bad.add_row(*map(escape, (where or "all", group.field, group.message)))
        if len(groups) > _BAD_LINES:
            bad.add_row("...", "", f"and {len(groups) - _BAD_LINES:,} more (--json: all)")
        views.append(bad)
    counts = _counts(picture) if isinstance(picture, Audit) else _rated_counts(picture)
    views += [counts, _lengths(picture)]
    if picture.annotators or picture.groups:
        views.append(_parts(picture))
    return views


def comparison_views(
    comparisons: Sequence[VersionComparison], left_out: Mapping[str, int]
) -> list[RenderableType]:
    """Draw what `dpo-keras compare` shows: a row for each version, its verdict, what is missing."""
    table = _table(
        None, "version", "against", "wins", "ties", "losses", "share", "interval", "p",
        numbers=range(2, 8),
    )  # fmt: skip
    for one in comparisons:
        low, high = one.interval
        table.add_row(
            *map(escape, (one.version, one.against)),
            *(f"{count:,}" for count in (one.wins, one.ties, one.losses)),
            "-" if one.share is None else f"{one.share:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{one.p_value:.2g}",
        )
    verdicts = [f"{one.version} against {one.against}: {one.verdict}." for one in comparisons]
    missing = [f"{count:,} {what}" for what, count in left_out.items()]
    return [table, *verdicts, *([f"Left out: {', '.join(missing)}."] if missing else [])]


def _counts(picture: Audit) -> Table:
    table = _table("Pairs", "what", "count", numbers=[1])
    rows: dict[str, object] = {
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


def _rated_counts(picture: RatedAudit) -> Table:
    table = _table("Rated responses", "what", "count", numbers=[1])
    good, bad = picture.median_characters
    rows: dict[str, object] = {
        "responses": f"{picture.responses:,}",
        "distinct prompts": f"{picture.prompts:,}",
        "desirable": f"{picture.desirable:,}",
        "undesirable": f"{picture.undesirable:,}",
        "soft ratings": f"{picture.soft:,}",
        "of weight 0": f"{picture.zero_weight:,}",
        "duplicates": f"{len(picture.duplicates):,}",
        "contradictions": f"{len(picture.contradictions):,}",
        "characters at the median": f"{good:,.0f} desirable, {bad:,.0f} undesirable",
    }
    for name, value in rows.items():
        table.add_row(name, str(value))
    return table


def _lengths(picture: Audit | RatedAudit) -> Table:
    percentiles = ["0", "10", "50", "90", "99", "100"]
    table = _table("Lengths", "text", "unit", "mean", *percentiles, numbers=range(2, 9))
    for name, units in picture.lengths.items():
        for unit, values in units.items():
            table.add_row(name, unit, *(f"{value:,.0f}" for value in values.values()))
    table.caption = "columns 0 to 100 are percentiles"
    return table


def _parts(picture: Audit | RatedAudit) -> Table:
    counted = "pairs" if isinstance(picture, Audit) else "responses"
    table = _table("Who and what", "kind", "name", counted, numbers=[2])
    for kind, counts in (("annotator", picture.annotators), ("group", picture.groups)):
        for name, count in list(counts.items())[:_BAD_LINES]:
            table.add_row(kind, escape(name), f"{count:,}")
        if len(counts) > _BAD_LINES:
            table.add_row(kind, f"and {len(counts) - _BAD_LINES:,} more", "")
    return table


def build_views(result: Mapping[str, JSON]) -> list[RenderableType]:
    """Say what `dpo-keras data build` made."""
    shards = len(result["shards"])
    return [
        result["summary"],
        f"{result['pairs']:,} pairs ({result['bytes'] / 1e6:,.1f} MB in {shards:,} "
        f"shard{'s' if shards > 1 else ''}) are in {result['directory']}; train on them with "
        f"data.path={result['directory']}",
    ]


def loss_rows() -> list[dict[str, JSON]]:
    """List the objectives with formula, source and options, for JSON and for the table."""
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


def loss_views(rows: Sequence[Mapping[str, JSON]]) -> list[RenderableType]:
    """Draw the objectives, from `loss_rows`: lines of any width, for formulas fill one."""
    table = Table.grid(padding=(0, 2, 1, 0))
    table.add_column(no_wrap=True, style="bold")
    table.add_column()
    for row in rows:
        reference = "compares with a reference" if row["needs_reference"] else "no reference"
        about = [row["summary"], f"loss of a pair: {row['formula']}"]
        about += [f"{reference}; arXiv {row['arxiv']}"]
        about += [f"options: {', '.join(row['options'])}"]
        table.add_row(row["name"], Text("\n".join(about)))
    return [
        table,
        "c, r: log-ratios to the reference of chosen and rejected; c̄, r̄: per token; Δ = c - r; "
        "ε: label_smoothing.",
    ]


def run_views(result: RunResult) -> list[RenderableType]:
    """Draw the outcome of a run."""
    views: list[RenderableType] = []
    if result.before is not None and result.after is not None:
        titles = {"figures": "Held-out pairs", "responses": "Responses to held-out prompts"}
        for key, title in titles.items():
            if key in result.after:
                columns = {"before": result.before[key], "after": result.after[key]}
                views.append(figure_table(title, columns))
    if result.samples:
        views.append(sample_table(result.samples))
    views += [f"The report says: {finding}" for finding in result.findings]
    views += [f"{what}: {said}" for what, said in outcome_lines(result.prediction).items()]
    if result.export is not None:
        views += export_views(result.export)
    files = {"run": result.directory, **result.report}
    return views + [f"{kind}: {path}" for kind, path in files.items()]


def plan_views(result: Mapping[str, JSON]) -> list[RenderableType]:
    """Draw what `dpo-keras plan` predicts."""
    work = _table("Steps", "of", "steps", "in an epoch", "tokens", "fill", "per step", "batches")
    for name, section in result["sections"].items():
        counts = [f"{section[key]:,}" for key in ("steps", "steps_per_epoch", "tokens")]
        step = f"{section['seconds_per_step']:,.3g} s"
        work.add_row(name, *counts, f"{section['fill']:.1%}", step, section["batches"])
    times = _table("Time", "stage", "in the trial", "in the run", numbers=(1, 2))
    for title, seconds in result["stages"].items():
        times.add_row(escape(title), *(duration(seconds[key]) for key in ("trial", "run")))
    pairs = ", ".join(f"{count:,} {name}" for name, count in result["pairs"].items())
    return [
        work,
        times,
        f"pairs: {pairs.replace('_', ' ')}",
        *(f"peak memory of {name}: {megabytes(n)}" for name, n in result["peak_bytes"].items()),
        f"time in all: {duration(result['seconds'])}",
    ]


def evaluation_views(result: Mapping[str, JSON]) -> list[RenderableType]:
    """Draw an evaluation, from `runs.evaluate`."""
    title = f"{result['file']}: {result['pairs']:,} pairs, {result['dropped']:,} dropped"
    return [
        figure_table(title, {"value (95 % interval)": result["figures"]}),
        *(f"The report says: {finding}" for finding in result["findings"]),
        *(f"{kind}: {path}" for kind, path in result["report"].items()),
    ]


def export_views(result: Mapping[str, JSON]) -> list[RenderableType]:
    """Draw an export and what it answered, or the files of `export_pretrained`."""
    if "files" in result:
        table = _table(f"{result['format']} in {result['path']}", "file", "bytes", numbers=(1,))
        for name, size in result["files"].items():
            table.add_row(name, f"{size:,}")
        return [table]
    title = "The exported model, asked in a process without Keras"
    table = _table(title, "signature", "request", "response")
    for name, call in result.get("answer", {}).items():
        table.add_row(name, _fields(call["request"]), _fields(call["response"]))
    return [table, f"exported: {result['path']}"]


def _fields(values: Mapping[str, JSON]) -> str:
    shown = {k: f"{v:.4f}" if isinstance(v, float) else str(v) for k, v in values.items()}
    return "\n".join(f"[dim]{name}[/dim] {_cell(text)}" for name, text in shown.items())


def figure_table(title: str, columns: Mapping[str, Mapping[str, dict[str, JSON]]]) -> Table:
    """Draw figures with their intervals side by side; `columns` are figures by name, by heading."""
    from dpo_keras.utils.intervals import Estimate

    table = _table(title, "figure", *columns, numbers=range(1, len(columns) + 1))
    for name in dict.fromkeys(name for figures in columns.values() for name in figures):
        found = (figures.get(name) for figures in columns.values())
        table.add_row(name, *(str(Estimate.from_dict(one)) if one else "" for one in found))
    return table


def sample_table(samples: Sequence[Mapping[str, JSON]]) -> Table:
    """Draw responses before and after, side by side, from `evaluation.side_by_side`."""
    table = Table(title="Samples on held-out prompts", title_justify="left", show_lines=True)
    for column in ("prompt", "before", "after"):
        table.add_column(column, ratio=1, overflow="fold")
    for sample in samples:
        cells = [_cell(str(sample["prompt"]))]
        for name in ("before", "after"):
            good = sample.get(f"{name}_preferred")
            mark = "" if good is None else "[green]good:[/green] " if good else "[red]bad:[/red] "
            cells.append(mark + _cell(str(sample.get(name, ""))))
        table.add_row(*cells)
    return table


def candidate_views(
    candidates: Sequence[Mapping[str, JSON]], shown: int = 5
) -> list[RenderableType]:
    """Draw the candidates of the first prompts."""
    views: list[RenderableType] = []
    for record in candidates[:shown]:
        prompt = record["prompt"]
        last_turn = prompt if isinstance(prompt, str) else Message.from_dict(prompt[-1]).words
        table = Table(title=_cell(last_turn), title_justify="left")
        table.add_column("")
        table.add_column("response", overflow="fold")
        for number, response in enumerate(record["responses"], start=1):
            table.add_row(str(number), _cell(response))
        views.append(table)
    if len(candidates) > shown:
        views.append(f"... and {len(candidates) - shown:,} more prompts (--output or --json: all)")
    return views


def _cell(text: str, width: int = 400) -> str:
    """Make text safe to draw. The end is kept, for the end of a prompt is what is answered."""
    text = visible(text.strip())
    return escape(text if len(text) <= width else "... " + text[-width:])
