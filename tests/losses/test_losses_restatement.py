"""Every objective equals an independent NumPy float64 statement of its formula."""

import losses_restatement as restated
import numpy as np
import pytest
from keras import ops
from losses_inputs import random_outputs

from dpo_keras.losses import DPOLoss, available


def values(kwargs, preference, outputs):
    return ops.convert_to_numpy(DPOLoss(**kwargs, reduction=None)(preference, outputs))


def test_no_objective_is_left_out():
    covered = {kwargs["loss_type"] for kwargs in restated.CASES.values()}
    # KTO takes rated responses: test_losses_unpaired.py.
    assert covered | {"aot", "aot_unpaired", "kto"} == set(available())


@pytest.mark.parametrize("case", restated.CASES)
def test_thousand_random_pairs_to_1e6_relative(case):
    kwargs = restated.CASES[case]
    preference, outputs = random_outputs(1000, seed=0)
    found = values(kwargs, preference, outputs)
    assert found.shape == (1000,) and found.dtype == np.float64
    expected = restated.preference_loss(kwargs, preference, outputs)
    # What cancels (`robust` subtracts terms of some hundred nats) is exact to the last digit only.
    np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("case", restated.CASES)
def test_close_pairs_to_1e9_relative(case):
    """Where nothing saturates, so that every term of a formula is felt."""
    kwargs = restated.CASES[case]
    preference, outputs = random_outputs(64, seed=1, spread=3.0)
    expected = restated.preference_loss(kwargs, preference, outputs)
    np.testing.assert_allclose(values(kwargs, preference, outputs), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("name", ["aot", "aot_unpaired"])
def test_optimal_transport_compares_equal_ranks(name, smoothing):
    kwargs = {"loss_type": name, "label_smoothing": smoothing}
    _, outputs = random_outputs(1000, seed=2)
    found = np.sort(values(kwargs, np.ones(1000), outputs))
    np.testing.assert_allclose(found, restated.aot(kwargs, outputs), rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("case", restated.CASES)
def test_float32_agrees_with_float64_as_far_as_float32_goes(case):
    kwargs = restated.CASES[case]
    preference, outputs = random_outputs(64, seed=3, spread=3.0, dtype="float32")
    found = values(kwargs, preference, outputs)
    assert found.dtype == np.float32
    wide = {name: value.astype("float64") for name, value in outputs.items()}
    expected = restated.preference_loss(kwargs, preference.astype("float64"), wide)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
