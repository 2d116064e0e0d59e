#!/usr/bin/env python
"""How far `dpo-keras plan` is off: predicted and actual time and memory of real trainings.

    python scripts/bench/plan.py --only quickstart

Each configuration is planned and then trained, one after the other, in processes of their own; the
machine must have nothing else to do. Time is what both report, which leaves out importing; memory
is the highest resident memory of the process that trains. "by itself" is what the training
predicted after its first steps, by its report.
"""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import tempfile
from typing import Any

import _common as common

QUICKSTART = ["configs/quickstart.yaml", "warmup.epochs=2", "training.epochs=3"]
QUICKSTART += ["evaluation.prompts=64"]
SAMPLE = "hh_harmless_base_test.jsonl.gz"
# Real conversations, in a model of 1.3 million weights.
HH = ["configs/hh_harmless.yaml", "data.limit=1200", "data.max_length=256", "warmup.epochs=1"]
HH += ["model.scratch.hidden_dim=128", "model.scratch.intermediate_dim=512"]
HH += ["model.scratch.num_layers=2", "model.scratch.max_sequence_length=256"]
HH += ["model.scratch.vocabulary_size=4000", "training.epochs=2", "evaluation.max_new_tokens=32"]
HH += ["export=null"]
CONFIGURATIONS = {
    "quickstart": QUICKSTART,
    "quickstart, buckets": [*QUICKSTART, "training.batching=buckets", "export=null"],
    "quickstart, LoRA": [*QUICKSTART, "model.lora_rank=8", "export=null"],
    "HH, cached reference": HH,
    "HH, remat, bfloat16": [
        *HH,
        "reference=auto",
        "training.remat=true",
        "model.dtype=mixed_bfloat16",
        "training.epochs=1",
        "training.max_steps=100",
    ],
    "HH, buckets, cached": [*HH, "training.batching=buckets", "training.epochs=1"],
}


def command(name: str, words: list[str], launcher: str) -> tuple[dict[str, Any], float]:
    """Run a command of dpo-keras; return its JSON and the megabytes that it held at most."""
    line = [*shlex.split(launcher), sys.executable, "-m", "dpo_keras.app", name, *words, "--json"]
    process = subprocess.Popen(line, stdout=subprocess.PIPE, text=True, cwd=common.ROOT)
    assert process.stdout is not None
    text = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{shlex.join(line)} failed: {text}")
    return json.loads(text), usage.ru_maxrss / 1e3 * 1.024


def measure(configuration: list[str], data: str, launcher: str) -> dict[str, Any]:
    """Plan and train one configuration in a temporary directory."""
    with tempfile.TemporaryDirectory() as folder:
        words = [*configuration, f"output={folder}/run"]
        if "export=null" not in configuration:
            words.append(f"export.path={folder}/exported/plan/1")
        if "hh_harmless" in configuration[0]:
            words.append(f"data.path={data}")
        planned, _ = command("plan", words, launcher)
        trained, megabytes = command("train", words, launcher)
    found = {
        "seconds": {"predicted": planned["seconds"], "actual": trained["seconds"]},
        "megabytes": {
            "predicted": planned["peak_bytes"]["the process"] / 1e6,
            "actual": megabytes,
        },
        "steps": {
            "predicted": planned["sections"]["training"]["steps"],
            "actual": trained["steps"],
        },
        "trial_seconds": sum(stage["trial"] for stage in planned["stages"].values()),
        "stages": planned["stages"],
    }
    if trained["prediction"] is not None:
        found["by itself"] = trained["prediction"]
    return found


def row(name: str, found: dict[str, Any]) -> list[str]:
    """Return a configuration's line of the table."""
    cells = [name, f"{found['trial_seconds']:.0f}"]
    for what in ("seconds", "megabytes"):
        predicted, actual = found[what]["predicted"], found[what]["actual"]
        cells += [f"{predicted:,.0f}", f"{actual:,.0f}", f"{100 * (predicted / actual - 1):+.0f} %"]
    own = found.get("by itself")
    cells += [f"{100 * own[key]['difference']:+.0f} %" for key in ("seconds", "peak_bytes") if own]
    return cells


def main() -> None:
    """Run from the command line."""
    parser = common.parser_of(__doc__)
    common.baseline_option(parser)
    parser.add_argument("--only", nargs="+", choices=CONFIGURATIONS, default=list(CONFIGURATIONS))
    args = parser.parse_args()
    data = pathlib.Path(args.baseline).parents[1] / "data" / SAMPLE
    figures = {}
    if args.json is not None and args.json.is_file():  # a configuration at a time
        figures = json.loads(args.json.read_text(encoding="utf-8"))
    for name in args.only:
        figures[name] = measure(CONFIGURATIONS[name], str(data), args.launcher)
        common.write(args.json, figures)
    columns = ["", "trial s", "predicted s", "s", "off", "predicted MB", "MB", "off"]
    columns += ["by itself: time", "memory"]
    rows = [row(name, found) for name, found in figures.items()]
    common.show("dpo-keras plan", columns, rows)


if __name__ == "__main__":
    main()
