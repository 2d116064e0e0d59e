"""`dpo-keras data build`: preference files become a directory that training streams."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

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
