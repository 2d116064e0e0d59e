"""Tokens of a built directory on disk: made once, in chunks, and continued after a stop.

SHA-256 of every file is kept and compared whenever tokens are opened or continued.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeAlias

import numpy as np

from dpo_keras.batching.ragged import TOKEN_BYTES, StoredRagged, TokenFile
from dpo_keras.batching.tokenized_pairs import (
    UNCUT,
    TokenizationReport,
    TokenizedPairs,
    identity_of_rows,
)
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import StoredPreferences
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text

Chunk: TypeAlias = tuple[TokenizedPairs, np.ndarray]
"""Tokens of some pairs, and their lengths before truncation, `UNCUT` `[n]`."""

FORMAT = "dpo_keras tokens 2"
FILES = ("tokens.bin", "rows.bin")
_COLUMNS = [
    *(("start", "<i8"), ("prompt", "<i4"), ("chosen", "<i4"), ("rejected", "<i4")),
    *(("preference", "<f4"), ("weight", "<f4"), ("margin", "<f4"), ("group", "<i4")),
    ("source", "<i8"),
]
ROW = np.dtype([*_COLUMNS, ("uncut", UNCUT)])
# Format 1 cut a prompt to one token before it cut responses. It had no checksums, and only knew
# whether the prompt was cut, whether a response was, and whether the responses are identical.
EARLIER_FORMAT = "dpo_keras tokens 1"
EARLIER_ROW = np.dtype([*_COLUMNS, ("cuts", "?", 3)])
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
    root = pairs.path / "tokens" if cache is None else Path(cache)
    folder, damage = root / _digest_of(key)[:16], ""
    store = _complete(folder)
    if store is None and (found := _earlier(root, key)):
        folder, store = found
    if store is None:
        with _locked(folder):
            store = _complete(folder)
            if store is None:
                if (folder / "store.json").exists():
                    damage = f"The tokens in {folder} were damaged, and have been made again."
                store = _write(folder, key, chunks)
    tokens = _open(folder, store, pairs, max_length)
    tokens.report.warnings[:0] = [damage] if damage else []
    return replace(tokens, pad=pad, max_length=max_length)


def _write(
    folder: Path, key: dict[str, JSON], chunks: Callable[[int], Iterable[Chunk]]
) -> dict[str, JSON]:
    """Make tokens, or those that are missing, and return the record of them."""
    progress, digests = _progress(folder, key)
    if not progress["sizes"]:
        for name in (*FILES, "store.json"):
            # Removed, not emptied: another process may still read them.
            (folder / name).unlink(missing_ok=True)
    report = TokenizationReport.from_dict(progress["report"])
    groups: dict[str, int] = {name: i for i, name in enumerate(progress["groups"])}
    with (folder / "tokens.bin").open("ab") as tokens, (folder / "rows.bin").open("ab") as rows:
        files = {"tokens.bin": tokens, "rows.bin": rows}
        for name, size in progress["sizes"].items():
            # What an earlier process wrote after its last commit does not count.
            files[name].truncate(size)
            files[name].seek(size)

        def commit() -> dict[str, JSON]:
            for file in files.values():
                file.flush()
                os.fsync(file.fileno())
            sizes = {name: file.tell() for name, file in files.items()}
            now = {"key": key, "groups": list(groups), "report": asdict(report)}
            return now | {"sizes": sizes, "sha256": _hexdigests(digests)}

        for number, (chunk, uncut) in enumerate(chunks(report.pairs), 1):
            laid, flat = _laid_out(chunk, uncut, tokens.tell() // TOKEN_BYTES, groups)
            for name, content in zip(FILES, (flat.tobytes(), laid.tobytes()), strict=True):
                files[name].write(content)
                digests[name].update(content)
            _add(report, chunk.report)
            if number % COMMIT == 0:
                _write_record(folder / "progress.json", commit())
        store = commit()
    _write_record(folder / "store.json", store)
    (folder / "progress.json").unlink(missing_ok=True)
    return store


def _progress(
    folder: Path, key: dict[str, JSON]
) -> tuple[dict[str, JSON], dict[str, hashlib._Hash]]:
    """Return the record that an earlier process left, and the digests to go on with."""
    record = _read_record(folder / "progress.json")
    if record is not None and record["key"] == key:
        digests = _digests(folder, record["sizes"])
        if _hexdigests(digests) == record["sha256"]:
            return record, digests
    nothing = {"sizes": {}, "groups": [], "report": asdict(TokenizationReport())}
    return nothing, _digests(folder, {})


def _complete(folder: Path) -> dict[str, JSON] | None:
    """Return the record of tokens that are all there and undamaged, else None."""
    record = _read_record(folder / "store.json")
    if record is None or not _sizes_match(folder, record["sizes"]):
        return None
    whole = _hexdigests(_digests(folder, record["sizes"])) == record["sha256"]
    return record if whole else None


def _earlier(root: Path, key: dict[str, JSON]) -> tuple[Path, dict[str, JSON]] | None:
    """Find tokens of format 1 that equal those that would be made now."""
    key = {**key, "format": EARLIER_FORMAT}
    least, kept = key.pop("min_prompt_tokens"), key.pop("kept")
    if kept:  # which were cut like all others
        return None
    folder = root / _digest_of(key)[:16]
    with contextlib.suppress(OSError, ValueError, KeyError):
        store: dict[str, JSON] = json.loads((folder / "store.json").read_text(encoding="utf-8"))
        if store["key"] == key and _sizes_match(folder, store["sizes"]):
            rows = np.fromfile(folder / "rows.bin", EARLIER_ROW)
            if not (rows["cuts"][:, 0] & (rows["prompt"] < least)).any():
                return folder, store
    return None


def _sizes_match(folder: Path, sizes: dict[str, int]) -> bool:
    with contextlib.suppress(OSError):
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    return False


def _write_record(path: Path, content: dict[str, JSON]) -> None:
    write_text(path, json.dumps({**content, "checksum": _digest_of(content)}))


def _read_record(path: Path) -> dict[str, JSON] | None:
    """Read what `_write_record` wrote; None where it is missing or damaged."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content: dict[str, JSON] = json.loads(path.read_text(encoding="utf-8"))
        if content.pop("checksum") == _digest_of(content):
            return content
    return None


def _digest_of(content: dict[str, JSON]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _digests(folder: Path, sizes: dict[str, int]) -> dict[str, hashlib._Hash]:
    """Return the SHA-256 of the first bytes of each file; updating them goes on from there."""
    digests = {name: hashlib.sha256() for name in FILES}
    for name, size in sizes.items():
        with contextlib.suppress(OSError), (folder / name).open("rb") as file:
            while part := file.read(min(size - file.tell(), 2**22)):
                digests[name].update(part)
    return digests


def _hexdigests(digests: dict[str, hashlib._Hash]) -> dict[str, str]:
    return {name: digest.hexdigest() for name, digest in digests.items()}


def _laid_out(
    tokens: TokenizedPairs, uncut: np.ndarray, start: int, groups: dict[str, int]
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
    rows["source"], rows["uncut"] = tokens.source, uncut
    flat = [part[row] for row in range(len(tokens)) for part in tokens.parts]
    return rows, np.concatenate([*flat, np.zeros(0, np.int32)]).astype("<i4")


def _add(report: TokenizationReport, chunk: TokenizationReport) -> None:
    """Add what rows do not tell; the rest is counted when they are opened."""
    report.pairs += chunk.pairs
    report.dropped += chunk.dropped[: LISTED - len(report.dropped)]
    for name in ("special_kept", "special_cut"):
        counts = Counter(getattr(report, name))
        counts.update(getattr(chunk, name))
        setattr(report, name, dict(counts))
    report.warnings += [text for text in chunk.warnings if text not in report.warnings]


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


def _open(
    folder: Path, store: dict[str, JSON], pairs: StoredPreferences, max_length: int
) -> TokenizedPairs:
    """Open the tokens of some pairs of the directory."""
    path, identity = folder / "rows.bin", _digest_of(store["key"])
    of_now = store["key"]["format"] == FORMAT
    kind = ROW if of_now else EARLIER_ROW
    rows: np.ndarray = np.memmap(path, kind, "r") if path.stat().st_size else np.zeros(0, kind)
    # Decided for all pairs, so that every side of a split has the same columns.
    margins = not np.isnan(rows["margin"]).all()
    if pairs.rows is not None:
        rows = rows[np.flatnonzero(np.isin(rows["source"], pairs.rows))]
        identity = identity_of_rows(identity, pairs.rows)
    column = {name: np.ascontiguousarray(rows[name]) for name, _ in _COLUMNS}
    report = _report(store["report"], pairs)
    if of_now:
        report.count(column["prompt"], (column["chosen"], column["rejected"]), rows["uncut"])
        report.warn_of_truncation(column["prompt"], rows["uncut"], max_length)
        report.warn_of_special_tokens()
    else:
        uncut = _uncut_of_earlier(rows)
        report.count(column["prompt"], (column["chosen"], column["rejected"]), uncut)
        report.warnings.append(
            f"The tokens in {folder} were made by an earlier version, without checksums; to make "
            "them again, delete that folder."
        )
    names = tuple(sorted(store["groups"]))
    numbers = np.array([*map(names.index, store["groups"]), -1], np.int32)
    file = TokenFile(folder / "tokens.bin")
    start, source = column["start"], column["source"]
    if pairs.rows is not None:
        source = np.searchsorted(pairs.rows, source)
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
        source=source,
        prompt_hash=pairs.prompt_hashes[source],
        report=report,
        identity=identity,
    )


def _uncut_of_earlier(rows: np.ndarray) -> np.ndarray:
    """Return lengths before truncation that tell what was cut, though not how much."""
    uncut = np.zeros(len(rows), UNCUT)
    uncut["prompt"] = rows["prompt"] + rows["cuts"][:, 0]
    uncut["response"] = np.maximum(rows["chosen"], rows["rejected"]) + rows["cuts"][:, 1]
    uncut["identical"] = rows["cuts"][:, 2]
    return uncut


def _report(stored: dict[str, JSON], pairs: StoredPreferences) -> TokenizationReport:
    """Return what was recorded about some pairs of the directory."""
    whole, wanted = TokenizationReport.from_dict(stored), pairs.rows
    if wanted is None:
        return whole
    place = {pair.index: int(np.searchsorted(wanted, pair.index)) for pair in whole.dropped}
    among = {i for i, at in place.items() if at < len(wanted) and wanted[at] == i}
    dropped = [replace(p, index=place[p.index]) for p in whole.dropped if p.index in among]
    return replace(whole, pairs=len(wanted), dropped=dropped)
