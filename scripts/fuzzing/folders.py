"""Folders whose files carry checksums: they read as they were written, or are refused."""

from __future__ import annotations

import contextlib
import io
import itertools
import random
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from dpo_keras.preferences import StoredPreferences, build_preferences
from fuzzing.kind import Finding, Kind, Mutate
from fuzzing.text_files import row_of, some_pairs


class DamagedFolder(Kind):
    """A folder whose files carry checksums: it reads as it was written, or is refused."""

    def make(self, folder: Path) -> None:
        """Write it."""
        raise NotImplementedError

    def read(self, folder: Path) -> Any:
        """Read all that is trained on."""
        raise NotImplementedError

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.make(folder / "whole")
        self.whole = self.read(folder / "whole")
        self.names = sorted(
            path.relative_to(folder / "whole")
            for path in (folder / "whole").rglob("*")
            if path.is_file() and self.counts(path)
        )
        self.numbers = itertools.count()

    def counts(self, path: Path) -> bool:
        """Return whether a file may be damaged; others do not matter to training."""
        return True

    def attempt(self, chance: random.Random, mutate: Mutate) -> str:
        """Damage it, and compare what is read with what it says."""
        copy = self.folder / str(next(self.numbers))
        shutil.copytree(self.folder / "whole", copy)
        victim = copy / chance.choice(self.names)
        victim.write_bytes(mutate(victim.read_bytes()))
        said = io.StringIO()
        try:
            with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
                found = self.read(copy)
        finally:
            shutil.rmtree(copy)
        if found == self.whole:
            return "unchanged"
        if self.may_differ(found) and said.getvalue().strip():
            return "reported"
        raise Finding(f"{victim.name} was damaged, and read as something else")

    def may_differ(self, found: Any) -> bool:
        """Return whether this reading is right where it was announced."""
        return False


class Built(DamagedFolder):
    """A directory of `data build`."""

    name = "built"

    def make(self, folder: Path) -> None:
        """Write it."""
        build_preferences(some_pairs(), folder, shard_bytes=1500)

    def read(self, folder: Path) -> Any:
        """Read all that is trained on."""
        pairs = StoredPreferences.open(folder)
        train, held_out = pairs.split(0.3)
        return [[row_of(pair) for pair in side] for side in (pairs, train, held_out)]

    def counts(self, path: Path) -> bool:
        """Return whether a file may be damaged."""
        return path.name not in ("dataset_info.json", "features.json")  # for TFDS


class Tokens(DamagedFolder):
    """The tokens of a built directory."""

    name = "tokens"

    def make(self, folder: Path) -> None:
        """Write it."""
        build_preferences(some_pairs(), folder)

    def read(self, folder: Path) -> Any:
        """Read all that is trained on."""
        from dpo_keras.batching import tokenize_pairs

        found = tokenize_pairs(StoredPreferences.open(folder), Letters(), max_length=512)
        rows = [[part[row].tolist() for part in found.parts] for row in range(len(found))]
        return rows, found.preference.tolist(), found.weight.tolist(), found.group_names

    def counts(self, path: Path) -> bool:
        """Return whether a file may be damaged."""
        return "tokens" in path.parts and path.stat().st_size > 0


class Letters:
    """A tokenizer: one token per letter."""

    start_token_id, end_token_id, pad_token_id = 1, 2, 0

    def tokenize(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the letters' numbers."""
        return [[ord(letter) for letter in text] for text in texts]


class Checkpoints(DamagedFolder):
    """Two checkpoints of a run, of which the newer is damaged."""

    name = "checkpoint"

    def make(self, folder: Path) -> None:
        """Write it."""
        import keras

        from dpo_keras.training.checkpoints import save_checkpoint

        keras.utils.set_random_seed(0)
        self.model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(8)])
        self.model.compile(keras.optimizers.Adam(0.1), loss="mse")
        for step in (10, 20):
            self.model.fit(np.ones((1, 4)), np.full((1, 8), step), verbose=0)
            save_checkpoint(self.model, folder, step)
        shutil.rmtree(folder / "step-00000020")
        self.older = self.read(folder)
        self.model.fit(np.ones((1, 4)), np.ones((1, 8)), verbose=0)
        save_checkpoint(self.model, folder, 20)

    def read(self, folder: Path) -> Any:
        """Read all that is trained on."""
        from dpo_keras.training.checkpoints import load_checkpoint

        for variable in [*self.model.variables, *self.model.optimizer.variables]:
            variable.assign(variable * 0)
        step = load_checkpoint(self.model, folder)
        variables = [*self.model.variables, *self.model.optimizer.variables]
        return step, [variable.numpy().tolist() for variable in variables]

    def counts(self, path: Path) -> bool:
        """Return whether a file may be damaged."""
        return path.parent.name == "step-00000020"

    def may_differ(self, found: Any) -> bool:
        """Return whether it is the older checkpoint."""
        return found == self.older
