#!/usr/bin/env python
"""Side by side with KerasHub's and transformers' own `generate`: new tokens per second.

    python scripts/bench/generation.py --checkpoint DIR [--rival PYTHON] [--baseline FILE]

All contenders take turns, each in a process of its own: the same checkpoint, the first prompts of
the HH sample (1, 16 and 128 of them, of all lengths, at most 448 tokens), temperature 1, at most 64
new tokens, all prompts of a size in one call.

Answers are of mixed lengths for all alike: the checkpoint of `trl_baseline.py checkpoint DIR` has
random weights and would never end, so a copy of it is made in which the end token has a probability
of about 1/40 after every token. (The last norm's bias is made one constant direction, along which
the end token's embedding points.) Each contender draws for itself; tokens before the end are
counted, and none after it.

* cold: seconds from loaded weights to the first answers, with compiling, tracing and all.
* warm: new tokens per second of a second call, with the same prompts.
* exported: the `generate` signature of `dpo_keras.export`, loaded with TensorFlow alone.

KerasHub and transformers pad all prompts of a call to the longest; KerasHub gives a step to every
place from the end of the shortest prompt on. "transformers by length" is what a user can do about
that: prompts sorted by length, in calls of 32.

Figures are medians over the rounds; `--append` adds to the rounds that the `--json` file has.
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

HERE = pathlib.Path(__file__).resolve()
NEW_TOKENS, PROMPT_TOKENS, SLOTS = 64, 448, 32
END_PROBABILITY = 1 / 40
CONTENDERS = ("ours", "KerasHub", "exported", "transformers", "transformers by length")


def ending_checkpoint(checkpoint: str, folder: str) -> None:
    """Copy a checkpoint; in the copy, every token may be the last with the same probability."""
    import math
    import shutil

    import numpy as np
    from safetensors.numpy import load_file, save_file

    shutil.copytree(checkpoint, folder, dirs_exist_ok=True)
    path = pathlib.Path(folder, "model.safetensors")
    weights = load_file(path)
    embeddings = next(value for name, value in weights.items() if name.endswith("wte.weight"))
    bias = next(value for name, value in weights.items() if name.endswith("ln_f.bias"))
    vocabulary, width = embeddings.shape
    end = json.loads(pathlib.Path(folder, "config.json").read_text())["eos_token_id"]
    # One direction that the hidden states share, and no other token's embedding has a part in.
    direction = np.zeros(width, np.float32)
    direction[0] = 1
    embeddings[:, 0] = 0
    others = math.log(vocabulary) + float((embeddings**2).sum(1).mean()) / 2
    logit = others + math.log(END_PROBABILITY / (1 - END_PROBABILITY))
    bias[:] = direction * logit
    embeddings[end] = direction
    scale = next(value for name, value in weights.items() if name.endswith("ln_f.weight"))
    scale[0] = 0
    save_file(weights, path, metadata={"format": "pt"})


def prompts_of(task: dict[str, Any]) -> list[list[int]]:
    """Return the prompts' ids, which transformers takes as they are."""
    from dpo_keras.batching import TextEncoder

    policy = common.load_policy(task["checkpoint"])
    texts = [str(pair.prompt) for pair in common.hh_pairs(task["baseline"], task["prompts"])]
    rows = TextEncoder(policy.preprocessor).prompts(texts).tolist()
    return [[int(token) for token in row][-PROMPT_TOKENS:] for row in rows]


def ours(task: dict[str, Any]) -> Any:
    """Return a function from the number of a call to the number of new tokens."""
    from dpo_keras.training import generation

    policy = common.load_policy(task["checkpoint"])
    detokenized, counted = generation.detokenized, [0]

    def counting(encoder: Any, rows: Any) -> Any:
        counted[0] += sum(map(len, rows))
        return detokenized(encoder, rows)

    generation.detokenized = counting

    def call(number: int) -> int:
        before = counted[0]
        generation.generate_responses(
            policy, task["ids"], max_new_tokens=NEW_TOKENS, seed=number,
            batch_size=SLOTS, max_length=PROMPT_TOKENS + NEW_TOKENS,
        )  # fmt: skip
        return counted[0] - before

    return call


def keras_hub_generate(task: dict[str, Any]) -> Any:
    """Return a function that runs KerasHub's `generate` on padded ids, as it pads prompts."""
    import keras_hub
    import numpy as np

    policy = common.load_policy(task["checkpoint"])
    policy.compile(sampler=keras_hub.samplers.RandomSampler(seed=0))
    end = policy.preprocessor.tokenizer.end_token_id
    rows = task["ids"]
    length = max(map(len, rows)) + NEW_TOKENS
    # KerasHub takes an end token in the padding for the end of the response.
    token_ids = np.full((len(rows), length), 1 if end == 0 else 0, np.int32)
    for row, ids in enumerate(rows):
        token_ids[row, : len(ids)] = ids
    lengths = np.array([len(ids) for ids in rows])
    mask = np.arange(length) < lengths[:, None]
    policy.preprocessor = None

    def call(number: int) -> int:
        inputs = {"token_ids": token_ids, "padding_mask": mask.astype(np.int32)}
        found = policy.generate(inputs, stop_token_ids=[end])
        ids = np.asarray(found["token_ids"])
        return sum(
            _before_end(ids[row, n : n + NEW_TOKENS].tolist(), {end})
            for row, n in enumerate(lengths)
        )

    return call


def exported(task: dict[str, Any]) -> Any:
    """Return a function that asks the exported signature, loaded without Keras."""
    import tensorflow as tf

    served = tf.saved_model.load(task["export"]).signatures["generate"]
    texts = tf.constant(task["texts"])

    def call(number: int) -> int:
        return int(served(prompt=texts)["tokens"].numpy().sum())

    return call


def _before_end(ids: list[int], ends: set[int]) -> int:
    return next((place for place, token in enumerate(ids) if token in ends), len(ids))


TRANSFORMERS = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
task = json.loads(sys.argv[1])
torch.manual_seed(task["round"])
model = AutoModelForCausalLM.from_pretrained(task["checkpoint"]).eval()
rows, end = task["ids"], model.config.eos_token_id
if task["by_length"]:
    rows = sorted(rows, key=len)
together = 32 if task["by_length"] else len(rows)

def generated(rows):
    width = max(map(len, rows))
    ids = torch.tensor([[end] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    found = model.generate(ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0,
                           top_p=1.0, max_new_tokens=task["new_tokens"], pad_token_id=end)
    return sum(row.index(end) if end in row else len(row) for row in found[:, width:].tolist())

times, counts = [], []
for _ in range(1 + task["warm"]):
    before = time.perf_counter()
    with torch.inference_mode():
        parts = [rows[place : place + together] for place in range(0, len(rows), together)]
        counts.append(sum(map(generated, parts)))
    times.append(time.perf_counter() - before)
print(json.dumps({"seconds": times, "tokens": counts}))
"""


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Run one contender in this process: a cold call, then warm ones."""
    makers = {"ours": ours, "KerasHub": keras_hub_generate, "exported": exported}
    call = makers[task["contender"]](task)
    seconds, tokens = [], []
    for number in range(1 + task["warm"]):
        before = time.perf_counter()
        tokens.append(call(100 * task["round"] + number))
        seconds.append(time.perf_counter() - before)
    return {"seconds": seconds, "tokens": tokens}


def prepare(task: dict[str, Any]) -> dict[str, Any]:
    """Make the checkpoint, the prompts' ids and the export that the contenders read."""
    import dpo_keras

    folder = pathlib.Path(task["folder"])
    ending_checkpoint(task["checkpoint"], str(folder / "checkpoint"))
    inside = {**task, "checkpoint": str(folder / "checkpoint")}
    ids = prompts_of(inside)
    policy = common.load_policy(inside["checkpoint"])
    dpo_keras.export(
        policy, str(folder / "export" / "1"), signatures=["generate"], temperature=1.0,
        max_new_tokens=NEW_TOKENS, max_length=PROMPT_TOKENS + NEW_TOKENS,
    )  # fmt: skip
    texts = [str(pair.prompt) for pair in common.hh_pairs(task["baseline"], task["prompts"])]
    return {"ids": ids, "texts": texts}


def run(args: argparse.Namespace, contender: str, task: dict[str, Any]) -> dict[str, Any]:
    """Run one contender in a process of its own."""
    if not contender.startswith("transformers"):
        return common.in_a_process(__file__, {**task, "contender": contender}, args.launcher)
    given = {key: task[key] for key in ("checkpoint", "ids", "new_tokens", "warm", "round")}
    given["by_length"] = contender == "transformers by length"
    command = [*shlex.split(args.launcher), args.rival, "-c", TRANSFORMERS, json.dumps(given)]
    environment = {**os.environ, "PYTHONPATH": ""}
    done = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, env=environment, cwd="/"
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def table(rounds: list[dict[str, Any]]) -> None:
    """Print medians over the rounds, and their ratios to ours."""
    sizes = sorted({int(size) for one in rounds for size in one})
    rows = []
    for size in sizes:
        runs = [one[str(size)] for one in rounds if str(size) in one]
        names = [name for name in CONTENDERS if name in runs[0]]
        warm = {
            name: statistics.median(
                sum(one[name]["tokens"][1:]) / sum(one[name]["seconds"][1:]) for one in runs
            )
            for name in names
        }
        cold = {name: statistics.median(one[name]["seconds"][0] for one in runs) for name in names}
        for name in names:
            # Each contender draws answers of its own: seconds for as many tokens as ours.
            ratio = warm[name] / warm["ours"]
            rows.append([f"{size} prompts: {name}", warm[name], ratio, cold[name]])
    columns = ("", "warm tokens/s", "of ours", "cold seconds")
    common.show(f"generation, {len(rounds)} rounds", columns, rows)


def main() -> None:
    """Measure, or be one of the measured."""
    parser = common.parser_of(__doc__)
    common.baseline_option(parser)
    parser.add_argument("--checkpoint", help="made by trl_baseline.py checkpoint DIR")
    parser.add_argument("--rival", help="a Python with torch and transformers")
    parser.add_argument("--sizes", type=int, nargs="+", default=[1, 16, 128])
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=CONTENDERS)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--warm", type=int, default=1, help="warm calls (default: 1)")
    parser.add_argument("--append", action="store_true", help="add to the rounds in --json")
    args = parser.parse_args()
    if args.task:
        print(json.dumps(prepare(args.task) if "folder" in args.task else measure(args.task)))
        return
    if not args.checkpoint:
        parser.error("--checkpoint is needed")
    rounds = json.loads(args.json.read_text()) if args.append and args.json.exists() else []
    with tempfile.TemporaryDirectory() as folder:
        setup = {"folder": folder, "checkpoint": args.checkpoint, "baseline": args.baseline}
        made = common.in_a_process(__file__, {**setup, "prompts": max(args.sizes)})
        for number in range(len(rounds), len(rounds) + args.rounds):
            one: dict[str, Any] = {}
            for size in args.sizes:
                task = {
                    "checkpoint": f"{folder}/checkpoint", "export": f"{folder}/export/1",
                    "ids": made["ids"][:size], "texts": made["texts"][:size],
                    "new_tokens": NEW_TOKENS, "warm": args.warm, "round": number,
                }  # fmt: skip
                one[str(size)] = {}
                for name in args.contenders:
                    if args.rival or not name.startswith("transformers"):
                        one[str(size)][name] = found = run(args, name, task)
                        print(f"{size} prompts, {name}: {found}", flush=True)
            rounds.append(one)
            common.write(args.json, rounds)
    table(rounds)


if __name__ == "__main__":
    main()
