#!/usr/bin/env python
"""What a step costs against pairs, length, vocabulary and replicas; and packing against the data.

    python scripts/bench/scaling.py

A small GPT-2 of random weights trains on random pairs in packed rows; one thing changes at a time,
each run in a process of its own. Replicas are logical CPUs of one machine, which share its cores:
they show what replicas cost, not what they gain. "per token" is a step's time over its tokens,
which stays level where cost is linear.

Packing is measured alone: tokens at hand, rows of all pairs of an epoch and all its batches.
"""

import argparse
import itertools
import json
import statistics
import time
from typing import Any

import _common as common

USUAL = {"pairs": 8, "length": 256, "vocabulary": 8192, "replicas": 1}


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Take a few steps, in this process."""
    import tensorflow as tf

    if task["replicas"] > 1:
        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * task["replicas"]
        tf.config.set_logical_device_configuration(cpu, logical)

    from dpo_keras import preference_dataset

    names = [device.name for device in tf.config.list_logical_devices("CPU")]
    several = task["replicas"] > 1
    strategy = tf.distribute.MirroredStrategy(names) if several else tf.distribute.get_strategy()
    tokenized = common.random_pairs(
        task["pairs"] * task["steps"], task["length"], task["vocabulary"]
    )
    dataset = preference_dataset(
        tokenized, batch_size=task["pairs"], batching="packed", replicas=task["replicas"]
    )
    with strategy.scope():
        policy = common.gpt2(task["layers"], task["width"], task["vocabulary"], task["length"])
        run = common.Timed(common.dpo_model(policy))
    before = time.perf_counter()
    run.fit(dataset)
    seconds = statistics.median(b - a for a, b in itertools.pairwise(run.ends))
    rates = run.rates()
    return {
        "first_step_seconds": run.ends[0] - before,
        "step_milliseconds": 1e3 * seconds,
        "pairs_per_second": rates["steady_pairs_per_second"],
        "tokens_per_second": rates["steady_tokens_per_second"],
        "microseconds_per_token": 1e6 / rates["steady_tokens_per_second"],
        "peak_mb": common.peak_megabytes(),
    }


def pack(task: dict[str, Any]) -> dict[str, Any]:
    """Packs an epoch and makes its batches, in this process."""
    from dpo_keras.batching import collate_packed
    from dpo_keras.batching.packing import packed_order, plan_packing

    tokenized = common.random_pairs(task["data"], task["length"], task["vocabulary"])
    started = time.perf_counter()
    plan = plan_packing(tokenized, task["pairs"])
    order = packed_order(plan, epoch=1)
    packed = time.perf_counter()
    for pairs in order.pairs:
        collate_packed(tokenized, pairs, plan.length, plan.slots)
    made = time.perf_counter()
    return {
        "packed_pairs_per_second": task["data"] / (packed - started),
        "pairs_per_second": task["data"] / (made - started),
        "fill": plan.fill,
    }


def train_all(args: argparse.Namespace, shared: dict[str, Any]) -> list[dict[str, Any]]:
    """One run for the usual values, and one for each value that differs."""
    tasks = [USUAL]
    for name, usual in USUAL.items():
        tasks += [{**USUAL, name: value} for value in getattr(args, name) if value != usual]
    found = []
    for task in tasks:
        run = common.in_a_process(__file__, {"what": "train", **task, **shared}, args.launcher)
        found.append({**task, **run})
    return found


def main() -> None:
    """Run from the command line."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--pairs", type=int, nargs="*", default=[4, 16, 32], help="per step")
    parser.add_argument("--length", type=int, nargs="*", default=[64, 128, 512])
    parser.add_argument("--vocabulary", type=int, nargs="*", default=[1024, 32_768, 131_072])
    parser.add_argument("--replicas", type=int, nargs="*", default=[2])
    parser.add_argument("--data", type=int, nargs="*", default=[1000, 10_000, 100_000])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--width", type=int, default=128)
    args = parser.parse_args()
    if args.task:
        print(json.dumps({"train": train, "pack": pack}[args.task["what"]](args.task)))
        return
    shared = {name: getattr(args, name) for name in ("steps", "layers", "width")}
    runs = train_all(args, shared)
    rows = [
        (
            " ".join(f"{name} {run[name]}" for name in USUAL if run[name] != USUAL[name])
            or ", ".join(f"{name} {value}" for name, value in USUAL.items()),
            *(run[name] for name in run if name not in USUAL),
        )
        for run in runs
    ]
    columns = ("", "first step s", "step ms", "pairs/s", "tokens/s", "µs per token", "peak MB")
    common.show(f"Training, {args.layers} layers of width {args.width}", columns, rows)
    packing = {}
    for count in args.data:
        task = {**USUAL, "what": "pack", "data": count}
        packing[count] = common.in_a_process(__file__, task, args.launcher)
    rows = [(f"{count:,}", *found.values()) for count, found in packing.items()]
    columns = ("pairs in the data", "packed pairs/s", "packed and laid out pairs/s", "fill")
    common.show("Packing", columns, rows)
    common.write(args.json, {"training": runs, "packing": packing, **shared})


if __name__ == "__main__":
    main()
