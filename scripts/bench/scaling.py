#!/usr/bin/env python
"""What a step costs against one thing at a time, and the exponent that arithmetic predicts.

    python scripts/bench/scaling.py --json scaling.json            # all axes
    python scripts/bench/scaling.py --axis length --json scaling.json
    python scripts/bench/scaling.py --json scaling.json --redraw .github/scaling.png

A small GPT-2 of random weights trains on random pairs in packed rows. Each axis is a process of its
own, in which all values take their steps in turn, round after round; a cost is the median over
rounds. JSON keeps the axes that were measured before.

The exponent is the slope of log(cost) over log(value), fitted by least squares. Arithmetic's is the
same slope of the additions and multiplications: for T tokens, R of them responses', and S pairs of
a token with a token that it sees, 2 T (kernels) + 4 S (width) (layers) + 2 R (width) (vocabulary),
each prompt and each response counted once. What costs more than it is an overhead; a lower exponent
has a part that does not grow.

Replicas are logical CPUs of one machine, which share its cores: they show what replicas cost, not
what they gain. Each number of them has a process of its own, since TensorFlow mixes up the sums of
two strategies in one. "responses" is the number of responses to each of 4 prompts, all of whose
pairs are trained on: K (K - 1) / 2. "data" packs all pairs of an epoch and lays out its batches.
"""

import argparse
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Mapping
from typing import Any

import _common as common
import roofline

USUAL = {"pairs": 8, "length": 256, "vocabulary": 8192, "width": 128, "replicas": 1, "responses": 2}
AXES = {
    "pairs": [4, 8, 16, 32],
    "length": [64, 128, 256, 512],
    "vocabulary": [2048, 8192, 32_768, 65_536],
    "width": [64, 128, 256, 512],
    "replicas": [1, 2, 4],
    "responses": [2, 3, 4, 6],
    "data": [1000, 10_000, 100_000],
}
PROMPTS = 4  # of a step, where the responses of a prompt vary


def ranked_pairs(prompts: int, responses: int, length: int, vocabulary: int) -> Any:
    """All pairs of several random responses to each of some random prompts."""
    import numpy as np

    random = np.random.default_rng(0)
    half = length // 2

    def text() -> Any:
        return random.integers(2, vocabulary, random.integers(half // 8, half + 1))

    answered = ((text(), [text() for _ in range(responses)]) for _ in range(prompts))
    return common.all_pairs(answered, length)


def operations(tokenized: Any, layers: int, width: int, vocabulary: int) -> float:
    """Additions and multiplications of a pass over pairs, each text once for its prompt."""
    from dpo_keras.batching import collate_packed, plan_packing

    trees = plan_packing(tokenized, len(tokenized)).trees
    work = roofline.Work.of(collate_packed(tokenized, [range(len(tokenized))], trees=trees))
    shape = roofline.Shape(layers, width, 12 * layers * width**2, vocabulary)
    return float(roofline.forward_flops(work, shape))


def case(task: Mapping[str, Any]) -> tuple[Any, Any, float]:
    """Make a run, its dataset, and the operations of as many pairs as a step is asked to hold."""
    import tensorflow as tf

    from dpo_keras import preference_dataset

    steps, vocabulary = task["steps"], task["vocabulary"]
    pairs = task["pairs"]
    if task["axis"] == "responses":
        count = task["responses"]
        pairs = PROMPTS * count * (count - 1) // 2
        tokenized = ranked_pairs(PROMPTS * steps, count, task["length"], vocabulary)
    else:
        tokenized = common.random_pairs(pairs * steps, task["length"], vocabulary)
    replicas = task["replicas"]
    names = [device.name for device in tf.config.list_logical_devices("CPU")][:replicas]
    strategy = (
        tf.distribute.MirroredStrategy(names) if replicas > 1 else tf.distribute.get_strategy()
    )
    dataset = preference_dataset(tokenized, batch_size=pairs, batching="packed", replicas=replicas)
    with strategy.scope():
        policy = common.gpt2(task["layers"], task["width"], vocabulary, task["length"])
        run = common.Timed(common.dpo_model(policy))
    per_step = operations(tokenized, task["layers"], task["width"], vocabulary)
    return run, dataset, per_step / steps


def train(task: dict[str, Any]) -> dict[str, Any]:
    """Take steps of all values of an axis in turn, in this process."""
    import tensorflow as tf

    if task["axis"] == "replicas":
        cpu = tf.config.list_physical_devices("CPU")[0]
        logical = [tf.config.LogicalDeviceConfiguration()] * max(task["values"])
        tf.config.set_logical_device_configuration(cpu, logical)
    cases = {value: case({**task, task["axis"]: value}) for value in task["values"]}
    rounds: dict[int, list[float]] = {value: [] for value in cases}
    for number in range(task["rounds"] + 1):  # the first one traces
        for value, (run, dataset, _) in cases.items():
            run.ends.clear()
            run.fit(dataset)
            if number:
                apart = [b - a for a, b in itertools.pairwise(run.ends)]
                # Packing may need a step more or fewer for as many pairs.
                share = int(dataset.cardinality()) / task["steps"]
                rounds[value].append(1e3 * share * statistics.median(apart))
    return {
        "values": task["values"],
        "cost": [statistics.median(rounds[value]) for value in cases],
        "rounds": list(rounds.values()),
        "operations": [per_step for _, _, per_step in cases.values()],
        "tokens": [run.tokens[-1] for run, _, _ in cases.values()],
    }


def pack(task: dict[str, Any]) -> dict[str, Any]:
    """Pack epochs of several sizes and lay out their batches, in this process."""
    from dpo_keras.batching import collate_packed
    from dpo_keras.batching.packing import packed_order, plan_packing

    found: dict[str, Any] = {"values": task["values"], "cost": [], "fill": []}
    for count in task["values"]:
        tokenized = common.random_pairs(count, task["length"], task["vocabulary"])
        started = time.perf_counter()
        plan = plan_packing(tokenized, task["pairs"])
        for pairs in packed_order(plan, epoch=1).pairs:
            collate_packed(tokenized, pairs, plan.length, plan.slots)
        found["cost"].append(1e3 * (time.perf_counter() - started))
        found["fill"].append(plan.fill)
    found["operations"] = [float(count) for count in task["values"]]
    return found


def unit_of(axis: str) -> str:
    """Return what the costs of an axis are in."""
    return "ms" if axis == "data" else "ms a step"


def draw(figures: Mapping[str, Any], path: pathlib.Path) -> None:
    """Draw a panel for each axis: what was measured, its slope, and arithmetic's."""
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = [name for name in AXES if name in figures]
    figure = Figure(figsize=(9, 2.5 * -(-len(names) // 3)), layout="constrained")
    FigureCanvasAgg(figure)
    for number, name in enumerate(names, start=1):
        found = figures[name]
        values, costs = np.array(found["values"], float), np.array(found["cost"])
        axes = figure.add_subplot(-(-len(names) // 3), 3, number)
        exponent, constant = common.slope(found["values"], found["cost"])
        predicted, _ = common.slope(found["values"], found["operations"])
        axes.loglog(values, np.exp(constant) * values**exponent, color="#2a78d6", lw=1)
        middle = np.exp(np.log(costs).mean() - predicted * np.log(values).mean())
        axes.loglog(values, middle * values**predicted, "--", color="#8a8a8a", lw=1)
        axes.loglog(values, costs, "o", color="#2a78d6", ms=4)
        axes.set_title(f"{name}: {exponent:.2f}, arithmetic {predicted:.2f}", fontsize=9)
        common.label_axes(axes, found["values"], found["cost"], unit_of(name))
    figure.savefig(path, dpi=80)


def table(figures: Mapping[str, Any]) -> None:
    """Print the costs of all axes, and their exponents."""
    rows = []
    for name in (name for name in AXES if name in figures):
        found = figures[name]
        costs = ", ".join(
            f"{value:,}: {cost:,.3g}"
            for value, cost in zip(found["values"], found["cost"], strict=True)
        )
        exponents = (common.slope(found["values"], found[key])[0] for key in ("cost", "operations"))
        rows.append((name, f"{costs} {unit_of(name)}", *(f"{value:.2f}" for value in exponents)))
    common.show("Cost", ("axis", "value: cost", "exponent", "arithmetic's"), rows)


def options() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    parser = common.parser_of(__doc__)
    parser.add_argument("--axis", nargs="*", choices=AXES, default=list(AXES))
    parser.add_argument("--redraw", type=pathlib.Path, help="draw --json into this PNG, no more")
    parser.add_argument("--steps", type=int, default=5, help="of each value in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    return parser


def main() -> None:
    """Run from the command line."""
    args = options().parse_args()
    if args.task:
        print(json.dumps((pack if args.task["axis"] == "data" else train)(args.task)))
        return
    figures: dict[str, Any] = {}
    if args.json is not None and args.json.is_file():
        figures = json.loads(args.json.read_text(encoding="utf-8"))
    for axis in [] if args.redraw else args.axis:
        task = {**USUAL, "axis": axis}
        task |= {name: getattr(args, name) for name in ("steps", "rounds", "layers")}
        apart = [[value] for value in AXES[axis]] if axis == "replicas" else [AXES[axis]]
        runs = [
            common.in_a_process(__file__, {**task, "values": values}, args.launcher)
            for values in apart
        ]
        figures[axis] = {name: [one for run in runs for one in run[name]] for name in runs[0]}
        common.write(args.json, figures)
    table(figures)
    if args.redraw:
        draw(figures, args.redraw)


if __name__ == "__main__":
    main()
