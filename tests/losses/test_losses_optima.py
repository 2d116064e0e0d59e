"""Tabular softmax policies, trained to convergence, reach the closed forms."""

import numpy as np
import pytest
from keras import ops

from dpo_keras.losses import DPOLoss
from dpo_keras.losses.step_loss import group_means, total

RANDOM = np.random.default_rng(1)
REWARD = RANDOM.normal(size=6)
REFERENCE = RANDOM.dirichlet(np.full(6, 2.0))
UNIFORM = np.full(2, 0.5)


def kl(p, q):
    return float(np.sum(p * np.log(p / q)))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture(scope="module")
def problem(frontier):
    return frontier.population(REFERENCE, REWARD)


def one_pair(frontier, preference, reference=UNIFORM):
    """Two responses, of which the first is preferred with a given probability."""
    whole = np.ones(1)
    return frontier.Problem(
        np.asarray(reference), np.zeros(2), np.array([0]), np.array([1]), preference * whole, whole
    )


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_dpo_reaches_the_reference_tilted_by_the_reward(frontier, problem, beta):
    """π* ∝ π_ref exp(r/β), to KL 1e-6 (arXiv 2305.18290, eq. 4)."""
    policy = frontier.train(DPOLoss("sigmoid", beta=beta), problem)
    assert kl(policy, frontier.optimum(problem, beta)) < 1e-6


def test_dpo_at_its_optimum_knows_the_rewards_and_sits_on_the_floor(frontier, problem):
    """βΔ = r_chosen - r_rejected, and the loss is E[H(σ(Δr))]."""
    policy = frontier.train(DPOLoss("sigmoid", beta=0.5), problem)
    scores = 0.5 * np.log(policy / REFERENCE)
    differences = REWARD[problem.first] - REWARD[problem.second]
    np.testing.assert_allclose(
        scores[problem.first] - scores[problem.second], differences, atol=1e-6
    )
    p = sigmoid(differences)
    floor = -(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()
    pairs = np.stack([problem.first, problem.second], 1)
    outputs = {"policy": np.log(policy)[pairs], "reference": np.log(REFERENCE)[pairs]}
    found = float(DPOLoss("sigmoid", beta=0.5)(problem.preference, outputs))
    assert found == pytest.approx(floor, rel=1e-9)


@pytest.mark.parametrize("smoothing", [0.05, 0.3])
def test_cdpo_with_certain_labels_stops_at_the_log_odds_of_its_smoothing(frontier, smoothing):
    """p = 1: βΔ = log((1-ε)/ε)."""
    policy = frontier.train(
        DPOLoss("sigmoid", beta=0.5, label_smoothing=smoothing), one_pair(frontier, 1.0)
    )
    delta = np.log(policy[0] / policy[1])
    assert 0.5 * delta == pytest.approx(np.log((1 - smoothing) / smoothing), abs=1e-6)


@pytest.mark.parametrize("tau", [0.1, 0.5, 2.0])
def test_ipo_with_certain_labels_stays_bounded(frontier, tau):
    """p = 1, two responses, uniform reference: π(y₁) = σ(1/(2τ)) (arXiv 2310.12036)."""
    policy = frontier.train(DPOLoss("ipo", beta=tau), one_pair(frontier, 1.0))
    assert policy[0] == pytest.approx(sigmoid(1 / (2 * tau)), rel=1e-6)


def test_exo_reaches_its_label(frontier):
    """The reverse KL is zero where P = y(1-ε) + (1-y)ε."""
    policy = frontier.train(
        DPOLoss("exo_pair", beta=1.0, label_smoothing=0.05), one_pair(frontier, 0.8)
    )
    assert policy[0] == pytest.approx(0.8 * 0.95 + 0.2 * 0.05, rel=1e-6)


def test_sppo_reaches_its_target_log_ratio(frontier):
    """Both squares fall to log-ratios of ±(y - ½)/β where normalization allows them."""
    loss = DPOLoss("sppo_hard", beta=0.5, reduction=None)
    ratio = np.linspace(-3, 3, 6001)
    outputs = {"policy": np.stack([ratio, -ratio], 1), "reference": np.zeros((6001, 2))}
    found = ops.convert_to_numpy(loss(np.full(6001, 0.8), outputs))
    assert ratio[found.argmin()] == pytest.approx((0.8 - 0.5) / 0.5, abs=1e-3)


@pytest.mark.parametrize("noise", [0.1, 0.3])
def test_robust_restores_the_rewards_under_flipped_labels(frontier, problem, noise):
    flipped = problem.preference * (1 - noise) + (1 - problem.preference) * noise
    noisy = frontier.Problem(
        REFERENCE, REWARD, problem.first, problem.second, flipped, problem.weight
    )
    clean = frontier.optimum(problem, 0.5)
    restored = frontier.train(DPOLoss("robust", beta=0.5, label_smoothing=noise), noisy)
    assert kl(restored, clean) < 1e-6
    misled = frontier.train(DPOLoss("sigmoid", beta=0.5), noisy)
    assert kl(misled, clean) > 1e-3


@pytest.mark.parametrize(
    ("divergence", "options", "derivative"),
    [
        ("forward_kl", {}, lambda u: 1 - 1 / u),
        ("js", {}, lambda u: np.log(2 * u / (1 + u))),
        ("alpha", {"divergence_alpha": 0.5}, lambda u: 2 - 2 / np.sqrt(u)),
    ],
)
def test_f_divergences_reach_their_optimum(frontier, problem, divergence, options, derivative):
    """β f'(π/π_ref) = r up to a constant (arXiv 2309.16240)."""
    policy = frontier.train(DPOLoss("sigmoid", divergence=divergence, beta=3.0, **options), problem)
    found = 3.0 * derivative(policy / REFERENCE)
    np.testing.assert_allclose(found - found[0], REWARD - REWARD[0], atol=1e-5)


def test_group_robust_training_ends_at_the_saddle(gradient_of):
    """Two groups of opposed opinion, one four times as large: min over z of the worse group's loss.

    Numerically, on a grid: where the two losses are equal, or at the worse group's own optimum.
    """
    labels, groups = np.array([0.9] * 4 + [0.3]), np.array([0] * 4 + [1], "int32")
    z = np.linspace(-5, 5, 200001)
    by_group = [p * np.logaddexp(0, -z) + (1 - p) * np.logaddexp(0, z) for p in (0.9, 0.3)]
    worst = np.maximum(*by_group)

    loss = DPOLoss("sigmoid", beta=1.0, group_robust={"groups": 2, "eta": 0.5})
    point = np.zeros(1)

    def outputs(x):
        policy = ops.tile(ops.stack([x, 0 * x], axis=1), (5, 1))
        return {"policy": policy, "reference": np.zeros((5, 2)), "group": groups}

    def combined(x):
        given = outputs(x)
        return loss.combine(loss.terms(labels, given), np.ones(5), given)

    for _ in range(120):
        given = outputs(ops.convert_to_tensor(point))
        loss.combine(loss.terms(labels, given), np.ones(5), given, training=True)
        point = point - 2.0 * gradient_of(combined, point)[1]
    assert point[0] == pytest.approx(z[worst.argmin()], abs=2e-3)
    given = outputs(ops.convert_to_tensor(point))
    losses = total(loss.terms(labels, given))
    member = ops.one_hot(given["group"], loss.group_robust["groups"], dtype=losses.dtype)
    means, _ = group_means(losses, ops.ones(5, losses.dtype), member, lambda value: value)
    assert ops.convert_to_numpy(means).max() == pytest.approx(worst.min(), abs=1e-3)
    plain = 0.9 * 0.8 + 0.3 * 0.2
    assert by_group[1][np.abs(z - np.log(plain / (1 - plain))).argmin()] > worst.min() + 0.1


BETAS = [0.2, 0.5, 1.0, 3.0]


def test_trained_policies_lie_on_the_frontier_and_never_above(frontier, problem):
    runs = frontier.frontier(problem, BETAS, labels=300, seed=0)
    assert len(runs) == 5 * len(BETAS)
    for run in runs:
        assert run.objective <= run.ceiling * (1 + 1e-12)
        if run.name == "sigmoid, population":
            assert run.objective == pytest.approx(run.ceiling, rel=0.01)
    assert any(run.objective < 0.99 * run.ceiling for run in runs)


def test_the_ceiling_is_what_the_tilted_reference_reaches(frontier, problem):
    for beta in BETAS:
        best = frontier.measure("", beta, frontier.optimum(problem, beta), problem)
        assert best.objective == pytest.approx(frontier.ceiling(problem, beta), rel=1e-9)
        other = frontier.measure("", beta, RANDOM.dirichlet(np.ones(6)), problem)
        assert other.objective < best.objective
