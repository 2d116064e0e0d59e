#!/usr/bin/env python
"""Side by side with TRL's DPOTrainer: pairs per second, peak memory, and the same losses.

    python scripts/bench/against_trl.py --checkpoint DIR --rival RIVAL_PYTHON [--baseline FILE]

Both sides take turns (ours, rival, ours, rival, ...), each run in a process of its own: the same
checkpoint (`trl_baseline.py checkpoint DIR`), the same pairs (the first of the HH sample), at most
512 tokens, 8 pairs per step (packed: on average), AdamW 1e-4 without decay and clipping, beta 0.1.
The rival runs trl_baseline.py, unchanged. Ours goes over the same pairs several times, since a step
is short. Three variants: the reference's log-probs in the run, as the command line does it;
computed before it ("cached"); and "ten lines", those of the top README as far as `fit`, read from
there, with the values above in place of its own and without its optional LoRA, against the rival's
"in the run".

* steady: pairs per second from the end of the first step to that of the last, on both sides (the
  rival's steps end where it prints their log lines). This is the headline.
* whole: pairs per second of all of `fit` or `train`, first step included. The rival compiles
  nothing; ours traces and compiles in its first step, which these short runs cannot hide.
* memory: the highest resident memory of the process. Ours runs with the packages of a plain
  installation: TensorFlow and Keras import what they find of JAX, matplotlib, pandas and scipy,
  which only our extras install.
* losses: 8 steps on the rival's own first batches, pair by pair, laid out as packed rows.

Figures are medians over the rounds. On a shared machine rounds may be run one by one, when it is
free: `--append` adds to the rounds that the `--json` file has.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

import _common as common

HERE = pathlib.Path(__file__).resolve()
VARIANTS = ("in the run", "ten lines", "cached")
OURS = ("seconds_to_first_step", "tokenized_pairs_per_second", "traces", "steps")
# In the README's lines: the value there, and that of this benchmark.
IN_TEN_LINES = {
    '"gemma3_1b"': "CHECKPOINT",
    '"pairs.jsonl"': "PAIRS",
    "dpo_keras.enable_lora(policy, 8)": "pass",
    "train, held_out = pairs.split(0.1, seed=0)": "train = pairs",
    "batch_size=16, max_length=1024": f"batch_size=8, max_length={common.MAX_LENGTH}",
    "AdamW(5e-6)": "AdamW(1e-4)",
    "epochs=1, callbacks=[": "epochs=EPOCHS, verbose=0, callbacks=[WATCH, ",
}


def ours(task: dict[str, Any]) -> dict[str, Any]:
    """One run of ours, in this process."""
    from dpo_keras import preference_dataset, tokenize_pairs
    from dpo_keras.scoring import cache_reference

    policy = common.load_policy(task["checkpoint"])
    everything = common.hh_pairs(task["baseline"])
    loaded_mb, loaded = common.peak_megabytes(), time.perf_counter()
    tokenized = tokenize_pairs(
        everything[: task["pairs"]], policy.preprocessor, max_length=common.MAX_LENGTH
    )
    cached = task["variant"] == "cached"
    if cached:
        before = time.perf_counter()
        tokenized = cache_reference(policy, tokenized, batch_size=8, batching="packed")
        caching = time.perf_counter() - before
    dataset = preference_dataset(tokenized, batch_size=8, batching="packed")
    run = common.Timed(common.dpo_model(policy, "cached" if cached else "frozen_copy"))
    run.fit(dataset, task["epochs"])
    found = {
        **run.rates(),
        "peak_memory_mb": common.peak_megabytes(),
        "loaded_memory_mb": loaded_mb,
        "seconds_to_first_step": run.ends[0] - loaded,
        **({"cached_pairs_per_second": len(tokenized) / caching} if cached else {}),
    }
    before = time.perf_counter()
    tokenize_pairs(everything, policy.preprocessor, max_length=common.MAX_LENGTH)
    found["tokenized_pairs_per_second"] = len(everything) / (time.perf_counter() - before)
    return found


def ten_lines(task: dict[str, Any]) -> dict[str, Any]:
    """Run the README's lines as far as `fit`, in this process."""
    import keras

    readme = (common.ROOT / "README.md").read_text(encoding="utf-8")
    code = readme.split("```python\n")[1].split("model.evaluate(")[0]
    for line, value in IN_TEN_LINES.items():
        if line not in code:
            raise SystemExit(f"the README's lines have no {line} any more")
        code = code.replace(line, value)
    ends: list[float] = []
    pairs: list[float] = []
    begun: list[float] = []

    def on_train_batch_end(batch: int, logs: Any) -> None:
        ends.append(time.perf_counter())
        pairs.append(float(names["model"].step_logs["pairs"]))

    records = common.hh_pairs(task["baseline"], task["pairs"])
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "pairs.jsonl"
        file.write_text("\n".join(json.dumps(pair.as_dict()) for pair in records))
        names: dict[str, Any] = {
            "CHECKPOINT": task["checkpoint"],
            "PAIRS": str(file),
            "EPOCHS": task["epochs"],
            "WATCH": keras.callbacks.LambdaCallback(
                on_train_begin=lambda logs: begun.append(time.perf_counter()),
                on_train_batch_end=on_train_batch_end,
            ),
        }
        os.chdir(folder)  # for the logs
        started = time.perf_counter()
        exec(code, names)
        finished = time.perf_counter()
        os.chdir(common.ROOT)
    return {
        "steady_pairs_per_second": sum(pairs[1:]) / (ends[-1] - ends[0]),
        "pairs_per_second": sum(pairs) / (finished - begun[0]),
        "steps": len(ends),
        "seconds_to_first_step": ends[0] - started,
        "peak_memory_mb": common.peak_megabytes(),
    }


def losses(task: dict[str, Any]) -> dict[str, Any]:
    """Trains on the rival's batches, each as one packed batch of a shape that holds them all."""
    import numpy as np
    import tensorflow as tf

    from dpo_keras import tokenize_pairs
    from dpo_keras.batching import Ragged, TokenizedPairs, collate_packed

    policy = common.load_policy(task["checkpoint"])
    batches = json.loads(pathlib.Path(task["batches"]).read_text())
    rows = [pair for batch in batches for pair in batch]
    ones = np.ones(len(rows), np.float32)
    parts = [Ragged.from_lists(list(column)) for column in zip(*rows, strict=True)]
    tokenized = TokenizedPairs(*parts, ones, ones)
    size = len(batches[0])
    tokens = tokenized.tree_tokens.reshape(len(batches), 2, -1).sum(-1).max()
    slots = tokenized.response_tokens.reshape(len(batches), 2, -1).sum(-1).max()
    laid_out = [
        collate_packed(tokenized, grid, -(-tokens // 8) * 8, -(-slots // 8) * 8)
        for grid in np.arange(len(rows)).reshape(len(batches), 2, size // 2)
    ]
    stacked = {name: np.stack([batch[name] for batch in laid_out]) for name in laid_out[0]}
    run = common.Timed(common.dpo_model(policy))
    run.fit(tf.data.Dataset.from_tensor_slices(stacked))
    mine = tokenize_pairs(
        common.hh_pairs(task["baseline"], task["pairs"]), policy.preprocessor, max_length=10_000
    )
    texts = {
        tuple(tuple(part[number].tolist()) for part in (mine.prompt, mine.chosen, mine.rejected))
        for number in range(len(mine))
    }
    uncut = [pair for pair in rows if max(map(len, pair[1:])) + len(pair[0]) < common.MAX_LENGTH]
    alike = sum(tuple(map(tuple, pair)) in texts for pair in uncut)
    return {"losses": run.losses, "same_tokens": [alike, len(uncut)], "cut": len(rows) - len(uncut)}


def rival(args: argparse.Namespace, pairs: int, variant: str, batches: str = "") -> dict[str, Any]:
    """One run of the baseline; its steps are timed by the log line that each of them prints."""
    front = [str(HERE.with_name("_rival_batches.py")), batches] if batches else []
    command = [*shlex.split(args.launcher), args.rival, *front, args.baseline, "run"]
    command += [args.checkpoint, "--pairs", str(pairs)]
    command += ["--precompute"] if variant == "cached" else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "PYTHONPATH": ""}
    ends, last = [], ""
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            cwd=folder, env=environment,
        )  # fmt: skip
        assert process.stdout is not None
        for line in process.stdout:
            ends += [time.perf_counter()] if line.startswith("{'loss'") else []
            last = line
    if process.wait():
        raise SystemExit(f"the rival failed: {shlex.join(command)}")
    found: dict[str, Any] = json.loads(last)
    # Pairs whose prompt alone is too long are left out by the rival; it still counts them.
    found["steps"] = len(ends)
    found["steady_pairs_per_second"] = 8 * (len(ends) - 1) / (ends[-1] - ends[0])
    return found


def one_round(args: argparse.Namespace) -> dict[str, Any]:
    """Each variant once on each side."""
    found: dict[str, Any] = {}
    rivals: dict[bool, dict[str, Any]] = {}
    for variant in args.variants:
        what, cached = "ten lines" if variant == "ten lines" else "ours", variant == "cached"
        task = {"what": what, "variant": variant, "checkpoint": args.checkpoint}
        task |= {"baseline": args.baseline, "pairs": args.pairs, "epochs": args.epochs}
        mine = common.in_a_process(__file__, task, args.launcher)
        if cached not in rivals:
            rivals[cached] = rival(args, args.pairs, variant)
        theirs = rivals[cached]
        found[variant] = {"ours": mine, "rival": theirs}
        print(
            f"{variant}: {mine['steady_pairs_per_second']:.2f} and "
            f"{theirs['steady_pairs_per_second']:.2f} pairs/s, {mine['peak_memory_mb']:.0f} and "
            f"{theirs['peak_memory_mb']:.0f} MB",
            file=sys.stderr,
        )
    return found


def compare_losses(args: argparse.Namespace) -> dict[str, Any]:
    """Compare the losses of both sides on the rival's first 8 batches."""
    with tempfile.TemporaryDirectory() as folder:
        batches = f"{folder}/batches.json"
        theirs = rival(args, 64, "in the run", batches)["losses"]
        task = {"what": "losses", "checkpoint": args.checkpoint, "batches": batches}
        task |= {"baseline": args.baseline, "pairs": 64}
        mine = common.in_a_process(__file__, task, args.launcher)
    difference = max(abs(a - b) for a, b in zip(mine["losses"], theirs, strict=True))
    return {**mine, "rival": theirs, "largest_difference": difference}


def summary(rounds: list[dict[str, Any]], variant: str) -> dict[str, Any]:
    """Medians over rounds, and ratios of medians."""

    def median(side: str, name: str) -> float:
        return statistics.median(turn[variant][side][name] for turn in rounds if variant in turn)

    named = {
        "steady": "steady_pairs_per_second",
        "whole": "pairs_per_second",
        "memory": "peak_memory_mb",
    }
    found: dict[str, Any] = {}
    for name, key in named.items():
        mine, theirs = median("ours", key), median("rival", key)
        found[name] = {"ours": mine, "rival": theirs, "ratio": mine / theirs}
    for name in OURS:
        if all(name in turn[variant]["ours"] for turn in rounds if variant in turn):
            found[name] = median("ours", name)
    return found


def show(medians: dict[str, Any], check: dict[str, Any] | None) -> None:
    """Print the tables."""
    units = {"steady": "pairs/s, steady", "whole": "pairs/s, whole", "memory": "peak memory, MB"}
    rows = [
        (f"{variant}: {unit}", *(found[name][side] for side in ("ours", "rival", "ratio")))
        for variant, found in medians.items()
        for name, unit in units.items()
    ]
    common.show("Against TRL", ("reference", "ours", "rival", "ours / rival"), rows)
    rows = [
        (name.replace("_", " "), *(found.get(name, "") for found in medians.values()))
        for name in OURS
    ]
    common.show("Ours", ("", *medians), rows)
    if check is not None:
        both = zip(check["losses"], check["rival"], strict=True)
        rows = [(str(n), f"{a:.6f}", f"{b:.6f}") for n, (a, b) in enumerate(both, start=1)]
        common.show("Losses on the same batches", ("step", "ours", "rival"), rows)
        alike, all_pairs = check["same_tokens"]
        print(f"largest difference {check['largest_difference']:.1e}")
        print(f"our tokens equal the rival's in {alike} of {all_pairs} pairs that neither cuts")


def main() -> None:
    """Run from the command line."""
    parser = common.parser_of(__doc__)
    common.baseline_option(parser)
    parser.add_argument("--checkpoint", help="from trl_baseline.py checkpoint")
    parser.add_argument("--rival", help="python of the rival's environment")
    parser.add_argument("--pairs", type=int, default=64, help="the same on both sides")
    parser.add_argument("--epochs", type=int, default=6, help="of ours, over those pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--append", action="store_true", help="to the rounds in the --json file")
    parser.add_argument("--no-losses", action="store_true", help="skip the comparison of losses")
    args = parser.parse_args()
    if args.task:
        for name in ("jax", "matplotlib", "pandas", "scipy"):
            sys.modules[name] = None  # type: ignore[assignment]
        run = {"ours": ours, "ten lines": ten_lines, "losses": losses}[args.task["what"]]
        print(json.dumps(run(args.task)))
        return
    if args.checkpoint is None or args.rival is None or args.rounds < 1:
        parser.error("--checkpoint and --rival are needed, and at least one round")
    # The rival runs in a folder of its own. Not resolve(): an environment's python is a link.
    for name in ("checkpoint", "baseline", "rival"):
        setattr(args, name, str(pathlib.Path(getattr(args, name)).absolute()))
    earlier: dict[str, Any] = {"rounds": [], "losses": None}
    if args.append and args.json is not None and args.json.exists():
        earlier = json.loads(args.json.read_text())
    rounds, check = earlier["rounds"], earlier["losses"]
    if not args.no_losses:
        check = compare_losses(args)
    for _ in range(args.rounds):
        rounds.append(one_round(args))
        ran = [variant for variant in VARIANTS if any(variant in turn for turn in rounds)]
        medians = {variant: summary(rounds, variant) for variant in ran}
        # Now, for a run that is stopped.
        common.write(args.json, {"medians": medians, "losses": check, "rounds": rounds})
    show(medians, check)


if __name__ == "__main__":
    main()
