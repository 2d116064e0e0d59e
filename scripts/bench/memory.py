#!/usr/bin/env python
"""Peak memory of training, by what is switched on and by length.

    python scripts/bench/memory.py [--lengths 256 512 1024] [--pairs 8]

A GPT-2 of random weights takes a few steps on random pairs, each variant in a process of its own,
since peak memory only ever grows. "process" is the highest resident memory, the libraries' own
included; "steps" is how much of it came after the model was compiled: gradients, optimizer, what
the backward pass keeps, and the traced graph.
"""

import inspect
import itertools
import json
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

    from dpo_keras import DPOModel, enable_lora, preference_dataset

    variant, length = VARIANTS[task["variant"]], task["length"]
    options = variant.get("model", {})
    unknown = sorted(set(options) - set(inspect.signature(DPOModel).parameters))
    if unknown:
        return {"skipped": f"DPOModel does not take {', '.join(unknown)}"}
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
    return {**found, "pairs_per_second": run.rates()["steady_pairs_per_second"]}


def main() -> None:
    """Run from the command line."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[256, 512, 1024])
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--pairs", type=int, default=8, help="pairs per step")
    parser.add_argument("--steps", type=int, default=6)
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
    figures, rows = [], []
    for length, variant in itertools.product(args.lengths, args.variants):
        task = {**shared, "length": length, "variant": variant}
        found = common.in_a_process(__file__, task, args.launcher)
        figures.append({"length": length, "variant": variant, **found})
        common.write(args.json, {**shared, "runs": figures})
        if "skipped" in found:
            print(f"{variant}: skipped, {found['skipped']}")
            continue
        rows.append((f"{length}: {variant}", *found.values()))
    columns = ("length", "process MB", "steps MB", "seconds/step", "pairs/s")
    common.show(f"Memory, {args.pairs} pairs per step", columns, rows)


if __name__ == "__main__":
    main()
