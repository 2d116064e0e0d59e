"""Checkpoints that are whole or absent: complete, on the disk, and unchanged since."""

import contextlib
import errno
import hashlib
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import keras
import tensorflow as tf

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.training import sharded_state
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import make_directory, replaced
from dpo_keras.utils.backends import process_count, uses_jax
from dpo_keras.utils.keras_internals import raise_failed_writes

_WEIGHTS = "state.weights.h5"
_SHARDED = "state"  # a directory, in place of the file: of trainings on JAX
_META = "checkpoint.json"
_FULL = (errno.ENOSPC, errno.EDQUOT)
_MARGIN = 2**20  # bytes for what else a run writes meanwhile: logs, events


class RunCheckpoint(keras.callbacks.Callback):
    """Save weights, reference, adapters and optimizer, with the step they belong to.

    A checkpoint is a directory `step-00000040/`, written under another name and renamed once it is
    on disk. Whatever interrupts it (a kill, a full disk), the last good one stays and a
    half-written one is never loaded. Older ones are removed last. On JAX it is written while the
    training goes on; the next one, and the end of the training, wait for it.

    Args:
        directory: where checkpoints go.
        every: steps between checkpoints; None saves at the end of each epoch only.
        keep: number of the newest checkpoints that are kept.
        start_step: steps taken before.
        save: False on workers other than the chief. On JAX they write their share of the state.
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
        self._writing: Future[pathlib.Path] | None = None

    def on_epoch_begin(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Count the steps of the epoch."""
        self._end_of_epoch = self.step + (self.params.get("steps") or 0)

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Save after every `every` steps.

        The last step of an epoch waits for the epoch's end. A run that is killed in between would
        else go on behind an evaluation that nobody has recorded.
        """
        before, self.step = self.step, self.step + self.model.steps_per_execution
        due = self.every is not None and before // self.every != self.step // self.every
        if due and self.step != self._end_of_epoch:
            self.save_now()

    def on_epoch_end(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Save."""
        self.save_now()

    def on_train_end(self, logs: dict[str, JSON] | None = None) -> None:
        """Wait for what is being written."""
        self.wait()

    def save_now(self) -> None:
        """Save, unless this step is saved already."""
        if (self.save or process_count() > 1) and self.saved != self.step:
            self.wait()
            finish = _start_checkpoint(self.model, self.directory, self.step, self.keep, self.save)
            self.saved = self.step
            if uses_jax():
                executor = ThreadPoolExecutor(1)
                self._writing = executor.submit(finish)
                executor.shutdown(wait=False)
            else:
                finish()

    def wait(self) -> None:
        """Wait until the latest checkpoint is on disk."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()


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
    return _start_checkpoint(model, pathlib.Path(directory), step, keep)()


def _start_checkpoint(
    model: keras.Model, directory: pathlib.Path, step: int, keep: int, writes: bool = True
) -> Callable[[], pathlib.Path]:
    """Take a model's state as it is now; return what waits until it is a checkpoint.

    On JAX all processes write their share of the state, and the one that `writes` does the rest.
    """
    final = directory / f"step-{step:08d}"
    state = directory / f".{final.name}.{_SHARDED}"
    write = None
    with _failures_explained(directory, step):
        if writes:
            make_directory(directory)
            for left_behind in directory.glob(".step-*"):  # by a process that was killed
                shutil.rmtree(left_behind, ignore_errors=True)
            _check_room(model, directory)
        if uses_jax():
            write = sharded_state.start_writing(model, state)

    def finish() -> pathlib.Path:
        with _failures_explained(directory, step):
            if write is not None:
                write()
            if writes:
                _complete(model, final, state, step)
        if writes:
            # Later ones were found damaged when this run went on from before them: they count for
            # nothing.
            for old in [path for path in _checkpoints(directory) if _step(path) <= step][:-keep]:
                shutil.rmtree(old, ignore_errors=True)
        return final

    return finish


def _complete(model: keras.Model, final: pathlib.Path, state: pathlib.Path, step: int) -> None:
    """Make a checkpoint of a state that is on disk; on TensorFlow write the state first."""
    with replaced(final) as partial:
        partial.mkdir()
        if uses_jax():
            written = state.replace(partial / _SHARDED)
        else:
            written = partial / _WEIGHTS
            with raise_failed_writes():
                model.save_weights(written)
        size, checksum = sharded_state.size_of(written), _checksum(written)
        meta = json.dumps({"step": step, "bytes": size, "sha256": checksum})
        (partial / _META).write_text(meta, encoding="utf-8")


@contextlib.contextmanager
def _failures_explained(directory: pathlib.Path, step: int) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        kept = latest_checkpoint(directory)
        last = "there is no earlier one" if kept is None else f"the last good one is {kept[1].name}"
        full = getattr(error, "errno", None) in _FULL
        reason = os.strerror(errno.ENOSPC) if full else str(error)
        remedy = "Free some space and continue" if full else "Fix that and continue"
        raise OSError(
            f"checkpoint at step {step} could not be written to {directory} ({reason}); {last}. "
            f"{remedy} with --resume."
        ) from error


def latest_checkpoint(directory: str | os.PathLike[str]) -> tuple[int, pathlib.Path] | None:
    """Return the step and the path of the newest whole checkpoint; None where there is none.

    Its weights are read, and compared with their checksum.

    Example:
        >>> latest_checkpoint("no/such/directory") is None
        True
    """
    for path in reversed(_checkpoints(pathlib.Path(directory))):
        if _damage(path) is None:
            return _step(path), path
    return None


def load_checkpoint(
    model: keras.Model,
    directory: str | os.PathLike[str],
    note: Callable[[str], object] = print,
) -> int:
    """Restore a model from its newest whole checkpoint.

    Args:
        model: built and compiled as the saved one was.
        directory: where checkpoints are.
        note: called with a line for each newer checkpoint that is damaged.

    Returns:
        The step it was taken at; 0 where there is none (the model stays as it is).

    Raises:
        InputError: the checkpoint does not fit the model, or all checkpoints are damaged.
    """
    damaged: list[str] = []
    for path in reversed(_checkpoints(pathlib.Path(directory))):
        try:
            damage = _damage(path)
            if damage is None:
                _read(model, path)
        except (ValueError, KeyError) as error:
            raise InputError(
                f"checkpoint {path} does not fit this model ({error}). Was the configuration "
                "changed?"
            ) from error
        except OSError as error:  # HDF5 cannot read it; no checksum has told so before
            damage = str(error)
        if damage is None:
            for line in damaged:
                note(f"warning: checkpoint {line}; the run goes on from {path.name}.")
            return _step(path)
        damaged.append(f"{path.name} is damaged ({damage})")
    if damaged:
        raise InputError(
            f"no checkpoint in {directory} can be used: {'; '.join(damaged)}. Restore one from a "
            "copy, or remove the directory to train from the beginning."
        )
    return 0


def _checkpoints(directory: pathlib.Path) -> list[pathlib.Path]:
    """Return the checkpoints of a directory, by their steps; some may be damaged."""
    return sorted(path for path in directory.glob("step-*") if path.name[5:].isdecimal())


def _step(path: pathlib.Path) -> int:
    return int(path.name[5:])


def _read(model: keras.Model, path: pathlib.Path) -> None:
    if not (path / _SHARDED).is_dir():
        model.load_weights(path / _WEIGHTS)
    elif not uses_jax():
        raise InputError(f"checkpoint {path} was written on JAX; go on with training.backend: jax.")
    else:
        sharded_state.read(model, path / _SHARDED)
        if hasattr(model, "reference"):
            model.reference.starts_as_policy = False  # as of weights that are loaded


def _damage(path: pathlib.Path) -> str | None:
    """Say what is wrong with a checkpoint; None where it is as it was written."""
    name, state = _META, _SHARDED if (path / _SHARDED).is_dir() else _WEIGHTS
    try:
        meta = json.loads((path / _META).read_text(encoding="utf-8"))
        step, size, checksum = int(meta["step"]), int(meta["bytes"]), meta.get("sha256")
        if step != _step(path):
            return f"{_META} is of step {step}"
        name = state
        found = sharded_state.size_of(path / state)
        if found != size:
            return f"{state} has {found:,} bytes instead of {size:,}"
        # Checkpoints of earlier versions carry no checksum.
        if checksum is not None and _checksum(path / state) != checksum:
            return f"the SHA-256 checksum of {state} is another"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    except (ValueError, TypeError, KeyError, AttributeError):
        return f"{_META} is not as it was written"
    return None


def _checksum(path: pathlib.Path) -> str:
    """Return the checksum of a file, or of all files of a directory with their names."""
    digests = []
    for one in sharded_state.files_of(path):
        with one.open("rb") as file:
            digests.append((one, hashlib.file_digest(file, "sha256").hexdigest()))
    if not path.is_dir():
        return digests[0][1]
    lines = [f"{one.relative_to(path)} {digest}\n" for one, digest in digests]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _check_room(model: keras.Model, directory: pathlib.Path) -> None:
    variables = [*model.variables, *model.optimizer.variables]
    needed = sum(math.prod(v.shape) * tf.as_dtype(v.dtype).size + 4096 for v in variables)
    if shutil.disk_usage(directory).free < needed + _MARGIN:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
