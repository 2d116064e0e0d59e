#!/usr/bin/env python
"""Peak memory of training, by what is switched on and by length.

    python scripts/bench/memory.py --lengths 128 --json memory.json     # and 256, 512
    python scripts/bench/memory.py --json memory.json --redraw .github/memory.png

A GPT-2 of random weights takes a few steps on random pairs, each variant in a process of its own,
since peak memory only ever grows. "process" is the highest resident memory, the libraries' own
included; "steps" is how much of it came after the model was compiled: gradients, optimizer, what
the backward pass keeps, and the traced graph. JSON keeps the lengths that were measured before.

The exponent is the slope of log("steps") over log(length). Arithmetic's counts 4 bytes for each
number that a step needs: of every trained weight a gradient and two moments; of every token place
and layer 16 times the width (with remat, the width, and 16 times it in one layer); of every pair of
places that attention computes, two for each head (packed or with remat, in one layer).
"""

import itertools
import json
import pathlib
import statistics
from typing import Any

import _common as common

# Of each variant: how pairs are laid out, where the reference comes from, what else.
VARIANTS: dict[str, dict[str, Any]] = {
    "packed": {},
    "packed, cached reference": {"reference": "cached"},
    "packed, remat": {"model": {"remat": True}},
    "packed, LoRA": {"reference": "adapters_off", "lora": 8},
    "packed, LoRA, remat": {"reference": "adapters_off", "lora": 8, "model": {"remat": True}},
    "buckets": {"batching": "buckets"},
    "buckets, cached reference": {"batching": "buckets", "reference": "cached"},
    "buckets, remat": {"batching": "buckets", "model": {"remat": True}},
}


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Take a few steps of one variant, in this process."""
    import numpy as np

    from dpo_keras import enable_lora, preference_dataset

    variant, length = VARIANTS[task["variant"]], task["length"]
    options = variant.get("model", {})
    policy = common.gpt2(task["layers"], task["width"], task["vocabulary"], length)
    if "lora" in variant:
        enable_lora(policy, variant["lora"])
    tokenized = common.random_pairs(task["pairs"] * task["steps"], length, task["vocabulary"])
    reference = variant.get("reference", "frozen_copy")
    if reference == "cached":
        # What the numbers are does not matter here.
        tokenized = tokenized.with_reference(np.full((len(tokenized), 2), -1.0, np.float32))
    batching = variant.get("batching", "packed")
    dataset = preference_dataset(tokenized, batch_size=task["pairs"], batching=batching)
    run = common.Timed(common.dpo_model(policy, reference, **options))
    if reference == "cached":
        run.model.reference.starts_as_policy = False
    before = common.peak_megabytes()
    run.fit(dataset)
    peak = common.peak_megabytes()
    seconds = [b - a for a, b in itertools.pairwise(run.ends)]
    found = {"process_mb": peak, "steps_mb": peak - before, "seconds": statistics.median(seconds)}
    batch = next(iter(dataset))
    trained = sum(int(np.prod(v.shape)) for v in policy.trainable_variables)
    found["arithmetic_mb"] = numbers(batch, trained, task, bool(options.get("remat"))) * 4 / 2**20
    return {**found, "pairs_per_second": run.rates()["steady_pairs_per_second"]}


def numbers(batch: dict[str, Any], trained: int, task: dict[str, Any], remat: bool) -> int:
    """Count the numbers that a step on a batch keeps."""
    import numpy as np

    ids = np.asarray(batch["token_ids"])
    layers, width, packed = task["layers"], task["width"], "reach" in batch
    seen = np.sum(batch["reach"] * batch["padding_mask"]) if packed else ids.size * ids.shape[-1]
    states, weights = ids.size * width, 2 * seen * max(width // 64, 1)
    kept = (layers + 16) * states if remat else 16 * layers * states
    return int(3 * trained + kept + (weights if packed or remat else layers * weights))


def draw(runs: list[dict[str, Any]], path: pathlib.Path) -> None:
    """Draw the memory of steps against length, a line for each variant."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    FigureCanvasAgg(figure)
    kinds = dict.fromkeys(run["variant"].split()[0].rstrip(",") for run in runs)
    for place, kind in enumerate(kinds, start=1):
        axes = figure.add_subplot(1, len(kinds), place)
        shown = [run for run in runs if run["variant"].startswith(kind)]
        for variant in dict.fromkeys(run["variant"] for run in shown):
            own = [run for run in shown if run["variant"] == variant]
            lengths = [run["length"] for run in own]
            fitted, predicted = exponents(own)
            label = f"{variant}: {fitted:.2f} ({predicted:.2f})"
            axes.loglog(lengths, [run["steps_mb"] for run in own], "o-", ms=3, label=label)
        lengths = sorted({run["length"] for run in shown})
        common.label_axes(axes, lengths, [run["steps_mb"] for run in shown], "MB of steps")
        axes.set_xlabel("length in tokens", fontsize=8)
        below = {"loc": "upper left", "bbox_to_anchor": (0, -0.18)}
        axes.legend(fontsize=7, title="exponent (arithmetic's)", title_fontsize=7, **below)
    figure.savefig(path, dpi=80)


def exponents(runs: list[dict[str, Any]]) -> tuple[float, float]:
    """Fit the exponents of what was measured and of what arithmetic counts."""
    lengths = [run["length"] for run in runs]
    fitted, predicted = (
        common.slope(lengths, [run[name] for run in runs])[0]
        for name in ("steps_mb", "arithmetic_mb")
    )
    return fitted, predicted


def main() -> None:
    """Run from the command line."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--redraw", type=pathlib.Path, help="draw --json into this PNG, no more")
    parser.add_argument("--lengths", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--layers", type=int, default=6)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(measure(args.task)))
        return
    shared = {
        key: getattr(args, key) for key in ("pairs", "steps", "vocabulary", "width", "layers")
    }
    figures: list[dict[str, Any]] = []
    if args.json is not None and args.json.is_file():
        figures = json.loads(args.json.read_text(encoding="utf-8"))["runs"]
    for length, variant in [] if args.redraw else itertools.product(args.lengths, args.variants):
        task = {**shared, "length": length, "variant": variant}
        found = common.in_a_process(__file__, task, args.launcher)
        new = (length, variant)
        figures = [run for run in figures if (run["length"], run["variant"]) != new]
        figures.append({"length": length, "variant": variant, **found})
        common.write(args.json, {**shared, "runs": figures})
    if args.redraw:
        draw(figures, args.redraw)
    names = ("process_mb", "steps_mb", "seconds", "pairs_per_second")
    rows: list[tuple[Any, ...]] = []
    for variant in args.variants:
        own = [run for run in figures if run["variant"] == variant]
        fitted = [f"{one:.2f}" for one in exponents(own)] if len(own) > 1 else ["", ""]
        rows += [(f"{run['length']}: {variant}", *(run[n] for n in names), *fitted) for run in own]
    columns = ("length", "process MB", "steps MB", "seconds/step", "pairs/s", "exponent")
    common.show(f"Memory, {args.pairs} pairs per step", (*columns, "arithmetic's"), rows)


if __name__ == "__main__":
    main()
