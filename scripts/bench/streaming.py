#!/usr/bin/env python
"""Data larger than memory: build, tokenize and iterate a million pairs; peak memory and speed.

    python scripts/bench/streaming.py [--pairs 1000000] [--small 10000] [--json FILE]

Writes `--pairs` random pairs of 2,000 bytes each as JSONL (2 GB), makes records of them, tokenizes
them with a byte-level BPE, and iterates over one epoch; the same with `--small` pairs, as often as
needed for a steady figure, from the built directory and from memory. Each stage runs in a process
of its own, since peak memory only ever grows; TensorFlow and Keras alone take most of it. Needs
about five times the JSONL's size in --folder, and leaves nothing there.
"""

import argparse
import json
import os
import pathlib
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "-1")

STEADY = 200_000  # pairs that a speed is measured on at least


def sentences(seed: int, count: int = 5000) -> list[str]:
    """Makes sentences of made-up words, some words far more common than others."""
    draw = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(3000)]
    weights = [1 / (rank + 5) for rank in range(len(words))]
    return [
        " ".join(draw.choices(words, weights, k=draw.randint(4, 18))).capitalize() + "."
        for _ in range(count)
    ]


def generate(args: argparse.Namespace) -> dict[str, float]:
    """Writes pairs; every tenth prompt stands twice."""
    pool, draw = sentences(0), random.Random(args.count)
    size = 0
    with open(args.work / "pairs.jsonl", "w", encoding="utf-8", buffering=2**20) as file:
        prompt = ""
        for number in range(args.count):
            if number % 10 != 9:
                prompt = f"{number}. " + " ".join(draw.choices(pool, k=draw.randint(4, 18)))
            left = " ".join(draw.choices(pool, k=draw.randint(2, 14)))
            right = " ".join(draw.choices(pool, k=draw.randint(2, 14)))
            # Nothing in it needs escaping.
            line = f'{{"prompt": "{prompt}", "chosen": " {left}", "rejected": " {right}"}}\n'
            size += len(line)
            file.write(line)
    return {"pairs": args.count, "bytes": size}


def build(args: argparse.Namespace) -> dict[str, float]:
    """Makes records."""
    from dpo_keras import build_preferences

    stored = build_preferences(args.work / "pairs.jsonl", args.work / "built")
    return {"pairs": len(stored), "shards": len(stored.shards)}


def tokenizer():
    """A KerasHub tokenizer, the same in every process."""
    import keras_hub

    from dpo_keras.app.scratch import train_tokenizer

    vocabulary, merges = train_tokenizer(sentences(0), 8192, ("<|endoftext|>",))
    return keras_hub.tokenizers.BytePairTokenizer(vocabulary, merges)


class Preprocessor:
    """What `tokenize_pairs` takes: a tokenizer with its special ids."""

    start_token_id = end_token_id = pad_token_id = 0

    def __init__(self):
        self.tokenize = tokenizer().tokenize


def tokens(args: argparse.Namespace, memory: bool = False):
    """Tokenizes, or opens the tokens that are there."""
    from dpo_keras import StoredPreferences, read_preferences, tokenize_pairs

    pairs = (
        read_preferences(args.work / "pairs.jsonl")
        if memory
        else StoredPreferences.open(args.work / "built")
    )
    return tokenize_pairs(pairs, Preprocessor(), max_length=args.max_length)


def tokenize(args: argparse.Namespace) -> dict[str, float]:
    """Makes tokens."""
    report = tokens(args).report
    return {"pairs": report.kept, "tokens": report.prompt_tokens + report.response_tokens}


def iterate(args: argparse.Namespace, memory: bool = False) -> dict[str, float]:
    """Takes every batch of at least one epoch, in its shuffled order."""
    from dpo_keras import preference_dataset

    pairs = tokens(args, memory)
    started = time.perf_counter()
    epochs = -(-STEADY // len(pairs))
    dataset = preference_dataset(pairs, batch_size=args.batch_size, epochs=epochs)
    planned = time.perf_counter()
    seen = 0
    for batch in dataset:
        seen += int((batch["weight"].numpy() > 0).sum())
    seconds = time.perf_counter() - planned
    assert seen == epochs * len(pairs)
    return {
        "pairs": seen,
        "planning_seconds": planned - started,
        "pairs_per_second": seen / seconds,
    }


STAGES = {
    "generate": generate,
    "build": build,
    "tokenize": tokenize,
    "iterate": iterate,
    "iterate in memory": lambda args: iterate(args, memory=True),
}


def run(stage: str, args: argparse.Namespace) -> dict[str, float]:
    """Runs one stage in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += ["--stage", stage, "--count", str(args.count), "--work", str(args.work)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Runs all stages and prints the table."""
    parser = argparse.ArgumentParser(description="Training data larger than memory.")
    parser.add_argument("--pairs", type=int, default=1_000_000)
    parser.add_argument("--small", type=int, default=10_000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--folder", type=pathlib.Path, help="for the data; default: temporary")
    parser.add_argument("--json", type=pathlib.Path)
    for hidden, kind in (("--stage", str), ("--count", int), ("--work", pathlib.Path)):
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.stage:
        started = time.perf_counter()
        result = STAGES[args.stage](args)
        result["seconds"] = time.perf_counter() - started
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result))
        return
    folder = pathlib.Path(tempfile.mkdtemp(prefix="dpo_streaming.", dir=args.folder))
    free, needed = shutil.disk_usage(folder).free, 5 * 2000 * args.pairs
    results: dict[str, dict[str, float]] = {}
    try:
        if free < needed:
            sys.exit(f"{folder} has {free / 1e9:.1f} GB free, {needed / 1e9:.1f} are needed.")
        print(f"{'pairs':>10} {'stage':<18}{'seconds':>9}{'pairs/s':>10}{'peak MB':>9}")
        for count in (args.small, args.pairs):
            args.count, args.work = count, folder / str(count)
            args.work.mkdir()
            for stage in STAGES:
                if stage == "iterate in memory" and count != args.small:
                    continue
                row = results[f"{stage} {count}"] = run(stage, args)
                speed = row.get("pairs_per_second", row["pairs"] / row["seconds"])
                print(
                    f"{count:>10,} {stage:<18}{row['seconds']:>9.1f}{speed:>10,.0f}"
                    f"{row['peak_mb']:>9,.0f}",
                    flush=True,
                )
            shutil.rmtree(args.work)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    large, small = (results[f"iterate {count}"] for count in (args.pairs, args.small))
    share = large["pairs_per_second"] / small["pairs_per_second"]
    peak = max(row["peak_mb"] for name, row in results.items() if name.endswith(f" {args.pairs}"))
    results["summary"] = {"speed_share": share, "peak_mb": peak}
    print(f"{args.pairs:,} pairs are read at {share:.2f} times the speed of {args.small:,}.")
    print(f"The most memory of any stage at {args.pairs:,} pairs: {peak:,.0f} MB.")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
