"""The configurations that need downloaded weights run with tiny local models of their format."""

import json
from pathlib import Path

import numpy as np
import pytest

from dpo_keras.app import runs
from dpo_keras.app.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
SMALL = [
    "data.limit=24",
    "data.held_out=0.25",
    "data.max_length=64",
    "evaluation.max_new_tokens=8",
    "training.batch_size=4",
    "training.gradient_accumulation=2",
    "training.buckets=1",
    "export=null",
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "preset", "prompts"),
    [
        ("gpt2_lora.yaml", "gpt2_preset", 0),
        ("gpt2_lora.yaml", "gpt2_hugging_face", 0),
        ("gemma3_lora.yaml", "gemma3_preset", 2),
    ],
)
def test_a_configuration_for_downloaded_weights_trains_a_local_model(
    name, preset, prompts, request, tmp_path
):
    model = request.getfixturevalue(preset)
    overrides = [f"model.path={model}", f"output={tmp_path / 'run'}", *SMALL]
    overrides.append(f"evaluation.prompts={prompts}")
    config = load_config(CONFIGS / name, overrides, outside=True)
    result = runs.train(config)
    assert len(result.samples) == prompts
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 5 + 1, "five steps and the epoch"
    tolerance = 1e-4 if config.model.dtype == "float32" else 5e-2
    assert json.loads(lines[0])["loss"] == pytest.approx(np.log(2), abs=tolerance)
    assert not (tmp_path / "run" / "reference").exists(), "model.path is the reference"
    assert np.isfinite(result.after["metrics"]["loss"])
