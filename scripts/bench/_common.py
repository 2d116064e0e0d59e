"""What the benchmarks share: processes of their own, the HH pairs, a timed run, tables, JSON."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import pathlib
import resource
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

ROOT = pathlib.Path(__file__).resolve().parents[2]
MAX_LENGTH = 512


def peak_megabytes() -> float:
    """Return the most memory that this process has held so far.

    Linux counts what the parent held when it started the process, too: parents must be small, and
    import no TensorFlow.
    """
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def in_a_process(script: str, task: dict[str, Any], launcher: str = "") -> dict[str, Any]:
    """Run `script --task JSON` in a process of its own.

    Args:
        script: path of the benchmark; it prints one JSON object as its last line.
        task: what to do.
        launcher: put in front of the command, such as `taskset -c 0,1`.

    Returns:
        What the process printed last.
    """
    command = [*shlex.split(launcher), sys.executable, script, "--task", json.dumps(task)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def parser_of(doc: str) -> argparse.ArgumentParser:
    """Make a parser with the options of all benchmarks."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", type=pathlib.Path, help="write the figures to this file")
    parser.add_argument("--launcher", default="", help="put in front of each measured process")
    parser.add_argument("--task", type=json.loads, help=argparse.SUPPRESS)
    return parser


def baseline_option(parser: argparse.ArgumentParser) -> None:
    """Add `--baseline`: where trl_baseline.py is, next to the HH sample."""
    usual = [ROOT / "shared", ROOT.parent / "shared"]
    found = next((place for place in usual if place.is_dir()), usual[0])
    parser.add_argument(
        "--baseline",
        default=str(found / "bench" / "trl_baseline.py"),
        help="trl_baseline.py, with data/ beside its folder (default: %(default)s)",
    )


def hh_pairs(baseline: str, count: int | None = None) -> list[Any]:
    """Read the first pairs of the HH sample, split as the baseline splits them."""
    from dpo_keras.preferences import PreferencePair

    spec = importlib.util.spec_from_file_location("trl_baseline", baseline)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rows = [row for row, _ in zip(module.read_pairs(), range(count or 10**9), strict=False)]
    return [PreferencePair(row["prompt"], row["chosen"], row["rejected"]) for row in rows]


def random_pairs(count: int, length: int, vocabulary: int, seed: int = 0) -> Any:
    """Pairs of random tokens: prompts of up to half of `length`, responses of up to the rest."""
    import numpy as np

    from dpo_keras.batching import Ragged, TokenizedPairs

    random = np.random.default_rng(seed)

    def tokens(most: int) -> Any:
        sizes = random.integers(max(most // 8, 1), most + 1, count)
        return Ragged.from_lists([random.integers(2, vocabulary, size) for size in sizes])

    ones = np.ones(count, np.float32)
    parts = tokens(length // 2), tokens(length - length // 2), tokens(length - length // 2)
    return TokenizedPairs(*parts, ones, ones, max_length=length)


def all_pairs(answered: Iterable[tuple[Any, list[Any]]], max_length: int) -> Any:
    """Make all pairs of the responses to each prompt, from (prompt, responses) in tokens."""
    import numpy as np

    from dpo_keras.batching import Ragged, TokenizedPairs

    texts, numbers = [], []
    for number, (prompt, answers) in enumerate(answered):
        for pair in itertools.combinations(answers, 2):
            texts.append((prompt, *pair))
            numbers.append(number)
    parts = [Ragged.from_lists(list(part)) for part in zip(*texts, strict=True)]
    ones, hashes = np.ones(len(texts), np.float32), np.array(numbers, np.uint64)
    return TokenizedPairs(*parts, ones, ones, prompt_hash=hashes, max_length=max_length)


def load_policy(checkpoint: str) -> Any:
    """Load a policy with the rivals' tokens: no start token before the prompt."""
    import keras_hub

    policy = keras_hub.models.CausalLM.from_preset(checkpoint)
    policy.preprocessor.add_start_token = False
    return policy


def slope(values: Sequence[float], costs: Sequence[float]) -> tuple[float, float]:
    """Fit log(cost) = exponent log(value) + constant, and return both."""
    import numpy as np

    exponent, constant = np.polyfit(np.log(values), np.log(costs), 1)
    return float(exponent), float(constant)


def label_axes(axes: Any, values: Sequence[float], costs: Sequence[float], unit: str) -> None:
    """Label logarithmic axes with all values, and with the least and the greatest cost."""
    axes.minorticks_off()
    axes.set_xticks(values, [f"{value:,.0f}" for value in values], fontsize=7)
    ends = sorted({min(costs), max(costs)})
    axes.set_yticks(ends, [f"{cost:,.3g}" if cost < 1000 else f"{cost:,.0f}" for cost in ends])
    axes.tick_params(labelsize=7)
    axes.set_ylabel(unit, fontsize=8)


def gpt2(layers: int, width: int, vocabulary: int, length: int) -> Any:
    """Make a GPT-2 with random weights and heads of 64."""
    import keras
    import keras_hub

    keras.utils.set_random_seed(0)
    backbone = keras_hub.models.GPT2Backbone(
        vocabulary_size=vocabulary,
        num_layers=layers,
        num_heads=max(width // 64, 1),
        hidden_dim=width,
        intermediate_dim=4 * width,
        max_sequence_length=length,
        dropout=0.0,
    )
    return keras_hub.models.GPT2CausalLM(backbone)


class Timed:
    """A run of `DPOModel.fit`, watched: when each step ended, its loss, pairs and traces.

    Args:
        model: a compiled `DPOModel`.
    """

    def __init__(self, model: Any):
        self.model = model
        self.ends: list[float] = []
        self.losses: list[float] = []
        self.pairs: list[float] = []
        self.tokens: list[float] = []
        self.traces = 0
        step = model.train_step

        def traced(batch: Any) -> Any:
            self.traces += 1
            return step(batch)

        model.train_step = traced

    def fit(self, dataset: Any, epochs: int = 1) -> None:
        """Trains, and keeps the figures of every step."""
        import keras

        def on_train_batch_end(batch: int, logs: Any) -> None:
            self.ends.append(time.perf_counter())
            self.losses.append(float(self.model.step_logs["loss"]))
            self.pairs.append(float(self.model.step_logs["pairs"]))
            self.tokens.append(float(self.model.step_logs["tokens"]))

        watch = keras.callbacks.LambdaCallback(on_train_batch_end=on_train_batch_end)
        self.started = time.perf_counter()
        self.model.fit(dataset, epochs=epochs, verbose=0, callbacks=[watch])
        self.finished = time.perf_counter()

    def rates(self) -> dict[str, Any]:
        """Pairs per second without and with the first step, and what else there is to say."""
        steady = self.ends[-1] - self.ends[0]
        return {
            "steady_pairs_per_second": sum(self.pairs[1:]) / steady,
            "steady_tokens_per_second": sum(self.tokens[1:]) / steady,
            "pairs_per_second": sum(self.pairs) / (self.finished - self.started),
            "pairs": sum(self.pairs),
            "steps": len(self.ends),
            "traces": self.traces,
            "losses": self.losses[:8],
        }


def dpo_model(policy: Any, reference: str = "frozen_copy", **options: Any) -> Any:
    """Make the model that all benchmarks train: AdamW as in torch, no decay or clipping."""
    import keras

    from dpo_keras import DPOLoss, DPOModel

    model = DPOModel(policy, reference, **options)
    optimizer = keras.optimizers.AdamW(1e-4, weight_decay=0.0, epsilon=1e-8)
    model.compile(optimizer, loss=DPOLoss("sigmoid", beta=0.1))
    return model


def show(title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Print a table; the first column is text."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left")
    for row in rows:
        table.add_row(*(cell if isinstance(cell, str) else f"{cell:,.4g}" for cell in row))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def write(path: pathlib.Path | None, figures: Any) -> None:
    """Write figures as JSON, if a file is named."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
