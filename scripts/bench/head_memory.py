#!/usr/bin/env python
"""Peak memory of one training step: chunked head against full logits.

    python scripts/bench/head_memory.py [--pairs 8] [--length 512] [--vocabulary 32000]

Each variant runs in a process of its own, since peak memory only ever grows. Prints a table; with
--json FILE writes it too. "step" is the peak beyond what the process held before the step.
"""

import argparse
import json
import os
import pathlib
import resource
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def peak_megabytes() -> float:
    """Return the most memory that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def step(variant: str, args: argparse.Namespace) -> dict[str, float]:
    """One compiled training step on random tokens; half of each sequence is response."""
    import keras
    import keras_hub
    import numpy as np

    from dpo_keras import DPOModel
    from dpo_keras.scoring import ResponseScorer

    keras.utils.set_random_seed(0)
    policy = keras_hub.models.GPT2CausalLM(
        keras_hub.models.GPT2Backbone(
            vocabulary_size=args.vocabulary,
            num_layers=args.layers,
            num_heads=4,
            hidden_dim=args.hidden,
            intermediate_dim=4 * args.hidden,
            max_sequence_length=args.length,
            dropout=0.0,
        )
    )
    model = DPOModel(policy)
    model.scorer = ResponseScorer(policy, plain=variant == "full logits")
    model.compile(keras.optimizers.SGD(1e-3))
    random, half = np.random.default_rng(0), args.length // 2
    token_ids = random.integers(3, args.vocabulary, (args.pairs, 2, args.length)).astype(np.int32)
    place = np.concatenate(
        [np.arange(half, args.length), args.length + np.arange(half, args.length)]
    )
    ones = np.ones((args.pairs, 1), np.float32)
    batch = {
        "token_ids": token_ids,
        "padding_mask": np.ones_like(token_ids),
        "source": np.tile(place - 1, (args.pairs, 1)).astype(np.int32),
        "target": token_ids.reshape(args.pairs, -1)[:, place],
        "owner": np.tile(place >= args.length, (args.pairs, 1)).astype(np.int32),
        "preference": ones,
        "weight": ones,
    }
    before = peak_megabytes()
    model.train_on_batch(batch)
    peak = peak_megabytes()
    started = time.perf_counter()
    model.train_on_batch(batch)
    seconds = time.perf_counter() - started
    return {"step_mb": peak - before, "process_mb": peak, "seconds": seconds}


def main() -> None:
    """Run both variants and print the table."""
    parser = argparse.ArgumentParser(description="Peak memory of one training step.")
    parser.add_argument("--pairs", type=int, default=8, help="pairs; two sequences each")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--variant", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.variant:
        print(json.dumps(step(args.variant, args)))
        return
    results = {}
    print(f"{'head':<14}{'step MB':>10}{'process MB':>12}{'seconds':>10}")
    for variant in ("full logits", "chunked"):
        command = [sys.executable, __file__, *sys.argv[1:], "--variant", variant]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = results[variant] = json.loads(output.splitlines()[-1])
        print(
            f"{variant:<14}{row['step_mb']:>10.0f}{row['process_mb']:>12.0f}{row['seconds']:>10.2f}"
        )
    for name in ("step_mb", "process_mb"):
        share = results["chunked"][name] / results["full logits"][name]
        results[f"{name}_share"] = share
        print(f"chunked / full logits, {name[:-3]} memory: {share:.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
