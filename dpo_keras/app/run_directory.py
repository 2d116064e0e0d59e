"""A run's directory: everything that is needed to look at a run, go on with it, or repeat it.

README.md lists its files. `result.json` is written last, and marks the run done.
"""

from __future__ import annotations

import errno
import json
import platform
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from dpo_keras.app.config import Config, parse_config, read_text
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import make_directory, write_text
from dpo_keras.utils.file_lock import FileLock, LockedError

_PACKAGES = [
    *("dpo-keras", "tensorflow", "tensorflow-text", "keras", "keras-hub", "numpy", "tokenizers"),
    *("pydantic", "jinja2"),
]
_BEFORE_TRAINING = (
    *("config.yaml", "config.given.yaml", "versions.json", "data.json", "metrics.jsonl"),
    *("metrics.warmup.jsonl", "reference", "reference_cache", "before", "checkpoints"),
    *("tensorboard", "trained_prompts.npy"),
)


_LOCK = "run.lock"
_HALF_WRITTEN = (".*.partial*", ".*.old")


class RunDirectory:
    """The paths of a run, and its small files."""

    def __init__(self, path: str | Path, writes: bool = True, temporary: bool = False):
        self.path = Path(path)
        self.writes = writes  # False on workers that only take part
        self.temporary = temporary  # of a trial, which leaves nothing behind elsewhere either
        self.checkpoints = self.path / "checkpoints"
        self.policy = self.path / "policy"
        self.adapters = self.path / "adapters.npz"  # only of a policy with LoRA
        self.reference = self.path / "reference"
        self.reward_head = self.path / "reward_head.npy"  # only of a reward model

    @property
    def begun(self) -> bool:
        """Whether there is any training, or a round of an improvement, that could be lost."""
        begun = (*self.checkpoints.glob("*/step-*"), *self.path.glob("round-*"))
        return self.finished or bool(begun)

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "result.json").is_file()

    def write(self, name: str, content: JSON) -> None:
        """Write a file, whole or not at all: JSON, JSON lines or text, by the name's suffix."""
        if not self.writes:
            return
        if name.endswith(".json"):
            text = json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
        elif name.endswith(".jsonl"):
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
        else:
            text = str(content)
        write_text(self.path / name, text)

    def read(self, name: str) -> JSON:
        """Read a JSON file of the run; None where it does not exist."""
        path = self.path / name
        if not path.is_file():
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"{path} is damaged: it holds no JSON ({error}).") from error

    def config(self) -> Config:
        """Read the resolved configuration; raise an `InputError` if this is no run directory."""
        path = self.path / "config.yaml"
        if not path.is_file():
            what = "it has no config.yaml" if self.path.exists() else "it does not exist"
            raise InputError(f"{self.path} is not the directory of a run: {what}.")
        return parse_config(read_text(path), source=str(path), stored=True)


@contextmanager
def locked_run(config: Config, resume: bool, writes: bool) -> Iterator[None]:
    """Keep the directory of a run that may begin or go on to this process, in a block of code.

    Raises:
        InputError: the directory is something else, cannot be written to, or is in use by another
            process.
    """
    run, _ = check_run(config, resume)
    if not writes:
        yield
        return
    new = not run.path.exists()
    with writable("output", run.path):
        make_directory(run.path)
        lock = FileLock(run.path / _LOCK)
        try:
            lock.acquire()
        except LockedError as error:
            why = f": {run.path} is in use by {error}; wait until it ends, or give another"
            why += " directory with output=DIRECTORY."
            raise InputError(InputProblem("output", why, hint=error.hint)) from error
    try:
        yield
    finally:
        if not (run.path / "config.yaml").is_file():
            _remove(run, "versions.json", "config.given.yaml")  # it did not begin
        lock.release()
        if new:
            with suppress(OSError):  # it has content
                run.path.rmdir()


@contextmanager
def writable(argument: str, path: str | Path) -> Iterator[None]:
    """Turn errors of writing to a place that the user named into an `InputError`."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO):
            raise  # the place is right, the disk is not
        rule = f": {path} cannot be written to ({error.strerror or error})"
        raise InputError(InputProblem(argument, rule, hint="Give another place.")) from error


def start_run(config: Config, resume: bool, given: str | None, writes: bool) -> RunDirectory:
    """Open the directory of a run that begins or goes on, and record its configuration in it."""
    if not writes:
        return RunDirectory(str(config.output), writes)
    run, goes_on = check_run(config, resume)
    if goes_on:
        _remove(run)
        return run
    # Input that was found wrong before any training must not be in the way of its correction.
    _remove(run, *_BEFORE_TRAINING)
    with writable("output", run.path):
        run.write("versions.json", versions())
        run.write("config.given.yaml", given or config.resolved())
        run.write("config.yaml", config.resolved())
    return run


def check_run(config: Config, resume: bool) -> tuple[RunDirectory, bool]:
    """Return the directory of a run that may begin or go on, and whether it goes on."""
    run = RunDirectory(str(config.output))
    with writable("output", run.path):
        # Somebody's own config.yaml makes no run of a directory.
        there = all((run.path / name).is_file() for name in ("config.yaml", "versions.json"))
        other = run.path.is_file() or (run.path.is_dir() and any(run.path.iterdir()))
    # A run that was killed before it wrote its configuration left its lock.
    other = other and not (there or (run.path / _LOCK).is_file())
    differences = config.differences(run.config()) if there and resume else []
    if there and not run.begun and (differences or not resume):
        return run, False
    if there and not resume:
        why = f": {run.path} holds a run already; go on with --resume, or give another directory"
        raise InputError(InputProblem("output", f"{why} with output=DIRECTORY."))
    if differences:
        raise InputError(
            [f"--resume needs the configuration that {run.path} was started with."]
            + [f"{difference} there." for difference in differences]
        )
    if other:
        why = f": {run.path} exists and is not the directory of a run; give another one"
        raise InputError(InputProblem("output", f"{why} with output=DIRECTORY."))
    return run, there


def _remove(run: RunDirectory, *names: str) -> None:
    """Remove files of a run, and what killed processes left half-written in it."""
    half_written = [path for pattern in _HALF_WRITTEN for path in run.path.glob(pattern)]
    for path in (*(run.path / name for name in names), *half_written):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def open_run(path: str | Path) -> RunDirectory:
    """Open the directory of a run that has trained a policy; anything else is an `InputError`."""
    run = RunDirectory(path)
    run.config()
    if not run.policy.is_dir():
        raise InputError(f"{path}: this run has no trained policy yet; finish it with --resume.")
    return run


def open_policy(path: str | Path) -> RunDirectory:
    """Open the directory of a run, as `open_run`; refuse a reward model, which writes no text."""
    run = open_run(path)
    if run.config().trains_reward:
        raise InputError(
            f"{path} must be the run of a policy; it has trained a reward model (loss.type: "
            "reward), which only `dpo-keras evaluate` and a judge of type reward take."
        )
    return run


def versions() -> dict[str, str]:
    """Return the versions of what a run depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
