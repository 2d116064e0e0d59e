"""A run's directory: everything that is needed to look at a run, go on with it, or repeat it.

| file | content |
|---|---|
| `config.yaml`, `config.given.yaml` | the resolved configuration; the text as it was given |
| `versions.json` | packages, Python and platform |
| `metrics.jsonl`, `metrics.warmup.jsonl`, `tensorboard/` | figures of each step and evaluation |
| `checkpoints/` | where `--resume` goes on |
| `reference/` | the reference, where it is not just `model.path` |
| `policy/` | the trained policy, a KerasHub preset: `model.path` of a next run |
| `before/`, `after/` | figures of every held-out pair, and responses, before and after |
| `samples.jsonl` | the responses side by side |
| `report.*`, `result.json` | the outcome; `result.json` is written last, and marks the run done |
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from dpo_keras.app.config import Config, parse_config, read_text
from dpo_keras.errors import InputError

_PACKAGES = [
    "dpo-keras",
    "tensorflow",
    "tensorflow-text",
    "keras",
    "keras-hub",
    "numpy",
    "tokenizers",
    "pydantic",
    "jinja2",
]


_BEFORE_TRAINING = (
    *("config.yaml", "config.given.yaml", "versions.json", "data.json", "metrics.jsonl"),
    *("metrics.warmup.jsonl", "reference", "reference_cache", "before", "checkpoints"),
    "tensorboard",
)


class RunDirectory:
    """The paths of a run, and reading and writing of its small files.

    Args:
        path: the directory.
        writes: False on workers that only take part; they write nothing.
    """

    def __init__(self, path: str | Path, writes: bool = True):
        self.path = Path(path)
        self.writes = writes

    @property
    def checkpoints(self) -> Path:
        """Where checkpoints go."""
        return self.path / "checkpoints"

    @property
    def policy(self) -> Path:
        """The trained policy."""
        return self.path / "policy"

    @property
    def reference(self) -> Path:
        """The reference, where it had to be kept."""
        return self.path / "reference"

    @property
    def begun(self) -> bool:
        """Whether there is any training that could be lost."""
        return self.finished or any(self.checkpoints.glob("*/step-*"))

    @property
    def finished(self) -> bool:
        """Whether the run came to its end."""
        return (self.path / "result.json").is_file()

    def write(self, name: str, content: Any) -> None:
        """Writes a file, whole or not at all.

        Args:
            name: of the file; `.json` gets JSON, `.jsonl` a line per record, others text.
            content: what to write.
        """
        if not self.writes:
            return
        path = self.path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        try:
            partial.write_text(_text(path.suffix, content), encoding="utf-8")
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)

    def read(self, name: str) -> Any:
        """Reads a JSON file of the run; None where it is not there.

        Args:
            name: of the file.
        """
        path = self.path / name
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None

    def config(self) -> Config:
        """Reads the resolved configuration.

        Raises:
            InputError: if this is no run directory.
        """
        path = self.path / "config.yaml"
        if not path.is_file():
            what = "it does not exist" if not self.path.exists() else "it has no config.yaml"
            raise InputError(f"{self.path} is not the directory of a run: {what}.")
        return parse_config(read_text(path), source=str(path))


def _text(suffix: str, content: Any) -> str:
    if suffix == ".json":
        return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
    if suffix == ".jsonl":
        return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in content)
    return str(content)


def start_run(config: Config, resume: bool, given: str | None, writes: bool) -> RunDirectory:
    """Opens the directory of a run that begins or goes on.

    Args:
        config: the run's configuration.
        resume: whether it may go on where it was stopped.
        given: the configuration's text as it was given, for the record.
        writes: see `RunDirectory`.

    Returns:
        The directory, with configuration and versions in it.

    Raises:
        InputError: if a run is there and `resume` is False, or it had another configuration.
    """
    if not writes:
        return RunDirectory(str(config.output), writes)
    run, there = check_run(config, resume)
    if there:
        return run
    # Input that was found wrong before any training must not be in the way of its correction.
    _clear(run)
    run.write("versions.json", versions())
    run.write("config.given.yaml", given or config.resolved())
    run.write("config.yaml", config.resolved())
    return run


def check_run(config: Config, resume: bool) -> tuple[RunDirectory, bool]:
    """Looks whether a run may begin or go on in its directory; changes nothing.

    Args:
        config: the run's configuration.
        resume: whether it may go on where it was stopped.

    Returns:
        The directory, and whether the run in it goes on.

    Raises:
        InputError: as `start_run`.
    """
    run = RunDirectory(str(config.output))
    # Somebody's own config.yaml makes no run of a directory.
    there = all((run.path / name).is_file() for name in ("config.yaml", "versions.json"))
    differences = config.differences(run.config()) if there and resume else []
    if there and not run.begun and (differences or not resume):
        return run, False
    if there and not resume:
        raise InputError(
            f"output: {run.path} holds a run already; go on with --resume, or give another "
            "directory with output=DIRECTORY."
        )
    if differences:
        raise InputError(
            [f"--resume needs the configuration that {run.path} was started with."]
            + [f"{difference} there." for difference in differences]
        )
    if not there and (run.path.is_file() or (run.path.is_dir() and any(run.path.iterdir()))):
        raise InputError(
            f"output: {run.path} is there and is not the directory of a run; give another one with "
            "output=DIRECTORY."
        )
    return run, there


def _clear(run: RunDirectory) -> None:
    """Removes what a run leaves before it trains; nothing else, whoever put it there."""
    for path in (*(run.path / name for name in _BEFORE_TRAINING), *run.path.glob(".*.partial")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def open_run(path: str | Path) -> RunDirectory:
    """Opens the directory of a run that has trained a policy.

    Args:
        path: the directory.

    Raises:
        InputError: if it is no run directory, or has no trained policy yet.
    """
    run = RunDirectory(path)
    run.config()
    if not run.policy.is_dir():
        raise InputError(f"{path}: this run has no trained policy yet; finish it with --resume.")
    return run


def versions() -> dict[str, str]:
    """Returns the versions of what a run depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed as a package"
    return found
