"""Two real processes train one run: killed, stopped, resumed, and told what is wrong."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from app_tiny import SIZES

from dpo_keras.app.cli import main
from dpo_keras.app.config import Config
from dpo_keras.app.models import load_model
from dpo_keras.training import latest_checkpoint

LAUNCHER = Path(__file__).parents[2] / "scripts" / "launch_workers"
EPOCHS, STEPS = 20, 100


def settings(output):
    """100 steps of 8 pairs, shared by two workers: seconds, and enough to be hit in mid-run."""
    return Config(
        output=str(output),
        model={"scratch": {**SIZES, "num_layers": 1, "max_sequence_length": 96}},
        data={"path": "builtin:support", "limit": 40, "held_out": 0, "max_length": 96},
        training={
            "batch_size": 8,
            "epochs": EPOCHS,
            "learning_rate": 1e-4,
            "buckets": 1,
            "checkpoint_every": 7,
            "evaluate_every": 50,
        },
        evaluation={"prompts": 0, "batch_size": 8},
    )


class Launch:
    """`scripts/launch_workers` at work; `lines` is what it has printed so far."""

    def __init__(self, path, *arguments):
        self.folder = path.parent
        self.errors = path.with_suffix(".err")
        with self.errors.open("w") as errors:
            self.process = subprocess.Popen(
                [sys.executable, str(LAUNCHER), str(path), *arguments],
                stdout=subprocess.DEVNULL,
                stderr=errors,
                text=True,
            )

    @property
    def text(self):
        return self.errors.read_text()

    def worker(self, index):
        return int(re.search(rf"\[worker {index}\] process (\d+)", self.text)[1])

    def wait_for_steps(self, count):
        log = self.folder / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 300
        while self.process.poll() is None and time.monotonic() < deadline:
            if log.exists() and len(log.read_text().splitlines()) >= count:
                return
            time.sleep(0.005)
        pytest.fail(f"ended or hung before step {count}:\n{self.text}")

    def finish(self):
        started = time.monotonic()
        return self.process.wait(300), time.monotonic() - started


def launched(folder):
    path = folder / "a.yaml"
    path.write_text(settings(folder / "run").resolved())
    return path


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    run = Launch(launched(folder))
    assert run.finish()[0] == 0, run.text
    return folder / "run", run.text


def test_the_chief_alone_writes_and_reports(undisturbed):
    run, text = undisturbed
    assert json.loads((run / "result.json").read_text())["steps"] == STEPS
    others = [line for line in text.splitlines() if line.startswith("[worker 1]")]
    assert re.search(r"worker 1 \(\S+\) is done; worker 0 \(\S+\) has the result", others[-1])
    assert len(others) == 2, "its process, and that it is done"


@pytest.mark.slow
def test_killed_then_stopped_then_resumed_ends_with_the_weights_of_an_undisturbed_run(
    undisturbed, tmp_path
):
    path, checkpoints = launched(tmp_path), tmp_path / "run" / "checkpoints" / "training"
    run = Launch(path)
    run.wait_for_steps(10)
    os.kill(run.worker(1), signal.SIGKILL)
    code, seconds = run.finish()
    assert code == 1 and seconds < 60, run.text
    assert re.search(r"\[worker 0\] error: worker 1 \(\S+\) was lost: .* --resume", run.text)
    killed_at = latest_checkpoint(checkpoints)[0]
    assert 7 <= killed_at < STEPS

    # What a chief that is killed while it writes leaves behind.
    half = checkpoints / f"step-{STEPS:08d}"
    half.mkdir()
    (half / "state.weights.h5").write_bytes(b"half")
    (checkpoints / ".step-00000099.1.partial").mkdir()

    run = Launch(path, "--resume")
    run.wait_for_steps(killed_at + 10)
    os.kill(run.worker(1), signal.SIGTERM)  # one of the two
    code, _ = run.finish()
    assert code == 75, run.text
    ends = re.findall(r"\[worker (\d)\] error: stopped by SIGTERM.* after step (\d+)", run.text)
    assert {worker for worker, _ in ends} == {"0", "1"} and len({step for _, step in ends}) == 1
    stopped_at = int(ends[0][1])
    assert killed_at < stopped_at < STEPS
    assert latest_checkpoint(checkpoints)[0] == stopped_at

    run = Launch(path, "--resume")
    assert run.finish()[0] == 0, run.text
    whole, _ = undisturbed
    weights = zip(
        load_model(str(tmp_path / "run" / "policy")).weights,
        load_model(str(whole / "policy")).weights,
        strict=True,
    )
    for one, other in weights:
        np.testing.assert_allclose(np.asarray(one), np.asarray(other), atol=1e-6)
    steps, expected = (
        [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (tmp_path / "run", whole)
    )
    losses = [record["loss"] for record in steps if "epoch" not in record]
    np.testing.assert_allclose(
        losses, [record["loss"] for record in expected if "epoch" not in record], atol=1e-6
    )
    assert len(losses) == STEPS
    assert not list(checkpoints.glob(".*"))


def tf_config(monkeypatch, index, *addresses):
    task = {"type": "worker", "index": index}
    content = {"cluster": {"worker": list(addresses)}, "task": task}
    monkeypatch.setenv("TF_CONFIG", json.dumps(content))


def test_another_configuration_is_refused_by_each_worker_before_it_waits(
    undisturbed, monkeypatch, capsys
):
    run, _ = undisturbed
    for index in (0, 1):
        tf_config(monkeypatch, index, "127.0.0.1:1", "127.0.0.1:2")
        assert main(["train", str(run.parent / "a.yaml"), "--resume", "loss.beta=0.2"]) == 2
        errors = capsys.readouterr().err
        assert f"--resume needs the configuration that {run} was started with" in errors
        assert "loss.beta is 0.2, was 0.1 there" in errors


def test_a_worker_that_can_not_be_reached_ends_the_run_in_time(tmp_path, monkeypatch, capsys):
    tf_config(monkeypatch, 1, "nowhere.invalid:7000", "127.0.0.1:7001")
    arguments = [str(launched(tmp_path)), "training.worker_timeout=0.5"]
    assert main(["train", *arguments]) == 1
    errors = capsys.readouterr().err
    assert "worker 1 (127.0.0.1:7001) could not reach worker 0 (nowhere.invalid:7000)" in errors
    assert "within 0.5 seconds" in errors and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_process_without_steps_has_no_part_in_such_a_run(tmp_path, monkeypatch, capsys):
    content = {"cluster": {"worker": ["a:1"], "ps": ["b:2"]}, "task": {"type": "ps", "index": 0}}
    monkeypatch.setenv("TF_CONFIG", json.dumps(content))
    assert main(["train", str(launched(tmp_path)), "training.strategy=multi_worker"]) == 2
    assert "chief and workers only" in capsys.readouterr().err
