"""Draw the reward-KL frontier, and where policies trained with each objective lie beneath it.

With a prompt whose few responses can be listed, everything is known: for a reward r and a reference
π_ref no policy has E[r] - β·KL(π ‖ π_ref) above β·log Σ π_ref·exp(r/β), and π_ref·exp(r/β)/Z has
exactly that (arXiv 2305.18290, eq. 4). DPO's optimum is that policy. Trained here: a softmax policy
with one logit for each response, on every pair with its Bradley-Terry probability ("population"),
and on a finite sample of labels.

    python scripts/bench/frontier.py --out frontier.png
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops

from dpo_keras.losses import DPOLoss

Array = np.ndarray


@dataclass(frozen=True)
class Problem:
    """One prompt, its responses, and what people think of them.

    Attributes:
        reference: `[K]`, the reference policy's probabilities.
        reward: `[K]`, what a Bradley-Terry crowd's labels follow.
        first: `[P]`, index of the first response of each pair.
        second: `[P]`, index of the second.
        preference: `[P]`, share of votes for the first.
        weight: `[P]`, how often each pair is shown; adds up to one.
    """

    reference: Array
    reward: Array
    first: Array
    second: Array
    preference: Array
    weight: Array


def population(reference: Array, reward: Array) -> Problem:
    """Make the problem of every pair, each with its exact preference probability."""
    first, second = np.triu_indices(len(reward), k=1)
    preference = 1 / (1 + np.exp(reward[second] - reward[first]))
    weight = np.full(len(first), 1 / len(first))
    return Problem(np.asarray(reference), np.asarray(reward), first, second, preference, weight)


def sampled(problem: Problem, labels: int, seed: int) -> Problem:
    """Make the problem of a finite number of labels on pairs drawn evenly."""
    random = np.random.default_rng(seed)
    shown = random.multinomial(labels, problem.weight)
    votes = random.binomial(shown, problem.preference)
    seen = shown > 0
    return Problem(
        problem.reference,
        problem.reward,
        problem.first[seen],
        problem.second[seen],
        (votes / np.maximum(shown, 1))[seen],
        shown[seen] / labels,
    )


def value_and_gradient(function: Callable[[Any], Any], point: Array) -> tuple[Array, Array]:
    """Give f(x) and the gradient of its sum, by the active backend's differentiation."""
    if keras.backend.backend() == "jax":
        import jax

        value, pull = jax.vjp(function, jax.numpy.asarray(point))
        return np.asarray(value), np.asarray(pull(jax.numpy.ones_like(value))[0])
    import tensorflow as tf

    x = tf.convert_to_tensor(point)
    with tf.GradientTape() as tape:
        tape.watch(x)
        value = function(x)
    return value.numpy(), tape.gradient(value, x).numpy()


def minimize(function: Callable[[Any], Any], start: Array, steps: int = 100) -> Array:
    """Minimize a smooth function by Newton's method, all of a step's points in one call.

    Args:
        function: `[M, K] -> [M]`, each row a point.
        start: `[K]`.
        steps: at most this many.

    Returns:
        `[K]`, where the gradient vanishes.
    """
    point, size = np.asarray(start, "float64"), len(start)
    nudges = 1e-4 * np.concatenate([np.zeros((1, size)), np.eye(size), -np.eye(size)])
    lengths = 2.0 ** -np.arange(20)
    for _ in range(steps):
        _, gradients = value_and_gradient(function, point + nudges)
        gradient = gradients[0]
        if np.abs(gradient).max() < 1e-13:
            break
        hessian = (gradients[1 : size + 1] - gradients[size + 1 :]) / 2e-4
        values, vectors = np.linalg.eigh((hessian + hessian.T) / 2)
        # A softmax does not feel a common shift of its logits: no step along flat directions.
        curved = np.abs(values) > 1e-9 * np.abs(values).max()
        inverse = np.where(curved, 1 / np.where(curved, np.abs(values), 1.0), 0.0)
        tried = point - lengths[:, None] * (vectors * inverse @ vectors.T @ gradient)
        tried = np.concatenate([point[None], tried])
        best = int(np.argmin(np.asarray(function(ops.convert_to_tensor(tried)))))
        if best == 0:
            break
        point = tried[best]
    return point


def train(loss: DPOLoss, problem: Problem) -> Array:
    """Train a tabular softmax policy to convergence and give its probabilities `[K]`."""
    reference = np.log(problem.reference)
    columns = np.stack([problem.first, problem.second], axis=1)

    def mean_loss(logits: Any) -> Any:
        points, pairs = logits.shape[0], len(columns)
        policy = ops.take(ops.log_softmax(logits, axis=-1), columns, axis=1)
        outputs = {
            "policy": ops.reshape(policy, (-1, 2)),
            "reference": np.tile(reference[columns], (points, 1)),
            "lengths": np.ones((points * pairs, 2)),
        }
        values = loss.call(np.tile(problem.preference, points), outputs)
        return ops.sum(ops.reshape(values, (points, pairs)) * problem.weight, axis=1)

    logits = minimize(mean_loss, reference)
    return np.exp(logits - np.logaddexp.reduce(logits))


def optimum(problem: Problem, beta: float) -> Array:
    """Give the policy that DPO's objective has as its optimum: π_ref exp(r/β) / Z."""
    logits = np.log(problem.reference) + problem.reward / beta
    return np.exp(logits - np.logaddexp.reduce(logits))


def ceiling(problem: Problem, beta: float) -> float:
    """Give β log Z: the most that any policy's E[r] - β·KL can be."""
    return float(beta * np.logaddexp.reduce(np.log(problem.reference) + problem.reward / beta))


@dataclass(frozen=True)
class Run:
    """Where a trained policy lies; `objective` is E[r] - β·KL, `ceiling` the most it can be."""

    name: str
    beta: float
    reward: float
    kl: float
    objective: float
    ceiling: float


def measure(name: str, beta: float, policy: Array, problem: Problem) -> Run:
    """Place a policy in the plane of reward and divergence."""
    held = policy > 0
    ratio = np.log(policy[held] / problem.reference[held])
    kl = float(policy[held] @ ratio)
    reward = float(policy @ problem.reward)
    return Run(name, beta, reward, kl, reward - beta * kl, ceiling(problem, beta))


OBJECTIVES: dict[str, dict[str, Any]] = {
    "sigmoid": {},
    "cDPO": {"loss_type": "sigmoid", "label_smoothing": 0.1},
    "ipo": {"loss_type": "ipo"},
    "sppo_hard": {"loss_type": "sppo_hard"},
}


def frontier(problem: Problem, betas: list[float], labels: int, seed: int) -> list[Run]:
    """Train every objective at every β on the population, and `sigmoid` on a sample too."""
    runs = []
    for beta in betas:
        for name, settings in OBJECTIVES.items():
            policy = train(DPOLoss(**{"beta": beta, **settings}), problem)
            runs.append(measure(f"{name}, population", beta, policy, problem))
        policy = train(DPOLoss("sigmoid", beta=beta), sampled(problem, labels, seed))
        runs.append(measure(f"sigmoid, {labels} labels", beta, policy, problem))
    return runs


def draw(problem: Problem, runs: list[Run], out: Path) -> None:
    """Draw the frontier as a line and each run as a point."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curve = [measure("", b, optimum(problem, b), problem) for b in np.geomspace(0.02, 50, 300)]
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot([r.kl for r in curve], [r.reward for r in curve], color="black", label="frontier")
    for name, marker in zip(dict.fromkeys(r.name for r in runs), "osD^v", strict=False):
        points = [r for r in runs if r.name == name]
        axes.plot([r.kl for r in points], [r.reward for r in points], marker, label=name)
    axes.set_xlabel("KL(π ‖ π_ref), nats")
    axes.set_ylabel("expected reward")
    axes.set_title("Reward gained for divergence spent")
    axes.legend()
    figure.savefig(out, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("frontier.png"))
    parser.add_argument("--responses", type=int, default=8)
    parser.add_argument("--labels", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--betas", type=float, nargs="+", default=[0.2, 0.4, 0.7, 1.0, 2.0, 4.0])
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(arguments)
    random = np.random.default_rng(given.seed)
    problem = population(
        random.dirichlet(np.full(given.responses, 3.0)), random.normal(size=given.responses)
    )
    runs = frontier(problem, given.betas, given.labels, given.seed)
    if given.json:
        print(json.dumps([asdict(run) for run in runs]))
    else:
        print(
            f"{'objective':24} {'beta':>6} {'E[r]':>8} {'KL':>8} {'E[r]-βKL':>10} {'β log Z':>10}"
        )
        for run in runs:
            print(
                f"{run.name:24} {run.beta:6.2f} {run.reward:8.4f} {run.kl:8.4f} "
                f"{run.objective:10.6f} {run.ceiling:10.6f}"
            )
    draw(problem, runs, given.out)


if __name__ == "__main__":
    main()
