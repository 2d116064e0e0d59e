"""What must be the same by two ways."""

import numpy as np
import pytest
from keras import ops
from losses_inputs import exchange, random_outputs
from losses_restatement import CASES

from dpo_keras.losses import PENALTIES, DPOLoss, binary_cross_entropy
from dpo_keras.losses.options import takers_of

PREFERENCE, OUTPUTS = random_outputs(200, seed=10, spread=4.0)
ONES = np.ones(200)


def loss(loss_type, preference=PREFERENCE, outputs=OUTPUTS, **options):
    function = DPOLoss(loss_type, reduction=None, **options)
    return ops.convert_to_numpy(function(preference, outputs))


def assert_same(first, second, **tolerance):
    np.testing.assert_allclose(first, second, **{"rtol": 1e-10, "atol": 1e-12, **tolerance})


@pytest.mark.parametrize("case", CASES)
def test_exchanging_the_responses_and_the_label_changes_nothing(case):
    options = CASES[case]
    named = [name for name in ("nll", "kl_to_reference") if options["loss_type"] in takers_of(name)]
    penalties = dict.fromkeys(named, 0.5)
    preference, outputs = exchange(PREFERENCE, OUTPUTS)
    swapped = loss(**options, preference=preference, outputs=outputs, penalties=penalties)
    assert_same(loss(**options, penalties=penalties), swapped)


@pytest.mark.parametrize("penalty", PENALTIES)
def test_exchanging_the_responses_and_the_label_changes_no_penalty(penalty):
    preference, outputs = exchange(PREFERENCE, OUTPUTS)
    swapped = loss("sigmoid", preference, outputs, penalties={penalty: 1.0})
    assert_same(loss("sigmoid", penalties={penalty: 1.0}), swapped)


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_exchanging_leaves_a_batchwise_loss_as_it_was(name):
    decided = np.where(PREFERENCE == 0.5, 1.0, PREFERENCE)
    preference, outputs = exchange(decided, OUTPUTS)
    assert_same(loss(name, decided), loss(name, preference, outputs))


def test_sigmoid_is_the_cross_entropy_of_the_scores():
    scores = DPOLoss("sigmoid", beta=0.2).scores(OUTPUTS)
    expected = ops.convert_to_numpy(binary_cross_entropy(PREFERENCE, scores))
    assert_same(loss("sigmoid", beta=0.2), expected)


def test_label_smoothing_is_a_soft_label():
    soft = PREFERENCE * 0.85 + (1 - PREFERENCE) * 0.15
    assert_same(loss("sigmoid", label_smoothing=0.15), loss("sigmoid", soft))


def test_robust_without_noise_is_sigmoid():
    assert_same(loss("robust"), loss("sigmoid"))


def test_robust_under_flipped_labels_is_sigmoid_on_the_mean():
    noisy = PREFERENCE * 0.7 + (1 - PREFERENCE) * 0.3
    assert_same(loss("robust", noisy, label_smoothing=0.3), loss("sigmoid"))


def test_mpo_is_its_parts():
    parts = 0.8 * loss("sigmoid") + 0.2 * loss("bco_pair") + loss("sft")
    assert_same(loss(["sigmoid", "bco_pair", "sft"], loss_weights=[0.8, 0.2, 1.0]), parts)


def test_rpo_is_sigmoid_and_the_likelihood_of_the_chosen():
    assert_same(loss("sigmoid", penalties={"nll": 0.3}), loss("sigmoid") + 0.3 * loss("sft"))


def test_a_list_of_one_is_its_objective():
    assert_same(loss(["hinge"]), loss("hinge"))


@pytest.mark.parametrize("distance", [1e-3, 1e-5])
def test_alpha_divergence_tends_to_the_reverse_kl(distance):
    near = loss("sigmoid", divergence="alpha", divergence_alpha=1 - distance)
    assert_same(near, loss("sigmoid"), rtol=0, atol=30 * distance)


def test_alpha_one_is_the_reverse_kl_and_alpha_zero_the_forward_kl():
    assert_same(loss("sigmoid", divergence="alpha", divergence_alpha=1.0), loss("sigmoid"))
    forward = loss("sigmoid", divergence="forward_kl")
    assert_same(loss("sigmoid", divergence="alpha", divergence_alpha=0.0), forward)


def test_simpo_without_margin_is_sigmoid_norm_with_a_uniform_reference():
    uniform = {**OUTPUTS, "reference": -np.log(32000.0) * OUTPUTS["lengths"]}
    assert_same(loss("simpo", gamma=0.0), loss("sigmoid_norm", outputs=uniform))


def test_alphapo_at_zero_is_simpo():
    assert_same(loss("alphapo", alphapo_alpha=0.0), loss("simpo"))
    assert_same(loss("alphapo", alphapo_alpha=1e-7), loss("simpo"), atol=1e-5)


def test_losses_without_reference_are_those_with_one_that_is_uniform():
    equal = {**OUTPUTS, "reference": np.zeros((200, 2))}
    assert_same(loss("cpo", cpo_alpha=0.0), loss("sigmoid", outputs=equal))
    assert_same(loss("slic"), loss("hinge", outputs=equal))


def test_ipo_by_length_is_ipo_on_responses_of_one_token():
    single = {**OUTPUTS, "lengths": np.ones((200, 2))}
    assert_same(loss("ipo", outputs=single), loss("ipo", length_normalize=False))


def test_modifiers_at_their_neutral_value_change_nothing():
    neutral = {
        **OUTPUTS,
        "margin": np.zeros(200),
        "wpo_log_weight": np.zeros((200, 2)),
    }
    assert_same(loss("sigmoid", outputs=neutral, margin=True, wpo=True), loss("sigmoid"))
    assert_same(loss("sigmoid", ld_alpha=1.0), loss("sigmoid"))
    assert_same(loss("sigmoid", penalties={"nll": 0.0}, dpo_positive=0.0), loss("sigmoid"))


def test_optimal_transport_of_one_pair_is_sigmoid():
    one = {name: value[:1] for name, value in OUTPUTS.items()}
    assert_same(loss("aot", ONES[:1], one), loss("sigmoid", ONES[:1], one))
    assert_same(loss("aot_unpaired", ONES[:1], one), loss("sigmoid", ONES[:1], one))


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_optimal_transport_does_not_see_padding(name):
    padded = {key: np.concatenate([value, 0 * value[:7] - 1]) for key, value in OUTPUTS.items()}
    padded["weight"] = np.concatenate([ONES, np.zeros(7)])
    found = loss(name, np.concatenate([PREFERENCE, np.ones(7)]), padded)
    assert_same(found[:200], loss(name))
    assert np.isfinite(found).all()


@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_optimal_transport_does_not_depend_on_the_order_of_pairs(name):
    order = np.random.default_rng(0).permutation(200)
    moved = {key: value[order] for key, value in OUTPUTS.items()}
    assert_same(loss(name, PREFERENCE[order], moved), loss(name)[order])


def test_dpo_positive_inside_the_loss_is_the_papers_formula():
    delta = OUTPUTS["policy"] - OUTPUTS["reference"]
    z = 0.1 * (delta[:, 0] - delta[:, 1] - 5.0 * np.maximum(0, -delta[:, 0]))
    assert_same(loss("sigmoid", ONES, dpo_positive=5.0), np.logaddexp(0, -z))


def test_terms_add_up_to_the_loss_and_penalties_carry_their_weight():
    function = DPOLoss("sigmoid", penalties={"nll": 0.5, "overconfidence": 0.25}, reduction=None)
    terms = function.terms(PREFERENCE, OUTPUTS)
    assert list(terms) == ["preference_loss", "penalty/nll", "penalty/overconfidence"]
    assert list(terms) == function.term_names()
    assert_same(terms["penalty/nll"], 0.5 * loss("sft"))
    total = sum(ops.convert_to_numpy(value) for value in terms.values())
    assert_same(total, ops.convert_to_numpy(function(PREFERENCE, OUTPUTS)))
