"""KTO is the formula of its paper, and TRL's, in value and gradient; z takes no gradient."""

import losses_restatement as restated
import numpy as np
import pytest
from keras import ops
from losses_inputs import random_outputs

from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss

SETTINGS = [
    {"beta": 0.1},
    {"beta": 1.3, "desirable_weight": 1.5, "undesirable_weight": 0.7},
]


def inputs(seed=0, count=1000):
    labels, outputs = random_outputs(count, seed, spread=4.0)
    outputs["policy"][:, 1] += 1.0  # so that z is above 0
    return labels, {name: outputs[name] for name in ("policy", "reference")}


def values(settings, labels, outputs):
    return ops.convert_to_numpy(DPOLoss("kto", reduction=None, **settings)(labels, outputs))


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_thousand_values_and_gradients_are_the_restated_ones(settings, gradient_of, float64):
    labels, outputs = inputs()
    value, gradient, z = restated.kto(settings, labels, outputs)
    assert z > 0.1
    np.testing.assert_allclose(values(settings, labels, outputs), value, rtol=1e-6, atol=1e-12)
    loss = DPOLoss("kto", reduction=None, **settings)
    total, found = gradient_of(
        lambda policy: loss(labels, {**outputs, "policy": policy}), outputs["policy"]
    )
    np.testing.assert_allclose(total, value.sum(), rtol=1e-9)
    np.testing.assert_allclose(found[:, 0], gradient, rtol=1e-6, atol=1e-12)
    assert (found[:, 1] == 0).all()  # no gradient flows through z


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shift", [0.0, -9.0])
def test_a_thousand_thumbs_have_the_loss_of_trl(settings, shift):
    """`KTOTrainer.kto_loss`: chosen 1 - σ(β(c - KL)), rejected 1 - σ(β(KL - c)), KL >= 0."""
    labels, outputs = inputs(seed=1)
    outputs["policy"][:, 1] += shift
    up = labels > 0.5
    kl = max((outputs["policy"] - outputs["reference"])[:, 1].mean(), 0.0)
    assert (kl == 0) == (shift < 0)
    ratio = (outputs["policy"] - outputs["reference"])[:, 0]
    beta = settings["beta"]
    chosen = 1 - 1 / (1 + np.exp(-beta * (ratio[up] - kl)))
    rejected = 1 - 1 / (1 + np.exp(-beta * (kl - ratio[~up])))
    expected = np.concatenate(
        (
            settings.get("desirable_weight", 1.0) * chosen,
            settings.get("undesirable_weight", 1.0) * rejected,
        )
    )
    found = values(settings, up.astype("float64"), outputs)
    np.testing.assert_allclose(np.sort(found), np.sort(expected), rtol=1e-6, atol=1e-6)
    mean = DPOLoss("kto", **settings)(up.astype("float64"), outputs)
    np.testing.assert_allclose(float(mean), expected.mean(), rtol=1e-6)


def test_a_policy_that_is_its_reference_has_half_of_the_weights():
    outputs = {"policy": np.zeros((2, 2)), "reference": np.zeros((2, 2))}
    found = values({"desirable_weight": 1.0, "undesirable_weight": 3.0}, [1.0, 0.0], outputs)
    assert found.tolist() == [0.5, 1.5]


def test_rows_of_weight_0_are_not_in_z_whatever_they_hold():
    labels, outputs = inputs(count=8)
    padded = {name: np.concatenate([value, [[np.inf, np.inf]]]) for name, value in outputs.items()}
    padded["policy"][-1] = np.nan
    padded["weight"] = np.array([1.0] * 8 + [0.0])
    found = values({"beta": 0.5}, np.append(labels, 0.5), padded)[:8]
    np.testing.assert_allclose(found, values({"beta": 0.5}, labels, outputs), rtol=1e-9)


def test_z_is_weighted_as_the_loss_is():
    outputs = {"policy": np.array([[0.0, 4.0], [0.0, 1.0]]), "reference": np.zeros((2, 2))}
    loss = DPOLoss("kto", beta=1.0, reduction=None)
    found = ops.convert_to_numpy(loss([1.0, 1.0], {**outputs, "weight": np.array([1.0, 3.0])}))
    z = (1 * 4.0 + 3 * 1.0) / 4
    np.testing.assert_allclose(found, 1 - 1 / (1 + np.exp(z)), rtol=1e-6)


def test_the_penalty_nll_leaves_mismatched_and_undesirable_responses_alone():
    outputs = {"policy": np.array([[-6.0, -50.0]] * 2), "reference": np.array([[-6.0, -50.0]] * 2)}
    outputs["lengths"] = np.array([[3, 5]] * 2)
    terms = DPOLoss("kto", penalties={"nll": 1.0}).terms(np.array([1.0, 0.0]), outputs)
    assert ops.convert_to_numpy(terms["penalty/nll"]).tolist() == [2.0, 0.0]


def test_options_and_mixtures_that_mean_nothing_are_refused():
    with pytest.raises(InputError, match="mixes objectives on pairs with objectives on rated"):
        DPOLoss(["kto", "sigmoid"])
    with pytest.raises(InputError, match="desirable_weight must be a number >= 0"):
        DPOLoss("kto", desirable_weight=-1.0)
    with pytest.raises(InputError, match="undesirable_weight has no effect with sigmoid"):
        DPOLoss("sigmoid", undesirable_weight=2.0)
    with pytest.raises(InputError, match="insufficient_confidence does not apply to kto"):
        DPOLoss("kto", penalties={"insufficient_confidence": 0.1})
