"""`dpo-keras export --format …`: a run's policy for other libraries."""

import json

import numpy as np
import pytest
import yaml
from app_runs import settings
from app_tiny import SIZES, TEXTS
from safetensors.numpy import load_file

from dpo_keras.app.cli import main
from dpo_keras.app.config_sections import Model
from dpo_keras.app.models import load_policy, save_policy
from dpo_keras.app.pretrained_export import facts_of_run, save_adapters
from dpo_keras.app.run_directory import RunDirectory, versions
from dpo_keras.serving import save_pretrained


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with LoRA, as `train` leaves it, without the training."""
    folder = tmp_path_factory.mktemp("runs")
    scratch = {"family": "gpt2", **SIZES, "num_layers": 1}
    save_policy(load_policy(Model(scratch=scratch), TEXTS), folder / "base")
    model = {"scratch": None, "path": str(folder / "base"), "lora_rank": 2}
    config = settings(folder / "run", model=model, warmup=None)
    run = RunDirectory(folder / "run")
    policy = load_policy(config.model)
    for variable in policy.trainable_variables:
        variable.assign(variable + 0.1)
    save_policy(policy, run.policy)
    save_adapters(policy, run.adapters)
    figure = {"reward_accuracy": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 9}}
    better = {"reward_accuracy": {"value": 0.75, "low": 0.7, "high": 0.8, "count": 9}}
    run.write("config.yaml", config.resolved())
    run.write("versions.json", versions())
    run.write("data.json", {"train": "f00d", "held_out": None})
    result = {"pairs": {"train": 40}, "before": {"figures": figure}, "after": {"figures": better}}
    run.write("result.json", result)
    return run


@pytest.mark.parametrize("format", ["keras_hub", "transformers", "peft"])
def test_a_run_goes_out_with_a_card_of_its_data_objective_and_figures(
    run, tmp_path, capsys, format
):
    out = tmp_path / "support"
    assert main(["export", str(run.path), str(out), "--format", format, "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["path"] == str(out) and "README.md" in said["files"]
    card = (out / "README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["tags"][0] == "dpo"
    assert "| pairs from | builtin:support |" in card and "| train pairs | 40 |" in card
    assert "`f00d`" in card and "beta 0.1" in card
    assert "| reward_accuracy | 0.5 (0.4 to 0.6) | 0.75 (0.7 to 0.8) |" in card


@pytest.mark.parametrize(("rank", "said"), [(None, False), (2, True)])
def test_a_card_says_how_adapters_are_scaled_where_there_are_any(run, rank, said):
    config = settings(run.path, model={"lora_rank": rank})
    assert ("lora_scaling" in facts_of_run(run, config).objective["model"]) == said


def test_adapters_of_a_run_are_those_that_were_trained(run, tmp_path):
    assert main(["export", str(run.path), str(tmp_path / "peft"), "--format", "peft"]) == 0
    for name, place in (("base", run.path.parent / "base"), ("merged", run.policy)):
        save_pretrained(load_policy(Model(path=str(place))), tmp_path / name)
    base, merged = (load_file(tmp_path / n / "model.safetensors") for n in ("base", "merged"))
    config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
    files = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    module = "transformer.h.0.attn.c_attn"
    down, up = (files[f"base_model.model.{module}.lora_{part}.weight"] for part in "AB")
    change = config["lora_alpha"] / config["r"] * (up @ down).T
    name = f"{module}.weight"
    np.testing.assert_allclose(base[name] + change, merged[name], atol=1e-5)
    assert np.abs(change).max() > 0.01


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--format", "onnx"], "--format must be one of saved_model, keras_hub, transformers"),
        (["--force"], "--force has no effect on SavedModels"),
        (["--format", "peft", "--max-new-tokens", "3"], "--max-new-tokens has no effect on peft"),
    ],
)
def test_wrong_options_of_export_exit_with_2(tmp_path, capsys, options, said):
    assert main(["export", str(tmp_path), str(tmp_path / "out"), *options]) == 2
    assert said in capsys.readouterr().err


def test_a_directory_in_the_way_is_replaced_with_force_only(run, tmp_path, capsys):
    (tmp_path / "mine").touch()
    words = ["export", str(run.path), str(tmp_path), "--format", "transformers"]
    assert main(words) == 2
    assert "exists" in capsys.readouterr().err and (tmp_path / "mine").exists()
    assert main([*words, "--force"]) == 0
    assert not (tmp_path / "mine").exists()


def test_adapters_of_a_run_without_lora_are_refused(run, tmp_path, capsys):
    saved = run.adapters.rename(run.path / "aside")
    try:
        words = ["export", str(run.path), str(tmp_path / "out"), "--format", "peft"]
        assert main(words) == 2
        assert "was trained without LoRA" in capsys.readouterr().err
    finally:
        saved.rename(run.adapters)
