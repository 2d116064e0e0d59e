"""Gradients against central differences, and value and gradient finite at any size."""

import math

import numpy as np
import pytest
from keras import ops
from losses_inputs import random_outputs
from losses_restatement import CASES

from dpo_keras.losses import PENALTIES, DPOLoss

WITH_PENALTIES = {
    **CASES,
    **{
        f"sigmoid + {name}": {"loss_type": "sigmoid", "penalties": {name: 0.7}}
        for name in PENALTIES
    },
    "MPO": {
        "loss_type": ["sigmoid", "bco_pair", "sft"],
        "loss_weights": [0.8, 0.2, 1.0],
        "dpo_positive": 5.0,
        "penalties": {"overconfidence": 0.1},
    },
}


def per_pair(kwargs, preference, outputs):
    """The loss as a function of the policy's log-probs."""
    loss = DPOLoss(**kwargs, reduction=None)
    return lambda policy: loss(preference, {**outputs, "policy": policy})


@pytest.mark.parametrize("case", WITH_PENALTIES)
def test_gradient_equals_central_differences(case, gradient_of):
    preference, outputs = random_outputs(64, seed=4, spread=4.0)
    function = per_pair(WITH_PENALTIES[case], preference, outputs)
    _, gradient = gradient_of(function, outputs["policy"])
    step = 1e-5
    for column in (0, 1):
        nudge = step * np.eye(2)[column]
        above = ops.convert_to_numpy(function(outputs["policy"] + nudge))
        below = ops.convert_to_numpy(function(outputs["policy"] - nudge))
        np.testing.assert_allclose(
            gradient[:, column], (above - below) / (2 * step), rtol=1e-6, atol=2e-8
        )


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_gradient_of_a_batchwise_loss_equals_central_differences(name, gradient_of):
    preference, outputs = random_outputs(12, seed=5, spread=4.0)
    function = per_pair({"loss_type": name}, preference, outputs)
    _, gradient = gradient_of(function, outputs["policy"])
    for place in np.ndindex(12, 2):
        nudge = np.zeros((12, 2))
        nudge[place] = 1e-5
        above = float(ops.sum(function(outputs["policy"] + nudge)))
        below = float(ops.sum(function(outputs["policy"] - nudge)))
        assert gradient[place] == pytest.approx((above - below) / 2e-5, rel=1e-6, abs=1e-8)


def test_no_gradient_enters_the_reference(gradient_of):
    """With LoRA switched off for the reference, both share their weights."""
    preference, outputs = random_outputs(64, seed=6, spread=1.0)
    loss = DPOLoss("sigmoid")
    _, gradient = gradient_of(
        lambda reference: loss(preference, {**outputs, "reference": reference}),
        outputs["reference"],
    )
    assert not gradient.any()


def test_gradient_of_sigmoid_is_the_papers(gradient_of):
    """-β σ(-βΔ) with respect to the chosen log-prob (arXiv 2305.18290, section 4)."""
    _, outputs = random_outputs(64, seed=7, spread=10.0)
    _, gradient = gradient_of(
        per_pair({"loss_type": "sigmoid", "beta": 0.3}, np.ones(64), outputs), outputs["policy"]
    )
    delta = (outputs["policy"] - outputs["reference"]) @ [1, -1]
    expected = -0.3 / (1 + np.exp(0.3 * delta))
    np.testing.assert_allclose(gradient, np.stack([expected, -expected], 1), rtol=1e-12)


EXTREMES = np.array(
    [
        (first, second, other_first, other_second)
        for first in (1e4, 1.0, 0.0, -1e4)
        for second in (1e4, 0.0, -1.0, -1e4)
        for other_first in (1e4, -1e4)
        for other_second in (1e4, -1e4)
    ]
)
ALL = {
    **WITH_PENALTIES,
    "aot": {"loss_type": "aot"},
    "aot_unpaired": {"loss_type": "aot_unpaired"},
    "orpo, beta 1": {"loss_type": "orpo", "beta": 1.0},
    "alphapo, beta 10": {"loss_type": "alphapo", "beta": 10.0, "alphapo_alpha": 2.0},
}


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("case", ALL)
def test_value_and_gradient_are_finite_at_ten_thousand_nats(case, dtype, gradient_of):
    count = len(EXTREMES)
    outputs = {
        "policy": EXTREMES[:, :2],
        "reference": EXTREMES[:, 2:],
        "policy_shared": EXTREMES[:, :2] / 2,
        "reference_shared": EXTREMES[:, 2:] / 2,
        "margin": np.ones(count),
        "wpo_log_weight": EXTREMES[:, :2],
    }
    outputs = {name: value.astype(dtype) for name, value in outputs.items()}
    for length in (1.0, 2000.0):
        outputs["lengths"] = np.full((count, 2), length, dtype)
        for label in (1.0, 0.5, 0.0):
            preference = np.full(count, label, dtype)
            function = per_pair(ALL[case], preference, outputs)
            value, gradient = gradient_of(function, outputs["policy"])
            assert np.isfinite(ops.convert_to_numpy(function(outputs["policy"]))).all()
            assert np.isfinite(value)
            assert np.isfinite(gradient).all()


def test_a_response_that_is_given_up_still_pulls_under_forward_kl(gradient_of):
    """Where exp is cut to its tangent, the gradient must not end."""
    outputs = {"reference": np.array([[-10.0, -10.0]])}
    function = per_pair(
        {"loss_type": "hinge", "divergence": "forward_kl", "beta": 1.0}, np.ones(1), outputs
    )
    slopes = [gradient_of(function, np.array([[at, -10.0]]))[1][0, 0] for at in (-39, -41, -9000)]
    assert slopes[0] == pytest.approx(-math.exp(29))
    assert slopes[1] == pytest.approx(-math.exp(30))
    assert slopes[2] == pytest.approx(-math.exp(30))
