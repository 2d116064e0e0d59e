"""The command line: exit codes, one readable message per fault, results as JSON on stdout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpo_keras.app.console import FAILED

ROOT = Path(__file__).parents[2]
GOOD = {"prompt": "How are you?", "chosen": "Fine, thanks.", "rejected": "No."}


def lines(path, *records):
    text = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.mark.slow
def test_help_and_version_answer_without_tensorflow():
    code = (
        "import sys; from dpo_keras.app.cli import main; code = main(sys.argv[1:]);"
        "heavy = [m for m in ('tensorflow', 'keras', 'keras_hub') if m in sys.modules];"
        "sys.exit(code or len(heavy))"
    )
    for arguments in (["--help"], ["train", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done
        assert "dpo-keras" in done.stdout


@pytest.mark.parametrize(
    "command",
    ["train", "validate", "data inspect", "evaluate", "generate", "export", "losses"],
)
def test_every_command_explains_itself_and_takes_json_and_debug(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0
    assert "--json" in out and "--debug" in out


@pytest.mark.parametrize(
    "arguments", [["trian", "a.yaml"], ["train"], ["train", "a.yaml", "--reusme"], ["data"], []]
)
def test_a_wrong_command_line_exits_with_2(run, arguments):
    code, _, err = run(*arguments)
    assert code == 2


def test_losses_lists_every_objective(run):
    code, out, _ = run("losses", "--json")
    names = [row["name"] for row in json.loads(out)["losses"]]
    assert code == 0 and {"sigmoid", "ipo", "simpo"} <= set(names)
    code, out, _ = run("losses")
    assert code == 0 and "sigmoid" in out and "2305.18290" in out


def test_validate_prints_the_resolved_configuration(run, gpt2_preset, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"model: {{path: {gpt2_preset}}}\ndata: {{path: 'builtin:support'}}\n")
    code, out, err = run("validate", path, "training.learning_rate=1e-4")
    assert code == 0 and "learning_rate: 0.0001" in out and "is valid" in err
    code, out, _ = run("validate", path, "--json")
    assert code == 0 and json.loads(out)["loss"]["beta"] == 0.1


def test_every_fault_is_one_line_on_stderr_without_a_traceback(run, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("model: {path: ./nowhere}\ndata: {pth: x}\nloss: {beta: -1}\n")
    for command in ("validate", "train"):
        code, out, err = run(command, path)
        assert code == 2 and out == ""
        assert "Traceback" not in err
        messages = [line for line in err.splitlines() if line.startswith("error: ")]
        assert [m.split(": ")[1].split("line ")[1] for m in messages] == ["1", "2", "3"]
        assert "did you mean data.path?" in err and "model.path ./nowhere" in err
    code, out, err = run("validate", path, "--json", "--debug")
    assert code == 2 and "Traceback" in err
    assert json.loads(out)["error"]["kind"] == "input"
    assert len(json.loads(out)["error"]["problems"]) == 3


def test_a_missing_configuration_is_said_at_once(run):
    code, _, err = run("train", "nowhere.yaml")
    assert code == 2 and "nowhere.yaml: can not be read: No such file" in err


def test_another_backend_is_refused(run, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    code, _, err = run("losses")
    assert code == 2 and "KERAS_BACKEND is 'jax'" in err


def test_inspect_draws_the_picture(run, tmp_path):
    path = lines(tmp_path / "p.jsonl", GOOD, {**GOOD, "chosen": "No.", "rejected": GOOD["chosen"]})
    code, out, _ = run("data", "inspect", path)
    assert code == 0
    for words in ("2 read, 2 kept", "contradictions", "the longer response wins", "prompt"):
        assert words in out
    code, out, _ = run("data", "inspect", path, "--json")
    content = json.loads(out)
    assert content["audit"]["pairs"] == 2 and content["report"]["kept"] == 2


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("{not json", "not JSON"),
        ({"prompt": "p", "chosen": "c"}, "rejected"),
        ({**GOOD, "preference": 1.7}, "1.7"),
        ({**GOOD, "chosen": "  "}, "chosen"),
        ({**GOOD, "rejected": GOOD["chosen"]}, "same"),
    ],
)
def test_a_bad_line_is_shown_with_its_number_and_the_good_ones_are_kept(run, tmp_path, bad, words):
    good = [{**GOOD, "prompt": f"Question {i}?"} for i in range(16)]
    path = lines(tmp_path / "p.jsonl", *good, bad, {**GOOD, "prompt": "Last?"})
    code, out, _ = run("data", "inspect", path)
    assert code == 0 and "18 read, 17 kept, 1 dropped" in out
    assert "line 17" in out and words in out


def test_data_without_one_good_line_exit_with_2(run, tmp_path):
    path = lines(tmp_path / "p.jsonl", {"a": 1}, {"a": 2})
    code, out, err = run("data", "inspect", path)
    assert code == 2 and out == "" and "no preference pair could be read" in err
    code, _, err = run("data", "inspect", tmp_path / "missing.jsonl")
    assert code == 2 and "missing.jsonl" in err


def test_unforeseen_errors_exit_with_1_and_ctrl_c_with_130(run, monkeypatch):
    for error, code, words in (
        (RuntimeError("boom\nmore"), 1, "RuntimeError: boom (--debug shows the traceback.)"),
        (OSError(28, "No space left on device", "x"), 1, "the disk is full"),
        (KeyboardInterrupt(), 130, "stopped"),
    ):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr("dpo_keras.app.cli.read_preferences", fail)
        found, out, err = run("data", "inspect", "x.jsonl")
        assert found == code and words in err and "Traceback" not in err and out == ""
    assert FAILED == 1
