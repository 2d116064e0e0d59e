"""Keras callbacks of preference training, and the log that `RunLog` writes, read back.

All callbacks of Keras work beside them.
"""

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import keras
import numpy as np
import tensorflow as tf

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.training.checkpoints import RunCheckpoint
from dpo_keras.training.generation import generate_responses
from dpo_keras.training.metrics import COUNTS, HIDDEN, with_margin
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import write_text

__all__ = [
    "Progress",
    "RunCheckpoint",
    "RunLog",
    "SampleResponses",
    "StopOnNonFinite",
    "SyncReference",
]


class SampleResponses(keras.callbacks.Callback):
    """Answer a few prompts as training proceeds, to show what the figures mean.

    Args:
        prompts: strings.
        every: epochs between samples; they are also taken before training.
        path: a JSONL file that each sample is appended to, or None.
        show: called with each record, or None.
        **options: as `dpo_keras.generate_responses`: `max_new_tokens`, `temperature`, `seed`, …

    Attributes:
        samples: records `{"epoch", "prompt", "response"}`; epoch 0 is before training.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        every: int = 1,
        path: str | os.PathLike[str] | None = None,
        show: Callable[[dict[str, JSON]], None] | None = None,
        **options: Any,
    ):
        super().__init__()
        if every < 1:
            raise InputError(InputProblem("every", "must be >= 1", every))
        self.prompts, self.every = list(prompts), every
        self.path = None if path is None else Path(path)
        self.show, self.options = show, options
        self.samples: list[dict[str, JSON]] = []

    def on_train_begin(self, logs: dict[str, JSON] | None = None) -> None:
        """Sample from the initial policy."""
        if not self.samples:
            self._sample(0)

    def on_epoch_end(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Sample from the current policy."""
        if (epoch + 1) % self.every == 0:
            self._sample(epoch + 1)

    def _sample(self, epoch: int) -> None:
        responses = generate_responses(self.model.policy, self.prompts, **self.options)
        for prompt, response in zip(self.prompts, responses, strict=True):
            record = {"epoch": epoch, "prompt": prompt, "response": response}
            self.samples.append(record)
            if self.path is not None:
                _append(self.path, record)
            if self.show is not None:
                self.show(record)


class RunLog(keras.callbacks.Callback):
    """Append a JSON line per step and per epoch to a file.

    Step records hold the values of that step; epoch records the means of the epoch, and of
    validation (`val_`). A resumed run first removes the records of steps that it takes again.

    Args:
        path: the file.
        start_step: steps taken before.
        every: steps between step records.
    """

    def __init__(self, path: str | os.PathLike[str], start_step: int = 0, every: int = 1):
        super().__init__()
        self.path, self.step, self.every = Path(path), start_step, every
        if self.path.exists():
            _keep_until(self.path, start_step)

    def evaluate_again(self, model: keras.Model, epoch: int, data: tf.data.Dataset) -> None:
        """Evaluate at the end of an epoch, from 1 on, if the run was stopped while it did so."""
        written = read_training_log(self.path).epochs if self.path.exists() else []
        if epoch and all(record["epoch"] != epoch for record in written):
            found = model.evaluate(data, return_dict=True, verbose=0)
            self.on_epoch_end(epoch - 1, {f"val_{name}": value for name, value in found.items()})

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Write the values of the step."""
        before, self.step = self.step, self.step + self.model.steps_per_execution
        if before // self.every != self.step // self.every:
            logged = with_margin(self.model.step_logs)
            values = {k: float(v) for k, v in logged.items() if k not in HIDDEN}
            _append(self.path, {"step": self.step, **values})

    def on_epoch_end(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Write the means of the epoch."""
        values = {name: float(value) for name, value in (logs or {}).items()}
        _append(self.path, {"epoch": epoch + 1, "step": self.step, **values})


class Progress(keras.callbacks.Callback):
    """Report each step to `show(dict)`: `step`, `steps`, speeds and the epoch's means so far."""

    def __init__(
        self,
        show: Callable[[dict[str, JSON]], object],
        start_step: int = 0,
        steps: int | None = None,
    ):
        super().__init__()
        self.show, self.step, self.steps = show, start_step, steps

    def on_epoch_begin(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Reset the clock."""
        self.clock: float | None = None
        self.before = dict.fromkeys(COUNTS, 0.0)

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Report the step; speed counts from the second one, since the first one is traced."""
        self.step += self.model.steps_per_execution
        counts, now = self.model.counts(), time.perf_counter()
        report: dict[str, JSON] = {"step": self.step, "steps": self.steps}
        if self.clock is None:
            self.clock, self.before = now, counts
        else:
            seconds = max(now - self.clock, 1e-9)
            for name, count in counts.items():
                report[f"{name}_per_second"] = (count - self.before[name]) / seconds
        self.show({**report, **{k: float(v) for k, v in (logs or {}).items()}})


class SyncReference(keras.callbacks.Callback):
    """Move the reference toward the policy as training proceeds: TR-DPO.

        every k steps: ref <- alpha policy + (1 - alpha) ref

    alpha = 1 replaces the reference (the hard update), a smaller alpha mixes it (the soft one).
    Checkpoints hold the reference as it is.

    Args:
        every: k, train steps between updates; micro-batches count one each.
        alpha: in (0, 1].
        start_step: steps taken before, for a resumed run.

    References:
        Gorbatovski et al., Learn Your Reference Model for Real Good Alignment, arXiv 2404.09656,
        equations 3 and 4.
    """

    def __init__(self, every: int = 512, alpha: float = 0.6, start_step: int = 0):
        super().__init__()
        problems = [] if every >= 1 else [InputProblem("every", "must be >= 1", every)]
        if not 0 < alpha <= 1:
            problems.append(InputProblem("alpha", "must be in (0, 1]", alpha))
        if problems:
            raise InputError(problems)
        self.every, self.alpha, self.step = every, alpha, start_step

    def on_train_begin(self, logs: dict[str, JSON] | None = None) -> None:
        """Refuse a reference that cannot move."""
        mode = getattr(getattr(self.model, "reference", None), "mode", None)
        if mode != "frozen_copy":
            rule = "a synchronised reference must be reference='frozen_copy'"
            raise InputError(f"{rule}, got {mode!r}.")

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Update the reference after every `every` steps."""
        before, self.step = self.step, self.step + self.model.steps_per_execution
        if before // self.every != self.step // self.every:
            self.model.reference.update_from_policy(self.alpha)


class StopOnNonFinite(keras.callbacks.Callback):
    """End a run whose loss or gradient became NaN or infinite.

    Raises:
        RuntimeError: at the first step with such a loss or gradient norm; names the step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taken = 0

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Check the loss and the gradient norm of the step."""
        self.taken += self.model.steps_per_execution
        values = {name: float(self.model.step_logs[name]) for name in ("loss", "grad_norm")}
        wrong = {name: value for name, value in values.items() if not math.isfinite(value)}
        # A loss scaler meets infinite gradients on its way to the right scale, and skips them.
        if hasattr(self.model.optimizer, "dynamic_scale"):
            wrong.pop("grad_norm", None)
        if wrong:
            named = " and ".join(f"{name} is {value}" for name, value in wrong.items())
            raise RuntimeError(
                f"{named} at step {self.taken} of this run. The last checkpoint is from before it. "
                "Lower the learning rate, clip gradients (clip_norm), or use bfloat16 instead of "
                "float16; `dpo-keras data inspect` finds pairs that do not fit."
            )


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

        Names that begin with `val_` come from the epoch records.
        """
        records = self.epochs if name.startswith("val_") else self.steps
        found = [(r["step"], r[name]) for r in records if _is_number(r.get(name))]
        points = np.array(found, np.float64).reshape(-1, 2)
        return points[:, 0], points[:, 1]

    @property
    def names(self) -> list[str]:
        """All names in the step records, in the order in which they were logged."""
        return [name for name in dict.fromkeys(n for r in self.steps for n in r) if name != "step"]

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
    log = TrainingLog()
    unreadable = 0
    for line in filter(str.strip, lines):
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict) or not _is_number(record.get("step")):
            unreadable += 1
        else:
            (log.epochs if "epoch" in record else log.steps).append(record)
    return TrainingLog(log.steps, log.epochs, unreadable)


def _is_number(value: JSON) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _append(path: Path, record: dict[str, JSON]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _keep_until(path: Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
        except ValueError:  # the line that a killed run was writing
            continue
    write_text(path, "".join(kept))
