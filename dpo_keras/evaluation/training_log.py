"""The training log that `callbacks.RunLog` writes, read back for curves."""

from __future__ import annotations

import json
import os
import pathlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dpo_keras.errors import InputError


@dataclass(frozen=True)
class TrainingLog:
    """Records of a run.

    Attributes:
        steps: one per optimizer step (or every few), rising: `{"step", name: value}`.
        epochs: one per epoch: `{"epoch", "step", name: mean, "val_<name>": held-out mean}`.
        unreadable: lines that are no record, such as one that a killed run was writing.
    """

    steps: list[dict[str, Any]] = field(default_factory=list)
    epochs: list[dict[str, Any]] = field(default_factory=list)
    unreadable: int = 0

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Steps and values of a logged name; values may be NaN where training broke.

        Args:
            name: a logged name; those that begin with `val_` are read from the epoch records.
        """
        records = self.epochs if name.startswith("val_") else self.steps
        found = [(r["step"], r[name]) for r in records if _number(r.get(name))]
        points = np.array(found, np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    @property
    def names(self) -> list[str]:
        """All names that steps hold, in the order in which they were logged."""
        found = {name: None for record in self.steps for name in record if name != "step"}
        return list(found)

    def broken_step(self) -> int | None:
        """The first step whose loss or gradient norm is not finite, or None."""
        for record in self.steps:
            values = [record.get(name, 0.0) for name in ("loss", "grad_norm")]
            if not all(np.isfinite(value) for value in values if _number(value)):
                return int(record["step"])
        return None


def read_training_log(path: str | os.PathLike[str]) -> TrainingLog:
    r"""Reads a run's metrics.jsonl.

    Args:
        path: the file.

    Returns:
        Its records; lines that are none are counted, not fatal.

    Raises:
        InputError: there is no such file.

    Example:
        >>> import tempfile
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "metrics.jsonl"
        >>> _ = path.write_text('{"step": 1, "loss": 0.7}\n{"step": 2, "loss": 0.6}\n{"ste')
        >>> log = read_training_log(path)
        >>> log.curve("loss")[1].tolist(), log.unreadable
        ([0.7, 0.6], 1)
    """
    try:
        lines = pathlib.Path(path).read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise InputError(
            f"metrics_jsonl {os.fspath(path)!r} cannot be read: {error.strerror}."
        ) from error
    log = TrainingLog()
    unreadable = 0
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not _number(record.get("step")):
            unreadable += 1
        else:
            (log.epochs if "epoch" in record else log.steps).append(record)
    return TrainingLog(log.steps, log.epochs, unreadable)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
