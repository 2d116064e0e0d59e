"""What a run exports: its policy as a SavedModel, during the run or later."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dpo_keras.app.config import Config
from dpo_keras.app.config_rules import keys_for_arguments
from dpo_keras.app.config_sections import Export
from dpo_keras.app.console import Progress, Silent
from dpo_keras.app.run_directory import RunDirectory, open_policy, writable
from dpo_keras.app.run_evaluation import load_trained
from dpo_keras.utils import JSON

if TYPE_CHECKING:
    from dpo_keras.preferences import Record
    from dpo_keras.training import DPOModel

_EXPORTED = "export.json"  # of a run: what it has exported


def export_run(
    run: str | Path,
    path: str | Path,
    *,
    max_new_tokens: int | None = None,
    progress: Progress | None = None,
) -> dict[str, JSON]:
    """Write a run's policy as a SavedModel, verified by loading it without Keras.

    `path` is `<name>/<version>`, or `<name>` for its next version. `max_new_tokens` is by default
    the configuration's; what does not fit its `data.max_length` is cut, which is noted. Return what
    was written, how it compared with the model in Python, and what it answered.
    """
    directory = open_policy(run)
    config = directory.config()
    progress = progress or Silent()
    if max_new_tokens is None:
        max_new_tokens = _tokens_to_export(config, progress)
    settings = {"path": str(path), "max_new_tokens": max_new_tokens}
    export = (config.export or Export()).model_copy(update=settings)
    progress.stage("Policy and reference")
    return export_model(config, export, load_trained(directory), (), progress)


def check_export(config: Config, run: RunDirectory) -> None:
    """Refuse a place for the export that is taken or cannot be written to, before any training."""
    if config.export is None or run.read(_EXPORTED) is not None:
        return
    from dpo_keras.serving.model_versions import version_path

    with keys_for_arguments(paths="export.path"):
        place = version_path(config.export.path or f"saved_models/{config.name}")
    parent = next(parent for parent in place.parents if parent.exists())
    with writable("export.path", place), tempfile.TemporaryDirectory(dir=parent):
        pass


def _tokens_to_export(config: Config, progress: Progress) -> int:
    """Return how long a response of an export may be: as configured, if that leaves a prompt."""
    wanted = (config.export or config.evaluation).max_new_tokens
    longest = config.data.max_length
    if wanted <= longest - 2:  # a prompt has two tokens at least
        return wanted
    progress.note(
        f"max_new_tokens is {longest // 2}: the configuration's {wanted} leave no room for a "
        f"prompt in data.max_length ({longest}), half of which is for each."
    )
    return longest // 2


def export_model(
    config: Config,
    settings: Export,
    model: DPOModel,
    pairs: Sequence[Record],
    progress: Progress,
    run: RunDirectory | None = None,
) -> dict[str, JSON]:
    """Export a model, and show what it answered to the first plain-text pair.

    A `run` that goes on after this uses what it has exported before.
    """
    from dpo_keras.serving import EXAMPLES, export
    from dpo_keras.serving.verification import calls

    progress.stage("Export")
    if run is not None and (before := _exported_before(run)) is not None:
        return before
    texts = [
        (str(pair.prompt), str(pair.responses[0]), str(pair.responses[-1]))
        for pair in pairs
        if len(pair.responses) > 1
        and all(isinstance(text, str) for text in (pair.prompt, *pair.responses))
    ]
    examples = (*texts[:1], *EXAMPLES)
    report = export(
        model,
        settings.path or f"saved_models/{config.name}",
        max_length=config.data.max_length,
        template=config.data.template,
        on_stage=progress.note,
        examples=examples,
        **settings.model_dump(exclude={"path"}),
    )
    progress.note(report.summary())
    answer = {
        name: {
            "request": {key: value[0] for key, value in inputs.items()},
            "response": {key: value[0] for key, value in report.answers[name].items()},
        }
        for name, inputs in calls(list(report.signatures), examples)
    }
    exported = {**report.as_dict(), "answer": answer}
    if run is not None:
        run.write(_EXPORTED, exported)
    return exported


def export_alone(
    config: Config, settings: Export, progress: Progress, run: RunDirectory
) -> dict[str, JSON]:
    """Export by a process that none of a mesh's other processes needs to wait for."""
    progress.stage("Export")
    if (before := _exported_before(run)) is not None:
        return before
    path = settings.path or f"saved_models/{config.name}"
    done = subprocess.run(
        [sys.executable, "-m", "dpo_keras.app", "export", str(run.path), path, "--json"],
        env={**os.environ, "KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the export failed: {done.stderr.strip().splitlines()[-1]}")
    found: dict[str, JSON] = json.loads(done.stdout)
    run.write(_EXPORTED, found)
    return found


def _exported_before(run: RunDirectory) -> dict[str, JSON] | None:
    exported = run.read(_EXPORTED)
    there = exported is not None and Path(exported["path"]).is_dir()
    return dict(exported) if there else None
