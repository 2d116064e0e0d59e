"""Checkpoints that are complete or absent."""

import errno
import json
import math
import os
import pathlib
import shutil

import keras
import tensorflow as tf

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import replaced

_WEIGHTS = "state.weights.h5"
_META = "checkpoint.json"


class RunCheckpoint(keras.callbacks.Callback):
    """Save weights, reference, adapters and optimizer, with the step they belong to.

    A checkpoint is a directory `step-00000040/`, written under another name and renamed once it is
    on disk. Whatever interrupts it (a kill, a full disk), the last good one stays and a
    half-written one is never loaded. Older ones are removed last.

    Args:
        directory: where checkpoints go.
        every: steps between checkpoints; None saves at the end of each epoch only.
        keep: number of the newest checkpoints that are kept.
        start_step: steps taken before.
        save: False on workers other than the chief.
    """

    def __init__(
        self,
        directory: str | os.PathLike[str],
        every: int | None = None,
        keep: int = 2,
        start_step: int = 0,
        save: bool = True,
    ):
        super().__init__()
        given = {"every": every, "keep": keep}.items()
        wrong = [InputProblem(n, "must be >= 1", v) for n, v in given if v is not None and v < 1]
        if wrong:
            raise InputError(wrong)
        self.directory = pathlib.Path(directory)
        self.every, self.keep, self.step, self.save = every, keep, start_step, save
        self.saved: int | None = None

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Save after every `every` steps."""
        before, self.step = self.step, self.step + self.model.steps_per_execution
        if self.every is not None and before // self.every != self.step // self.every:
            self.save_now()

    def on_epoch_end(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Save."""
        self.save_now()

    def save_now(self) -> None:
        """Save, unless this step is saved already."""
        if self.save and self.saved != self.step:
            save_checkpoint(self.model, self.directory, self.step, keep=self.keep)
            self.saved = self.step


def save_checkpoint(
    model: keras.Model, directory: str | os.PathLike[str], step: int, keep: int = 2
) -> pathlib.Path:
    """Write one checkpoint, complete or not at all, and remove old ones.

    Args:
        model: a compiled model.
        directory: where checkpoints go.
        step: optimizer steps taken.
        keep: number of the newest checkpoints that are kept.

    Returns:
        The checkpoint's directory.

    Raises:
        OSError: the disk is full or not writable; earlier checkpoints are untouched.
    """
    directory = pathlib.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    final = directory / f"step-{step:08d}"
    for left_behind in directory.glob(".step-*"):  # by a process that was killed
        shutil.rmtree(left_behind, ignore_errors=True)
    try:
        _check_room(model, directory)
        with replaced(final) as partial:
            partial.mkdir()
            model.save_weights(partial / _WEIGHTS)
            size = (partial / _WEIGHTS).stat().st_size
            meta = json.dumps({"step": step, "bytes": size})
            (partial / _META).write_text(meta, encoding="utf-8")
    except Exception as error:
        kept = latest_checkpoint(directory)
        last = "there is no earlier one" if kept is None else f"the last good one is {kept[1].name}"
        full = getattr(error, "errno", None) == errno.ENOSPC
        reason = os.strerror(errno.ENOSPC) if full else str(error)
        remedy = "Free some space and continue" if full else "Fix that and continue"
        raise OSError(
            f"checkpoint at step {step} could not be written to {directory} ({reason}); {last}. "
            f"{remedy} with --resume."
        ) from error
    for _, old in _checkpoints(directory)[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(directory: str | os.PathLike[str]) -> tuple[int, pathlib.Path] | None:
    """Return the step and the path of the newest complete checkpoint; None where there is none.

    Example:
        >>> latest_checkpoint("no/such/directory") is None
        True
    """
    found = _checkpoints(pathlib.Path(directory))
    return found[-1] if found else None


def load_checkpoint(model: keras.Model, directory: str | os.PathLike[str]) -> int:
    """Restore a model from its newest checkpoint.

    Args:
        model: built and compiled as the saved one was.
        directory: where checkpoints are.

    Returns:
        The step it was taken at; 0 where there is none (the model stays as it is).

    Raises:
        InputError: the checkpoint does not fit the model.
    """
    found = latest_checkpoint(directory)
    if found is None:
        return 0
    step, path = found
    try:
        model.load_weights(path / _WEIGHTS)
    except (ValueError, KeyError) as error:
        raise InputError(
            f"checkpoint {path} does not fit this model ({error}). Was the configuration changed?"
        ) from error
    return step


def _checkpoints(directory: pathlib.Path) -> list[tuple[int, pathlib.Path]]:
    found = []
    for path in directory.glob("step-*"):
        try:
            meta = json.loads((path / _META).read_text(encoding="utf-8"))
            if (path / _WEIGHTS).stat().st_size == meta["bytes"]:
                found.append((int(meta["step"]), path))
        except (OSError, ValueError, KeyError):
            continue
    return sorted(found)


def _check_room(model: keras.Model, directory: pathlib.Path) -> None:
    # HDF5 cannot close a file on a full disk: it fails now, and again as a crash when Python ends.
    variables = [*model.variables, *model.optimizer.variables]
    needed = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size + 4096 for v in variables)
    if shutil.disk_usage(directory).free < needed:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
