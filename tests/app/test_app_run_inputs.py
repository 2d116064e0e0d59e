"""Runs on inputs of every kind: conversations, bad lines, changed data, each kind of reference."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from app_runs import HELD_OUT, SEED, settings, steps_of
from app_tiny import SIZES, TEXTS
from tiny import Letters

from dpo_keras.app import runs
from dpo_keras.app.cli import main
from dpo_keras.app.config_sections import Data, Model
from dpo_keras.app.models import load_model, load_policy, save_policy
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.app.run_inputs import tokenize
from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    Preferences,
    read_preferences,
    support_pairs,
    write_preferences,
)
from dpo_keras.preferences.collection import earlier_split


@pytest.mark.slow
def test_data_that_changed_since_the_run_began_are_refused(tmp_path):
    data = tmp_path / "pairs.jsonl"
    write_preferences(support_pairs(50), data)
    config = settings(tmp_path / "run", data={"path": str(data)}, warmup=None)

    class StoppedError(Exception):
        pass

    class Stopping(runs.Silent):
        def stage(self, title):
            if title == "Preference training":
                raise StoppedError

    with pytest.raises(StoppedError):
        runs.train(config, progress=Stopping())
    write_preferences(support_pairs(50, seed=1), data)
    with pytest.raises(InputError, match="the train and held_out pairs are not those"):
        runs.train(config, resume=True)
    write_preferences(support_pairs(50), data)
    assert runs.train(config, resume=True).steps == 5


@pytest.mark.slow
def test_a_run_begun_before_memory_and_disk_had_one_split_keeps_its_sides(tmp_path, monkeypatch):
    config = settings(tmp_path / "run", warmup=None)

    class StoppedError(Exception):
        pass

    class Stopping(runs.Silent):
        def stage(self, title):
            if title == "Preference training":
                raise StoppedError

    with monkeypatch.context() as earlier, pytest.raises(StoppedError):
        earlier.setattr(Preferences, "split", earlier_split)
        runs.train(config, progress=Stopping())
    begun = tmp_path / "run" / "data.json"
    content = json.loads(begun.read_text())
    assert content.pop("split")  # earlier versions wrote the fingerprints alone
    begun.write_text(json.dumps(content))
    result = runs.train(config, resume=True)
    sides = earlier_split(support_pairs(50), HELD_OUT, SEED, "prompt")
    assert result.pairs == {"train": len(sides[0]), "held_out": len(sides[1]), "dropped": 0}
    assert sides[1] != support_pairs(50).split(HELD_OUT, seed=SEED)[1]


def turn(role, content):
    return {"role": role, "content": content}


@pytest.mark.slow
def test_conversations_run_through_a_chat_template_from_file_to_candidates(tmp_path):
    data = tmp_path / "chat.jsonl"
    records = [
        {
            "prompt": [turn("system", "Be kind."), turn("user", f"Question {number}?")],
            "chosen": [turn("assistant", "Gladly!")],
            "rejected": [turn("assistant", "No.")],
        }
        for number in range(6)
    ]
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    config = settings(
        tmp_path / "run",
        data={"path": str(data), "held_out": 0.5, "template": "chatml", "limit": None},
        evaluation={"prompts": 1},
        warmup=None,
    )
    result = runs.train(config)
    assert result.steps == 1
    assert "Question" in result.samples[0]["prompt"] and "<|im_" not in result.samples[0]["prompt"]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text(json.dumps({"prompt": records[0]["prompt"]}) + '\n{"prompt": "Hi"}\n')
    candidates = runs.generate(result.directory, prompts, max_new_tokens=4)
    assert candidates[0]["prompt"] == records[0]["prompt"] and len(candidates[1]["responses"]) == 2
    bare = config.model_copy(
        update={
            "output": str(tmp_path / "bare"),
            "data": config.data.model_copy(update={"template": None}),
        }
    )
    with pytest.raises(
        InputError, match=r"training pairs: .*data\.template is needed to turn chat"
    ):
        runs.train(bare)


@pytest.fixture(scope="module")
def preset(tmp_path_factory):
    """One layer, as what a reference is does not depend on their number."""
    path = tmp_path_factory.mktemp("models") / "preset"
    scratch = {"family": "gpt2", **SIZES, "num_layers": 1}
    save_policy(load_policy(Model(scratch=scratch), TEXTS), path)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "reference"),
    [
        ({"model": {"lora_rank": 2}}, "adapters_off"),
        ({"model": {"lora_rank": 2, "quantization": "int4"}}, "adapters_off"),
        ({"model": {"lora_rank": 2}, "warmup": {"batch_size": 8, "learning_rate": 1e-3}}, "frozen"),
        ({"reference": "SELF"}, "model"),
        ({"loss": {"type": "simpo", "beta": 2.0, "gamma": 0.5}}, "none"),
    ],
)
def test_references_of_every_kind(preset, tmp_path, changes, reference):
    changes = {"warmup": None, **changes}
    changes["model"] = {"scratch": None, "path": str(preset), **changes.get("model", {})}
    if changes.get("reference") == "SELF":
        changes["reference"] = str(preset)
    notes = []

    class Notes(runs.Silent):
        def note(self, text):
            notes.append(text)

    config = settings(tmp_path / "run", data={"max_length": 64, "limit": 20}, **changes)
    result = runs.train(config, progress=Notes())
    assert any(note.startswith(f"reference: {reference}") for note in notes), notes
    first = steps_of(result.directory)[0]["loss"]
    if reference != "none":
        assert first == pytest.approx(np.log(2), abs=1e-4)
    measured = runs.evaluate(result.directory, "builtin:support", limit=8)
    assert np.isfinite(measured["metrics"]["loss"])
    if "lora_rank" in changes["model"]:
        reloaded = load_model(result.directory + "/policy")
        assert not any("lora" in weight.path for weight in reloaded.weights), "adapters are merged"
    # No other place has the model that the policy was compared with.
    only_here = "quantization" in changes["model"] or changes["warmup"] is not None
    assert Path(result.directory, "reference").exists() == only_here


def test_a_reference_with_another_vocabulary_ends_before_any_training(llama, tmp_path, capsys):
    save_policy(llama, tmp_path / "llama")
    path = tmp_path / "a.yaml"
    path.write_text(settings(tmp_path / "run").resolved())
    assert main(["train", str(path), f"reference={tmp_path / 'llama'}"]) == 2
    assert "another vocabulary than the policy" in capsys.readouterr().err
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_bad_lines_are_named_and_left_out_or_end_the_run_as_configured(tmp_path, capsys):
    data = tmp_path / "pairs.jsonl"
    write_preferences(support_pairs(30), data)
    lines = data.read_text().splitlines()
    lines[16] = "{not json"
    data.write_text("\n".join(lines) + "\n")
    path = tmp_path / "a.yaml"
    path.write_text(settings(tmp_path / "run", data={"path": str(data)}, warmup=None).resolved())
    assert main(["train", str(path), "data.on_error=fail", f"output={tmp_path / 'no'}"]) == 2
    assert "line 17" in capsys.readouterr().err
    # Without held-out pairs a run trains, and says nothing of quality.
    assert main(["train", str(path), "data.held_out=0", "--json"]) == 0
    out, err = capsys.readouterr()
    result = json.loads(out)
    assert "not JSON: 1 (line 17)" in err
    assert result["pairs"] == {"train": 29, "held_out": 0, "dropped": 1}
    assert result["steps"] == 4 and result["before"] is None and result["report"] == {}
    assert (tmp_path / "run" / "policy").is_dir()


def test_steps_that_do_not_divide_are_refused_before_any_training(tmp_path):
    with pytest.raises(InputError, match="steps_per_execution must divide the 5 steps"):
        runs.train(settings(tmp_path / "run", training={"steps_per_execution": 2}))
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_truncation_of_many_pairs_is_printed_with_the_length_to_set(tmp_path):
    notes = []

    class Notes(runs.Silent):
        def note(self, text):
            notes.append(text)

    pairs = read_preferences([{"prompt": "?" * 51, "chosen": "c" * 99, "rejected": "r"}])
    policy, run = SimpleNamespace(preprocessor=Letters()), RunDirectory(str(tmp_path))
    for least, left in ((None, 25), (40, 40)):
        data = Data(path="x", max_length=100, min_prompt_tokens=least)
        tokens = tokenize(data, pairs, policy, "training", Notes(), run)
        assert tokens.prompt.lengths.tolist() == [left]
        assert notes.pop().endswith(
            f"Warning: max_length=100 cuts 1 of 1 pairs: 1 prompts ({left} of 52 tokens are left "
            "on average), and the responses of 1 pairs. max_length=152 would leave 95% of the "
            "pairs whole."
        )
