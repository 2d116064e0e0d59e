"""Writes the tokens of a built directory in chunks; a stopped process can be gone on with."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import itertools
import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from dpo_keras.batching.encoders import TextEncoder
from dpo_keras.batching.ragged import WIDTH, StoredRagged, TokenFile
from dpo_keras.batching.tokenization import Rules, tokenize_chunk
from dpo_keras.batching.tokenized_pairs import DroppedPair, TokenizationReport, TokenizedPairs
from dpo_keras.errors import InputError
from dpo_keras.preferences.stored_preferences import StoredPreferences

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


FORMAT = "dpo_keras tokens 1"
PROBE = 64  # pairs whose tokens tell one tokenizer from another


def tokenize_stored(
    pairs: StoredPreferences, rules: Rules, cache: str | os.PathLike[str] | None = None
) -> TokenizedPairs:
    """Tokenizes the pairs of a built directory, or opens their tokens where they are there.

    Tokenization goes on where an earlier one was stopped; processes that want the same tokens wait
    for the one that makes them.

    Args:
        pairs: all pairs of the directory, or some; tokens are made for all up to `pairs.extent`, so
            that every split of them finds its own.
        rules: how text becomes tokens.
        cache: the folder that the tokens' folder is in; None: `tokens/` in the directory.

    Returns:
        As `tokenize_pairs`; what stays in memory is about 50 bytes per pair.

    Raises:
        InputError: as `tokenize_pairs`, or if the records are damaged.
    """
    key = store_key(pairs, rules)
    identity = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    folder = (pairs.path / "tokens" if cache is None else Path(cache)) / identity[:16]
    if not _is_whole(folder):
        with _alone(folder):
            if not _is_whole(folder):
                write_tokens(folder, pairs.whole, rules, key)
    tokens = _open(folder, rules, identity, pairs)
    if not len(tokens):
        raise InputError(
            [f"None of the {len(pairs)} pairs is left after tokenization."]
            + [str(pair) for pair in tokens.report.dropped[:20]]
        )
    return tokens


def store_key(pairs: StoredPreferences, rules: Rules) -> dict[str, Any]:
    """Returns all that tokens depend on, as plain values.

    A tokenizer is known by its class, its special ids and its vocabulary, and by what it makes of
    the first pairs: whatever differs there shows, whether or not the tokenizer tells.
    """
    encoder, template, max_length, overlength = rules
    probe = hashlib.sha256()
    # What is too long must not raise here, where a few pairs stand for all.
    lenient = rules._replace(overlength="truncate")
    some = list(itertools.islice(pairs.whole, PROBE))
    tokens, _ = tokenize_chunk(some, lenient)
    for part in (tokens.prompt, tokens.chosen, tokens.rejected):
        probe.update(json.dumps(part.tolist()).encode())
    return {
        "format": FORMAT,
        "records": pairs.checksum,
        "pairs": pairs.extent,
        "tokenizer": _tokenizer_key(encoder),
        "probe": probe.hexdigest(),
        "template": None if template is None else [template.name, _digest(template.source)],
        "max_length": max_length,
        "overlength": overlength,
    }


def _tokenizer_key(encoder: TextEncoder) -> dict[str, Any]:
    tokenizer = encoder.tokenizer
    parts: dict[str, Any] = {}
    for name in ("get_vocabulary", "merges", "proto"):
        value = getattr(tokenizer, name, None)
        with contextlib.suppress(Exception):  # a tokenizer of the user's own may have anything
            value = value() if callable(value) else value
            if isinstance(value, set):
                value = sorted(value)
            parts[name] = None if value is None else _digest(repr(value))
    return {
        "class": type(tokenizer).__name__,
        "ids": [encoder.start, encoder.end, sorted(encoder.ends), encoder.pad],
        "anchor": encoder.anchor,
        **parts,
    }


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _is_whole(folder: Path) -> bool:
    """Whether tokens are there, in the sizes that they were written in."""
    try:
        sizes = json.loads((folder / "store.json").read_text(encoding="utf-8"))["sizes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError):
        return False


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until no other process writes into the folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / "lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise InputError(
            f"tokens cannot be written into {folder}: {error.strerror}. Name another place "
            "(cache=, in a configuration data.tokens)."
        ) from error
    try:
        with contextlib.suppress(OSError):  # some network file systems have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _open(folder: Path, rules: Rules, identity: str, pairs: StoredPreferences) -> TokenizedPairs:
    """Opens tokens, narrowed to the pairs that are asked for."""
    store = json.loads((folder / "store.json").read_text(encoding="utf-8"))
    path = folder / "rows.bin"
    rows: np.ndarray = np.memmap(path, ROW, "r") if path.stat().st_size else np.zeros(0, ROW)
    report = _report(store["report"])
    # Decided for all pairs, so that every side of a split has the same columns.
    margins = not np.isnan(rows["margin"]).all()
    if pairs.rows is not None:
        kept = np.flatnonzero(np.isin(rows["source"], pairs.rows))
        rows = rows[kept]
        report = _report_of_side(report, rows, pairs.rows)
        identity = hashlib.sha256(
            identity.encode() + np.ascontiguousarray(pairs.rows, "<i8").tobytes()
        ).hexdigest()
    column = {name: np.ascontiguousarray(rows[name]) for name in ROW.names or () if name != "cuts"}
    names = tuple(sorted(store["groups"]))
    numbers = np.array([*map(names.index, store["groups"]), -1], np.int32)
    file, start = TokenFile(folder / "tokens.bin"), column["start"]
    file.warm()
    parts: dict[str, Any] = {}
    for name in ("prompt", "chosen", "rejected"):
        parts[name] = StoredRagged(file, start, column[name])
        start = start + column[name]
    source = column["source"]
    return TokenizedPairs(
        **parts,
        preference=column["preference"],
        weight=column["weight"],
        pad=rules.encoder.pad,
        group=numbers[column["group"]] if names else None,
        margin=np.nan_to_num(column["margin"], nan=0.0) if margins else None,
        group_names=names,
        source=source if pairs.rows is None else np.searchsorted(pairs.rows, source),
        max_length=rules.max_length,
        report=report,
        identity=identity,
    )


def _report(values: dict[str, Any]) -> TokenizationReport:
    dropped = [DroppedPair(**entry) for entry in values["dropped"]]
    return TokenizationReport(**{**values, "dropped": dropped})


def _report_of_side(
    whole: TokenizationReport, rows: np.ndarray, wanted: np.ndarray
) -> TokenizationReport:
    """Counts what tokenization did to some of the pairs."""
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
