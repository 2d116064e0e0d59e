"""`dpo-keras data build`: preference files become a directory that training streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from dpo_keras.app.console import prepare_keras, reporting
from dpo_keras.app.options import AsJson, Debug, PairLimit
from dpo_keras.app.progress import Progress, Silent
from dpo_keras.errors import InputError
from dpo_keras.preferences import build_preferences


def build(
    files: Sequence[str],
    out: str | Path,
    columns: Sequence[str] = (),
    *,
    progress: Progress | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Builds a directory of records.

    Args:
        files: as for `read_preferences`.
        out: the directory to make.
        columns: `ours=theirs`, each.
        progress: hears what happens; None: nobody.
        **options: of `build_preferences`.

    Returns:
        `{"directory", "pairs", "bytes", "checksum", "shards", "report"}`.

    Raises:
        InputError: as `build_preferences`; a column that is no `ours=theirs`.
    """
    progress = progress or Silent()
    wrong = [text for text in columns if not all(text.partition("="))]
    if wrong:
        raise InputError([f"--column must be ours=theirs, got {text!r}." for text in wrong])
    progress.stage("Records")
    stored = build_preferences(
        files,
        out,
        columns={ours: theirs for ours, _, theirs in (text.partition("=") for text in columns)},
        on_pairs=lambda done: progress.advance(done, None),
        **options,
    )
    return {
        "directory": str(out),
        "pairs": len(stored),
        "bytes": sum(shard.bytes for shard in stored.shards),
        "checksum": stored.checksum,
        "shards": [vars(shard) for shard in stored.shards],
        "report": stored.report.as_dict(),
        "summary": stored.report.summary(),
    }


data = typer.Typer(help="Look at preference data, and make records of it.", no_args_is_help=True)

Format = Annotated[str, typer.Option(help="How to read them; auto goes by name and columns.")]


@data.command("inspect")
def data_inspect(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Preference files, or builtin:support.")
    ],
    format: Format = "auto",
    limit: PairLimit = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show counts, lengths, bad lines, duplicates, contradictions and biases of the data."""
    with reporting(as_json, debug) as terminal:
        from dpo_keras.app import views
        from dpo_keras.preferences import audit, read_preferences

        pairs = read_preferences(files, format=format, limit=limit)
        picture = audit(pairs)
        content = {"report": pairs.report.as_dict(), "audit": picture.as_dict()}
        terminal.result(content, *views.data_views(pairs, picture))


@data.command("build")
def data_build(
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Preference files, or tfds:NAME/CONFIG:SPLIT."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The directory to make; data.path of a run.")
    ],
    format: Format = "auto",
    column: Annotated[
        list[str] | None,
        typer.Option(help="prompt=question reads the prompt from that column; repeatable."),
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where TensorFlow Datasets keeps its data.")
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="report keeps the good records, fail builds nothing if any is bad.")
    ] = "report",
    limit: PairLimit = None,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of a shard.")] = 256,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make sharded, checksummed records of data of any size, to train on without loading it."""
    with reporting(as_json, debug) as terminal:
        prepare_keras()
        from dpo_keras.app import views
        from dpo_keras.app.console import TerminalProgress

        with TerminalProgress(terminal.log) as progress:
            result = build(
                files,
                out,
                column or (),
                format=format,
                data_dir=data_dir,
                on_error=on_error,
                limit=limit,
                shard_bytes=shard_megabytes * 2**20,
                progress=progress,
            )
        terminal.result(result, *views.build_views(result))
