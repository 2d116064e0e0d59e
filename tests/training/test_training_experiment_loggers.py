"""MLflow and Weights & Biases by name, with stand-ins of the interface of the real packages.

They have the signatures of mlflow 3.18 and wandb 0.31.
"""

import importlib.machinery
import sys
import types

import keras
import pytest

from dpo_keras.errors import InputError
from dpo_keras.training import DPOModel
from dpo_keras.training.experiment_loggers import experiment_loggers


def module(name, **content):
    made = types.ModuleType(name)
    made.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(made).update(content)
    return made


@pytest.fixture
def trackers(monkeypatch):
    """Put stand-ins for both packages in place; return what they are told, in order."""
    told = []

    class Run:
        def __enter__(self):
            told.append("mlflow begins")

        def __exit__(self, *error):
            told.append("mlflow ends")

    class MlflowCallback(keras.callbacks.Callback):
        def __init__(self, log_every_epoch=True, log_every_n_steps=None, model_id=None):
            assert not (log_every_epoch and log_every_n_steps)
            self.every = log_every_n_steps

        def on_batch_end(self, batch, logs=None):
            if int(self.model.optimizer.iterations.numpy()) % self.every == 0:
                told.append(("mlflow", float(logs["loss"])))

    class WandbMetricsLogger(keras.callbacks.Callback):
        def __init__(self, log_freq="epoch", initial_global_step=0):
            super().__init__()
            assert wandb.run is not None, "You must call `wandb.init()`"
            self.every = log_freq

        def on_train_batch_end(self, batch, logs=None):
            if batch % self.every == 0:
                told.append(("wandb", float(logs["loss"])))

    def init(project, name, config):
        wandb.run = name
        told.append(("wandb begins", project, name, config["seed"]))

    def finish():
        wandb.run = None
        told.append("wandb ends")

    wandb = module("wandb", run=None, init=init, finish=finish)
    mlflow = module(
        "mlflow",
        active_run=lambda: None,
        start_run=lambda run_name: told.append(("mlflow run", run_name)) or Run(),
        log_dict=lambda values, file: told.append((file, values["seed"])),
    )
    for stand_in in (
        wandb,
        mlflow,
        module("mlflow.keras", MlflowCallback=MlflowCallback),
        module("wandb.integration", __path__=[]),
        module("wandb.integration.keras", WandbMetricsLogger=WandbMetricsLogger),
    ):
        monkeypatch.setitem(sys.modules, stand_in.__name__, stand_in)
    return told


def test_both_trackers_are_told_of_every_second_step_and_closed(trackers, policy, dataset):
    model = DPOModel(policy)
    model.compile("sgd")
    settings = {"seed": 3}
    with experiment_loggers(["mlflow", "wandb"], run="r", settings=settings, every=2) as callbacks:
        model.fit(dataset, epochs=2, verbose=0, callbacks=callbacks)
    assert trackers[:4] == [
        ("mlflow run", "r"),
        "mlflow begins",
        ("configuration.json", 3),
        ("wandb begins", "dpo-keras", "r", 3),
    ]
    steps = [one[0] for one in trackers[4:-2]]  # the second, the fourth and the sixth to mlflow
    assert steps == ["wandb", "mlflow", "wandb", *["mlflow", "wandb"] * 2]
    assert trackers[-2:] == ["wandb ends", "mlflow ends"]


def test_a_run_of_the_users_own_is_used_and_left_open(trackers):
    sys.modules["wandb"].run = "mine"
    sys.modules["mlflow"].active_run = lambda: "mine"
    with experiment_loggers(["wandb", "mlflow"], run="r", settings={"seed": 3}) as callbacks:
        assert len(callbacks) == 2
    assert trackers == [("configuration.json", 3)]


def test_trackers_are_closed_when_training_fails(trackers):
    with (
        pytest.raises(KeyboardInterrupt),
        experiment_loggers(["mlflow", "wandb"], run="r", settings={"seed": 3}),
    ):
        raise KeyboardInterrupt
    assert trackers[-2:] == ["wandb ends", "mlflow ends"]


def test_a_missing_package_is_named_with_the_command_that_installs_it():
    with (
        pytest.raises(InputError) as error,
        experiment_loggers(["mlflow", "wandb", "comet"], run="r", settings={}),
    ):
        pass
    text = str(error.value)
    assert "pip install 'dpo-keras[mlflow]'" in text and "pip install 'dpo-keras[wandb]'" in text
    assert "loggers must be among mlflow, wandb, got 'comet'." in text
