"""Group-robust weights and BCO's running mean: what moves, by how much, and what is kept."""

import keras
import numpy as np
import pytest
from keras import ops

from dpo_keras.losses import DPOLoss
from dpo_keras.losses.step_loss import ObjectiveState, group_means, total


def array(value):
    return ops.convert_to_numpy(value)


def grouped(losses, groups):
    """Terms and outputs of a step whose pairs have these losses and groups."""
    return (
        {"preference_loss": np.asarray(losses, "float32")},
        {"group": np.asarray(groups, "int32")},
    )


def test_objectives_without_memory_have_no_state():
    assert DPOLoss().state is None
    assert DPOLoss("bco_pair").state is None


def test_groups_begin_equal():
    loss = DPOLoss(group_robust={"groups": 4})
    np.testing.assert_allclose(array(loss.state.group_weights), 0.25)
    assert loss.state is loss.state


def test_one_step_by_hand():
    """q ∝ (exp(η·1), exp(η·3)) after one step; the loss is the new q's mean of the group means."""
    loss = DPOLoss(group_robust={"groups": 2, "eta": 0.5})
    terms, outputs = grouped([0.0, 2.0, 3.0], [0, 0, 1])
    found = float(loss.combine(terms, np.ones(3), outputs, training=True))
    q = np.exp([0.5, 1.5]) / np.exp([0.5, 1.5]).sum()
    np.testing.assert_allclose(array(loss.state.group_weights), q, rtol=1e-6)
    assert found == pytest.approx(q @ [1.0, 3.0], rel=1e-6)


def test_weights_move_in_training_only():
    loss = DPOLoss(group_robust={"groups": 2, "eta": 0.5})
    terms, outputs = grouped([0.0, 2.0, 3.0], [0, 0, 1])
    assert float(loss.combine(terms, np.ones(3), outputs)) == pytest.approx(2.0)
    np.testing.assert_allclose(array(loss.state.group_weights), 0.5)


def test_pairs_count_within_their_group_by_their_weight():
    loss = DPOLoss(group_robust={"groups": 2})
    terms, outputs = grouped([0.0, 4.0, 3.0, 99.0], [0, 0, 1, 1])
    weight = np.array([3.0, 1.0, 2.0, 0.0])
    assert float(loss.combine(terms, weight, outputs)) == pytest.approx(0.5 * 1.0 + 0.5 * 3.0)


def test_a_group_that_is_absent_keeps_its_weight():
    loss = DPOLoss(group_robust={"groups": 3, "eta": 1.0})
    terms, outputs = grouped([1.0, 2.0], [0, 2])
    loss.combine(terms, np.ones(2), outputs, training=True)
    found = array(loss.state.group_weights)
    assert found[1] == pytest.approx(1 / 3, rel=1e-5)
    assert found[2] / found[0] == pytest.approx(np.e, rel=1e-5)
    assert found.sum() == pytest.approx(1.0, rel=1e-6)


def test_a_step_without_any_pair_moves_nothing():
    loss = DPOLoss(group_robust={"groups": 2})
    terms, outputs = grouped([1.0, 5.0], [0, 1])
    assert float(loss.combine(terms, np.zeros(2), outputs, training=True)) == 0.0
    np.testing.assert_allclose(array(loss.state.group_weights), 0.5, rtol=1e-6)


def test_a_weight_may_come_near_zero_and_return():
    loss = DPOLoss(group_robust={"groups": 2, "eta": 1.0})
    for losses in ([0.0, 200.0], [0.0, 200.0], [400.0, 0.0], [1.0, 0.0]):
        terms, outputs = grouped(losses, [0, 1])
        loss.combine(terms, np.ones(2), outputs, training=True)
    found = array(loss.state.group_weights)
    assert np.isfinite(found).all()
    assert found[0] == pytest.approx(np.e / (1 + np.e), rel=1e-4)


def test_losses_of_ten_thousand_nats_leave_the_weights_finite():
    loss = DPOLoss(group_robust={"groups": 2, "eta": 10.0})
    terms, outputs = grouped([1e4, -1e4], [0, 1])
    assert np.isfinite(float(loss.combine(terms, np.ones(2), outputs, training=True)))
    np.testing.assert_allclose(array(loss.state.group_weights), [1.0, 0.0], atol=1e-6)


def test_group_means_count_the_pairs_of_all_replicas():
    loss = DPOLoss(group_robust={"groups": 2, "eta": 0.5})
    sums = np.array([[2.0, 3.0], [2.0, 1.0]], "float32")
    shares = []
    for losses, groups in (([0.0, 3.0], [0, 1]), ([2.0], [0])):
        terms, outputs = grouped(losses, groups)
        shares.append(
            float(loss.combine(terms, np.ones(len(losses)), outputs, False, lambda _: sums))
        )
    assert sum(shares) == pytest.approx(0.5 * 1.0 + 0.5 * 3.0)
    member = ops.one_hot(outputs["group"], 2, dtype="float32")
    losses = ops.cast(total(terms), "float32")
    means, weight = group_means(losses, ops.ones(1), member, lambda _: sums)
    np.testing.assert_allclose(array(means), [1.0, 3.0])
    np.testing.assert_allclose(array(weight), [2.0, 1.0])


def test_the_gradient_is_that_of_the_weighted_groups(gradient_of):
    loss = DPOLoss(group_robust={"groups": 2})
    _, outputs = grouped([0, 0, 0], [0, 0, 1])
    _, gradient = gradient_of(
        lambda x: loss.combine({"preference_loss": x}, np.ones(3), outputs), np.ones(3)
    )
    np.testing.assert_allclose(gradient, [0.25, 0.25, 0.5], rtol=1e-6)


REWARDED = {
    "policy": np.array([[3.0, 1.0], [0.0, -2.0]], "float32"),
    "reference": np.zeros((2, 2), "float32"),
}


def test_running_mean_of_the_rewards_by_hand():
    """β = 0.5: rewards 1.5, 0.5, 0, -1, their mean 0.25; weights 1 and 3 make it -0.125."""
    loss = DPOLoss("bco_pair", beta=0.5, shift_momentum=0.8)
    assert float(loss.state.reward_shift) == 0.0
    terms = loss.terms(np.ones(2), REWARDED)
    loss.combine(terms, np.array([1.0, 3.0]), REWARDED, training=False)
    assert float(loss.state.reward_shift) == 0.0
    loss.combine(terms, np.array([1.0, 3.0]), REWARDED, training=True)
    assert float(loss.state.reward_shift) == pytest.approx(0.2 * -0.125)
    loss.combine(terms, np.array([1.0, 3.0]), REWARDED, training=True)
    assert float(loss.state.reward_shift) == pytest.approx(0.36 * -0.125)


def test_the_shift_moves_both_sides_of_the_classifier():
    loss = DPOLoss("bco_pair", beta=0.5, shift_momentum=0.0, reduction=None)
    loss.state.reward_shift.assign(0.25)
    found = array(loss(np.ones(2), REWARDED))
    chosen, rejected = np.array([1.5, 0.0]), np.array([0.5, -1.0])
    expected = np.logaddexp(0, -(chosen - 0.25)) + np.logaddexp(0, rejected - 0.25)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_without_momentum_the_shift_is_zero():
    plain = DPOLoss("bco_pair", beta=0.5, reduction=None)(np.ones(2), REWARDED)
    shifted = DPOLoss("bco_pair", beta=0.5, shift_momentum=0.9, reduction=None)
    np.testing.assert_allclose(array(shifted(np.ones(2), REWARDED)), array(plain))


def test_state_is_saved_with_the_model_that_holds_it(tmp_path):
    class Holder(keras.Model):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            self.objective_state = DPOLoss(
                "bco_pair", shift_momentum=0.5, group_robust={"groups": 3}
            ).state

        def call(self, x):
            return x

    held, fresh = Holder(), Holder()
    for model in (held, fresh):
        model.build((None, 1))
    held.objective_state.update_group_weights(
        np.array([1.0, 2.0, 3.0], "float32"), np.array([True] * 3), 1.0
    )
    held.objective_state.update_reward_shift(np.float32(4.0), 0.5)
    assert len(held.weights) == 2 and not held.trainable_weights
    held.save_weights(tmp_path / "state.weights.h5")
    fresh.load_weights(tmp_path / "state.weights.h5")
    for one, other in zip(held.get_weights(), fresh.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    assert float(fresh.objective_state.reward_shift) == 2.0


def test_state_survives_its_configuration():
    state = ObjectiveState(groups=3, reward_shift=True)
    again = keras.saving.deserialize_keras_object(keras.saving.serialize_keras_object(state))
    assert again.get_config() == state.get_config()
    assert [tuple(w.shape) for w in again.weights] == [tuple(w.shape) for w in state.weights]
