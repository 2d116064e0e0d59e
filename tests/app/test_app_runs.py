"""Runs from Python and from the command line: what they write, and that they can be repeated."""

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
from app_runs import HELD_OUT, SEED, settings, steps_of

from dpo_keras import serving
from dpo_keras.app import run_export, runs
from dpo_keras.app.cli import main
from dpo_keras.app.config import parse_config
from dpo_keras.app.config_sections import Export
from dpo_keras.app.models import load_model
from dpo_keras.app.run_directory import RunDirectory, locked_run
from dpo_keras.errors import InputError
from dpo_keras.preferences import read_preferences, write_preferences
from dpo_keras.training import latest_checkpoint
from dpo_keras.training.callbacks import StopOnNonFinite

ROOT = Path(__file__).parents[2]


def same_weights(one, other, tolerance=1e-6):
    for a, b in zip(one.weights, other.weights, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), atol=tolerance)


class Heard(runs.Silent):
    """Keeps what a run said; ends it at the stage `until`."""

    def __init__(self, until=None):
        self.until, self.notes, self.steps = until, [], {}

    def stage(self, title):
        self.now = title
        self.steps[title] = []
        if title == self.until:
            raise StoppedError

    def note(self, text):
        self.notes.append(text)

    def advance(self, done, total, **values):
        self.steps[self.now].append(done)


class StoppedError(Exception):
    pass


@pytest.fixture(scope="module")
def tokens():
    """The tokens of each step of `trained`, by the kind of model that was trained."""
    return {"SupervisedModel": [], "DPOModel": []}


@pytest.fixture(scope="module")
def trained(tmp_path_factory, tokens):
    """A finished run with everything but an export, and its result."""
    output = tmp_path_factory.mktemp("runs") / "whole"
    config = settings(output, evaluation={"prompts": 3, "samples_shown": 2})
    check = StopOnNonFinite.on_train_batch_end

    def count(self, batch, logs=None):
        tokens[type(self.model).__name__].append(float(self.model.step_logs["tokens"]))
        check(self, batch, logs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopOnNonFinite, "on_train_batch_end", count)
        return runs.train(config, given="# as given\n"), config


def test_a_run_leaves_all_that_is_needed_to_look_at_it_and_repeat_it(trained):
    result, config = trained
    run = RunDirectory(result.directory)
    assert parse_config((run.path / "config.yaml").read_text()) == config
    assert (run.path / "config.given.yaml").read_text() == "# as given\n"
    assert run.read("versions.json")["keras"] == keras.__version__
    assert run.read("result.json") == json.loads(json.dumps(result.as_dict()))
    assert [record["step"] for record in steps_of(run.path)] == [1, 2, 3, 4, 5]
    assert any((run.path / "tensorboard").rglob("events*"))
    for name in ("html", "markdown", "json", "training_curves"):
        assert Path(result.report[name]).stat().st_size > 0
    samples = [json.loads(line) for line in (run.path / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 3 and {"prompt", "before", "after"} <= samples[0].keys()
    assert result.samples == samples[:2]
    assert result.steps == 5 and result.pairs == {"train": 40, "held_out": 10, "dropped": 0}
    assert not list(run.path.glob(".*")), "nothing half-written is left"


def test_the_report_says_how_far_the_prediction_of_time_and_memory_was_off(trained):
    result, _ = trained
    stored = RunDirectory(result.directory).read("prediction.json")
    assert stored == json.loads(json.dumps(result.prediction))
    assert stored["step"] == 3, "half of the five steps"
    time, memory = stored["seconds"], stored["peak_bytes"]
    assert sum(stored["stages"].values()) <= time["actual"] <= result.seconds
    assert time["difference"] == pytest.approx(time["predicted"] / time["actual"] - 1)
    assert 0 < memory["predicted"] <= memory["actual"]
    report = Path(result.report["markdown"]).read_text()
    for found in (time, memory):
        assert f"| {found['of']} |" in report
        assert f"({100 * found['difference']:+.0f} %)" in report


def test_a_plan_counts_the_steps_and_tokens_of_the_run_and_leaves_nothing(
    trained, tokens, tmp_path, run
):
    result, _ = trained
    path = tmp_path / "a.yaml"
    path.write_text(settings(tmp_path / "run").resolved())  # the same, but for the samples
    code, out, _ = run("plan", path, "--json")
    assert code == 0 and list(tmp_path.iterdir()) == [path]
    plan = json.loads(out)
    assert plan["pairs"] == result.pairs
    for section, kind in (("training", "DPOModel"), ("warmup", "SupervisedModel")):
        assert plan["sections"][section]["steps"] == len(tokens[kind])
        assert plan["sections"][section]["tokens"] == sum(tokens[kind])
    stages = plan["stages"]
    heard = {title for title in result.prediction["stages"] if "Responses" not in title}
    assert heard <= set(stages)
    assert plan["seconds"] == pytest.approx(sum(stage["run"] for stage in stages.values()))
    assert plan["peak_bytes"]["the process"] >= result.prediction["peak_bytes"]["actual"]


def test_the_first_loss_is_log_2_and_training_moves_the_figures(trained):
    result, _ = trained
    assert steps_of(result.directory)[0]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert result.before["metrics"]["loss"] == pytest.approx(np.log(2), abs=1e-4)
    assert result.after["metrics"]["loss"] < 0.69
    assert 0 <= result.after["responses"]["preferred"]["value"] <= 1


def test_a_run_is_never_overwritten_and_a_finished_one_is_not_run_again(trained, monkeypatch):
    result, config = trained
    with pytest.raises(InputError, match="holds a run already; go on with --resume"):
        runs.train(config)
    assert not Path(result.directory, "run.lock").exists()
    monkeypatch.setattr(runs, "read_sides", None)
    assert runs.train(config, resume=True).as_dict() == json.loads(json.dumps(result.as_dict()))


def test_resuming_a_run_that_never_was_says_that_it_starts(tmp_path):
    heard = Heard(until="Data")
    with pytest.raises(StoppedError):
        runs.train(settings(tmp_path / "run"), resume=True, progress=heard)
    line = f"{tmp_path / 'run'} has no checkpoint to resume: it starts from the beginning."
    assert heard.notes == [line]


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_a_second_process_in_the_directory_of_a_run_exits_with_2(tmp_path, capsys, flags):
    config = settings(tmp_path / "run")
    path = tmp_path / "a.yaml"
    path.write_text(config.resolved())
    with locked_run(config, False, True):
        assert main(["train", str(path), *flags]) == 2
    errors = capsys.readouterr().err
    assert f"output: {tmp_path / 'run'} is in use by process {os.getpid()} on " in errors
    assert list(tmp_path.iterdir()) == [path]


def test_a_place_for_the_export_that_is_taken_is_refused_before_any_training(tmp_path):
    (tmp_path / "served" / "1").mkdir(parents=True)
    export = Export(path=str(tmp_path / "served" / "1"))
    with pytest.raises(InputError, match=r"^export\.path .*/served/1 exists already"):
        runs.train(settings(tmp_path / "run", export=export), progress=Heard(until="Data"))
    export = Export(path="/proc/served")
    with pytest.raises(InputError, match=r"^export\.path: /proc/.* cannot be written to"):
        runs.train(settings(tmp_path / "run", export=export), progress=Heard(until="Data"))


def test_a_run_that_was_stopped_after_its_export_does_not_export_again(tmp_path, monkeypatch):
    run = RunDirectory(tmp_path / "run")
    answer = {"score": {"response": {"reward": 1.0}}}
    run.write("export.json", {"path": str(tmp_path), "answer": answer})
    config = settings(run.path, export=Export(path=str(tmp_path / "1")))
    monkeypatch.setattr(serving, "export", None)
    run_export.check_export(config, run)
    exported = run_export.export_model(config, config.export, None, (), Heard(), run)
    assert exported["answer"] == answer


def test_resuming_with_another_configuration_names_the_keys_that_differ(trained):
    _, config = trained
    other = settings(config.output, loss={"beta": 0.2}, warmup=None, evaluation={"prompts": 3})
    with pytest.raises(InputError) as error:
        runs.train(other, resume=True)
    text = str(error.value)
    assert "loss.beta is 0.2, was 0.1 there." in text and "warmup is null, was {" in text
    assert "evaluation.samples_shown is 4, was 2 there." in text


def test_a_directory_with_other_files_is_not_taken_for_a_run(tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(InputError, match="not the directory of a run"):
        runs.train(settings(tmp_path))
    assert [item.name for item in tmp_path.iterdir()] == ["thesis.txt"]


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory, trained):
    """The same run as `trained`, killed by kill -9 after its third step, not yet resumed."""
    _, config = trained
    output = tmp_path_factory.mktemp("runs") / "killed"
    path = output.with_suffix(".yaml")
    path.write_text(config.resolved())
    process = subprocess.Popen(
        [sys.executable, "-m", "dpo_keras.app", "train", str(path), f"output={output}"],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    )
    log = output / "metrics.jsonl"
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            process.send_signal(signal.SIGKILL)
            break
        time.sleep(0.005)
    _, errors = process.communicate()
    assert process.returncode == -signal.SIGKILL, errors
    return output


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_very_weights_of_an_uninterrupted_one(trained, interrupted):
    result, config = trained
    copy = config.model_copy(update={"output": str(interrupted)})
    killed_at, _ = latest_checkpoint(interrupted / "checkpoints" / "training")
    heard = Heard()
    resumed = runs.train(copy, resume=True, progress=heard)
    assert 2 <= killed_at < 5
    assert [note for note in heard.notes if "resume" in note] == [
        "resumed after step 5 of 5.",  # the warm-up is not repeated
        f"resumed after step {killed_at} of 5.",
    ]
    assert heard.steps["Supervised warm-up"] == []
    assert heard.steps["Preference training"] == list(range(killed_at + 1, 6))
    same_weights(load_model(result.directory + "/policy"), load_model(str(interrupted / "policy")))
    for one, other in zip(steps_of(result.directory), steps_of(interrupted), strict=True):
        assert one.keys() == other.keys()
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-6)
    assert resumed.before["metrics"] == pytest.approx(result.before["metrics"], abs=1e-6)
    assert resumed.samples == result.samples


@pytest.mark.slow
def test_a_full_disk_stops_the_run_and_keeps_the_last_good_checkpoint(
    trained, tmp_path, monkeypatch, capsys
):
    _, config = trained
    path = tmp_path / "full.yaml"
    path.write_text(config.resolved())
    arguments = ["train", str(path), f"output={tmp_path / 'run'}", "evaluation.prompts=0"]
    original = keras.Model.save_weights
    saved = []

    def save_weights(self, filepath, *rest, **options):
        saved.extend(["training"] if "training" in str(filepath) else [])
        if len(saved) > 1:
            Path(filepath).write_bytes(b"half")
            raise OSError(28, "No space left on device", str(filepath))
        return original(self, filepath, *rest, **options)

    monkeypatch.setattr(keras.Model, "save_weights", save_weights)
    assert main(arguments) == 1
    errors = capsys.readouterr().err
    assert "No space left" in errors and "--resume" in errors and "Traceback" not in errors
    checkpoints = tmp_path / "run" / "checkpoints" / "training"
    assert [item.name for item in checkpoints.iterdir()] == ["step-00000002"]
    monkeypatch.undo()
    assert main([*arguments, "--resume"]) == 0
    assert len(steps_of(tmp_path / "run")) == 5


def test_evaluate_measures_against_the_reference_of_the_training(trained, tmp_path):
    result, config = trained
    _, held_out = read_preferences("builtin:support", limit=50).split(HELD_OUT, seed=SEED)
    write_preferences(held_out, tmp_path / "held_out.jsonl")
    measured = runs.evaluate(result.directory, tmp_path / "held_out.jsonl")
    for name, value in result.after["metrics"].items():
        assert measured["metrics"][name] == pytest.approx(value, abs=1e-4), name
    assert measured["pairs"] == 10 and Path(measured["report"]["html"]).is_file()
    assert measured["trained_on"] == 0
    assert not any("trained on" in finding for finding in measured["findings"])


def test_evaluate_from_the_command_line(trained, capsys):
    result, _ = trained
    assert main(["evaluate", result.directory, "builtin:support", "--limit", "8", "--json"]) == 0
    out = json.loads(capsys.readouterr().out)
    assert out["pairs"] == 8 and 0 <= out["metrics"]["reward_accuracy"] <= 1
    seen = out["trained_on"]
    train = read_preferences("builtin:support", limit=50).split(HELD_OUT, seed=SEED)[0]
    first, known = read_preferences("builtin:support", limit=8), {pair.prompt for pair in train}
    assert seen == sum(pair.prompt in known for pair in first) > 4
    said = f"warning: The policy was trained on the prompts of {seen} of these 8 pairs."
    assert any(finding.startswith(said) for finding in out["findings"])
    assert "The policy was trained on the prompts" in Path(out["report"]["markdown"]).read_text()
    assert main(["evaluate", result.directory, "builtin:support", "--limit", "8"]) == 0
    assert "reward_accuracy" in capsys.readouterr().out


def test_an_evaluation_that_cannot_be_written_ends_before_it_measures(trained, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(trained[0].directory, run)
    shutil.rmtree(run / "evaluations", ignore_errors=True)
    (run / "evaluations").write_text("in the way")
    assert main(["evaluate", str(run), "builtin:support", "--limit", "8"]) == 2
    assert f"run: {run}/evaluations/support cannot be written to (Not a" in capsys.readouterr().err


def test_generate_writes_several_candidates_and_repeats_them(trained, tmp_path, capsys):
    result, _ = trained
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "What is it?", "id": "a"}\n{"prompt": "When?"}\n')
    output = tmp_path / "out" / "candidates.jsonl"
    arguments = ["generate", result.directory, str(prompts), "-n", "3", "-o", str(output), "--json"]
    assert main(arguments) == 0
    candidates = json.loads(capsys.readouterr().out)["candidates"]
    assert [c["prompt"] for c in candidates] == ["What is it?", "When?"]
    assert candidates[0]["id"] == "a" and len(candidates[0]["responses"]) == 3
    assert len(set(candidates[0]["responses"])) > 1
    assert [json.loads(line) for line in output.read_text().splitlines()] == candidates
    assert runs.generate(result.directory, prompts, responses=3) == candidates


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{not json\n", ["line 1: is not JSON"]),
        ('{"prompt": ""}\n\n{"text": "x"}\n', ["line 1: prompt must be", "line 3: prompt must be"]),
        ("\n", ["there is no prompt"]),
        ('{"prompt": [{"role": "user", "content": "Hi"}]}', ["data.template"]),
    ],
)
def test_prompts_that_are_none_are_named(trained, tmp_path, capsys, content, words):
    (tmp_path / "p.jsonl").write_text(content)
    assert main(["generate", trained[0].directory, str(tmp_path / "p.jsonl")]) == 2
    errors = capsys.readouterr().err
    assert [word for word in words if word not in errors] == []


def test_generate_says_what_it_can_not_do(trained, tmp_path):
    (tmp_path / "p.txt").write_text("Hi\n")
    with pytest.raises(InputError, match="scratch has no weights"):
        runs.generate(settings(tmp_path / "x"), tmp_path / "p.txt")
    with pytest.raises(InputError, match="overrides"):
        runs.generate(trained[0].directory, tmp_path / "p.txt", ["seed=1"])
    with pytest.raises(InputError, match="temperature must be > 0"):
        runs.generate(trained[0].directory, tmp_path / "p.txt", temperature=0.0)


@pytest.mark.slow
def test_export_writes_and_asks_the_served_model(trained, tmp_path, capsys):
    result, config = trained
    run = tmp_path / "run"
    shutil.copytree(result.directory, run)
    wanted = config.model_copy(update={"export": Export(signatures=["prefer"])})
    (run / "config.yaml").write_text(wanted.resolved())
    path = tmp_path / "served" / "1"
    assert main(["export", str(run), str(path), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["verified"] and (path / "saved_model.pb").is_file()
    answer = report["answer"]["prefer"]["response"]
    assert answer["probability_a"] + answer["probability_b"] == pytest.approx(1)
    assert main(["export", str(run), str(path)]) == 2
    assert "exists already" in capsys.readouterr().err


@pytest.mark.slow
def test_a_cached_reference_trains_exactly_as_a_frozen_copy(trained, tmp_path):
    result, _ = trained
    cached = runs.train(settings(tmp_path / "cached", reference="cached"))
    for one, other in zip(steps_of(result.directory), steps_of(cached.directory), strict=True):
        assert other["loss"] == pytest.approx(one["loss"], abs=1e-5)
    assert cached.after["metrics"] == pytest.approx(result.after["metrics"], abs=1e-4)
    held_out = tmp_path / "held_out.jsonl"
    pairs = read_preferences("builtin:support", limit=50)
    write_preferences(pairs.split(HELD_OUT, seed=SEED)[1], held_out)
    measured = runs.evaluate(cached.directory, held_out)["metrics"]
    assert measured == pytest.approx(result.after["metrics"], abs=1e-4)


def test_what_is_no_run_is_said_to_be_none(tmp_path, capsys):
    for command in (["evaluate", str(tmp_path), "x"], ["export", str(tmp_path), "x/1"]):
        assert main(command) == 2
        assert "is not the directory of a run" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text(settings(tmp_path).resolved())
    assert main(["evaluate", str(tmp_path), "x"]) == 2
    assert "no trained policy yet" in capsys.readouterr().err
