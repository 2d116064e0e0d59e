"""`dpo-keras data`: look at preference data, and make records of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from dpo_keras.app.console import AsJson, Debug, reporting, working
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.deferred_imports import Deferred, deferred_function

views = Deferred("dpo_keras.app.views")
audit = deferred_function("dpo_keras.preferences", "audit")
audit_rated = deferred_function("dpo_keras.preferences", "audit_rated")
build_preferences = deferred_function("dpo_keras.preferences", "build_preferences")
read_preferences = deferred_function("dpo_keras.preferences", "read_preferences")

data = typer.Typer(help="Look at preference data, and make records of it.", no_args_is_help=True)

PairLimit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Read this many pairs at most.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="prompt=question reads the prompt from that column; repeatable."),
]
AllowTruncated = Annotated[
    bool,
    typer.Option("--allow-truncated", help="Read what is left of files that are cut off."),
]
Format = Annotated[str, typer.Option(help="How to read them; auto goes by name and columns.")]


Feedback = Annotated[
    str | None,
    typer.Option(help="What to take of a feedback log that has both: choices or thumbs."),
]


@data.command("inspect")
def data_inspect(  # noqa: PLR0913, PLR0917 (a parameter is an option)
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Preference files, or builtin:support.")
    ],
    format: Format = "auto",
    column: Columns = None,
    limit: PairLimit = None,
    allow_truncated: AllowTruncated = False,
    feedback: Feedback = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show counts, lengths, bad lines, duplicates, contradictions and biases of the data."""
    with reporting(as_json, debug) as terminal:
        pairs = read_preferences(
            files,
            format=format,
            columns=_renaming(column or ()),
            limit=limit,
            allow_truncated=allow_truncated,
            feedback=feedback,
        )
        picture = audit_rated(pairs) if hasattr(pairs, "ratings") else audit(pairs)
        content = {"report": pairs.report.as_dict(), "audit": picture.as_dict()}
        terminal.result(content, *views.data_views(pairs, picture))


@data.command("build")
def data_build(  # noqa: PLR0913, PLR0917 (a parameter is an option)
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Preference files, or tfds:NAME/CONFIG:SPLIT."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The directory to make; data.path of a run.")
    ],
    format: Format = "auto",
    column: Columns = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where TensorFlow Datasets keeps its data.")
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="report keeps the good records, fail builds nothing if any is bad.")
    ] = "report",
    limit: PairLimit = None,
    allow_truncated: AllowTruncated = False,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of a shard.")] = 256,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make sharded, checksummed records of data of any size, to train on without loading it."""
    with reporting(as_json, debug) as terminal:
        with working(terminal) as progress:
            progress.stage("Records")
            stored = build_preferences(
                files,
                out,
                columns=_renaming(column or ()),
                format=format,
                data_dir=data_dir,
                on_error=on_error,
                limit=limit,
                allow_truncated=allow_truncated,
                shard_bytes=shard_megabytes * 2**20,
                on_pairs=lambda done: progress.advance(done, None),
            )
        result: dict[str, JSON] = {
            "directory": str(out),
            "pairs": len(stored),
            "bytes": sum(shard.bytes for shard in stored.shards),
            "checksum": stored.checksum,
            "shards": [vars(shard) for shard in stored.shards],
            "report": stored.report.as_dict(),
            "summary": stored.report.summary(),
        }
        terminal.result(result, *views.build_views(result))


def _renaming(columns: Sequence[str]) -> Mapping[str, str]:
    wrong = [text for text in columns if not all(text.partition("="))]
    if wrong:
        raise InputError([InputProblem("--column", "must be ours=theirs", text) for text in wrong])
    return {ours: theirs for ours, _, theirs in (text.partition("=") for text in columns)}
