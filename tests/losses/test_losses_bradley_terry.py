"""The steps of the method, on numbers that a hand can check."""

import math

import numpy as np
import pytest
from keras import ops

from dpo_keras.losses import (
    binary_cross_entropy,
    log_likelihood_ratio,
    preference_probabilities,
)


def test_worked_example_of_the_method():
    scores = ops.convert_to_tensor([[2.5, 1.5]])
    probabilities = ops.convert_to_numpy(preference_probabilities(scores))[0]
    np.testing.assert_allclose(probabilities, [0.7311, 0.2689], atol=5e-5)
    assert float(log_likelihood_ratio(scores)[0]) == 1.0
    assert float(binary_cross_entropy([1.0], scores)[0]) == pytest.approx(0.3133, abs=5e-5)


def test_equal_scores_are_a_coin_toss_whatever_the_label():
    values = binary_cross_entropy([0.0, 0.3, 1.0], ops.zeros((3, 2)))
    np.testing.assert_allclose(ops.convert_to_numpy(values), math.log(2), rtol=1e-6)


def test_cross_entropy_is_least_where_probability_equals_the_label():
    llr = np.linspace(-4, 4, 801, dtype="float64")
    scores = np.stack([llr, np.zeros_like(llr)], axis=1)
    values = ops.convert_to_numpy(binary_cross_entropy(np.full(801, 0.8), scores))
    assert 1 / (1 + np.exp(-llr[values.argmin()])) == pytest.approx(0.8, abs=2e-3)


@pytest.mark.parametrize("size", [1e4, -1e4])
def test_extreme_scores_stay_finite(size):
    scores = ops.convert_to_tensor([[size, -size]])
    assert float(log_likelihood_ratio(scores)[0]) == 2 * size
    assert float(binary_cross_entropy([0.5], scores)[0]) == pytest.approx(abs(size))
    assert np.isfinite(ops.convert_to_numpy(preference_probabilities(scores))).all()


def test_ratio_is_taken_from_scores_and_not_from_rounded_probabilities():
    scores = ops.convert_to_tensor([[40.0, 0.0]])
    assert float(preference_probabilities(scores)[0, 0]) == 1.0
    assert float(log_likelihood_ratio(scores)[0]) == 40.0


def test_float64_is_kept_and_everything_else_becomes_float32(float64):
    assert ops.convert_to_numpy(log_likelihood_ratio(np.zeros((1, 2)))).dtype == np.float64
    for dtype in ("int32", "float16", "float32"):
        values = log_likelihood_ratio(np.zeros((1, 2), dtype))
        assert ops.convert_to_numpy(values).dtype == np.float32
