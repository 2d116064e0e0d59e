"""Writes the tokens of a built directory in chunks; a stopped process can be gone on with."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
from pathlib import Path
from typing import Any

import numpy as np

from dpo_keras.batching.pairs import TokenizedPairs
from dpo_keras.batching.report import DroppedPair, TokenizationReport
from dpo_keras.batching.stored_ragged import WIDTH
from dpo_keras.batching.tokenization import Rules, tokenize_chunk
from dpo_keras.preferences.stored import StoredPreferences

ROW = np.dtype(
    [
        *(("start", "<i8"), ("prompt", "<i4"), ("chosen", "<i4"), ("rejected", "<i4")),
        *(("preference", "<f4"), ("weight", "<f4"), ("margin", "<f4"), ("group", "<i4")),
        *(("source", "<i8"), ("cuts", "?", 3)),
    ]
)
CHUNK = 2048  # pairs tokenized at a time
COMMIT = 16  # chunks between two notes of the progress
LISTED = 1000  # dropped pairs that the report names


def write_tokens(folder: Path, pairs: StoredPreferences, rules: Rules, key: dict[str, Any]) -> None:
    """Writes the tokens of all pairs, chunk by chunk, from where an earlier process has stopped.

    Args:
        folder: is there; nobody else writes into it.
        pairs: all up to `pairs.extent` are written.
        rules: how text becomes tokens.
        key: what the tokens depend on, for the record.

    Raises:
        InputError: as `tokenize_pairs`, or if the records are damaged.
    """
    progress = _progress(folder, key)
    (folder / "store.json").unlink(missing_ok=True)
    report = TokenizationReport(**progress["report"])
    groups: dict[str, int] = {name: i for i, name in enumerate(progress["groups"])}
    done = progress["pairs"]
    with open(folder / "tokens.bin", "ab") as tokens, open(folder / "rows.bin", "ab") as rows:
        for file, size in (
            (tokens, progress["tokens"] * WIDTH),
            (rows, report.kept * ROW.itemsize),
        ):
            file.truncate(size)
            file.seek(size)

        def commit() -> None:
            for file in (tokens, rows):
                file.flush()
                os.fsync(file.fileno())
            now = {"pairs": done, "tokens": tokens.tell() // WIDTH, "groups": list(groups)}
            _replace(folder / "progress.json", {**now, "key": key, "report": _plain(report)})

        source = itertools.islice(pairs.read(done), pairs.extent - done)
        for number in itertools.count(1):
            chunk = list(itertools.islice(source, CHUNK))
            if not chunk:
                break
            some, cuts = tokenize_chunk(chunk, rules, done)
            laid, flat = _rows(some, cuts, tokens.tell() // WIDTH, groups)
            tokens.write(flat.tobytes())
            rows.write(laid.tobytes())
            _add(report, some.report)
            done += len(chunk)
            if number % COMMIT == 0:
                commit()
        commit()
    names = ("tokens.bin", "rows.bin")
    _replace(
        folder / "store.json",
        {
            "key": key,
            "groups": list(groups),
            "sizes": {name: (folder / name).stat().st_size for name in names},
            "report": _plain(report),
        },
    )
    (folder / "progress.json").unlink()


def _progress(folder: Path, key: dict[str, Any]) -> dict[str, Any]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        sizes = {"tokens.bin": found["tokens"] * WIDTH, "rows.bin": 0}
        if found["key"] == key and all((folder / n).stat().st_size >= s for n, s in sizes.items()):
            dropped = [DroppedPair(**entry) for entry in found["report"]["dropped"]]
            return {**found, "report": {**found["report"], "dropped": dropped}}
    return {"pairs": 0, "tokens": 0, "groups": [], "report": {}}


def _rows(
    tokens: TokenizedPairs, cuts: np.ndarray, start: int, groups: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Lays a chunk out as rows and tokens of the files."""
    parts = {"prompt": tokens.prompt, "chosen": tokens.chosen, "rejected": tokens.rejected}
    rows = np.zeros(len(tokens), ROW)
    for name, part in parts.items():
        rows[name] = part.lengths
    ends = np.cumsum(sum(part.lengths for part in parts.values()))
    rows["start"] = start + np.concatenate([[0], ends[:-1]]) if len(tokens) else 0
    rows["preference"], rows["weight"] = tokens.preference, tokens.weight
    rows["margin"] = np.nan if tokens.margin is None else tokens.margin
    rows["group"] = -1
    if tokens.group is not None:
        numbers = [groups.setdefault(name, len(groups)) for name in tokens.group_names]
        rows["group"] = np.array([*numbers, -1], np.int32)[tokens.group]
    rows["source"], rows["cuts"] = tokens.source, cuts
    flat = [part[row] for row in range(len(tokens)) for part in parts.values()]
    return rows, np.concatenate([*flat, np.zeros(0, np.int32)]).astype("<i4")


def _add(report: TokenizationReport, chunk: TokenizationReport) -> None:
    counts = ("pairs", "kept", "truncated_prompts", "truncated_responses")
    for name in (*counts, "identical_responses", "prompt_tokens", "response_tokens"):
        setattr(report, name, getattr(report, name) + getattr(chunk, name))
    report.longest = max(report.longest, chunk.longest)
    report.dropped += chunk.dropped[: LISTED - len(report.dropped)]
    report.warnings += [text for text in chunk.warnings if text not in report.warnings]


def _plain(report: TokenizationReport) -> dict[str, Any]:
    values = report.as_dict()
    del values["dropped_by_rule"]
    return values


def _replace(path: Path, content: Any) -> None:
    partial = path.with_name(f".{path.name}.partial")
    with open(partial, "w", encoding="utf-8") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
