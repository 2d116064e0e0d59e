"""Every objective on one pair that a hand can calculate.

The pair: chosen has 4 tokens and log π = -8, log π_ref = -10, so c = 2 and 0.5 a token; rejected
has 2 tokens and log π = -6, log π_ref = -5, so r = -1 and -0.5 a token. Δ = 3; β = 0.5 makes the
scores 1 and -0.5 and the LLR 1.5.
"""

import math

import numpy as np
import pytest
from keras import ops

from dpo_keras.losses import DPOLoss, available

OUTPUTS = {
    "policy": np.array([[-8.0, -6.0]]),
    "reference": np.array([[-10.0, -5.0]]),
    "lengths": np.array([[4, 2]]),
}
LN2 = math.log(2)


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def softplus(x):
    return math.log(1 + math.exp(x))


BY_HAND = {
    "sigmoid": softplus(-1.5),
    "hinge": 0.0,
    "ipo": (1.0 - 1.0) ** 2,
    "exo_pair": sigmoid(1.5) * math.log(sigmoid(1.5) / 0.9)
    + sigmoid(-1.5) * math.log(sigmoid(-1.5) / 0.1),
    "nca_pair": softplus(-1.0) + softplus(1.0) / 2 + softplus(-0.5) / 2,
    "robust": softplus(-1.5),
    "bco_pair": softplus(-1.0) + softplus(-0.5),
    "sppo_hard": (2.0 - 1.0) ** 2 + (-1.0 + 1.0) ** 2,
    "aot": softplus(-1.5),
    "aot_unpaired": softplus(-1.5),
    "apo_zero": 1 - sigmoid(1.0) + sigmoid(-0.5),
    "apo_down": sigmoid(1.0) + 1 - sigmoid(1.5),
    "discopop": sigmoid(-30) * softplus(-1.5) + sigmoid(30) * math.exp(-1.5),
    "sigmoid_norm": softplus(-0.5),
    "simpo": softplus(-(0.5 * (-2.0 + 3.0) - 0.5)),
    "cpo": softplus(1.0) + 2.0,
    "slic": 2.0,
    "orpo": 2.0 + 0.5 * softplus(-(math.log(math.e**3 - 1) - math.log(math.e**2 - 1))),
    "alphapo": softplus(-(0.5 * 4 * (math.exp(0.75) - math.exp(0.5)) - 0.5)),
    "sft": 2.0,
    "reward": softplus(2.0),
    "plackett_luce": softplus(-1.5),
    "kto": 1 - sigmoid(1.0),  # the second column is the mismatch, whose log-ratio is below 0
}


def test_the_table_is_complete():
    assert set(BY_HAND) == set(available())


@pytest.mark.parametrize("name", BY_HAND)
def test_value_by_hand(name):
    loss = DPOLoss(name, beta=0.5, label_smoothing=0.1 if name == "exo_pair" else 0.0)
    assert float(loss([1.0], OUTPUTS)) == pytest.approx(BY_HAND[name], rel=1e-12, abs=1e-15)


@pytest.mark.parametrize("name", ["sigmoid", "robust", "aot", "aot_unpaired", "sigmoid_norm"])
def test_a_policy_equal_to_its_reference_starts_at_log_two(name):
    same = {**OUTPUTS, "reference": OUTPUTS["policy"]}
    assert float(DPOLoss(name)([1.0], same)) == pytest.approx(LN2, rel=1e-12)


def test_scores_are_the_implicit_rewards():
    scores = DPOLoss("sigmoid", beta=0.5).scores(OUTPUTS)
    np.testing.assert_allclose(ops.convert_to_numpy(scores), [[1.0, -0.5]])


def test_scores_of_reference_free_losses_need_no_reference():
    without = {name: value for name, value in OUTPUTS.items() if name != "reference"}
    np.testing.assert_allclose(
        ops.convert_to_numpy(DPOLoss("simpo", beta=2.0).scores(without)), [[-4.0, -6.0]]
    )
    log_odds = ops.convert_to_numpy(DPOLoss("orpo", beta=2.0).scores(without))
    np.testing.assert_allclose(log_odds, [[-math.log(math.e**2 - 1), -math.log(math.e**3 - 1)]])


def test_forward_kl_js_and_alpha_rewards_by_hand():
    for divergence, options, expected in (
        ("reverse_kl", {}, [2.0, -1.0]),
        ("forward_kl", {}, [1 - math.exp(-2), 1 - math.e]),
        ("js", {}, [LN2 - softplus(-2), LN2 - softplus(1)]),
        ("alpha", {"divergence_alpha": 0.5}, [2 - 2 / math.e, 2 - 2 * math.exp(0.5)]),
    ):
        loss = DPOLoss("sigmoid", beta=1.0, divergence=divergence, **options)
        found = ops.convert_to_numpy(loss.scores(OUTPUTS))
        np.testing.assert_allclose(found, [expected], rtol=1e-12)


def test_ld_dpo_counts_the_shared_part_whole_and_the_tail_in_part():
    """Chosen: 2 of its 4 tokens are shared; c = 1.5 there and 0.5 in the tail."""
    parts = {
        "policy_shared": np.array([[-4.0, -6.0]]),
        "reference_shared": np.array([[-5.5, -5.0]]),
    }
    loss = DPOLoss("sigmoid", beta=1.0, ld_alpha=0.5)
    found = ops.convert_to_numpy(loss.scores({**OUTPUTS, **parts}))
    np.testing.assert_allclose(found, [[1.75, -1.0]])


def test_wpo_weighs_a_pair_by_both_responses():
    loss = DPOLoss("hinge", beta=0.1, wpo=True)
    outputs = {**OUTPUTS, "wpo_log_weight": np.log([[0.5, 0.25]])}
    assert float(loss([1.0], outputs)) == pytest.approx(0.7 / 8)
    outputs["wpo_log_weight"] = np.log([[4.0, 2.0]])
    assert float(loss([1.0], outputs)) == pytest.approx(0.7 * 8)
    bounded = DPOLoss("hinge", beta=0.1, wpo=True, wpo_max_weight=1.0)
    assert float(bounded([1.0], outputs)) == pytest.approx(0.7)


def test_margin_is_what_the_ratio_has_to_clear():
    loss = DPOLoss("sigmoid", beta=0.5, margin=True)
    found = float(loss([1.0], {**OUTPUTS, "margin": np.array([1.5])}))
    assert found == pytest.approx(LN2)


def test_dpo_positive_by_hand():
    """c = -1, Δ = 1, λ = 2: -log σ(β(Δ - λ·1))."""
    outputs = {**OUTPUTS, "policy": np.array([[-11.0, -7.0]])}
    loss = DPOLoss("sigmoid", beta=0.5, dpo_positive=2.0)
    assert float(DPOLoss("sigmoid", beta=0.5)([1.0], outputs)) == pytest.approx(softplus(-0.5))
    assert float(loss([1.0], outputs)) == pytest.approx(softplus(0.5))


def test_dpo_positive_is_nothing_while_the_chosen_response_gains():
    with_it, without = DPOLoss("sigmoid", dpo_positive=50.0), DPOLoss("sigmoid")
    assert float(with_it([1.0], OUTPUTS)) == float(without([1.0], OUTPUTS))


def test_a_weighted_list_is_the_sum_of_its_parts():
    loss = DPOLoss(["sigmoid", "bco_pair", "sft"], beta=0.5, loss_weights=[0.8, 0.2, 1.0])
    expected = 0.8 * BY_HAND["sigmoid"] + 0.2 * BY_HAND["bco_pair"] + BY_HAND["sft"]
    assert float(loss([1.0], OUTPUTS)) == pytest.approx(expected, rel=1e-12)
