"""Pairs of a built directory as tokens on disk: made once per tokenizer, template and truncation.

| file | content |
|---|---|
| `tokens.bin` | int32 tokens: prompt, chosen, rejected of each pair, one after the other |
| `rows.bin` | a row of `ROW` per pair: where, how long, preference, weight, group, margin |
| `progress.json` | how far the two are good while they are being written |
| `store.json` | what they were made from, groups and report; written last |
"""

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

from dpo_keras.batching.encoding import TextEncoder
from dpo_keras.batching.pairs import TokenizedPairs
from dpo_keras.batching.report import DroppedPair, TokenizationReport
from dpo_keras.batching.stored_ragged import StoredRagged, TokenFile
from dpo_keras.batching.token_writing import ROW, write_tokens
from dpo_keras.batching.tokenization import Rules, tokenize_chunk
from dpo_keras.errors import InputError
from dpo_keras.preferences.stored import StoredPreferences

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
