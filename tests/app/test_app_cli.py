"""The command line: exit codes, one readable message per fault, results as JSON on stdout."""

import ast
import json
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

from dpo_keras.app import keras_backend
from dpo_keras.app.console import FAILED
from dpo_keras.errors import InputError

ROOT = Path(__file__).parents[2]
GOOD = {"prompt": "How are you?", "chosen": "Fine, thanks.", "rejected": "No."}


def lines(path, *records):
    text = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("\n".join(text) + "\n")
    return path


@pytest.mark.slow
def test_commands_answer_without_what_they_do_not_need(tmp_path):
    path = lines(tmp_path / "p.jsonl", GOOD)
    code = (
        "import sys; from dpo_keras.app.cli import main; exits = [];\n"
        "for line in sys.argv[2:]: exits.append(main(line.split()))\n"
        "sys.exit(str([exits, [m for m in sys.argv[1].split() if m in sys.modules]]))"
    )

    def exits_and_imports(heavy, *commands):
        done = subprocess.run(
            [sys.executable, "-c", code, heavy, *commands],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert "Traceback" not in done.stderr
        return ast.literal_eval(done.stderr.splitlines()[-1])

    slow = "tensorflow keras keras_hub"
    explained = ("--help", "train --help", "--version")
    assert exits_and_imports(f"{slow} numpy yaml", *explained) == [[0, 0, 0], []]
    config = f"configs/gpt2_lora.yaml data.path={path}"
    checked = ("losses", f"validate {config} data.template=chatml")
    wrong = (f"train {config} training.epochs=many", "evaluate no_run a", "export no_run m/1")
    assert exits_and_imports(slow, *checked, *wrong) == [[0, 0, 2, 2, 2], []]


@pytest.mark.parametrize(
    "command",
    [
        *("quickstart", "train", "plan", "validate", "data inspect", "evaluate", "generate"),
        *("export", "losses"),
    ],
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
    for command in ("validate", "train", "plan"):
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


def test_a_configuration_of_the_package_goes_by_its_name(run):
    code, out, _ = run("validate", "builtin:quickstart", "--json")
    assert code == 0
    assert out == run("validate", ROOT / "configs" / "quickstart.yaml", "--json")[1]
    code, _, err = run("validate", "builtin:qickstart")
    assert code == 2 and "did you mean 'quickstart'?" in err
    for recipe in sorted((ROOT / "configs").glob("*.yaml")):
        assert recipe.stem in err, "the message lists what there is"


@pytest.mark.slow
def test_quickstart_runs_the_bundled_configuration_and_keeps_an_earlier_run(
    run, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    earlier = tmp_path / "runs" / "quickstart"
    earlier.mkdir(parents=True)
    (earlier / "mine.txt").write_text("an earlier run")
    code, _, err = run("quickstart", "data.path=nowhere.jsonl")
    assert code == 2 and "nowhere.jsonl" in err
    assert (earlier / "mine.txt").exists(), "what can not run moves nothing"
    own = tmp_path / "own"
    own.mkdir()
    (own / "mine.txt").write_text("no run")
    code, _, err = run("quickstart", "output=own", "data.limit=60")
    assert code == 2 and "own" in err and (own / "mine.txt").exists()
    small = ["data.limit=60", "warmup.epochs=1", "training.epochs=1", "export=null"]
    code, out, err = run("quickstart", *small, "evaluation.prompts=2", "--json")
    assert code == 0, err
    assert json.loads(out)["directory"] == "runs/quickstart"
    (kept,) = tmp_path.glob("runs/quickstart.*")
    assert (kept / "mine.txt").read_text() == "an earlier run"
    assert not (earlier / "mine.txt").exists()
    resolved = (earlier / "config.yaml").read_text()
    assert "path: builtin:support" in resolved and "limit: 60" in resolved
    assert run("quickstart", *small, "evaluation.prompts=2", "--resume")[0] == 0
    assert len(list(tmp_path.glob("runs/*"))) == 2, "--resume moves nothing"


@pytest.mark.parametrize(
    "command",
    ["", "train", "generate", "annotate", "export", "data build", "feedback report", "losses"],
)
def test_help_names_types_in_words(run, command):
    code, out, _ = run(*command.split(), "--help")
    assert code == 0 and not re.search(r"<(bool|int|float|path|str|list|choice)|list\[", out)
    if command == "generate":
        assert "NUMBER" in out and "PATH" in out and "--force" in out


def test_losses_fit_80_columns_and_lose_nothing(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    _, out, _ = run("losses")
    first, *_, last = out.splitlines()
    assert first.startswith("sigmoid  ")
    assert max(len(line.rstrip()) for line in out.splitlines()[:-1]) <= 80
    for words in ("-log σ(βΔ)", "arXiv 2305.18290", "label_smoothing", "no reference"):
        assert words in out
    assert len(out.splitlines()) < 130 and last.startswith("c, r: log-ratios")


def test_validate_warns_of_a_rate_that_destroys_the_policy(run, gpt2_preset, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(f"model: {{path: {gpt2_preset}}}\ndata: {{path: 'builtin:support'}}\n")
    code, _, err = run("validate", path, "training.learning_rate=1e10")
    assert code == 0 and "warning: training.learning_rate is 1e+10; above 0.1" in err


def test_what_exists_is_not_overwritten_unasked(run, tmp_path):
    pytest.importorskip("choix")
    output, prompts = tmp_path / "out.jsonl", tmp_path / "prompts.txt"
    output.write_text("precious")
    prompts.write_text("Hi\n")
    for arguments in (
        ["generate", "nowhere.yaml", prompts, "-o", output],
        ["feedback", "export", tmp_path / "x.sqlite", output],
        ["feedback", "report", tmp_path / "x.sqlite", "-o", output],
    ):
        code, _, err = run(*arguments)
        assert code == 2 and f"{output} exists. Give another path, or --force to" in err
        code, _, err = run(*arguments, "--force")
        assert code == 2 and "exists." not in err, "the next thing that is wrong"
    assert output.read_text() == "precious"


def test_an_output_that_no_file_can_be_made_at_is_said_before_any_work(run, tmp_path):
    (tmp_path / "file").write_text("")
    for output, words in (
        (tmp_path, "is a directory"),
        (tmp_path / "file" / "x", "takes no files"),
    ):
        code, _, err = run("generate", "nowhere.yaml", "nowhere.txt", "-o", output)
        assert code == 2 and f"--output: {output}" in err and words in err


def test_a_python_warning_is_one_line_without_code(run, monkeypatch):
    def warn(*_, **__):
        warnings.warn("the data are old", UserWarning, stacklevel=1)
        raise InputError("x")

    monkeypatch.setattr("dpo_keras.app.data_commands.read_preferences", warn)
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        _, _, err = run("data", "inspect", "x.jsonl")
    assert err.splitlines() == ["warning: the data are old", "error: x"]


def test_bytes_of_the_command_line_that_are_no_text_exit_with_2(run, tmp_path):
    (tmp_path / "a.yaml").write_text("name: x")
    for arguments in (
        ["validate", tmp_path / "a.yaml", "name=\udc80"],
        ["validate", "\udc80.yaml"],
    ):
        for extra in ([], ["--json"]):
            code, _, err = run(*arguments, *extra)
            assert code == 2 and "\\udc80" in err


def test_another_backend_is_refused(run, monkeypatch, tmp_path):
    monkeypatch.setattr(keras_backend, "_running", lambda: None)
    monkeypatch.setenv("KERAS_BACKEND", "torch")
    path = tmp_path / "x.yaml"
    path.write_text("model: {scratch: {}}\ndata: {path: 'builtin:support', max_length: 128}\n")
    code, _, err = run("validate", path)
    assert code == 2 and "KERAS_BACKEND must be tensorflow or jax, got 'torch'." in err


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

        monkeypatch.setattr("dpo_keras.app.data_commands.read_preferences", fail)
        found, out, err = run("data", "inspect", "x.jsonl")
        assert found == code and words in err and "Traceback" not in err and out == ""
    assert FAILED == 1
