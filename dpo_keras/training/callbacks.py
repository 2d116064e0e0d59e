"""Keras callbacks of preference training. All callbacks of Keras work beside them."""

import json
import math
import os
import pathlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import keras

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.training.checkpoints import RunCheckpoint
from dpo_keras.training.generation import generate_responses
from dpo_keras.training.metrics import COUNTS, HIDDEN
from dpo_keras.utils.atomic_files import write_text
from dpo_keras.utils.tensors import JSON

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
        self.prompts = list(prompts)
        self.every = every
        self.path = None if path is None else pathlib.Path(path)
        self.show = show
        self.options = options
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

    Step records hold the values of that step. Epoch records hold the means of the epoch, figures of
    validation (`val_`) included. A resumed run appends; it first removes the records of steps that
    it takes again, so that the file holds each step once.

    Args:
        path: the file.
        start_step: steps taken before.
        every: steps between step records.
    """

    def __init__(self, path: str | os.PathLike[str], start_step: int = 0, every: int = 1):
        super().__init__()
        self.path = pathlib.Path(path)
        self.step = start_step
        self.every = every
        if self.path.exists():
            _keep_until(self.path, start_step)

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Write the values of the step."""
        self.step += self.model.steps_per_execution
        if self.step % self.every == 0:
            values = {k: float(v) for k, v in self.model.step_logs.items() if k not in HIDDEN}
            _append(self.path, {"step": self.step, **values})

    def on_epoch_end(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Write the means of the epoch."""
        values = {name: float(value) for name, value in (logs or {}).items()}
        _append(self.path, {"epoch": epoch + 1, "step": self.step, **values})


class Progress(keras.callbacks.Callback):
    """Report steps, pairs per second and tokens per second to a function.

    Args:
        show: called after each step with a dict: `step`, `steps` (total, where known),
            `pairs_per_second`, `tokens_per_second`, and the epoch's means so far.
        start_step: steps taken before.
        steps: total number of steps.
    """

    def __init__(
        self,
        show: Callable[[dict[str, JSON]], object],
        start_step: int = 0,
        steps: int | None = None,
    ):
        super().__init__()
        self.show = show
        self.step = start_step
        self.steps = steps

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

    alpha = 1 replaces the reference (the hard update), a smaller alpha mixes it (the soft one). The
    reference is part of the model's state, so checkpoints hold it as it is.

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
        problems = []
        if every < 1:
            problems.append(InputProblem("every", "must be >= 1", every))
        if not 0 < alpha <= 1:
            problems.append(InputProblem("alpha", "must be in (0, 1]", alpha))
        if problems:
            raise InputError(problems)
        self.every, self.alpha, self.step = every, alpha, start_step

    def on_train_begin(self, logs: dict[str, JSON] | None = None) -> None:
        """Refuse a reference that cannot move."""
        mode = getattr(getattr(self.model, "reference", None), "mode", None)
        if mode != "frozen_copy":
            raise InputError(
                f"a synchronised reference must be reference='frozen_copy', got {mode!r}."
            )

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


def _append(path: pathlib.Path, record: dict[str, JSON]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record, ensure_ascii=False) + "\n")


def _keep_until(path: pathlib.Path, step: int) -> None:
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line).get("step", 0) <= step:
                kept.append(line + "\n")
        except ValueError:  # the line that a killed run was writing
            continue
    write_text(path, "".join(kept))
