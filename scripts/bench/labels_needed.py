#!/usr/bin/env python
"""How many judgements each selection of pairs needs: held-out accuracy against labels.

    python scripts/bench/labels_needed.py --json labels.json --plot labels.png

The model and its warm-up are those of configs/quickstart.yaml, made once. A part of the bundled
pairs is held out; the others are the pool, whose labels are hidden. Each seed asks about a first
batch at random, the same for every selection, since a policy that equals its reference gives every
pair P = 1/2. Then it trains from the warmed-up weights on all that has been asked, scores the pool,
and asks about the next batch by the selection. What is measured is the share of held-out pairs of
which the chosen response has the higher reward.

`disagreement` has a committee: the policies of this batch and of the two before it. `diverse` keeps
a distance from the pairs of its own batch only.

Labels needed for an accuracy: where the mean curve of a selection, made monotone, first reaches it.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
from label_noise import CONFIG, say, warmed_up

from dpo_keras import DPOLoss, DPOModel, preference_dataset
from dpo_keras.app.config import load_config
from dpo_keras.batching import TokenizedPairs
from dpo_keras.feedback.selection import SELECTIONS, Pool, select_pairs
from dpo_keras.scoring.response_embeddings import response_embeddings
from dpo_keras.training import make_optimizer, train_preferences

COMMITTEE = 3


class Learner:
    """A policy that is trained again and again from the same weights, compiled once."""

    def __init__(self, policy: Any, args: argparse.Namespace):
        self.policy, self.args = policy, args
        self.start = policy.get_weights()
        self.model = DPOModel(policy, reference="cached")
        self.model.reference.starts_as_policy = True
        # A constant rate does not depend on the number of steps, so that one trace serves all.
        optimizer = make_optimizer(1, learning_rate=args.learning_rate, schedule="constant")
        self.model.compile(optimizer, DPOLoss("sigmoid", beta=args.beta))
        self.fresh = [keras.ops.convert_to_numpy(v) for v in optimizer.variables]

    def train(self, pairs: TokenizedPairs, seed: int) -> None:
        """Train from the first weights on all pairs that have a label."""
        self.policy.set_weights(self.start)
        for variable, value in zip(self.model.optimizer.variables, self.fresh, strict=True):
            variable.assign(value)
        train_preferences(
            self.model,
            pairs,
            epochs=self.args.epochs,
            batch_size=self.args.batch_size,
            seed=seed,
            batching="buckets",
            buckets=1,
        )

    def llr(self, pairs: TokenizedPairs) -> np.ndarray:
        """Return S(chosen) - S(rejected) of each pair."""
        batches = preference_dataset(
            pairs, batch_size=128, buckets=1, batching="buckets", shuffle=False
        )
        found = self.model.predict(batches, verbose=0)["llr"][: len(pairs)]
        return np.asarray(found, np.float64)


def curve(
    learner: Learner, pool: TokenizedPairs, held: TokenizedPairs, selection: str, seed: int
) -> list[dict]:
    """Ask batch after batch; return labels and held-out accuracy after each."""
    args = learner.args
    pool = pool.take(np.sort(select_pairs("random", args.pool, Pool(), len(pool), seed)))
    first = select_pairs("random", args.batch, Pool(), len(pool), seed)
    asked, records, committee = first, [], []
    while True:
        begun = time.perf_counter()
        learner.train(pool.take(np.sort(asked)), seed)
        right = 0.5 * (1 + np.sign(learner.llr(held)))
        record = {"selection": selection, "seed": seed, "labels": len(asked)}
        record |= {"accuracy": float(right.mean())}
        left = np.setdiff1d(np.arange(len(pool)), asked)
        done = len(asked) >= args.labels
        if not done:
            known = {}
            if selection in ("uncertain", "disagreement"):
                probabilities = 1 / (1 + np.exp(-learner.llr(pool).clip(-50, 50)))
                committee = [*committee, probabilities][-COMMITTEE:]
                known = {"probabilities": probabilities[left]}
                several = committee if len(committee) > 1 else committee * 2
                known["committee"] = np.stack(several)[:, left]
            elif selection == "diverse":
                states = response_embeddings(learner.policy, pool.take(left), batch_size=128)
                known = {"embeddings": states[:, 0] - states[:, 1]}
            chosen = select_pairs(selection, args.batch, Pool(**known), len(left), 1000 + seed)
            asked = np.concatenate([asked, left[chosen]])
        records.append({**record, "seconds": round(time.perf_counter() - begun, 1)})
        say(json.dumps(records[-1]))
        if done:
            return records


def mean_curve(records: list[dict], selection: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return labels, and mean and standard deviation of the accuracy over the seeds."""
    own = [r for r in records if r["selection"] == selection]
    labels = np.array(sorted({r["labels"] for r in own}))
    values = [[r["accuracy"] for r in own if r["labels"] == count] for count in labels]
    spread = [np.std(v, ddof=1) if len(v) > 1 else 0.0 for v in values]
    return labels, np.array([np.mean(v) for v in values]), np.array(spread)


def labels_needed(labels: np.ndarray, accuracy: np.ndarray, goal: float) -> float | None:
    """Interpolate how many labels reach an accuracy; None if none of them do."""
    best = np.maximum.accumulate(accuracy)
    if best[-1] < goal:
        return None
    place = int(np.argmax(best >= goal))
    if place == 0:
        return float(labels[0])
    low, high = best[place - 1], best[place]
    share = (goal - low) / (high - low)
    return float(labels[place - 1] + share * (labels[place] - labels[place - 1]))


def tables(records: list[dict], selections: list[str]) -> str:
    """Give two Markdown tables: accuracy by labels, and labels by accuracy against random."""
    curves = {name: mean_curve(records, name) for name in selections}
    head = f"| {' | '.join(selections)} |\n{'|---' * (len(selections) + 1)}|\n"
    lines = [f"| labels {head}".rstrip()]
    for place, count in enumerate(curves[selections[0]][0]):
        cells = [f"{c[1][place]:.3f} ± {c[2][place]:.3f}" for c in curves.values()]
        lines.append(f"| {count} | {' | '.join(cells)} |")
    lines += ["", f"| accuracy {head}".rstrip()]
    low, high = curves["random"][1][0], curves["random"][1].max()
    for goal in [*np.arange(np.ceil(20 * low + 0.5) / 20, high, 0.05), high]:
        base = labels_needed(*curves["random"][:2], goal)
        cells = []
        for name, (labels, accuracy, _) in curves.items():
            found = labels_needed(labels, accuracy, goal)
            saved = "" if name == "random" or not (found and base) else f" ({found / base - 1:+.0%})"
            cells.append("not reached" if found is None else f"{found:.0f}{saved}")
        lines.append(f"| {goal:.3f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(records: list[dict], selections: list[str], path: Path) -> None:
    """Draw accuracy against labels, with one standard deviation over the seeds."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(5.5, 3.4), dpi=150)
    for name in selections:
        labels, mean, spread = mean_curve(records, name)
        axes.plot(labels, mean, marker="o", markersize=3, label=name)
        axes.fill_between(labels, mean - spread, mean + spread, alpha=0.15)
    axes.set_xlabel("judgements")
    axes.set_ylabel("held-out reward accuracy")
    axes.legend(frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--selections", nargs="+", choices=SELECTIONS, default=list(SELECTIONS[:2]))
    parser.add_argument("--labels", type=int, default=160, help="the most to ask for")
    parser.add_argument("--batch", type=int, default=16, help="labels asked for at once")
    parser.add_argument("--pool", type=int, default=1500, help="pairs to choose from, by seed")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--beta", type=float, default=1.0)
    parser.add_argument("--held-out", type=float, default=0.2, help="share of the bundled pairs")
    parser.add_argument("--warmup-epochs", type=int, help="by default the quickstart's")
    parser.add_argument("--json", type=Path, help="where to write every run")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    args = parser.parse_args(arguments)
    args.selections = ["random", *(name for name in args.selections if name != "random")]
    overrides = [] if args.warmup_epochs is None else [f"warmup.epochs={args.warmup_epochs}"]
    policy, pool, held = warmed_up(load_config(CONFIG, overrides), args.held_out)
    learner, begun = Learner(policy, args), time.perf_counter()
    records: list[dict] = []
    for seed in range(args.seeds):
        for selection in args.selections:
            records += curve(learner, pool, held, selection, seed)
        if args.json:  # after each seed: a run that is stopped keeps what it has
            settings = {k: v for k, v in vars(args).items() if k not in ("json", "plot")}
            args.json.write_text(json.dumps({"settings": settings, "runs": records}, indent=1))
    say(f"{time.perf_counter() - begun:.0f} s after the warm-up")
    print(f"pool {min(args.pool, len(pool))}, held out {len(held)}, {args.seeds} seeds\n")
    print(tables(records, args.selections))
    if args.plot:
        draw(records, args.selections, args.plot)


if __name__ == "__main__":
    main()
