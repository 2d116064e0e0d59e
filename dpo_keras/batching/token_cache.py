"""Tokens of a built directory on disk: made once, in chunks, and continued after a stop."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dpo_keras.batching.ragged import TOKEN_BYTES, StoredRagged, TokenFile
from dpo_keras.batching.tokenized_pairs import TokenizationReport, TokenizedPairs, identity_of_rows
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import StoredPreferences
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text

Chunk: TypeAlias = tuple[TokenizedPairs, np.ndarray]
"""Tokens of some pairs, and bool `[n, 3]`: prompt cut, response cut, responses identical."""

ROW = np.dtype(
    [
        *(("start", "<i8"), ("prompt", "<i4"), ("chosen", "<i4"), ("rejected", "<i4")),
        *(("preference", "<f4"), ("weight", "<f4"), ("margin", "<f4"), ("group", "<i4")),
        *(("source", "<i8"), ("cuts", "?", 3)),
    ]
)
COMMIT = 16  # chunks between two records of the progress
LISTED = 1000  # dropped pairs that the report lists


def cached_tokens(
    pairs: StoredPreferences,
    *,
    key: dict[str, JSON],
    chunks: Callable[[int], Iterable[Chunk]],
    cache: str | os.PathLike[str] | None,
    pad: int,
    max_length: int,
) -> TokenizedPairs:
    """Open the tokens of a built directory; make those that are missing first.

    Tokenization continues where an earlier process stopped. Processes that want the same tokens
    wait for the one that makes them. Tokens are made for all pairs up to `pairs.extent`, so that
    every split finds its own; about 50 bytes per pair of `pairs` stay in memory. `key`, everything
    that the tokens depend on, names the folder; `chunks` makes them from a pair's number on.
    """
    identity = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = (pairs.path / "tokens" if cache is None else Path(cache)) / identity[:16]
    if not _is_complete(folder):
        with _locked(folder):
            if not _is_complete(folder):
                _write(folder, key, chunks)
    tokens = _open(folder, identity, pairs)
    return replace(tokens, pad=pad, max_length=max_length)


def _write(folder: Path, key: dict[str, JSON], chunks: Callable[[int], Iterable[Chunk]]) -> None:
    progress = _progress(folder, key)
    (folder / "store.json").unlink(missing_ok=True)
    report = TokenizationReport.from_dict(progress["report"])
    groups: dict[str, int] = {name: i for i, name in enumerate(progress["groups"])}
    with (folder / "tokens.bin").open("ab") as tokens, (folder / "rows.bin").open("ab") as rows:
        # What an earlier process wrote after its last commit does not count.
        sizes = (progress["tokens"] * TOKEN_BYTES, report.kept * ROW.itemsize)
        for file, size in zip((tokens, rows), sizes, strict=True):
            file.truncate(size)
            file.seek(size)

        def commit() -> None:
            for file in (tokens, rows):
                file.flush()
                os.fsync(file.fileno())
            size = tokens.tell() // TOKEN_BYTES
            now = {"pairs": report.pairs, "tokens": size, "groups": list(groups)}
            now |= {"key": key, "report": asdict(report)}
            write_text(folder / "progress.json", json.dumps(now))

        for number, (chunk, cuts) in enumerate(chunks(report.pairs), 1):
            laid, flat = _laid_out(chunk, cuts, tokens.tell() // TOKEN_BYTES, groups)
            tokens.write(flat.tobytes())
            rows.write(laid.tobytes())
            _add(report, chunk.report)
            if number % COMMIT == 0:
                commit()
        commit()
    written = {name: (folder / name).stat().st_size for name in ("tokens.bin", "rows.bin")}
    store = {"key": key, "groups": list(groups), "sizes": written, "report": asdict(report)}
    write_text(folder / "store.json", json.dumps(store))
    (folder / "progress.json").unlink()


def _progress(folder: Path, key: dict[str, JSON]) -> dict[str, JSON]:
    with contextlib.suppress(OSError, ValueError):
        found = json.loads((folder / "progress.json").read_text(encoding="utf-8"))
        size = (folder / "tokens.bin").stat().st_size
        if (
            found["key"] == key
            and size >= found["tokens"] * TOKEN_BYTES
            and (folder / "rows.bin").exists()
        ):
            return found
    return {"pairs": 0, "tokens": 0, "groups": [], "report": asdict(TokenizationReport())}


def _laid_out(
    tokens: TokenizedPairs, cuts: np.ndarray, start: int, groups: dict[str, int]
) -> tuple[np.ndarray, np.ndarray]:
    """Return a chunk as rows and tokens of the files."""
    rows = np.zeros(len(tokens), ROW)
    for name, part in zip(("prompt", "chosen", "rejected"), tokens.parts, strict=True):
        rows[name] = part.lengths
    ends = np.cumsum(tokens.tree_tokens)
    rows["start"] = start + ends - tokens.tree_tokens
    rows["preference"], rows["weight"] = tokens.preference, tokens.weight
    rows["margin"] = np.nan if tokens.margin is None else tokens.margin
    rows["group"] = -1
    if tokens.group is not None:
        numbers = [groups.setdefault(name, len(groups)) for name in tokens.group_names]
        rows["group"] = np.array([*numbers, -1], np.int32)[tokens.group]
    rows["source"], rows["cuts"] = tokens.source, cuts
    flat = [part[row] for row in range(len(tokens)) for part in tokens.parts]
    return rows, np.concatenate([*flat, np.zeros(0, np.int32)]).astype("<i4")


def _add(report: TokenizationReport, chunk: TokenizationReport) -> None:
    counts = ("pairs", "kept", "truncated_prompts", "truncated_responses")
    for name in (*counts, "identical_responses", "prompt_tokens", "response_tokens"):
        setattr(report, name, getattr(report, name) + getattr(chunk, name))
    report.longest = max(report.longest, chunk.longest)
    report.dropped += chunk.dropped[: LISTED - len(report.dropped)]
    report.warnings += [text for text in chunk.warnings if text not in report.warnings]


def _is_complete(folder: Path) -> bool:
    """Whether tokens are there, in the sizes that they were written in."""
    try:
        sizes = json.loads((folder / "store.json").read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        rule = f"must name another place: tokens cannot be written into {folder}: {error.strerror}"
        raise InputError(InputProblem("cache", rule)) from error
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open(folder: Path, identity: str, pairs: StoredPreferences) -> TokenizedPairs:
    """Open the tokens of some pairs of the directory."""
    store = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    path = folder / "rows.bin"
    rows: np.ndarray = np.memmap(path, ROW, "r") if path.stat().st_size else np.zeros(0, ROW)
    report = TokenizationReport.from_dict(store["report"])
    # Decided for all pairs, so that every side of a split has the same columns.
    margins = not np.isnan(rows["margin"]).all()
    if pairs.rows is not None:
        rows = rows[np.flatnonzero(np.isin(rows["source"], pairs.rows))]
        report = _report_of_side(report, rows, pairs.rows)
        identity = identity_of_rows(identity, pairs.rows)
    column = {name: np.ascontiguousarray(rows[name]) for name in ROW.names or () if name != "cuts"}
    names = tuple(sorted(store["groups"]))
    numbers = np.array([*map(names.index, store["groups"]), -1], np.int32)
    file = TokenFile(folder / "tokens.bin")
    file.warm()
    start, source = column["start"], column["source"]
    responses = start + column["prompt"]
    return TokenizedPairs(
        prompt=StoredRagged(file, start, column["prompt"]),
        chosen=StoredRagged(file, responses, column["chosen"]),
        rejected=StoredRagged(file, responses + column["chosen"], column["rejected"]),
        preference=column["preference"],
        weight=column["weight"],
        group=numbers[column["group"]] if names else None,
        margin=np.nan_to_num(column["margin"], nan=0.0) if margins else None,
        group_names=names,
        source=source if pairs.rows is None else np.searchsorted(pairs.rows, source),
        report=report,
        identity=identity,
    )


def _report_of_side(
    whole: TokenizationReport, rows: np.ndarray, wanted: np.ndarray
) -> TokenizationReport:
    """Count what tokenization did to some of the pairs."""
    place = {pair.index: int(np.searchsorted(wanted, pair.index)) for pair in whole.dropped}
    among = {i for i, at in place.items() if at < len(wanted) and wanted[at] == i}
    longer = np.maximum(rows["chosen"], rows["rejected"])
    prompts, responses, identical = rows["cuts"].sum(axis=0).tolist()
    return TokenizationReport(
        pairs=len(wanted),
        kept=len(rows),
        dropped=[replace(p, index=place[p.index]) for p in whole.dropped if p.index in among],
        truncated_prompts=prompts,
        truncated_responses=responses,
        identical_responses=identical,
        prompt_tokens=int(rows["prompt"].sum(dtype=np.int64)),
        response_tokens=int((rows["chosen"] + rows["rejected"]).sum(dtype=np.int64)),
        longest=int((rows["prompt"] + longer).max(initial=0)),
        warnings=whole.warnings,
    )
