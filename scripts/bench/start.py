#!/usr/bin/env python
"""How long people wait before the work begins: commands, imports, first steps, an export.

    python scripts/bench/start.py [--config configs/quickstart.yaml] [--rounds 3]
    python scripts/bench/start.py --stages "dpo-keras --help" export --rounds 1
    python scripts/bench/start.py --stages "first step" --profile

Every stage runs in a process of its own, the stages in turn, round after round. Commands and
imports are timed from outside, with the start of Python. The others are timed inside, once the
configuration's policy is loaded and the pairs are tokenized. Prints medians; --json writes every
figure. --profile prints where the time of a stage goes, function by function.
"""

import argparse
import cProfile
import pathlib
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

from _common import ROOT, in_a_process, parser_of, show, write

COMMANDS: dict[str, list[str]] = {
    "dpo-keras --help": ["--help"],
    "dpo-keras --version": ["--version"],
    "dpo-keras train --help": ["train", "--help"],
    "dpo-keras validate": ["validate", "CONFIG"],
    "dpo-keras train, an error": ["train", "CONFIG", "training.epochs=many"],
}
IMPORTS = {
    "import dpo_keras": "import dpo_keras",
    "import of training": "import dpo_keras; dpo_keras.DPOModel",
    "import of serving": "import dpo_keras; dpo_keras.export",
}
GOALS = {"dpo-keras --help": 0.5, "first step": 8.0, "first evaluation": 8.0, "export": 8.0}


def seconds_of(command: list[str], expected: int = 0) -> float:
    """Time a command from outside, from its first line to its exit."""
    began = time.perf_counter()
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode != expected:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stderr}")
    return seconds


def command_seconds(stage: str, config: str) -> float:
    """Time a command of `COMMANDS`, or an import."""
    if stage in IMPORTS:
        return seconds_of([sys.executable, "-c", IMPORTS[stage]])
    words = [config if word == "CONFIG" else word for word in COMMANDS[stage]]
    line = "import sys; from dpo_keras.app.cli import main; sys.exit(main())"
    return seconds_of([sys.executable, "-c", line, *words], 2 if "error" in stage else 0)


class Loaded:
    """A configuration's policy, with its pairs."""

    def __init__(self, config: str):
        from dpo_keras.app.config import load_config
        from dpo_keras.app.console import Silent, prepare_keras
        from dpo_keras.app.models import load_policy
        from dpo_keras.app.run_inputs import read_sides, texts_of

        prepare_keras()
        import keras

        import dpo_keras

        self.config = load_config(config)
        keras.utils.set_random_seed(self.config.seed)
        self.sides = read_sides(self.config, Silent())
        began = time.perf_counter()
        self.policy = load_policy(self.config.model, texts_of(self.sides.train))
        self.load_seconds = time.perf_counter() - began
        data = self.config.data
        self.train, self.held_out = (
            dpo_keras.tokenize_pairs(
                side, self.policy.preprocessor, max_length=data.max_length, template=data.template
            )
            for side in (self.sides.train, self.sides.held_out)
        )

    def model(self) -> Any:
        """Make the DPOModel of the configuration, compiled."""
        import dpo_keras
        from dpo_keras.app.config_rules import build_loss

        model = dpo_keras.DPOModel(self.policy, self.config.reference)
        model.compile("adamw", build_loss(self.config.loss))
        return model

    def batches(self, pairs: Any, size: int) -> Any:
        """Lay pairs out as a run does: packed where the policy allows it."""
        from dpo_keras.training import choose_layout

        layout = choose_layout([self.policy], note=lambda text: None)
        return layout.dataset(pairs, size, shuffle=False)


def first_step(loaded: Loaded) -> None:
    """Make the model with its reference, trace the step and take it."""
    dataset = loaded.batches(loaded.train, loaded.config.training.batch_size)
    loaded.model().fit(dataset, steps_per_epoch=1, verbose=0)


def first_evaluation(loaded: Loaded) -> None:
    """Make the model with its reference, trace its evaluation and measure one batch."""
    dataset = loaded.batches(loaded.held_out, loaded.config.evaluation.batch_size)
    loaded.model().evaluate(dataset, steps=1, verbose=0)


def first_answers(loaded: Loaded) -> None:
    """Let the policy answer the first prompts."""
    import dpo_keras

    prompts = [pair.prompt for pair, _ in zip(loaded.sides.held_out, range(16), strict=False)]
    evaluation = loaded.config.evaluation
    dpo_keras.generate_responses(
        loaded.policy, prompts, max_new_tokens=evaluation.max_new_tokens, temperature=0.0
    )


def export(loaded: Loaded) -> None:
    """Write the SavedModel and verify it in a process without Keras."""
    import dpo_keras

    config = loaded.config
    options = {} if config.export is None else {"max_new_tokens": config.export.max_new_tokens}
    with tempfile.TemporaryDirectory() as folder:
        dpo_keras.export(
            loaded.model(),
            pathlib.Path(folder) / config.name / "1",
            max_length=config.data.max_length,
            template=config.data.template,
            on_stage=lambda stage: print(f"{time.perf_counter():10.2f} {stage}", file=sys.stderr),
            **options,
        )


INSIDE: dict[str, Callable[[Loaded], None]] = {
    "first step": first_step,
    "first evaluation": first_evaluation,
    "first answers": first_answers,
    "export": export,
}
STAGES = [*COMMANDS, *IMPORTS, "load policy", *INSIDE]


def measure(stage: str, config: str, profile: bool = False) -> float:
    """Run one stage in this process and return its seconds."""
    loaded = Loaded(config)
    if stage == "load policy":
        return loaded.load_seconds
    watch = cProfile.Profile()
    began = time.perf_counter()
    if profile:
        watch.runcall(INSIDE[stage], loaded)
        pstats.Stats(watch, stream=sys.stderr).sort_stats("cumulative").print_stats(60)
    else:
        INSIDE[stage](loaded)
    return time.perf_counter() - began


def main() -> None:
    """Measure the stages in alternating rounds and print their medians."""
    parser = parser_of(str(__doc__))
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.yaml"))
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES, metavar="STAGE")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--profile", action="store_true", help="of stages inside a process")
    args: argparse.Namespace = parser.parse_args()
    if args.task is not None:
        print(f'{{"seconds": {measure(**args.task)}}}')
        return
    seconds: dict[str, list[float]] = {stage: [] for stage in args.stages}
    for _ in range(args.rounds):
        for stage in args.stages:
            if stage in COMMANDS or stage in IMPORTS:
                found = command_seconds(stage, args.config)
            else:
                task = {"stage": stage, "config": args.config, "profile": args.profile}
                found = in_a_process(__file__, task, args.launcher)["seconds"]
            seconds[stage].append(found)
    rows = [
        [stage, statistics.median(found), min(found), max(found), GOALS.get(stage, "")]
        for stage, found in seconds.items()
    ]
    columns = ["stage", "median, s", "least", "most", "goal"]
    show(f"Start, {args.rounds} rounds, {pathlib.Path(args.config).name}", columns, rows)
    write(args.json, {"config": args.config, "seconds": seconds})


if __name__ == "__main__":
    main()
