"""`DPOLoss` as a `keras.losses.Loss`: reductions, weights, dtypes, saving, replicas."""

import json

import keras
import numpy as np
import pytest
from keras import ops
from losses_inputs import random_outputs

from dpo_keras.errors import InputError
from dpo_keras.losses import OBJECTIVES, DPOLoss
from dpo_keras.losses.options import takers_of

PREFERENCE, OUTPUTS = random_outputs(8, seed=20, spread=3.0, dtype="float32")


def array(value):
    return ops.convert_to_numpy(value)


def test_it_is_a_keras_loss():
    assert isinstance(DPOLoss(), keras.losses.Loss)


def test_reductions_are_keras_own():
    values = array(DPOLoss(reduction=None)(PREFERENCE, OUTPUTS))
    assert values.shape == (8,)
    for reduction, expected in (
        ("sum", values.sum()),
        ("sum_over_batch_size", values.mean()),
        ("mean", values.mean()),
    ):
        found = DPOLoss(reduction=reduction)(PREFERENCE, OUTPUTS)
        assert float(found) == pytest.approx(expected, rel=1e-6)


def test_sample_weight_is_kept():
    weight = np.arange(8, dtype="float32")
    values = array(DPOLoss(reduction=None)(PREFERENCE, OUTPUTS))
    found = array(DPOLoss(reduction=None)(PREFERENCE, OUTPUTS, sample_weight=weight))
    np.testing.assert_allclose(found, values * weight, rtol=1e-6)
    mean = DPOLoss(reduction="mean_with_sample_weight")(PREFERENCE, OUTPUTS, sample_weight=weight)
    assert float(mean) == pytest.approx((values * weight).sum() / weight.sum(), rel=1e-6)


def test_sample_weight_of_zero_is_padding_to_a_batchwise_loss():
    weight = np.array([1, 1, 1, 1, 1, 1, 0, 0], "float32")
    kept = {name: value[:6] for name, value in OUTPUTS.items()}
    # Padding that would take the last places in one order and the first in the other.
    far = {**OUTPUTS, "policy": np.concatenate([kept["policy"], [[99, -99], [99, -99]]])}
    far["reference"] = np.concatenate([kept["reference"], [[-99, 99], [-99, 99]]])
    far = {name: value.astype("float32") for name, value in far.items()}
    found = DPOLoss("aot", reduction="sum")(np.ones(8), far, sample_weight=weight)
    alone = DPOLoss("aot", reduction="sum")(np.ones(6), kept)
    assert float(found) == pytest.approx(float(alone), rel=1e-6)
    assert DPOLoss("aot").batchwise and not DPOLoss("sigmoid").batchwise


def test_rows_of_several_pairs_are_flattened():
    rows = {k: np.reshape(v, (4, 2, *v.shape[1:])) for k, v in OUTPUTS.items()}
    found = DPOLoss(reduction=None, margin=True)(np.reshape(PREFERENCE, (4, 2)), rows)
    flat = DPOLoss(reduction=None, margin=True)(PREFERENCE, OUTPUTS)
    np.testing.assert_array_equal(array(found), array(flat))


def test_lengths_may_be_whole_numbers():
    whole = {**OUTPUTS, "lengths": OUTPUTS["lengths"].astype("int32")}
    found = DPOLoss("simpo")(PREFERENCE, whole)
    assert float(found) == float(DPOLoss("simpo")(PREFERENCE, OUTPUTS))


def test_half_precision_is_raised_to_float32():
    half = {name: ops.cast(value, "bfloat16") for name, value in OUTPUTS.items()}
    found = DPOLoss(reduction=None)(PREFERENCE, half)
    assert keras.backend.standardize_dtype(found.dtype) == "float32"


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_objective_survives_saving(name):
    options = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    penalty = "nll" if name in takers_of("nll") else "overconfidence"
    loss = DPOLoss(name, beta=0.3, penalties={penalty: 0.2}, reduction="sum", **options)
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))
    again = keras.saving.deserialize_keras_object(config)
    assert isinstance(again, DPOLoss)
    assert again.get_config() == loss.get_config()
    assert float(again(PREFERENCE, OUTPUTS)) == float(loss(PREFERENCE, OUTPUTS))


def test_lists_and_options_survive_saving():
    loss = DPOLoss(
        ["sigmoid", "bco_pair", "sft"],
        loss_weights=[0.8, 0.2, 1.0],
        dpo_positive=5.0,
        penalties={"kl_to_reference": 0.1},
        divergence="alpha",
        divergence_alpha=0.3,
        ld_alpha=0.5,
        margin=True,
        wpo=True,
        shift_momentum=0.9,
        group_robust={"groups": 3, "eta": 0.1},
        name="mixture",
    )
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))
    again = keras.saving.deserialize_keras_object(config)
    assert again.get_config() == loss.get_config()
    assert again.needs == loss.needs


@keras.saving.register_keras_serializable("tests")
def halved_margin(preference, scores, outputs):
    return 0.5 * (scores[:, 0] - scores[:, 1])


def test_a_registered_function_survives_saving():
    loss = DPOLoss(penalties={"nll": 0.1, halved_margin: 0.2})
    config = json.loads(json.dumps(keras.saving.serialize_keras_object(loss)))
    again = keras.saving.deserialize_keras_object(config)
    assert again.term_names() == ["preference_loss", "penalty/nll", "penalty/halved_margin"]
    assert float(again(PREFERENCE, OUTPUTS)) == float(loss(PREFERENCE, OUTPUTS))


WEIGHT = np.array([1, 2, 0, 1, 1, 0.5, 1, 0], "float32")


def halves(function, summed):
    """Run a function on each half of the pairs, as two replicas would.

    `summed` is what `all_reduce` gives both of them: sums that an all-reduce would have made.
    """
    first = {name: value[:4] for name, value in OUTPUTS.items()}
    second = {name: value[4:] for name, value in OUTPUTS.items()}
    return [
        float(function(PREFERENCE[:4], first, WEIGHT[:4], summed)),
        float(function(PREFERENCE[4:], second, WEIGHT[4:], summed)),
    ]


def test_replicas_results_add_up_to_the_loss_of_one():
    loss = DPOLoss(penalties={"nll": 0.1})

    def step(preference, outputs, weight, all_reduce):
        return loss.combine(loss.terms(preference, outputs), weight, outputs, True, all_reduce)

    whole = float(step(PREFERENCE, OUTPUTS, WEIGHT, None))
    shares = halves(step, lambda _: ops.convert_to_tensor(WEIGHT.sum()))
    assert sum(shares) == pytest.approx(whole, rel=1e-6)
    values = array(DPOLoss(penalties={"nll": 0.1}, reduction=None)(PREFERENCE, OUTPUTS))
    assert whole == pytest.approx((values * WEIGHT).sum() / WEIGHT.sum(), rel=1e-6)


def test_padding_that_is_not_finite_does_not_reach_the_loss():
    loss = DPOLoss()
    terms = {"preference_loss": np.array([1.0, np.inf, np.nan], "float32")}
    assert float(loss.combine(terms, np.array([2.0, 0.0, 0.0]), {})) == 1.0


def test_a_step_of_nothing_but_padding_costs_nothing():
    loss = DPOLoss()
    assert float(loss.combine({"preference_loss": np.ones(3, "float32")}, np.zeros(3), {})) == 0.0


def test_group_weights_have_no_place_in_a_mean_over_pairs():
    loss = DPOLoss(group_robust={"groups": 2})
    outputs = {**OUTPUTS, "group": np.zeros(8, "int32")}
    with pytest.raises(InputError, match="combine"):
        loss(PREFERENCE, outputs)
    assert array(loss.call(PREFERENCE, outputs)).shape == (8,)
