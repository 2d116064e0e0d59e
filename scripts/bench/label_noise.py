#!/usr/bin/env python
"""How well each objective stands labels that are wrong: held-out accuracy on the bundled pairs.

    python scripts/bench/label_noise.py --json label_noise.json

The model and its warm-up are those of configs/quickstart.yaml, made once. For each seed some of
the training pairs are drawn, and each label is flipped with the given probability; every objective
gets the same pairs, flips and order. What is measured is the share of held-out pairs, their labels
*clean*, of which the chosen response has the higher reward, and the log loss of P(chosen) on them.

    sigmoid   DPO, which takes every label at its word
    cDPO      sigmoid with label_smoothing = the rate of flips
    robust    robust with label_smoothing = the rate of flips

Without flips all three are the same loss, so that row is trained once for each seed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np

from dpo_keras import DPOLoss, DPOModel, SupervisedModel, cache_reference, preference_dataset
from dpo_keras.app.config import Config, load_config
from dpo_keras.app.models import load_policy
from dpo_keras.app.run_inputs import texts_of
from dpo_keras.batching import TokenizedPairs, steps_per_epoch, tokenize_pairs
from dpo_keras.preferences import read_preferences
from dpo_keras.training import make_optimizer, train_preferences, warm_up

CONFIG = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
OBJECTIVES: dict[str, Callable[[float, float], DPOLoss]] = {
    "sigmoid": lambda beta, rate: DPOLoss("sigmoid", beta=beta),
    "cDPO": lambda beta, rate: DPOLoss("sigmoid", beta=beta, label_smoothing=rate),
    "robust": lambda beta, rate: DPOLoss("robust", beta=beta, label_smoothing=rate),
}


def say(text: str) -> None:
    """Tell how far it is; the table alone goes to standard output."""
    print(text, file=sys.stderr, flush=True)


def warmed_up(config: Config, held_out: float) -> tuple[Any, TokenizedPairs, TokenizedPairs]:
    """Give the policy after supervised training, and both sides with its log-probs."""
    keras.utils.set_random_seed(config.seed)
    train, held = read_preferences(config.data.path).split(held_out, seed=config.seed)
    policy = load_policy(config.model, texts_of(train))
    sides = [
        tokenize_pairs(pairs, policy.preprocessor, max_length=config.data.max_length)
        for pairs in (train, held)
    ]
    plan = config.warmup
    steps = plan.epochs * steps_per_epoch(sides[0], plan.batch_size)
    model = SupervisedModel(policy)
    model.compile(
        make_optimizer(
            steps,
            learning_rate=plan.learning_rate,
            schedule=plan.schedule,
            warmup_fraction=plan.warmup_fraction,
        )
    )
    warm_up(
        model,
        sides[0],
        epochs=plan.epochs,
        batch_size=plan.batch_size,
        buckets=1,
        progress=lambda r: r["step"] % 100 or say(f"warm-up {r['step']}/{steps} {r['loss']:.3f}"),
    )
    return policy, *(cache_reference(policy, side, batch_size=64) for side in sides)


def with_flips(pairs: TokenizedPairs, count: int, rate: float, seed: int) -> TokenizedPairs:
    """Draw `count` pairs and exchange the preference of each with probability `rate`.

    The flips of a higher rate contain those of a lower one.
    """
    random = np.random.default_rng(seed)
    drawn = pairs.take(np.sort(random.permutation(len(pairs))[:count]))
    flipped = random.random(len(drawn)) < rate
    return dataclasses.replace(
        drawn, preference=np.where(flipped, 1 - drawn.preference, drawn.preference)
    )


def cells(rates: list[float]) -> Iterator[tuple[str, float]]:
    """Name what is trained: every objective at every rate, without flips `sigmoid` alone."""
    for rate in rates:
        for name in OBJECTIVES if rate else ["sigmoid"]:
            yield name, rate


def run(policy: Any, train: TokenizedPairs, held: TokenizedPairs, args: Any) -> list[dict]:
    """Train and measure every cell with every seed, from the same weights."""
    start = policy.get_weights()
    model = DPOModel(policy, reference="cached")
    model.reference.starts_as_policy = True
    measured = preference_dataset(
        held, batch_size=args.batch_size, buckets=1, batching="buckets", shuffle=False
    )
    steps = args.epochs * steps_per_epoch(args.pairs, args.batch_size)
    records: list[dict] = []
    for name, rate in cells(args.rates):
        # Compiled once: what the seeds share is one trace.
        optimizer = make_optimizer(
            steps, learning_rate=args.learning_rate, schedule="cosine", warmup_fraction=0.1
        )
        model.compile(optimizer, OBJECTIVES[name](args.beta, rate))
        fresh = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]
        for seed in range(args.seeds):
            begun = time.perf_counter()
            policy.set_weights(start)
            for variable, value in zip(optimizer.variables, fresh, strict=True):
                variable.assign(value)
            pairs = with_flips(train, args.pairs, rate, seed)
            train_preferences(
                model,
                pairs,
                epochs=args.epochs,
                batch_size=args.batch_size,
                seed=seed,
                buckets=1,
            )
            # Rows beyond the pairs are the last batch's padding.
            llr = model.predict(measured, verbose=0)["llr"][: len(held)].astype(float)
            records.append(
                {
                    "objective": name,
                    "rate": rate,
                    "seed": seed,
                    "flipped": float(np.mean(pairs.preference < 0.5)),
                    "accuracy": float(np.mean(0.5 * (1 + np.sign(llr)))),
                    "log_loss": float(np.mean(np.logaddexp(0, -llr))),
                    "mean_llr": float(np.mean(llr)),
                    "seconds": round(time.perf_counter() - begun, 1),
                }
            )
            say(json.dumps(records[-1]))
    return records


def table(records: list[dict], key: str, rates: list[float]) -> str:
    """Give a Markdown table: rates down, objectives across, mean ± standard deviation."""
    lines = [f"| labels flipped | {' | '.join(OBJECTIVES)} |", "|---" * (len(OBJECTIVES) + 1) + "|"]
    for rate in rates:
        row = []
        for name in OBJECTIVES:
            values = [
                r[key]
                for r in records
                if r["rate"] == rate and r["objective"] == (name if rate else "sigmoid")
            ]
            spread = np.std(values, ddof=1) if len(values) > 1 else 0.0
            row.append(f"{np.mean(values):.3f} ± {spread:.3f}")
        lines.append(f"| {rate:g} | {' | '.join(row)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--pairs", type=int, default=1024, help="training pairs of each run")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--rates", type=float, nargs="+", default=[0.0, 0.1, 0.2, 0.3, 0.4])
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the bundled pairs")
    parser.add_argument("--warmup-epochs", type=int, help="by default the quickstart's")
    parser.add_argument("--json", type=Path, help="where to write every run")
    args = parser.parse_args(arguments)
    overrides = [] if args.warmup_epochs is None else [f"warmup.epochs={args.warmup_epochs}"]
    config = load_config(CONFIG, overrides)
    policy, train, held = warmed_up(config, args.held_out)
    if not 0 < args.pairs <= len(train):
        parser.error(f"--pairs must be from 1 to the {len(train)} training pairs, got {args.pairs}")
    records = run(policy, train, held, args)
    if args.json:
        settings = {k: v for k, v in vars(args).items() if k != "json"}
        settings |= config.model_dump(mode="json", include={"seed", "model", "warmup"})
        args.json.write_text(json.dumps({"settings": settings, "runs": records}, indent=1))
    print(f"{args.pairs} training pairs, {len(held)} held out, {args.seeds} seeds\n")
    print(f"Held-out accuracy\n\n{table(records, 'accuracy', args.rates)}\n")
    print(f"Held-out log loss of P(chosen), nats\n\n{table(records, 'log_loss', args.rates)}")


if __name__ == "__main__":
    main()
