"""Plackett-Luce: two responses are DPO, four are brute force, extremes stay finite."""

import itertools

import numpy as np
import pytest
from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.losses.bradley_terry import plackett_luce_nll

RANDOM = np.random.default_rng(4)


def outputs(columns, count=50, scale=3.0, lengths=None):
    policy, reference = RANDOM.normal(-20, scale, (2, count, columns))
    if lengths is None:
        lengths = np.full((count, columns), 7)
    return {"policy": policy, "reference": reference, "lengths": lengths}


def value(loss_type, found, preference=None, **options):
    preference = np.ones(len(found["policy"])) if preference is None else preference
    return ops.convert_to_numpy(DPOLoss(loss_type, reduction=None, **options)(preference, found))


def by_hand(scores):
    """Choose the best of all, then the best of the rest, and so on."""
    return -sum(
        scores[place] - np.log(np.sum(np.exp(scores[place:]))) for place in range(len(scores))
    )


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_two_responses_are_dpo_at_any_label(beta):
    found = outputs(2)
    labels = RANDOM.uniform(0, 1, 50)
    np.testing.assert_allclose(
        value("plackett_luce", found, labels, beta=beta),
        value("sigmoid", found, labels, beta=beta),
        rtol=0,
        atol=1e-7,
    )


def test_four_responses_are_the_formula_of_the_paper():
    found = outputs(4)
    scores = 0.5 * (found["policy"] - found["reference"])
    expected = [by_hand(row) for row in scores]
    np.testing.assert_allclose(value("plackett_luce", found, beta=0.5), expected, rtol=1e-12)


def policy_gradient(loss_type, found, preference, gradient_of, beta):
    loss = DPOLoss(loss_type, beta=beta, reduction="sum")
    return gradient_of(lambda x: loss(preference, {**found, "policy": x}), found["policy"])


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_two_responses_have_the_gradient_of_dpo_at_any_label(beta, gradient_of):
    found, labels = outputs(2), RANDOM.uniform(0, 1, 50)
    ours, theirs = (
        policy_gradient(name, found, labels, gradient_of, beta)[1]
        for name in ("plackett_luce", "sigmoid")
    )
    assert np.abs(theirs).max() > 0.01 * beta
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-7)


def test_four_responses_have_the_gradient_of_brute_force(gradient_of):
    """dL/dS_i = Σ_{k≤i} P(i is chosen at place k) - [i < K], P from all 24 orders."""
    found = outputs(4, count=6)
    scores = 0.5 * (found["policy"] - found["reference"])
    expected = np.zeros((6, 4))
    for row, own in enumerate(scores):
        orders = list(itertools.permutations(range(4)))
        likely = np.exp([-by_hand(own[list(order)]) for order in orders])
        for place in range(3):
            # Of the orders that begin as this one does, where is the next place's share?
            alike = [n for n, order in enumerate(orders) if order[:place] == (0, 1, 2)[:place]]
            for n in alike:
                expected[row, orders[n][place]] += likely[n] / likely[alike].sum()
            expected[row, place] -= 1
    _, gradient = policy_gradient("plackett_luce", found, np.ones(6), gradient_of, beta=0.5)
    np.testing.assert_allclose(gradient, 0.5 * expected, atol=1e-9)


def test_the_probabilities_of_all_orders_of_four_add_up_to_one():
    scores = RANDOM.normal(0, 2, 4)
    orders = np.array(list(itertools.permutations(scores)))
    nll = ops.convert_to_numpy(plackett_luce_nll(orders, np.ones(orders.shape, bool)))
    np.testing.assert_allclose(np.exp(-nll).sum(), 1.0, rtol=1e-12)


def test_an_equal_reference_gives_log_of_the_number_of_orders():
    found = outputs(4)
    found["reference"] = found["policy"]
    np.testing.assert_allclose(value("plackett_luce", found), np.log(24), rtol=1e-12)


def test_columns_behind_a_shorter_ranking_count_for_nothing():
    lengths = np.where(np.arange(5) < np.array([2, 3, 5])[:, None], 4, 0)
    found = outputs(5, count=3, lengths=lengths)
    scores = 0.1 * (found["policy"] - found["reference"])
    expected = [by_hand(scores[row, :count]) for row, count in enumerate((2, 3, 5))]
    np.testing.assert_allclose(value("plackett_luce", found), expected, rtol=1e-10)


@pytest.mark.parametrize("scores", [[1e4, 0.0, -1e4], [-1e4, 0.0, 1e4], [0.0, 0.0, 0.0]])
def test_extremes_stay_finite_with_their_gradients(scores, gradient_of):
    present = np.ones((1, 3), bool)
    nll, gradient = gradient_of(lambda given: plackett_luce_nll(given, present), [scores])
    assert np.isfinite(nll).all()
    assert np.isfinite(gradient).all()
    # P(k is next) - [k is next], summed over the places: what softmax's likelihood has.
    np.testing.assert_allclose(gradient.sum(), 0.0, atol=1e-6)


def test_shifting_all_scores_of_a_ranking_changes_nothing():
    found = outputs(4)
    shifted = {**found, "policy": found["policy"] + RANDOM.normal(0, 5, (50, 1))}
    np.testing.assert_allclose(
        value("plackett_luce", found), value("plackett_luce", shifted), rtol=1e-9
    )


def test_penalties_see_the_best_two_and_the_whole_distance():
    found = outputs(3)
    two = {name: values[:, :2] for name, values in found.items()}
    with_penalty = value("plackett_luce", found, penalties={"insufficient_confidence": 1.0})
    expected = value("sigmoid", two, penalties={"insufficient_confidence": 1.0}) - value(
        "sigmoid", two
    )
    np.testing.assert_allclose(with_penalty - value("plackett_luce", found), expected, atol=1e-9)
    distance = value("plackett_luce", found, penalties={"kl_to_reference": 1.0}) - value(
        "plackett_luce", found
    )
    ratios = found["policy"] - found["reference"]
    np.testing.assert_allclose(distance, np.mean(ratios**2 / 14, axis=1), rtol=1e-6)


def test_objectives_of_pairs_refuse_rankings():
    with pytest.raises(InputError, match=r"shape \[N, 2\].*got \(50, 4\).*plackett_luce"):
        value("sigmoid", outputs(4))
    with pytest.raises(InputError, match="ld_alpha has no effect with plackett_luce"):
        DPOLoss("plackett_luce", ld_alpha=0.5)


@pytest.mark.parametrize("beta", [0.3, 1.0])
def test_the_optimum_on_rankings_is_the_reference_tilted_by_the_reward(frontier, beta):
    """π* ∝ π_ref exp(r/β), of a crowd that ranks by Plackett-Luce with rewards r."""
    reference, reward = RANDOM.dirichlet(np.full(4, 2.0)), RANDOM.normal(size=4)
    orders = np.array(list(itertools.permutations(range(4))))
    share = np.exp([-by_hand(reward[order]) for order in orders])
    loss = DPOLoss("plackett_luce", beta=beta)

    def mean_loss(logits):
        points = logits.shape[0]
        policy = ops.take(ops.log_softmax(logits, axis=-1), orders, axis=1)
        found = {
            "policy": ops.reshape(policy, (-1, 4)),
            "reference": np.tile(np.log(reference)[orders], (points, 1)),
            "lengths": np.ones((points * 24, 4)),
        }
        values = loss.call(np.ones(points * 24), found)
        return ops.sum(ops.reshape(values, (points, 24)) * share, axis=1)

    logits = frontier.minimize(mean_loss, np.log(reference))
    policy = np.exp(logits - np.logaddexp.reduce(logits))
    expected = reference * np.exp(reward / beta)
    np.testing.assert_allclose(policy, expected / expected.sum(), atol=1e-6)
