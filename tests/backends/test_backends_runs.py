"""The command line on JAX: a run from its data to its export, on meshes, killed and resumed."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import keras
import numpy as np
import pytest

from dpo_keras.app import runs
from dpo_keras.app.cli import main
from dpo_keras.app.config import load_config
from dpo_keras.app.models import load_model
from dpo_keras.errors import InputError
from dpo_keras.evaluation import run_report
from dpo_keras.training import latest_checkpoint
from dpo_keras.utils.backends import data_axis_size

LAUNCHER = Path(__file__).parents[2] / "scripts" / "launch_workers"
STEPS = 12
MESH = {"data": 2, "model": 4}
CONFIG = """
seed: 5
model:
  scratch: {family: llama, num_layers: 1, num_heads: 4, hidden_dim: 32, intermediate_dim: 64,
            max_sequence_length: 96, vocabulary_size: 400}
data: {path: "builtin:support", limit: 50, held_out: 0.14, max_length: 96}
training: {batch_size: 8, learning_rate: 1.0e-3, max_steps: 12, checkpoint_every: 2,
           evaluate_every: 6, optimizer: sgd, mesh: {data: 2, model: 4}}
evaluation: {prompts: 2, max_new_tokens: 4, batch_size: 8}
"""


@pytest.fixture(autouse=True)
def runs_draw_no_plots(monkeypatch):
    monkeypatch.setattr(run_report, "_draw", lambda *arguments: ({}, {}))


@pytest.fixture(scope="module")
def configuration(tmp_path_factory):
    path = tmp_path_factory.mktemp("configuration") / "run.yaml"
    path.write_text(CONFIG)
    return path


def run(path, *overrides, **options):
    said = []

    class Heard(runs.Silent):
        def note(self, text):
            said.append(text)

    result = runs.train(load_config(path, overrides), progress=Heard(), **options)
    return result, said


def weights(directory):
    return [keras.ops.convert_to_numpy(w) for w in load_model(str(directory / "policy")).weights]


def assert_equal(ours, theirs, atol):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


@pytest.fixture(scope="module")
def undisturbed(configuration, tmp_path_factory):
    directory = tmp_path_factory.mktemp("runs") / "undisturbed"
    export = directory.parent / "served" / "1"
    result, _ = run(configuration, f"output={directory}", f"export.path={export}")
    return directory, result


def test_a_run_on_a_mesh_trains_measures_answers_and_is_exported(undisturbed):
    directory, result = undisturbed
    assert data_axis_size() == MESH["data"] and keras.backend.backend() == "jax"
    assert result.steps == STEPS
    assert len(result.samples) == 2 and all(sample["after"] for sample in result.samples)
    log = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in log if "epoch" not in record]
    assert len(losses) == STEPS and losses[-1] < losses[0] == pytest.approx(np.log(2), abs=1e-5)
    # The exporting process runs on TensorFlow, and compared its answers with the model's there.
    assert set(result.export["signatures"]) == {"score", "prefer", "generate"}
    assert result.export["verified"] and max(result.export["differences"].values()) < 1e-3
    assert result.export["answer"]["prefer"]["response"]["llr"] != 0


def test_a_run_that_is_killed_goes_on_on_its_mesh_and_on_another(
    undisturbed, configuration, tmp_path
):
    killed = tmp_path / "killed"
    command = [sys.executable, "-m", "dpo_keras.app", "train", configuration, f"output={killed}"]
    process = subprocess.Popen(
        list(map(str, command)), env=os.environ, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    log, deadline = killed / "metrics.jsonl", time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if log.is_file() and len(log.read_text().splitlines()) >= 5:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.002)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == -signal.SIGKILL, said
    found = latest_checkpoint(killed / "checkpoints" / "training")
    assert found is not None and 2 <= found[0] < STEPS

    expected = weights(undisturbed[0])
    for number, (mesh, atol) in enumerate(
        (("{data: 2, model: 4}", 1e-6), ("{data: 1, model: 2, fsdp: true}", 1e-5))
    ):
        copy = tmp_path / f"copy{number}"
        shutil.copytree(killed, copy, ignore=shutil.ignore_patterns("*.lock"))
        result, said = run(
            configuration, f"output={copy}", f"training.mesh={mesh}", "export=null", resume=True
        )
        assert f"resumed after step {found[0]} of {STEPS}." in said
        assert result.steps == STEPS
        assert_equal(weights(copy), expected, atol)


def test_rows_that_were_packed_for_a_mesh_are_not_packed_anew(undisturbed, configuration, tmp_path):
    directory, result = undisturbed
    copy = tmp_path / "copy"
    shutil.copytree(directory, copy, ignore=shutil.ignore_patterns("*.lock", "result.json"))
    same = [f"output={copy}", f"export.path={result.export['path']}"]
    with pytest.raises(InputError, match="packs its rows for 2. Go on with a divisor of 2"):
        run(configuration, *same, "training.mesh={data: 8}", resume=True)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.mesh={data: 4, model: 4}"], "training.mesh needs 4 * 4 devices, and there are"),
        (["training.mesh={model: 7}"], "training.mesh.model divides no weight of this policy"),
        (["training.backend=tensorflow", "training.mesh=null"], "it runs on jax already"),
        (["training.strategy=mirrored"], "training.strategy has no effect without training.mesh"),
        (["model.scratch=null", "model.path={}/a.keras"], "by the family of the policy, which"),
    ],
)
def test_a_wrong_mesh_or_backend_gets_one_message(
    overrides, message, configuration, tmp_path, capsys
):
    import zipfile

    with zipfile.ZipFile(tmp_path / "a.keras", "w") as file:
        file.writestr("config.json", "{}")
    overrides = [override.replace("{}/", f"{tmp_path}/") for override in overrides]
    output = f"output={tmp_path / 'run'}"
    assert main(["train", str(configuration), output, *overrides]) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if "error" in line]
    assert len(errors) == 1 and message in errors[0]


def launched(path, *overrides):
    """Two processes with two devices each; returns the launcher's exit code and what they said."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    del environment["KERAS_BACKEND"]
    done = subprocess.run(
        [sys.executable, LAUNCHER, "-n", "2", path, *overrides],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        timeout=300,
        check=False,
    )
    return done.returncode, done.stderr


def test_two_processes_are_one(undisturbed, configuration, tmp_path):
    """Each makes rows of its own, and holds its share of the weights."""
    served = tmp_path / "served" / "1"
    code, said = launched(
        configuration,
        f"output={tmp_path / 'run'}",
        "training.mesh={data: 2, model: 2}",
        f"export.path={served}",
    )
    assert code == 0, said
    assert_equal(weights(tmp_path / "run"), weights(undisturbed[0]), 1e-5)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["steps"] == STEPS and result["export"]["verified"]
    alone = json.loads((undisturbed[0] / "result.json").read_text())
    for name in ("loss", "reward_accuracy", "kl"):
        expected = alone["after"]["metrics"][name]
        assert result["after"]["metrics"][name] == pytest.approx(expected, abs=1e-5)
    assert [s["after"] for s in result["samples"]] == [s["after"] for s in alone["samples"]]
