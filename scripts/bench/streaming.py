#!/usr/bin/env python
"""Data larger than memory: build, tokenize and iterate a million pairs; peak memory and speed.

    python scripts/bench/streaming.py [--pairs 1000000] [--small 10000] [--json FILE]

Writes `--pairs` random pairs of 2,000 bytes each as JSONL (2 GB), makes records of them and
tokenizes them with a byte-level BPE; the same with `--small` pairs. Then iterates over one epoch of
the large set and as many pairs of the small one, in turns of some seconds, so that what else the
machine does slows both alike. Each stage runs in a process of its own, since peak memory only ever
grows; TensorFlow and Keras alone take most of it. Needs about five times the JSONL's size in
--folder, and leaves nothing there.
"""

import argparse
import itertools
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

TURN = 16_000  # batches of one set before the other has its turn


def sentences(seed: int, count: int = 5000) -> list[str]:
    """Make sentences of invented words, some far more common than others."""
    draw = random.Random(seed)
    syllables = [c + v for c in "bdfgklmnprstvz" for v in "aeiou"]
    words = ["".join(draw.choices(syllables, k=draw.randint(1, 4))) for _ in range(3000)]
    weights = [1 / (rank + 5) for rank in range(len(words))]
    return [
        " ".join(draw.choices(words, weights, k=draw.randint(4, 18))).capitalize() + "."
        for _ in range(count)
    ]


def generate(args: argparse.Namespace) -> dict[str, float]:
    """Write pairs; every tenth prompt occurs twice."""
    pool, draw = sentences(0), random.Random(args.count)
    size = 0
    path = args.work / str(args.count) / "pairs.jsonl"
    with path.open("w", encoding="utf-8", buffering=2**20) as file:
        prompt = ""
        for number in range(args.count):
            if number % 10 != 9:
                prompt = f"{number}. " + " ".join(draw.choices(pool, k=draw.randint(5, 21)))
            left = " ".join(draw.choices(pool, k=draw.randint(2, 14)))
            right = " ".join(draw.choices(pool, k=draw.randint(2, 14)))
            # Nothing in it needs escaping.
            line = f'{{"prompt": "{prompt}", "chosen": " {left}", "rejected": " {right}"}}\n'
            size += len(line)
            file.write(line)
    return {"pairs": args.count, "bytes": size}


def build(args: argparse.Namespace) -> dict[str, float]:
    """Make records."""
    from dpo_keras import build_preferences

    folder = args.work / str(args.count)
    stored = build_preferences(folder / "pairs.jsonl", folder / "built")
    return {"pairs": len(stored), "shards": len(stored.shards)}


def tokenizer():
    """Make a KerasHub tokenizer, the same in every process."""
    import keras_hub

    from dpo_keras.app.models import train_tokenizer

    vocabulary, merges = train_tokenizer(sentences(0), 8192, ("<|endoftext|>",))
    return keras_hub.tokenizers.BytePairTokenizer(vocabulary, merges)


class Preprocessor:
    """What `tokenize_pairs` takes: a tokenizer with its special ids."""

    start_token_id = end_token_id = pad_token_id = 0

    def __init__(self):
        self.tokenize = tokenizer().tokenize


def tokens(args: argparse.Namespace, count: int):
    """Tokenizes, or opens the tokens that are there."""
    from dpo_keras import StoredPreferences, tokenize_pairs

    pairs = StoredPreferences.open(args.work / str(count) / "built")
    return tokenize_pairs(pairs, Preprocessor(), max_length=args.max_length)


def tokenize(args: argparse.Namespace) -> dict[str, float]:
    """Make tokens."""
    report = tokens(args, args.count).report
    return {"pairs": report.kept, "tokens": report.prompt_tokens + report.response_tokens}


def iterate(args: argparse.Namespace) -> dict[str, float]:
    """Take every batch of a shuffled epoch of the large set, in turns with the small set."""
    from dpo_keras import preference_dataset

    sets, speeds = {}, {}
    started = time.perf_counter()
    for count in (args.small, args.pairs):
        sets[count], speeds[count] = tokens(args, count), [0, 0.0]
    opened = time.perf_counter() - started
    steps = -(-args.pairs // args.batch_size)
    for start in range(0, steps, TURN):
        for count, pairs in sets.items():
            # A stream of its own for each turn: none makes batches while the other is measured.
            dataset = preference_dataset(
                pairs, batch_size=args.batch_size, batching="buckets", epochs=None, start_step=start
            )
            begun = time.perf_counter()
            for batch in itertools.islice(dataset, min(TURN, steps - start)):
                speeds[count][0] += int((batch["weight"].numpy() > 0).sum())
            speeds[count][1] += time.perf_counter() - begun
            del dataset
    assert speeds[args.pairs][0] == args.pairs
    return {
        "pairs": args.pairs,
        "opening_seconds": opened,
        "small_pairs_per_second": speeds[args.small][0] / speeds[args.small][1],
        "pairs_per_second": speeds[args.pairs][0] / speeds[args.pairs][1],
    }


STAGES = {"generate": generate, "build": build, "tokenize": tokenize, "iterate": iterate}


def run(stage: str, args: argparse.Namespace) -> dict[str, float]:
    """Run one stage in a process of its own."""
    command = [sys.executable, __file__, *sys.argv[1:]]
    command += ["--stage", stage, "--count", str(args.count), "--work", str(args.work)]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    return json.loads(output.splitlines()[-1])


def main() -> None:
    """Run all stages and print the table."""
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
        print(f"{'pairs':>10} {'stage':<10}{'seconds':>9}{'pairs/s':>10}{'peak MB':>9}")
        for count in (args.small, args.pairs):
            args.count, args.work = count, folder
            (folder / str(count)).mkdir()
            for stage in STAGES:
                if stage == "iterate" and count == args.small:
                    continue
                row = results[f"{stage} {count}"] = run(stage, args)
                speed = row.get("pairs_per_second", row["pairs"] / row["seconds"])
                print(
                    f"{count:>10,} {stage:<10}{row['seconds']:>9.1f}{speed:>10,.0f}"
                    f"{row['peak_mb']:>9,.0f}",
                    flush=True,
                )
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    last = results[f"iterate {args.pairs}"]
    share = last["pairs_per_second"] / last["small_pairs_per_second"]
    peak = max(row["peak_mb"] for name, row in results.items() if name.endswith(f" {args.pairs}"))
    results["summary"] = {"speed_share": share, "peak_mb": peak}
    print(
        f"An epoch of {args.pairs:,} pairs: {last['pairs_per_second']:,.0f} pairs/s, "
        f"{share:.2f} times the {last['small_pairs_per_second']:,.0f} of {args.small:,} pairs."
    )
    print(f"The most memory of any stage at {args.pairs:,} pairs: {peak:,.0f} MB.")
    if args.json:
        args.json.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
