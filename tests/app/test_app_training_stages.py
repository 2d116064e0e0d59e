"""How a run's batches are laid out, and that what is refused is named by its key."""

import json
from contextlib import contextmanager
from types import SimpleNamespace

import keras
import pytest
import tensorflow as tf
from tiny import Letters, gpt2, pairs, plain_model

from dpo_keras.app import run_export, runs
from dpo_keras.app.config import Config
from dpo_keras.app.console import Silent
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.app.training_stages import (
    Context,
    build_model,
    check_steps,
    layout_of,
    steps_per_epoch,
    train_policy,
)
from dpo_keras.batching import tokenize_pairs
from dpo_keras.cluster import StopRequest
from dpo_keras.errors import InputError
from dpo_keras.training import Layout


def config(**training):
    return Config(model={"path": "x"}, data={"path": "y"}, training={"batch_size": 4, **training})


class Heard(Silent):
    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)


def test_auto_packs_and_falls_back_with_one_line_for_policy_or_reference():
    policy, progress = gpt2(num_layers=1), Heard()
    packed = layout_of(config(row_length=96), policy, "frozen_copy", progress, replicas=2)
    assert packed == Layout("packed", 4, 96, 2) and not progress.notes
    assert layout_of(config(), policy, plain_model(), progress) == Layout("buckets", 4)
    (line,) = progress.notes
    assert line.startswith("batching: buckets instead of packed rows, because")


def test_what_is_refused_is_named_by_its_key():
    with pytest.raises(InputError, match=r"training\.batching cannot be 'packed'"):
        layout_of(config(batching="packed"), plain_model(), "none", Silent())
    tokenized = tokenize_pairs(pairs(11), Letters(), max_length=48)
    context = SimpleNamespace(
        config=config(row_length=8), layout=Layout("packed", row_length=8), progress=Silent()
    )
    with pytest.raises(InputError, match=r"training\.row_length must hold the longest pair"):
        check_steps(context, tokenized)


def test_steps_are_those_of_the_layout():
    tokenized = tokenize_pairs(pairs(11), Letters(), max_length=48)
    settings = config()
    for layout in (Layout("buckets"), Layout("packed", row_length=64)):
        context = SimpleNamespace(config=settings, layout=layout)
        steps = steps_per_epoch(context, settings.training, tokenized)
        stream = layout.dataset(tokenized, 4, seed=settings.seed)
        assert steps == int(stream.cardinality()) == sum(1 for _ in stream)


def test_an_export_takes_the_length_of_the_configuration_cut_to_what_fits(monkeypatch):
    exported, heard = [], Heard()

    def export_model(config, export, *rest):
        exported.append(export.max_new_tokens)
        return {}

    monkeypatch.setattr(run_export, "load_trained", lambda run: None)
    monkeypatch.setattr(run_export, "export_model", export_model)
    for max_length, sections, given in (
        (64, {"evaluation": {"max_new_tokens": 24}}, None),
        (64, {"evaluation": {"max_new_tokens": 24}, "export": {"max_new_tokens": 30}}, None),
        (65, {}, None),  # 64 tokens by default leave one for the prompt
        (65, {}, 40),
    ):
        short = Config(
            model={"path": "x"}, data={"path": "y", "max_length": max_length}, **sections
        )
        monkeypatch.setattr(
            run_export, "open_policy", lambda run, c=short: SimpleNamespace(config=lambda: c)
        )
        runs.export_run("run", "path/1", max_new_tokens=given, progress=heard)
    assert exported == [24, 30, 32, 40]
    (line,) = heard.notes
    assert line.startswith("max_new_tokens is 32: the configuration's 64 leave no room")


def test_steps_records_optimizer_and_loggers_are_those_of_the_configuration(tmp_path, monkeypatch):
    settings = {"max_steps": 5, "log_every": 2, "optimizer": "sgd", "loggers": ["mlflow"]}
    settings |= {"optimizer_options": {"momentum": 0.5}, "learning_rate": 1e10}
    opened = []

    @contextmanager
    def loggers(names, *, run, settings, every):
        opened.append((names, run, settings["training"]["max_steps"], every))
        yield [CountBatches()]

    class CountBatches(keras.callbacks.Callback):
        steps = 0

        def on_train_batch_end(self, batch, logs=None):
            CountBatches.steps += 1

    monkeypatch.setattr("dpo_keras.training.experiment_loggers.experiment_loggers", loggers)
    heard = Heard()
    context = Context(
        config(**settings, clip_norm=1e-12, batching="buckets", buckets=1),
        RunDirectory(tmp_path),
        False,
        heard,
        tf.distribute.get_strategy(),
        StopRequest(),
        None,
    )
    policy = gpt2(num_layers=1)
    context.settle_layout(policy, "frozen_copy")
    tokenized = tokenize_pairs(pairs(11), Letters(), max_length=48)
    model, tokenized, _ = build_model(context, policy, "frozen_copy", tokenized, None)
    assert model.optimizer.momentum == 0.5
    assert train_policy(context, model, tokenized, None) == CountBatches.steps == 5
    records = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert [one["step"] for one in records if "epoch" not in one] == [2, 4]
    assert opened == [(["mlflow"], "run", 5, 2)]
    assert any("warning: training.learning_rate is 1e+10" in note for note in heard.notes)
