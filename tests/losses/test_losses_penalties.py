"""Penalties on confidence, in both directions, and which way each of them pulls."""

import math

import numpy as np
import pytest
from keras import ops

from dpo_keras.losses import (
    DPOLoss,
    insufficient_confidence,
    kl_to_reference,
    nll,
    overconfidence,
    preference_probabilities,
)

LN2 = math.log(2)


def scores_of(llr):
    llr = np.atleast_1d(np.asarray(llr, "float64"))
    return np.stack([llr / 2, -llr / 2], axis=1)


def of_labels(penalty):
    """`overconfidence` does not read labels."""
    return penalty if penalty is not overconfidence else lambda labels, scores: penalty(scores)


def value(penalty, llr, label=1.0):
    llr = np.atleast_1d(np.asarray(llr, "float64"))
    labels = np.full(len(llr), label)
    return ops.convert_to_numpy(of_labels(penalty)(labels, scores_of(llr)))


def slope(penalty, llr, gradient_of, label=1.0):
    def function(x):
        labels = np.full(len(llr), label)
        return of_labels(penalty)(labels, ops.stack([x / 2, -x / 2], axis=1))

    return gradient_of(function, np.asarray(llr, "float64"))[1]


def entropy(llr):
    p = ops.convert_to_numpy(preference_probabilities(scores_of(llr)))
    return -(p * np.log(p)).sum(axis=1)


RIGHT = np.linspace(0.01, 20, 60)


def test_insufficient_confidence_of_a_right_pair_is_the_entropy():
    """log 2 - KL(P ‖ U) = H(P)."""
    np.testing.assert_allclose(value(insufficient_confidence, RIGHT), entropy(RIGHT), atol=1e-12)


def test_insufficient_confidence_is_largest_undecided_and_nothing_when_certain():
    found = value(insufficient_confidence, [0.0, 1.0, 3.0, 100.0])
    assert found[0] == pytest.approx(LN2)
    assert (np.diff(found) < 0).all()
    assert found[-1] == pytest.approx(0, abs=1e-12)


def test_insufficient_confidence_of_a_wrong_pair_is_never_below_that_of_any_right_one():
    wrong = value(insufficient_confidence, -np.concatenate([RIGHT, [1e3]]))
    np.testing.assert_allclose(wrong, LN2, rtol=1e-12)
    assert (wrong >= value(insufficient_confidence, RIGHT).max()).all()


def test_insufficient_confidence_pulls_toward_the_preferred_response_or_not_at_all(gradient_of):
    assert (slope(insufficient_confidence, RIGHT, gradient_of) < 0).all()
    assert not slope(insufficient_confidence, -RIGHT, gradient_of).any()


def test_a_wrong_and_certain_pair_is_not_made_better_by_being_more_certain(gradient_of):
    """The whole loss of a wrong pair falls only toward the right."""
    plain = DPOLoss("sigmoid", beta=1.0, reduction=None)
    with_penalty = DPOLoss(
        "sigmoid", beta=1.0, penalties={"insufficient_confidence": 5.0}, reduction=None
    )
    llr = -np.linspace(0.1, 50, 100)

    def run(loss):
        outputs = {"reference": np.zeros((100, 2))}
        return gradient_of(
            lambda x: loss(np.ones(100), {**outputs, "policy": ops.stack([x, 0 * x], axis=1)}), llr
        )[1]

    np.testing.assert_allclose(run(with_penalty), run(plain), rtol=1e-12)
    assert (run(with_penalty) < 0).all()


def test_plain_entropy_would_have_failed_that(gradient_of):
    """H(P) itself falls as a wrong pair becomes more certain: the reason for the one-sided form."""

    def whole(x):
        p = ops.softmax(ops.stack([x / 2, -x / 2], axis=1), axis=-1)
        return -ops.sum(p * ops.log(p), axis=-1)

    assert (gradient_of(whole, -RIGHT)[1] > 0).all()


def test_insufficient_confidence_has_no_step_and_no_kink_at_the_border(gradient_of):
    near = np.array([-1e-6, 0.0, 1e-6])
    np.testing.assert_allclose(value(insufficient_confidence, near), LN2, rtol=1e-12)
    np.testing.assert_allclose(slope(insufficient_confidence, near, gradient_of), 0, atol=1e-6)


def test_people_who_are_undecided_pull_neither_way(gradient_of):
    llr = np.array([-5.0, -0.5, 0.0, 0.5, 5.0])
    np.testing.assert_allclose(value(insufficient_confidence, llr, label=0.5), LN2, rtol=1e-12)
    assert not slope(insufficient_confidence, llr, gradient_of, label=0.5).any()


def test_soft_labels_pull_as_far_as_they_are_decided(gradient_of):
    full = slope(insufficient_confidence, RIGHT, gradient_of)
    half = slope(insufficient_confidence, RIGHT, gradient_of, label=0.75)
    np.testing.assert_allclose(half, full / 2, rtol=1e-12)


def test_labels_for_the_second_response_mirror_those_for_the_first(gradient_of):
    for llr in (RIGHT, -RIGHT):
        np.testing.assert_array_equal(
            value(insufficient_confidence, llr, label=0.0), value(insufficient_confidence, -llr)
        )
    assert (slope(insufficient_confidence, -RIGHT, gradient_of, label=0.0) > 0).all()


def test_overconfidence_is_the_divergence_from_uniform():
    llr = np.linspace(-20, 20, 81)
    np.testing.assert_allclose(value(overconfidence, llr), LN2 - entropy(llr), atol=1e-12)
    assert value(overconfidence, 0.0)[0] == pytest.approx(0.0, abs=1e-15)
    assert value(overconfidence, 1e4)[0] == pytest.approx(LN2)


def test_overconfidence_draws_every_pair_to_undecided(gradient_of):
    assert (slope(overconfidence, RIGHT, gradient_of) > 0).all()
    assert (slope(overconfidence, -RIGHT, gradient_of) < 0).all()


def test_one_direction_undoes_the_other_on_a_right_pair():
    both = value(overconfidence, RIGHT) + value(insufficient_confidence, RIGHT)
    np.testing.assert_allclose(both, LN2, rtol=1e-12)


def test_insufficient_confidence_sharpens_and_overconfidence_softens_the_optimum():
    """Where 80 of 100 prefer the first response: P = 0.8 alone, more or less with a penalty."""
    llr = np.linspace(-1, 6, 7001)

    def best(penalties):
        loss = DPOLoss("sigmoid", beta=1.0, penalties=penalties, reduction=None)
        outputs = {"policy": np.stack([llr, 0 * llr], 1), "reference": np.zeros((7001, 2))}
        found = ops.convert_to_numpy(loss(np.full(7001, 0.8), outputs))
        return 1 / (1 + math.exp(-llr[found.argmin()]))

    assert best(None) == pytest.approx(0.8, abs=1e-3)
    assert best({"insufficient_confidence": 0.2}) > 0.81
    assert best({"overconfidence": 0.2}) < 0.79


OUTPUTS = {
    "policy": np.array([[-8.0, -6.0]]),
    "reference": np.array([[-10.0, -5.0]]),
    "lengths": np.array([[4, 2]]),
}


def test_likelihood_penalty_is_the_mean_over_the_preferred_response():
    for label, expected in ((1.0, 2.0), (0.0, 3.0), (0.75, 2.25)):
        assert float(nll(np.array([label]), OUTPUTS)[0]) == pytest.approx(expected)


def test_distance_from_the_reference_by_hand():
    """(2²/(2·4) + 1²/(2·2)) / 2."""
    assert float(kl_to_reference(OUTPUTS)[0]) == pytest.approx(0.375)


def test_distance_from_the_reference_is_nothing_only_at_the_reference(gradient_of):
    same = {**OUTPUTS, "reference": OUTPUTS["policy"]}
    assert float(kl_to_reference(same)[0]) == 0.0
    _, gradient = gradient_of(
        lambda policy: kl_to_reference({**OUTPUTS, "policy": policy}),
        OUTPUTS["policy"],
    )
    assert gradient[0, 0] > 0 > gradient[0, 1]


@pytest.mark.parametrize("writer", ["policy", "reference"])
def test_distance_estimates_the_divergence_whoever_wrote_the_responses(writer):
    """Two categorical models a small step apart: the exact divergence per token, within 5 %."""
    random = np.random.default_rng(0)
    reference = random.dirichlet(np.ones(12))
    policy = reference * np.exp(0.1 * random.normal(size=12))
    policy /= policy.sum()
    exact = (policy * np.log(policy / reference)).sum()
    tokens = random.choice(12, (40000, 2, 3), p=policy if writer == "policy" else reference)
    outputs = {
        "policy": np.log(policy)[tokens].sum(-1),
        "reference": np.log(reference)[tokens].sum(-1),
        "lengths": np.full((40000, 2), 3.0),
    }
    estimate = ops.convert_to_numpy(kl_to_reference(outputs)).mean()
    assert estimate == pytest.approx(exact, rel=0.05)


def test_a_penalty_of_this_package_as_a_function_is_that_of_its_name():
    by_function = DPOLoss("sigmoid", penalties={overconfidence: 0.5, nll: 0.1})
    assert by_function.get_config()["penalties"] == {"overconfidence": 0.5, "nll": 0.1}


def test_a_penalty_finds_the_probabilities_and_their_ratio_among_the_outputs():
    def chosen_probability(preference, scores, outputs):
        np.testing.assert_allclose(outputs["llr"], scores[:, 0] - scores[:, 1])
        return outputs["probabilities"][:, 0]

    loss = DPOLoss("sigmoid", beta=1.0, penalties={chosen_probability: 1.0}, reduction=None)
    found = float(loss.terms([1.0], OUTPUTS)["penalty/chosen_probability"][0])
    assert found == pytest.approx(1 / (1 + math.exp(-3.0)))


def test_a_function_of_ones_own_is_a_penalty():
    def longer_chosen(preference, scores, outputs):
        return outputs["lengths"][:, 0] - outputs["lengths"][:, 1]

    loss = DPOLoss("sigmoid", penalties={longer_chosen: 0.5}, reduction=None)
    terms = loss.terms([1.0], OUTPUTS)
    assert float(terms["penalty/longer_chosen"][0]) == 1.0
