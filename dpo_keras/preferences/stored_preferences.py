"""Preference pairs on disk: the directory that `build_preferences` makes, read without loading it.

| file | content |
|---|---|
| `preference_pairs-train.tfrecord-00000-of-00008` … | the pairs, as `tf.train.Example` |
| `index.bin` | for each pair: shard, place, size and the hash of its prompt |
| `manifest.json` | counts, sizes and SHA-256 of every file, and the report of the reading |
| `dataset_info.json`, `features.json` | so that `tfds.builder_from_directory` reads it too |
| `tokens/` | token ids, a folder for each tokenizer, template and truncation (a cache) |
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import overload

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import PreferencePair
from dpo_keras.preferences.prompt_hashes import held_out_rows
from dpo_keras.preferences.read_report import ReadReport
from dpo_keras.preferences.record_files import (
    INDEX,
    MANIFEST,
    StoredFile,
    parse,
    read_manifest,
    sha256_of,
    size_fault,
)

INDEX_ROW = np.dtype([("shard", "<u4"), ("place", "<u8"), ("size", "<u4"), ("prompt", "<u8")])
# A TFRecord is length (8 bytes), its checksum (4), the data, their checksum (4).
RECORD_HEAD, RECORD_TAIL = 12, 4


class StoredPreferences(Sequence[PreferencePair]):
    """Pairs of a built directory: list-like, read from disk one by one, never all at once.

    What stays in memory is, of a selection, 8 bytes per pair.

    Args:
        path: the directory.
        shards: its shards.
        index: rows of `INDEX_ROW`, one per pair.
        report: how the pairs were read when the directory was built.
        rows: int64 `[N]`, which pairs of the directory these are, rising; None for all.

    Attributes:
        extent: pairs of the directory up to the last that may be among these; tokens are made for
            so many.
    """

    def __init__(
        self,
        path: Path,
        shards: Sequence[StoredFile],
        index: np.ndarray,
        report: ReadReport,
        rows: np.ndarray | None = None,
    ):
        self.path = path
        self.shards = tuple(shards)
        self.report = report
        self.rows = rows
        self.extent = len(index)
        self._index = index

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> StoredPreferences:
        """Opens a built directory, and checks that every file is there in its full size.

        Checksums are compared when a shard is read from its beginning; see `verify`.

        Raises:
            InputError: if it is no built directory, or naming every file that is missing or cut.
        """
        folder = Path(path)
        manifest = read_manifest(folder)
        try:
            shards = [StoredFile(**entry) for entry in manifest["shards"]]
            index = StoredFile(**manifest["index"])
            report = ReadReport.from_dict(manifest["report"])
        except (KeyError, TypeError) as error:
            raise InputError(
                f"{folder / MANIFEST} is damaged ({type(error).__name__}: {error}); build again."
            ) from error
        faults = [fault for file in (*shards, index) if (fault := size_fault(folder, file))]
        if faults:
            raise InputError(faults)
        rows = np.memmap(folder / INDEX, INDEX_ROW, "r")
        return cls(folder, shards, rows, report)

    @property
    def checksum(self) -> str:
        """SHA-256 over the shards' own: two directories of equal checksum hold the same pairs."""
        return hashlib.sha256("".join(s.sha256 for s in self.shards).encode()).hexdigest()

    @property
    def whole(self) -> StoredPreferences:
        """All pairs of the directory up to `extent`."""
        return StoredPreferences(self.path, self.shards, self._index[: self.extent], self.report)

    @property
    def prompt_hashes(self) -> np.ndarray:
        """The hash of each pair's prompt, uint64 `[N]`."""
        hashes = self._index["prompt"]
        return np.asarray(hashes if self.rows is None else hashes[self.rows])

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return self.extent if self.rows is None else len(self.rows)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...

    @overload
    def __getitem__(self, index: slice) -> StoredPreferences: ...

    def __getitem__(self, index: int | slice) -> PreferencePair | StoredPreferences:
        """Reads one pair; a slice reads nothing."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        row = index % len(self)
        return self._read_one(row if self.rows is None else int(self.rows[row]))

    def __iter__(self) -> Iterator[PreferencePair]:
        """Reads the pairs one after the other."""
        return self.read() if self.rows is None else map(self._read_one, map(int, self.rows))

    def __repr__(self) -> str:
        """Returns the count and the place."""
        return f"StoredPreferences({len(self):,} pairs of {self.path})"

    def select(self, rows: np.ndarray) -> StoredPreferences:
        """Returns some of the pairs.

        Args:
            rows: int `[n]`, numbers of pairs here, rising.
        """
        rows = np.asarray(rows, np.int64)
        chosen = rows if self.rows is None else self.rows[rows]
        selected = StoredPreferences(self.path, self.shards, self._index, self.report, chosen)
        selected.extent = self.extent
        return selected

    def first(self, count: int) -> StoredPreferences:
        """Returns the first pairs; nothing beyond them is ever tokenized.

        Args:
            count: how many.
        """
        if count >= len(self):
            return self
        if self.rows is not None:
            return self.select(np.arange(count))
        return StoredPreferences(self.path, self.shards, self._index[:count], self.report)

    def split(
        self, fraction: float, seed: int = 0, by: str = "prompt"
    ) -> tuple[StoredPreferences, StoredPreferences]:
        """Splits into training and held-out pairs; no prompt is ever on both sides.

        Each prompt is drawn by its own hash (`held_out_rows`), so that pairs may be added to the
        data without moving others; the held-out share is the fraction as nearly as chance has it.

        Args:
            fraction: share of the prompts to hold out, in (0, 1).
            seed: another seed draws another split.
            by: "prompt"; annotators and groups are kept apart only by `Preferences.split`.

        Returns:
            `(train, held_out)`.

        Raises:
            InputError: if an argument is wrong, or one side would be empty.
        """
        faults = []
        if isinstance(fraction, bool) or not 0 < fraction < 1:
            faults.append(f"fraction must be a number in (0, 1), got {fraction!r}.")
        if by != "prompt":
            faults.append(
                f"by must be 'prompt' for a built directory, got {by!r}: read_preferences of the "
                "files can keep annotators and groups apart."
            )
        if faults:
            raise InputError(faults)
        held = held_out_rows(self.prompt_hashes, fraction, seed)
        if held.all() or not held.any():
            side = "held-out" if not held.any() else "training"
            raise InputError(
                f"fraction {fraction:g} of {len(self):,} pairs, drawn by prompt with seed {seed}, "
                f"leaves the {side} side empty; choose another fraction or seed."
            )
        return self.select(np.flatnonzero(~held)), self.select(np.flatnonzero(held))

    def read(self, start: int = 0) -> Iterator[PreferencePair]:
        """Reads the directory's pairs in order, up to `extent`, from checked shards.

        Args:
            start: number of the first pair.

        Raises:
            InputError: if a shard's checksum is wrong.
        """
        number = 0
        for shard in self.shards:
            count = min(shard.pairs, self.extent - number)
            skipped = min(max(start - number, 0), count)
            if skipped < count:
                self._check(shard)
                rows = self._index[number + skipped : number + count]
                with open(self.path / shard.file, "rb") as file:
                    file.seek(int(rows[0]["place"]))
                    for size in rows["size"].tolist():
                        record = file.read(RECORD_HEAD + size + RECORD_TAIL)
                        yield parse(record[RECORD_HEAD : RECORD_HEAD + size])
            number += count

    def verify(self) -> None:
        """Compares the checksum of every file.

        Raises:
            InputError: naming every file that is not as it was written.
        """
        faults = []
        manifest = read_manifest(self.path)
        for file in (*self.shards, StoredFile(**manifest["index"])):
            try:
                self._check(file)
            except InputError as error:
                faults += error.problems
        if faults:
            raise InputError(faults)

    def _check(self, file: StoredFile) -> None:
        fault = size_fault(self.path, file)
        if fault is None and (found := sha256_of(self.path / file.file)) != file.sha256:
            fault = (
                f"{self.path / file.file} is damaged: its SHA-256 is {found[:12]}…, the manifest "
                f"has {file.sha256[:12]}…. Build the directory again, or restore the file."
            )
        if fault is not None:
            raise InputError(fault)

    def _read_one(self, row: int) -> PreferencePair:
        entry = self._index[row]
        shard = self.shards[int(entry["shard"])]
        try:
            with open(self.path / shard.file, "rb", buffering=0) as file:
                record = os.pread(
                    file.fileno(), int(entry["size"]), int(entry["place"]) + RECORD_HEAD
                )
            return parse(record)
        except (OSError, InputError) as error:
            raise InputError(
                f"{self.path / shard.file}: pair {row} cannot be read ({error}). Build the "
                "directory again, or restore the file."
            ) from error
