"""One device, two replicas and two workers take the same steps, through `fit`."""

import json
import os
import pathlib
import socket
import subprocess
import sys

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import gpt2

from dpo_keras.batching import preference_dataset
from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.training import STRATEGIES, DPOModel, SupervisedModel, strategy, supervised_dataset
from dpo_keras.training.distribution import per_worker
from dpo_keras.training.mesh import distribution

FOLDER = pathlib.Path(__file__).parent


def train(scope, tokenized, supervised=False):
    """Five steps on batches of four of eleven pairs: every third batch has an empty row."""
    with scope.scope():
        policy = gpt2(num_layers=1)
        optimizer = keras.optimizers.Adam(1e-2, global_clipnorm=0.05)

        def make(worker):
            data = preference_dataset(
                tokenized, batch_size=4, buckets=2, batching="buckets", epochs=None, worker=worker
            )
            return supervised_dataset(data) if supervised else data

        data = per_worker(scope, make)
        if supervised:
            model = SupervisedModel(policy, dropout=False)
            model.compile(optimizer)
        else:
            model = DPOModel(policy)
            loss = DPOLoss(penalties={"insufficient_confidence": 0.1, "nll": 0.1})
            model.compile(optimizer, loss=loss)
    history = model.fit(data, steps_per_epoch=5, verbose=0).history
    return [v.numpy() for v in policy.weights], history


@pytest.fixture(scope="module")
def one_device(tokenized):
    return train(strategy("one_device"), tokenized)


def assert_same(results, expected):
    (weights, history), (wanted, logs) = results, expected
    for one, other in zip(weights, wanted, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    for name, value in logs.items():
        if "per_second" not in name:
            np.testing.assert_allclose(history[name], value, rtol=1e-4, atol=1e-5, err_msg=name)


def test_no_strategy_is_one_device(one_device, tokenized):
    assert_same(train(tf.distribute.get_strategy(), tokenized), one_device)


def test_two_replicas_are_one_clipping_and_all_logs_included(one_device, tokenized):
    mirrored = strategy("mirrored")
    assert mirrored.num_replicas_in_sync == 2
    assert_same(train(mirrored, tokenized), one_device)


def test_supervised_training_is_the_same_on_two_replicas(tokenized):
    alone = train(strategy("one_device"), tokenized, supervised=True)
    assert_same(train(strategy("mirrored"), tokenized, supervised=True), alone)


@pytest.mark.slow
def test_two_workers_are_one_device(one_device, tmp_path):
    """Two processes on the loopback, of which each makes and reads its own rows of a batch."""
    ports = []
    for _ in range(2):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    secret = {"DPO_KERAS_CLUSTER_SECRET": "s" * 32}
    workers = []
    for index in range(2):
        config = {"cluster": cluster, "task": {"type": "worker", "index": index}}
        workers.append(
            subprocess.Popen(
                [
                    sys.executable,
                    str(FOLDER / "training_worker.py"),
                    str(tmp_path / f"{index}.npz"),
                ],
                env={**os.environ, **secret, "TF_CONFIG": json.dumps(config)},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    for worker in workers:
        _, errors = worker.communicate(timeout=300)
        assert worker.returncode == 0, errors[-3000:]
    for index in range(2):
        with np.load(tmp_path / f"{index}.npz") as stored:
            weights = [stored[f"w{n}"] for n in range(len(one_device[0]))]
            history = {name[2:]: stored[name] for name in stored.files if name.startswith("h_")}
        assert_same((weights, {n.replace("|", "/"): h for n, h in history.items()}), one_device)


def test_xla_under_two_replicas_is_refused_with_the_reason(tokenized):
    with strategy("mirrored").scope():
        model = DPOModel(gpt2(num_layers=1))
        model.compile(keras.optimizers.Adam(1e-2), jit_compile=True)
    data = preference_dataset(tokenized, batch_size=4, batching="buckets")
    with pytest.raises(InputError, match="keras#17187"):
        model.fit(data, verbose=0)


def test_auto_is_one_device_on_a_machine_without_gpus(monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    assert strategy().num_replicas_in_sync == 1


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("miror", None, f"one of {', '.join(STRATEGIES)}"),
        ("multi_worker", None, "needs the environment variable TF_CONFIG"),
        ("multi_worker", "{not json", "must be JSON"),
        ("multi_worker", '{"task": {}}', "cluster"),
        ("tpu", None, "found no TPU"),
    ],
)
def test_strategies_that_cannot_be_say_what_they_need(name, config, message, monkeypatch):
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config)
    with pytest.raises(InputError, match=message):
        strategy(name)


def test_a_mesh_needs_jax():
    with pytest.raises(InputError, match="mesh needs Keras on JAX.*KERAS_BACKEND=jax"):
        distribution(data=2)
