"""The training log that `callbacks.RunLog` writes, read back for curves."""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeGuard

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.tensors import JSON


@dataclass(frozen=True)
class TrainingLog:
    """Records of a run.

    Attributes:
        steps: one per optimizer step (or every few), rising: `{"step", name: value}`.
        epochs: one per epoch: `{"epoch", "step", name: mean, "val_<name>": held-out mean}`.
        unreadable: number of lines that are not records, such as one cut off by a killed run.
    """

    steps: list[dict[str, JSON]] = field(default_factory=list)
    epochs: list[dict[str, JSON]] = field(default_factory=list)
    unreadable: int = 0

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Return the steps and the values of a logged name; values may be NaN.

        Args:
            name: a logged name. Names that begin with `val_` come from the epoch records.
        """
        records = self.epochs if name.startswith("val_") else self.steps
        found = [(r["step"], r[name]) for r in records if _is_number(r.get(name))]
        points = np.array(found, np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    @property
    def names(self) -> list[str]:
        """All names in the step records, in the order in which they were logged."""
        found = {name: None for record in self.steps for name in record if name != "step"}
        return list(found)

    def broken_step(self) -> int | None:
        """Return the first step whose loss or gradient norm is not finite, or None."""
        for record in self.steps:
            values = [record.get(name, 0.0) for name in ("loss", "grad_norm")]
            if not all(math.isfinite(value) for value in values if _is_number(value)):
                return int(record["step"])
        return None


def read_training_log(path: str | os.PathLike[str]) -> TrainingLog:
    r"""Read a run's metrics.jsonl.

    Args:
        path: the file.

    Returns:
        Its records. Unreadable lines are counted.

    Raises:
        InputError: the file cannot be read.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n{"ste')
        >>> log = read_training_log(path)
        >>> log.curve("loss")[1].tolist(), log.unreadable
        ([0.7, 0.6], 1)
    """
    try:
        lines = Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        rule = f"{os.fspath(path)!r} cannot be read: {error.strerror}"
        raise InputError(InputProblem("metrics_jsonl", rule)) from error
    steps: list[dict[str, JSON]] = []
    epochs: list[dict[str, JSON]] = []
    unreadable = 0
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not _is_number(record.get("step")):
            unreadable += 1
        else:
            (epochs if "epoch" in record else steps).append(record)
    return TrainingLog(steps, epochs, unreadable)


def _is_number(value: JSON) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)
