#!/usr/bin/env python
"""Pairs per second of the same training on TensorFlow and on JAX.

    python scripts/bench/backends.py --json backends.json

A small policy of random weights trains on random pairs of up to 256 tokens, 8 in a step. Each
measurement is a process of its own; the backends take turns, round after round. The first epoch
traces and compiles, and is reported as the start; the others are timed. A figure is the median over
rounds, and the ratio is the median of the rounds' ratios.
"""

import argparse
import json
import os
import statistics
import time
from typing import Any

import _common as common

BACKENDS = ("tensorflow", "jax")
CASES = {
    "GPT-2, packed": {"family": "gpt2", "batching": "packed"},
    "GPT-2, packed, LoRA": {"family": "gpt2", "batching": "packed", "adapters": True},
    "GPT-2, buckets": {"family": "gpt2", "batching": "buckets"},
    "Llama, packed": {"family": "llama", "batching": "packed"},
    "Llama, buckets": {"family": "llama", "batching": "buckets"},
}
PAIRS, BATCH, LENGTH, VOCABULARY, WIDTH, LAYERS = 32, 8, 256, 8192, 256, 4


def policy_of(family: str) -> Any:
    """Make a policy of random weights."""
    import keras_hub

    if family == "gpt2":
        return common.gpt2(LAYERS, WIDTH, VOCABULARY, LENGTH)
    backbone = keras_hub.models.Llama3Backbone(
        vocabulary_size=VOCABULARY,
        num_layers=LAYERS,
        num_query_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        hidden_dim=WIDTH,
        intermediate_dim=4 * WIDTH,
    )
    return keras_hub.models.Llama3CausalLM(backbone=backbone)


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Train in this process, and time the epochs."""
    os.environ["KERAS_BACKEND"] = task["backend"]
    import keras

    import dpo_keras

    keras.utils.set_random_seed(0)
    policy = policy_of(task["family"])
    if task.get("adapters"):
        dpo_keras.enable_lora(policy, 8)
    model = dpo_keras.DPOModel(policy)
    model.compile(keras.optimizers.AdamW(1e-5), loss=dpo_keras.DPOLoss())
    data = dpo_keras.preference_dataset(
        common.random_pairs(PAIRS, LENGTH, VOCABULARY),
        batch_size=BATCH,
        batching=task["batching"],
    )
    seconds = []
    for _ in range(1 + task["epochs"]):
        start = time.perf_counter()
        model.fit(data, verbose=0)
        seconds.append(time.perf_counter() - start)
    return {"start": seconds[0], "pairs_per_second": PAIRS / statistics.median(seconds[1:])}


def table(rounds: list[dict[str, Any]]) -> None:
    """Print medians over the rounds."""
    rows = []
    for case in CASES:
        of = [one[case] for one in rounds if case in one]
        speed = {b: [one[b]["pairs_per_second"] for one in of] for b in BACKENDS}
        ratios = [j / t for t, j in zip(speed["tensorflow"], speed["jax"], strict=True)]
        starts = [statistics.median(one[b]["start"] for one in of) for b in BACKENDS]
        figures = [statistics.median(values) for values in (*speed.values(), ratios)]
        rows.append([case, *figures, *starts])
    columns = ("", "TensorFlow pairs/s", "JAX pairs/s", "JAX / TensorFlow")
    columns += ("TensorFlow start s", "JAX start s")
    common.show(f"training, {len(rounds)} rounds", columns, rows)


def main() -> None:
    """Measure, or be one of the measured."""
    parser: argparse.ArgumentParser = common.parser_of(__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=3, help="timed epochs of a process")
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(args.task)))
        return
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        one: dict[str, Any] = {}
        for case, settings in CASES.items():
            task = {**settings, "epochs": args.epochs}
            one[case] = {
                backend: common.in_a_process(__file__, {**task, "backend": backend}, args.launcher)
                for backend in BACKENDS
            }
            print(case, one[case], flush=True)
        rounds.append(one)
        common.write(args.json, rounds)
    table(rounds)


if __name__ == "__main__":
    main()
