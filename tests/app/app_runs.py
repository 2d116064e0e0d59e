"""The configuration of a run of seconds, and what it logged."""

import json
from pathlib import Path

from app_tiny import SIZES

from dpo_keras.app.config import Config

# Of the 50 pairs, 40 to train on and 10 held out.
HELD_OUT, SEED = 0.14, 5


def settings(output, **changes):
    """A run of seconds: 40 pairs of 50, one layer, five steps of warm-up and five of training."""
    content = {
        "output": str(output),
        "seed": SEED,
        "model": {"scratch": {**SIZES, "num_layers": 1, "max_sequence_length": 96}},
        "data": {"path": "builtin:support", "limit": 50, "held_out": HELD_OUT, "max_length": 96},
        "warmup": {"batch_size": 8, "learning_rate": 1e-3},
        "training": {"batch_size": 8, "learning_rate": 1e-3, "buckets": 1, "checkpoint_every": 2},
        "evaluation": {"prompts": 0, "max_new_tokens": 8, "batch_size": 8},
    }
    for key, change in changes.items():
        old = content.get(key)
        content[key] = {**old, **change} if isinstance(old, dict) and change else change
    return Config(**content)


def steps_of(directory):
    lines = (Path(directory) / "metrics.jsonl").read_text().splitlines()
    return [record for record in map(json.loads, lines) if "epoch" not in record]
