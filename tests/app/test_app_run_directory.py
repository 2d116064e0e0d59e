"""A run's directory is opened for a new run, for its own resumption, and for nothing else."""

import json

import pytest

from dpo_keras.app import run_directory
from dpo_keras.app.config import parse_config
from dpo_keras.app.run_directory import RunDirectory, locked_run, open_run, start_run
from dpo_keras.errors import InputError

TEXT = "model: {path: some_preset}\ndata: {path: pairs.jsonl}\n"


def config_at(path, *overrides):
    return parse_config(TEXT, [f"output={path}", *overrides])


def train_a_little(run):
    (run.checkpoints / "training" / "step-00000002").mkdir(parents=True)


def test_a_new_run_records_its_configuration_and_versions(tmp_path):
    config = config_at(tmp_path / "run")
    run = start_run(config, False, "# given", True)
    assert run.config() == config and not run.begun and not run.finished
    assert (run.path / "config.given.yaml").read_text() == "# given"
    assert {"python", "tensorflow", "keras"} <= run.read("versions.json").keys()


def test_what_was_wrong_before_any_training_may_be_corrected_in_place(tmp_path):
    first = start_run(config_at(tmp_path / "run"), False, None, True)
    first.write("data.json", {"train": "other tokens"})
    again = start_run(config_at(tmp_path / "run", "loss.beta=0.2"), False, None, True)
    assert again.config().loss.beta == 0.2 and again.read("data.json") is None
    once_more = start_run(config_at(tmp_path / "run", "loss.beta=0.3"), True, None, True)
    assert once_more.config().loss.beta == 0.3


def test_a_run_that_has_trained_is_resumed_with_its_own_configuration_only(tmp_path):
    config = config_at(tmp_path / "run")
    train_a_little(start_run(config, False, None, True))
    with pytest.raises(InputError, match="holds a run already; go on with --resume"):
        start_run(config, False, None, True)
    with pytest.raises(InputError, match=r"loss.beta is 0.2, was 0.1 there"):
        start_run(config_at(tmp_path / "run", "loss.beta=0.2"), True, None, True)
    assert start_run(config, True, None, True).begun


def test_resuming_what_never_began_begins_it(tmp_path):
    assert start_run(config_at(tmp_path / "run"), True, None, True).config().name == "run"


def test_a_file_in_the_way_is_not_overwritten(tmp_path):
    (tmp_path / "run").write_text("precious")
    with pytest.raises(InputError, match="is not the directory of a run"):
        start_run(config_at(tmp_path / "run"), False, None, True)
    assert (tmp_path / "run").read_text() == "precious"


def test_a_directory_with_a_configuration_of_its_own_is_left_alone(tmp_path):
    (tmp_path / "config.yaml").write_text(TEXT)
    with pytest.raises(InputError, match="is not the directory of a run"):
        start_run(config_at(tmp_path), False, None, True)
    assert (tmp_path / "config.yaml").read_text() == TEXT


def test_workers_that_are_not_chief_write_nothing(tmp_path):
    run = start_run(config_at(tmp_path / "run"), False, None, False)
    run.write("result.json", {})
    assert not (tmp_path / "run").exists()


def test_a_run_in_use_is_refused_to_a_second_process_resumed_or_not(tmp_path):
    config = config_at(tmp_path / "run")
    with locked_run(config, False, True):
        train_a_little(start_run(config, False, None, True))
        with (
            pytest.raises(InputError, match=r"is in use by process \d+ on .*output=DIRECTORY"),
            locked_run(config, True, True),
        ):
            pass
        assert (tmp_path / "run" / "run.lock").is_file(), "the first one keeps it"
    with locked_run(config, True, True):
        pass
    assert not (tmp_path / "run" / "run.lock").exists()


def test_workers_that_are_not_chief_take_no_lock(tmp_path):
    config = config_at(tmp_path / "run")
    with locked_run(config, False, True), locked_run(config, True, False):
        assert (tmp_path / "run" / "run.lock").is_file()


class KilledError(BaseException):
    pass


@pytest.mark.parametrize("name", ["versions.json", "config.given.yaml", "config.yaml"])
def test_a_run_that_ends_before_its_configuration_is_written_leaves_nothing(
    tmp_path, monkeypatch, name
):
    def write_text(path, text):
        if path.name == name:
            raise KilledError
        path.write_text(text)

    monkeypatch.setattr(run_directory, "write_text", write_text)
    with (
        pytest.raises(KilledError),
        locked_run(config_at(tmp_path / "run"), False, True),
    ):
        start_run(config_at(tmp_path / "run"), False, None, True)
    assert not (tmp_path / "run").exists()


def test_a_run_killed_before_its_configuration_is_written_does_not_block_the_next(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.lock", "versions.json", ".config.given.99.partial.yaml"):
        (folder / name).write_text("{}")
    with locked_run(config_at(folder), False, True):
        start_run(config_at(folder), False, None, True)
    assert sorted(path.name for path in folder.iterdir()) == [
        *("config.given.yaml", "config.yaml", "versions.json")
    ]


def test_what_a_killed_process_left_half_written_is_removed_when_the_run_goes_on(tmp_path):
    config = config_at(tmp_path / "run")
    run = start_run(config, False, None, True)
    train_a_little(run)
    (run.path / ".policy.99.partial").mkdir()
    start_run(config, True, None, True)
    assert not list(run.path.glob(".*")) and run.begun


def test_an_output_that_cannot_be_written_to_is_an_error_of_the_input(tmp_path):
    (tmp_path / "file").write_text("precious")
    with (
        pytest.raises(InputError, match=r"^output: .*file/run cannot be written to \(Not a dir"),
        locked_run(config_at(tmp_path / "file" / "run"), False, True),
    ):
        pass
    with (
        pytest.raises(InputError, match=r"^output: /proc/run cannot be written to"),
        locked_run(config_at("/proc/run"), False, True),
    ):
        pass


def test_files_are_written_whole_or_not_at_all(tmp_path):
    run = RunDirectory(tmp_path)
    run.write("a.json", {"é": 1})
    with pytest.raises(TypeError):
        run.write("b.jsonl", [{"bad": object()}])
    run.write("lines.jsonl", [{"n": 1}, {"n": 2}])
    assert json.loads((tmp_path / "a.json").read_text()) == {"é": 1}
    assert sorted(item.name for item in tmp_path.iterdir()) == ["a.json", "lines.jsonl"]
    assert run.read("missing.json") is None


def test_what_is_no_run_can_not_be_opened(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        open_run(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"has no config.yaml"):
        open_run(tmp_path)
    start_run(config_at(tmp_path / "run"), False, None, True)
    with pytest.raises(InputError, match="no trained policy yet"):
        open_run(tmp_path / "run")


def test_a_file_of_a_run_that_holds_no_json_is_named(tmp_path):
    (tmp_path / "data.json").write_text("")
    with pytest.raises(InputError, match=r"data\.json is damaged: it holds no JSON"):
        RunDirectory(tmp_path).read("data.json")
