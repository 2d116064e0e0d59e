"""MLflow and Weights & Biases, through the Keras callbacks that they bring.

Written for mlflow 3.18 (`mlflow.keras.MlflowCallback`) and wandb 0.31
(`wandb.integration.keras.WandbMetricsLogger`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import keras

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.deferred_imports import missing_package
from dpo_keras.utils.text import did_you_mean


@contextmanager
def experiment_loggers(
    names: Sequence[str], *, run: str, settings: Mapping[str, JSON], every: int = 1
) -> Iterator[list[keras.callbacks.Callback]]:
    """Yield callbacks that report a training to the experiment trackers that are named.

    A run of the tracker that is active already is used and stays open; otherwise one is begun, and
    ended with the block. Where its data go is the tracker's own setting: `MLFLOW_TRACKING_URI`,
    `WANDB_MODE` and the like.

    Args:
        names: "mlflow" and "wandb".
        run: name of the run.
        settings: what the run was configured with, kept with it.
        every: steps between reports.

    Raises:
        InputError: an unknown name, or a package that is not installed.
    """
    problems = []
    for name in names:
        if name not in _LOGGERS:
            rule, hint = f"must be among {', '.join(_LOGGERS)}", did_you_mean(name, _LOGGERS)
            problems.append(InputProblem("loggers", rule, name, hint))
        elif problem := missing_package(name, extra=name):
            problems.append(InputProblem("loggers", problem))
    if problems:
        raise InputError(problems)
    with ExitStack() as runs:
        yield [_LOGGERS[name](runs, run, settings, every) for name in names]


def _mlflow(
    runs: ExitStack, run: str, settings: Mapping[str, JSON], every: int
) -> keras.callbacks.Callback:
    mlflow: Any = importlib.import_module("mlflow")
    if mlflow.active_run() is None:
        runs.enter_context(mlflow.start_run(run_name=run))
    mlflow.log_dict(dict(settings), "configuration.json")
    callback = importlib.import_module("mlflow.keras").MlflowCallback
    return callback(log_every_epoch=False, log_every_n_steps=every)


def _wandb(
    runs: ExitStack, run: str, settings: Mapping[str, JSON], every: int
) -> keras.callbacks.Callback:
    wandb: Any = importlib.import_module("wandb")
    if wandb.run is None:
        wandb.init(project="dpo-keras", name=run, config=dict(settings))
        runs.callback(wandb.finish)
    return importlib.import_module("wandb.integration.keras").WandbMetricsLogger(log_freq=every)


_LOGGERS: dict[str, Callable[..., keras.callbacks.Callback]] = {
    "mlflow": _mlflow,
    "wandb": _wandb,
}
