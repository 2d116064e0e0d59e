#!/usr/bin/env python
"""One GPU, bfloat16: pairs per second, peak memory and MFU of ours on both backends, and of TRL.

    python scripts/bench/gpu.py --checkpoint DIR --rival PYTHON --peak-tflops 989 --json gpu.json

DIR is a Hugging Face checkpoint; PYTHON has torch and trl. The contenders take turns, each run in a
process of its own: weights in bfloat16, random pairs of up to 1,024 tokens, 16 in a step, AdamW
1e-6, the reference computed in each step. The first epoch traces and compiles; the second is timed.

MFU is the share of the GPU's peak (--peak-tflops, in bfloat16; 989 for an H100 SXM) that arithmetic
takes: 8 operations for each weight and each token of the pairs, 6 of the policy's step and 2 of the
reference's pass, each prompt counted once for each of its two responses, whoever shares it.
"""

import argparse
import json
import os
import pathlib
import shlex
import statistics
import subprocess
import tempfile
import time
from typing import Any

import _common as common

OURS = ("tensorflow", "jax")
LENGTH, BATCH = 1024, 16

TRL = """
import json, sys, time
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer
task = json.loads(sys.argv[1])
tokenizer = AutoTokenizer.from_pretrained(task["checkpoint"])
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(task["checkpoint"], torch_dtype=torch.bfloat16)
pairs = json.load(open(task["pairs"]))
texts = [[tokenizer.decode(part) for part in pair] for pair in pairs]
data = Dataset.from_list([dict(zip(("prompt", "chosen", "rejected"), t)) for t in texts])
ends = []
class Watch(TrainerCallback):
    def on_step_end(self, *args, **kwargs):
        torch.cuda.synchronize()
        ends.append(time.perf_counter())
config = DPOConfig(
    output_dir="trl", per_device_train_batch_size=task["batch"], num_train_epochs=2, bf16=True,
    max_length=task["length"], learning_rate=1e-6, lr_scheduler_type="constant", max_grad_norm=1e9,
    report_to=[], save_strategy="no", disable_tqdm=True, dataloader_drop_last=True,
    gradient_checkpointing=False, logging_strategy="no",
)
trainer = DPOTrainer(
    model=model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[Watch()]
)
trainer.train()
half = len(ends) // 2
print(json.dumps({
    "pairs_per_second": (len(ends) - half) * task["batch"] / (ends[-1] - ends[half - 1]),
    "peak_bytes": torch.cuda.max_memory_allocated(),
}))
"""


def pairs_of(count: int, vocabulary: int) -> list[list[list[int]]]:
    """Make random pairs of tokens: prompt, chosen, rejected."""
    made = common.random_pairs(count, LENGTH, vocabulary)
    parts = (made.prompt.tolist(), made.chosen.tolist(), made.rejected.tolist())
    return [list(pair) for pair in zip(*parts, strict=True)]


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Train ours in this process."""
    os.environ["KERAS_BACKEND"] = task["backend"]
    import keras
    import numpy as np

    import dpo_keras
    from dpo_keras.app.run_clock import peak_device_memory
    from dpo_keras.batching import Ragged, TokenizedPairs

    policy = dpo_keras.load_model(task["checkpoint"], "bfloat16")
    model = dpo_keras.DPOModel(policy)
    model.compile(keras.optimizers.AdamW(1e-6, weight_decay=0.0), loss=dpo_keras.DPOLoss())
    pairs = json.loads(pathlib.Path(task["pairs"]).read_text())
    parts = [Ragged.from_lists(list(column)) for column in zip(*pairs, strict=True)]
    ones = np.ones(len(pairs), np.float32)
    tokens = TokenizedPairs(*parts, ones, ones, max_length=LENGTH)
    data = dpo_keras.preference_dataset(tokens, batch_size=task["batch"])
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        model.fit(data, verbose=0)
        seconds.append(time.perf_counter() - start)
    return {
        "pairs_per_second": len(pairs) / seconds[-1],
        "peak_bytes": max(peak_device_memory().values(), default=0),
        "weights": policy.count_params(),
    }


def rival(args: argparse.Namespace, task: dict[str, Any]) -> dict[str, Any]:
    """Run TRL in a process of its own Python."""
    command = [*shlex.split(args.launcher), args.rival, "-c", TRL, json.dumps(task)]
    environment = {**os.environ, "PYTHONPATH": ""}
    folder = pathlib.Path(task["pairs"]).parent  # for its logs
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd=folder
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rounds: list[dict[str, Any]], tokens_per_pair: float, peak_tflops: float) -> None:
    """Print medians over the rounds."""
    weights = next(one[b]["weights"] for one in rounds for b in OURS if b in one)
    rows = []
    for name in rounds[0]:
        speed = statistics.median(one[name]["pairs_per_second"] for one in rounds)
        memory = statistics.median(one[name]["peak_bytes"] for one in rounds) / 1e9
        used = 8 * weights * tokens_per_pair * speed / (peak_tflops * 1e12)
        rows.append([name, speed, memory, used])
    columns = ("", "pairs/s", "peak memory GB", "MFU")
    common.show(f"one GPU, bfloat16, {len(rounds)} rounds", columns, rows)


def main() -> None:
    """Measure, or be one of the measured."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--checkpoint", help="a Hugging Face checkpoint's directory")
    parser.add_argument("--rival", help="a Python with torch and trl; without it ours alone")
    parser.add_argument("--backends", nargs="+", choices=OURS, default=OURS)
    parser.add_argument("--pairs", type=int, default=256)
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--vocabulary", type=int, default=32_000, help="largest random token")
    parser.add_argument("--peak-tflops", type=float, default=989.0)
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(args.task)))
        return
    if not args.checkpoint:
        parser.error("--checkpoint is needed")
    pairs = pairs_of(args.pairs, args.vocabulary)
    tokens = [2 * len(p) + len(c) + len(r) for p, c, r in pairs]
    with tempfile.TemporaryDirectory() as folder:
        file = pathlib.Path(folder) / "pairs.json"
        file.write_text(json.dumps(pairs))
        checkpoint = str(pathlib.Path(args.checkpoint).absolute())
        task = {"checkpoint": checkpoint, "pairs": str(file), "batch": args.batch}
        rounds = run_rounds(args, {**task, "length": LENGTH})
    table(rounds, sum(tokens) / len(tokens), args.peak_tflops)


def run_rounds(args: argparse.Namespace, task: dict[str, Any]) -> list[dict[str, Any]]:
    """Let the contenders take turns."""
    rounds: list[dict[str, Any]] = []
    for _ in range(args.rounds):
        one = {
            backend: common.in_a_process(__file__, {**task, "backend": backend}, args.launcher)
            for backend in args.backends
        }
        if args.rival:
            one["TRL"] = rival(args, task)
        rounds.append(one)
        print(one, flush=True)
        common.write(args.json, rounds)
    return rounds


if __name__ == "__main__":
    main()
