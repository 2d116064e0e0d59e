#!/usr/bin/env python
"""Peak memory of one training step: chunked head against full logits, and QLoRA.

    python scripts/bench/head_memory.py [--pairs 8] [--length 512] [--vocabulary 32000]
    python scripts/bench/head_memory.py --variants "lora" "int4 lora" "int4 lora, full logits"

"int4 lora, full logits" is what Keras does by itself: `policy.quantize`, the embedding included,
then LoRA. Each variant runs in a process of its own, since peak memory only ever grows. Prints a
table; with --json FILE writes it too. "process" is the most that the process held in its steps,
after loading and quantizing; "step" is what of it is beyond what it held before the first.
"""

import argparse
import ctypes
import gc
import json
import os
import pathlib
import subprocess
import sys
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


def peak_megabytes(since_now: bool = False) -> float:
    """Return the most memory that this process has held; with `since_now`, begin anew first."""
    if since_now:
        gc.collect()
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what loading has freed
        pathlib.Path("/proc/self/clear_refs").write_text("5")
    status = pathlib.Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


VARIANTS = (
    "full logits",
    "chunked",
    "lora",
    "int8 lora",
    "int4 lora",
    "int4 lora, full logits",
)
SHARES = (
    ("chunked", "full logits"),
    ("int4 lora", "int4 lora, full logits"),
    ("int8 lora", "lora"),
    ("int4 lora", "lora"),
)


def adapt(policy: object, variant: str) -> None:
    """Quantize a policy and give it adapters, as a variant says."""
    from dpo_keras import quantize

    mode = variant.partition(" ")[0]
    if mode in ("int8", "int4"):
        if variant.endswith("full logits"):
            policy.quantize(mode)
        else:
            quantize(policy, mode)
    if "lora" in variant:
        policy.backbone.enable_lora(8)


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
    adapt(policy, variant)
    model = DPOModel(policy)
    model.scorer = ResponseScorer(policy, plain=variant.endswith("full logits"))
    if variant.endswith(", full logits"):
        model.scorer._overrides = lambda *_: []  # as without dpo_keras.quantize
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
    weights = sum(v.value.dtype.size * int(np.prod(v.shape)) for v in policy.weights) / 2**20
    before = peak_megabytes(since_now=True)
    model.train_on_batch(batch)
    peak = peak_megabytes()
    started = time.perf_counter()
    model.train_on_batch(batch)
    seconds = time.perf_counter() - started
    return {"step_mb": peak - before, "process_mb": peak, "seconds": seconds, "weights_mb": weights}


def main() -> None:
    """Run the variants and print the table."""
    parser = argparse.ArgumentParser(description="Peak memory of one training step.")
    parser.add_argument("--pairs", type=int, default=8, help="pairs; two sequences each")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32_000)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS[:2])
    parser.add_argument("--json", type=pathlib.Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(step(args.one, args)))
        return
    results = {}
    print(f"{'variant':<24}{'weights MB':>12}{'step MB':>10}{'process MB':>12}{'seconds':>10}")
    for variant in args.variants:
        command = [sys.executable, __file__, *sys.argv[1:], "--one", variant]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        row = results[variant] = json.loads(output.splitlines()[-1])
        print(
            f"{variant:<24}{row['weights_mb']:>12.1f}{row['step_mb']:>10.0f}"
            f"{row['process_mb']:>12.0f}{row['seconds']:>10.2f}",
            flush=True,
        )
    for one, other in SHARES:
        if one in results and other in results:
            for name in ("step_mb", "process_mb"):
                share = results[one][name] / results[other][name]
                results[f"{one} / {other}, {name}"] = share
                print(f"{one} / {other}, {name[:-3]} memory: {share:.2f}")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
