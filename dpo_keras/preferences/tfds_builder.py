"""The TensorFlow Datasets builder `preference_pairs`: preference files as a TFDS set.

    tfds build --imports dpo_keras.preferences.tfds_builder preference_pairs/jsonl \
        --manual_dir FOLDER

or, in Python, with files in any place:

    tfds.builder("preference_pairs", config=PreferencePairsConfig(name="mine", files=["a.csv"]))

Importing this module registers the builder. It needs `pip install "dpo-keras[tfds]"`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tensorflow_datasets as tfds

from dpo_keras.errors import InputError
from dpo_keras.preferences.file_formats import SUFFIXES, open_file
from dpo_keras.preferences.record_stream import Reading, RecordStream
from dpo_keras.preferences.stored_preferences import (
    FLAGS,
    IMAGES,
    NAMES,
    NUMBERS,
    TEXTS,
    to_features,
)
from dpo_keras.utils import JSON

ANY = tuple(suffix + end for suffix in SUFFIXES for end in ("", ".gz"))


@dataclass(eq=False)
class PreferencePairsConfig(tfds.core.BuilderConfig):
    """Which files to read, and how; the other fields are arguments of `read_preferences`."""

    # Files of the manual directory. A folder in it is a split; files directly in it are "train".
    suffixes: Sequence[str] = ANY
    names: Mapping[str, str] | None = None  # exactly these files of it instead, by split
    files: Sequence[str] | Mapping[str, Sequence[str]] | None = None  # these instead, from anywhere
    format: str = "auto"
    columns: Mapping[str, str] | None = None
    on_error: str = "report"

    def splits(self, folder: Path | None) -> dict[str, list[str]]:
        """Find the files of each split in the manual directory, where no `files` are given."""
        if self.files is not None:
            given = self.files if isinstance(self.files, Mapping) else {"train": self.files}
            return {split: [os.fspath(file) for file in files] for split, files in given.items()}
        assert folder is not None
        if self.names is not None:
            named = {split: folder / name for split, name in self.names.items()}
            found = {split: [str(file)] for split, file in named.items() if file.is_file()}
        else:
            folders = sorted(entry for entry in folder.iterdir() if entry.is_dir())
            found = {entry.name: self._matching(entry) for entry in folders}
            found["train"] = found.get("train", []) + self._matching(folder)
        found = {split: files for split, files in found.items() if files}
        if not found:
            wanted = ", ".join((self.names or {}).values()) or ", ".join(self.suffixes)
            raise InputError(f"{folder} holds no file for preference_pairs/{self.name}: {wanted}.")
        return found

    def _matching(self, folder: Path) -> list[str]:
        files = sorted(entry for entry in folder.iterdir() if entry.is_file())
        return [str(file) for file in files if file.name.lower().endswith(tuple(self.suffixes))]


def _config(name: str, description: str, *suffixes: str, **options: JSON) -> PreferencePairsConfig:
    options |= {"name": name, "description": description}
    return PreferencePairsConfig(suffixes=suffixes or ANY, **options)


class PreferencePairs(tfds.core.GeneratorBasedBuilder):
    """Preference pairs from files, validated, in the order of the files.

    Features are those of a built directory: `prompt`, `chosen`, `rejected` (text; JSON lists of
    role/content messages where `messages` is true), `preference`, `weight`, `margin` (float64, NaN
    without), `annotator`, `group`, `id` (empty without), `swapped`, `images` (JSON, empty without).
    `read_preferences("tfds:preference_pairs/jsonl:train")` returns the pairs of the files.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "First version."}
    MANUAL_DOWNLOAD_INSTRUCTIONS = (
        "Put the preference files into the manual directory (or folders in it, one per split), or "
        "give a PreferencePairsConfig with `files`."
    )
    BUILDER_CONFIGS = [
        _config("auto", "Every file of a known format."),
        _config("jsonl", "JSON Lines.", ".jsonl", ".ndjson"),
        _config("jsonl_gz", "JSON Lines, gzipped.", ".jsonl.gz", ".ndjson.gz"),
        _config("json", "One JSON list of records.", ".json", ".json.gz"),
        _config("csv", "CSV, messages as JSON.", ".csv", ".csv.gz"),
        _config("parquet", "Parquet.", ".parquet"),
        _config(
            "hh",
            "HH-RLHF's layout: train.jsonl.gz and test.jsonl.gz with whole conversations.",
            names={"train": "train.jsonl.gz", "test": "test.jsonl.gz"},
            format="jsonl",
        ),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=PreferencePairs.__doc__,
            features=tfds.features.FeaturesDict(features()),
            # The order is that of the files; training shuffles by its own seed.
            disable_shuffling=True,
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, JSON]:
        config: PreferencePairsConfig = self.builder_config
        folder = None if config.files is not None else Path(os.fspath(dl_manager.manual_dir))
        files = config.splits(folder)
        return {split: self._generate_examples(paths) for split, paths in files.items()}

    def _generate_examples(self, files: Sequence[str]) -> Iterator[tuple[int, dict[str, JSON]]]:
        config: PreferencePairsConfig = self.builder_config
        reading = Reading(config.format, config.columns)
        sources = (open_file(file, reading) for file in files)
        for number, pair in enumerate(RecordStream(sources, reading, config.on_error)):
            yield number, to_features(pair)


def features() -> dict[str, tfds.features.FeatureConnector]:
    """Return the features of a pair, as TensorFlow Datasets names them."""
    # As bytes: plain float features are cut to float32.
    encoding = tfds.features.Encoding.BYTES
    number = tfds.features.Tensor(shape=(), dtype=np.float64, encoding=encoding)
    return {
        **{name: tfds.features.Text() for name in (*TEXTS, *NAMES, IMAGES)},
        **dict.fromkeys(NUMBERS, number),
        **{name: tfds.features.Scalar(np.bool_) for name in FLAGS},
    }
