"""A chief, a parameter server and two workers, each a process, on the loopback."""

import contextlib
import json
import os
import pathlib
import socket
import subprocess
import sys

import numpy as np
import pytest
from legacy_learning import BATCH, EPOCHS, STEPS, accuracy, learn, sides

import dpo_keras
from dpo_keras import legacy
from dpo_keras.app.config import parse_config
from dpo_keras.batching import preference_dataset
from dpo_keras.errors import InputError

pytestmark = pytest.mark.slow

FOLDER = pathlib.Path(__file__).parent
CLUSTER = {
    "chief": ["127.0.0.1:1"],
    "ps": ["127.0.0.1:2"],
    "worker": ["127.0.0.1:3", "127.0.0.1:4"],
}


def free_addresses(count):
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{held.getsockname()[1]}" for held in sockets]


@contextlib.contextmanager
def process(arguments, cluster, job, index, log):
    config = {"cluster": cluster, "task": {"type": job, "index": index}}
    with (
        log.open("w") as errors,
        subprocess.Popen(
            [sys.executable, *arguments],
            env={**os.environ, "TF_CONFIG": json.dumps(config)},
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as started,
    ):
        try:
            yield started
        finally:
            started.kill()


@pytest.fixture(scope="module")
def cluster_run(tmp_path_factory):
    """What the chief found, and the directory that all processes see."""
    directory = tmp_path_factory.mktemp("cluster")
    addresses = free_addresses(4)
    cluster = {"chief": addresses[:1], "ps": addresses[1:2], "worker": addresses[2:]}
    server = ["-m", "dpo_keras.legacy.parameter_server"]
    with contextlib.ExitStack() as stack:
        for job, index in (("ps", 0), ("worker", 0), ("worker", 1)):
            log = directory / f"{job}-{index}.log"
            stack.enter_context(process(server, cluster, job, index, log))
        log = directory / "chief.log"
        program = [str(FOLDER / "legacy_chief.py"), str(directory)]
        chief = stack.enter_context(process(program, cluster, "chief", 0, log))
        output, _ = chief.communicate(timeout=240)
    assert chief.returncode == 0, log.read_text()[-3000:]
    return json.loads(output.strip().splitlines()[-1]), directory


def test_a_cluster_learns_what_one_process_learns(cluster_run):
    found, _ = cluster_run
    data = preference_dataset(sides()[0], batch_size=BATCH, buckets=1, epochs=None)
    model, history = learn(data=data)
    alone = accuracy(model)
    assert 0.85 < alone < 0.95  # a tenth of the held-out labels is turned round
    assert found["before"] == 0.5
    assert round(abs(found["accuracy"] - alone), 9) <= 0.02  # in floats 0.9 - 0.88 is above it
    assert found["steps"] == STEPS * EPOCHS
    logged = {name for name in history if "per_second" not in name}
    assert set(found["logs"]) == logged


def test_each_worker_has_its_own_pairs(cluster_run):
    shares = [set(rows) for rows in cluster_run[0]["shares"].values()]
    assert len(shares) == 2 and not shares[0] & shares[1]
    assert len(shares[0] | shares[1]) == len(sides()[0])


def test_the_policy_that_the_chief_saves_is_the_one_that_was_measured(cluster_run):
    import tf_keras

    found, directory = cluster_run
    model = legacy.DPOModel(tf_keras.models.load_model(directory / "policy.keras"), "none")
    model.compile("sgd", dpo_keras.DPOLoss("simpo"))
    logps = model.policy_logps(next(iter(preference_dataset(sides()[1], batch_size=4))))
    np.testing.assert_allclose(logps, found["logps"], atol=1e-4)


def test_what_parameter_servers_cannot_do_is_refused(cluster_run):
    of_keras_3, of_shared_steps = cluster_run[0]["refused"]
    assert "Use dpo_keras.legacy.DPOModel" in of_keras_3
    assert "no step that all pairs share" in of_shared_steps


@pytest.mark.parametrize("in_files", [False, True])
def test_rows_for_workers_are_those_of_the_batch_contract(in_files, tmp_path):
    tokenized = sides()[0]
    directory = tmp_path / "rows" if in_files else None
    creator = legacy.worker_batches(
        tokenized, batch_size=7, shuffle=False, directory=directory, workers=1
    )
    wanted = preference_dataset(tokenized, batch_size=7, buckets=1, shuffle=False, epochs=1)
    for found, batch in zip(creator(None), wanted.take(10), strict=False):
        assert found.keys() == batch.keys()
        for name, value in batch.items():
            np.testing.assert_array_equal(found[name], value)
            assert found[name].dtype == value.dtype
    shuffled = legacy.worker_batches(tokenized, batch_size=len(tokenized), workers=1, seed=3)
    first, second = (batch["token_ids"].numpy() for batch in shuffled(None).take(2))
    assert (first != second).any()
    assert sorted(map(bytes, first)) == sorted(map(bytes, second))


def test_rows_that_are_too_many_for_the_graph_want_a_directory(monkeypatch):
    import importlib

    monkeypatch.setattr(
        importlib.import_module("dpo_keras.legacy.parameter_server"), "GRAPH_LIMIT", 1000
    )
    with pytest.raises(InputError) as error:
        legacy.worker_batches(sides()[0], batch_size=100, workers=2)
    assert "2 x 100 pairs" in error.value.problems[0]
    assert "Give a directory" in error.value.problems[1]


TASKS = {
    "none": (None, "needs? the environment variable TF_CONFIG"),
    "no JSON": ("{", "must be JSON"),
    "a list": ("[]", "must be an object"),
    "no server": (
        {
            "cluster": {"worker": ["127.0.0.1:3"]},
            "task": {"type": "worker", "index": 0},
        },
        "has no chief and no ps",
    ),
    "no such job": (
        {"cluster": CLUSTER, "task": {"type": "boss", "index": 0}},
        "task.type must be",
    ),
    "no such index": (
        {"cluster": CLUSTER, "task": {"type": "worker", "index": 2}},
        "task.index is 2, but",
    ),
    "a worker": (
        {"cluster": CLUSTER, "task": {"type": "worker", "index": 1}},
        "python -m dpo_keras.legacy.parameter_server",
    ),
}


@pytest.mark.parametrize("name", TASKS)
def test_a_task_that_cannot_be_the_chief_is_told_why(name, monkeypatch):
    config, message = TASKS[name]
    monkeypatch.delenv("TF_CONFIG", raising=False)
    if config is not None:
        monkeypatch.setenv("TF_CONFIG", config if isinstance(config, str) else json.dumps(config))
    with pytest.raises(InputError, match=message):
        dpo_keras.strategy("parameter_server")


def test_the_chief_serves_nothing(monkeypatch):
    config = {"cluster": CLUSTER, "task": {"type": "chief", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(config))
    with pytest.raises(InputError, match="runs the training program itself"):
        legacy.run_server()


def test_the_command_line_points_to_the_legacy_models():
    text = "model: {path: some_preset}\ndata: {path: pairs.jsonl}\n"
    with pytest.raises(InputError, match="Keras 3 has.*dpo_keras.legacy.*parameter_server"):
        parse_config(text, ["training.strategy=parameter_server"])
