"""Records from the command line, and runs that train on what stays on disk."""

import gzip
import json

import pytest
from app_tiny import SIZES, same_logits

from dpo_keras.app import runs
from dpo_keras.app.cli import main
from dpo_keras.app.config import Config, parse_config
from dpo_keras.app.console import Silent
from dpo_keras.app.models import load_model
from dpo_keras.app.run_inputs import read_sides
from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    StoredPreferences,
    read_preferences,
    support_pairs,
    write_preferences,
)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Pairs as files and as records: 40 to train on, 12 held out."""
    folder = tmp_path_factory.mktemp("data")
    pairs = list(support_pairs(60))
    write_preferences(pairs[:40], folder / "train.jsonl")
    write_preferences(pairs[48:], folder / "held_out.jsonl")
    assert main(["data", "build", str(folder / "train.jsonl"), "--out", str(folder / "train")]) == 0
    return folder


def settings(output, path, prompts=0, **data):
    return Config(
        output=str(output),
        model={"scratch": {**SIZES, "num_layers": 1, "max_sequence_length": 96}},
        data={"path": str(path), "max_length": 96, **data},
        training={"batch_size": 8, "learning_rate": 1e-3, "buckets": 1},
        evaluation={"prompts": prompts, "max_new_tokens": 4, "batch_size": 8},
    )


def test_build_prints_what_it_made_and_inspect_reads_it(run, files, tmp_path):
    path = files / "train.jsonl"
    code, out, _ = run("data", "build", path, "-o", tmp_path / "out", "--limit", 9, "--json")
    result = json.loads(out)
    assert code == 0 and result["pairs"] == 9 and len(result["shards"]) == 1
    assert result["checksum"] == StoredPreferences.open(tmp_path / "out").checksum
    code, out, _ = run("data", "inspect", tmp_path / "out", "--json")
    assert code == 0 and json.loads(out)["audit"]["pairs"] == 9
    code, _, err = run("data", "build", path, "-o", tmp_path / "out", "--column", "prompt")
    assert code == 2 and "--column must be ours=theirs" in err
    code, _, err = run("data", "build", path, "-o", tmp_path / "out")
    assert code == 2 and err.count("error:") == 1 and "must be a new or an empty directory" in err


def test_inspect_takes_columns_and_tells_bad_records_in_groups(run, tmp_path):
    path = tmp_path / "x.jsonl"
    good = [{"question": f"{n}", "best": "a", "worst": "b"} for n in range(50)]
    bad = [{**good[0], "weight": 2.0e6 + n} for n in range(7)]
    path.write_text("".join(json.dumps(record) + "\n" for record in good + bad))
    names = ["prompt=question", "chosen=best", "rejected=worst"]
    columns = [word for name in names for word in ("--column", name)]
    code, out, _ = run("data", "inspect", path, *columns)
    assert code == 0 and "57 read, 50 kept" in out
    told = " ".join(out.replace("│", " ").split())
    assert "lines 51, 52, 53 and 4 more" in told
    assert "weight must be in [0, 1e6], got" in told and "2000000.0 … 2000006.0" in told
    code, _, err = run("data", "inspect", path)
    assert code == 2 and "--column chosen=" in err


def test_a_file_that_is_cut_off_exits_with_2_unless_that_is_allowed(run, files, tmp_path):
    path = tmp_path / "x.jsonl.gz"
    lines = (files / "train.jsonl").read_text()
    path.write_bytes(gzip.compress(lines.encode())[:-30])
    out = tmp_path / "out"
    for command in (["inspect", path], ["build", path, "-o", out]):
        code, _, err = run("data", *command)
        assert code == 2 and "is cut off or damaged after line" in err
        assert "--allow-truncated" in err and not out.exists()
        code, out_text, _ = run("data", *command, "--allow-truncated", "--json")
        (warning,) = json.loads(out_text)["report"]["warnings"]
        assert code == 0 and warning["rule"] == "broken file"


def test_a_run_ends_at_a_file_that_is_cut_off_unless_that_is_allowed(files, tmp_path):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress((files / "train.jsonl").read_bytes())[:-30])
    with pytest.raises(InputError, match="data.allow_truncated: true"):
        read_sides(settings(tmp_path / "run", path), Silent())
    train, held_out, _ = read_sides(
        settings(tmp_path / "run", path, allow_truncated=True), Silent()
    )
    assert 0 < len(train) + len(held_out) < 40
    with pytest.raises(InputError, match=r"data.allow_truncated has no effect on .*must be whole"):
        read_sides(settings(tmp_path / "run", files / "train", allow_truncated=True), Silent())


@pytest.mark.slow
def test_a_run_on_records_ends_with_the_weights_of_a_run_on_the_file(files, tmp_path):
    held_out = str(files / "held_out.jsonl")
    results, policies = [], []
    for name in ("train.jsonl", "train"):
        config = settings(tmp_path / name, files / name, held_out_path=held_out)
        results.append(runs.train(config))
        policies.append(load_model(str(tmp_path / name / "policy")))
    same_logits(*policies)
    assert results[0].pairs == results[1].pairs == {"train": 40, "held_out": 12, "dropped": 0}
    assert results[0].after == results[1].after
    assert any((files / "train" / "tokens").iterdir())


@pytest.mark.slow
def test_records_are_split_by_prompt_and_measured(files, tmp_path):
    given = {"held_out": 0.3, "tokens": str(tmp_path / "t"), "prompts": 2}
    result = runs.train(settings(tmp_path / "run", files / "train", **given))
    assert sum(result.pairs.values()) == 40 and 4 <= result.pairs["held_out"] <= 20
    assert result.after["figures"]["reward_accuracy"] and result.samples
    assert len(list((tmp_path / "t").iterdir())) == 1
    with pytest.raises(InputError, match="data.columns has no effect"):
        runs.train(settings(tmp_path / "c", files / "train", columns={"prompt": "q"}))


@pytest.mark.parametrize("by", ["prompt", "group"])
def test_records_have_the_sides_of_the_file_that_they_were_built_from(files, tmp_path, by):
    config = [settings(tmp_path / "run", files / name, held_out=0.3, split_by=by)
              for name in ("train.jsonl", "train")]  # fmt: skip
    memory, disk = (read_sides(one, Silent()) for one in config)
    assert isinstance(disk.held_out, StoredPreferences)
    assert list(disk.train) == list(memory.train) and list(disk.held_out) == list(memory.held_out)


@pytest.mark.parametrize("how", ["cut off", "damaged"])
def test_a_damaged_shard_is_one_message_and_exit_code_2(run, files, tmp_path, how):
    out = tmp_path / "built"
    assert run("data", "build", files / "train.jsonl", "-o", out)[0] == 0
    shard = next(entry for entry in out.iterdir() if "tfrecord" in entry.name)
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content[:-9] if how == "cut off" else content)
    config = tmp_path / "a.yaml"
    config.write_text(settings(tmp_path / "run", out).resolved())
    code, _, err = run("train", config)
    assert code == 2 and err.count("error:") == 1
    assert shard.name in err.replace("\n", "") and how in err and "Traceback" not in err


def test_a_configuration_can_name_tensorflow_datasets(files, tmp_path):
    tfds = pytest.importorskip("tensorflow_datasets")
    from dpo_keras.preferences.tfds_builder import PreferencePairsConfig

    mine = PreferencePairsConfig(name="mine", files=[str(files / "train.jsonl")])
    tfds.builder("preference_pairs", config=mine, data_dir=tmp_path).download_and_prepare()
    given = {"data_dir": str(tmp_path), "held_out": 0.2}
    config = settings(tmp_path / "run", "tfds:preference_pairs/mine:train[:20]", **given)
    sides = read_sides(config, Silent())
    assert (len(sides.train), len(sides.held_out)) == (17, 3)
    assert set(sides.train) <= set(read_preferences(files / "train.jsonl"))
    given["columns"] = {"prompt": "question"}
    config = settings(tmp_path / "run", "tfds:preference_pairs/mine", **given)
    with pytest.raises(InputError, match="no effect on records that are pairs already"):
        read_sides(config, Silent())


MODEL = "model: {scratch: {}}\nevaluation: {max_new_tokens: 8}\n"


@pytest.mark.parametrize(
    "data, message",
    [
        ("{path: 'tfds:', max_length: 64}", r"data\.path.* must be tfds:NAME/CONFIG:SPLIT"),
        (
            "{path: 'builtin:support', held_out_path: 'tfds:', max_length: 64}",
            r"line 3: data\.held_out_path must be tfds:NAME/CONFIG:SPLIT",
        ),
        ("{path: FOLDER, max_length: 64}", r"which is a directory and has no manifest\.json"),
        (
            "{path: 'builtin:support', max_length: 64, columns: {promt: a}}",
            r"data\.columns.* has 'promt'",
        ),
    ],
)
def test_wrong_sources_are_found_before_anything_runs(tmp_path, data, message):
    data = data.replace("FOLDER", str(tmp_path))
    with pytest.raises(InputError, match=message):
        parse_config(MODEL + f"data: {data}\n", outside=True)


@pytest.mark.parametrize("key", ["path", "held_out_path"])
def test_a_wrong_name_of_tensorflow_datasets_is_reported_under_the_key_that_gave_it(tmp_path, key):
    given = {"path": "builtin:support", "max_length": 64, key: "tfds:"}
    config = Config(
        model={"scratch": {}}, data=given, evaluation={"max_new_tokens": 8}, export=None
    )
    with pytest.raises(InputError) as error:
        read_sides(config, Silent())
    assert [problem.argument for problem in error.value.problems] == [f"data.{key}"]
