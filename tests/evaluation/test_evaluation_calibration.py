"""Calibration of P(chosen): hand-derived values, symmetry in the order of responses, extremes."""

import json
import math

import numpy as np
import pytest

from dpo_keras.evaluation.calibration import calibrate


def logit(p):
    return math.log(p / (1 - p))


def test_two_confidences_by_hand():
    # Four pairs said 0.9, of which half are right; six said 0.6, of which all are.
    llr = [logit(0.9)] * 4 + [logit(0.6)] * 6
    label = [1, 1, 0, 0] + [1] * 6
    found = calibrate(llr, label)
    assert found.expected_calibration_error.value == pytest.approx(0.4 * 0.4 + 0.6 * 0.4)
    assert found.confidence.value == pytest.approx(0.4 * 0.9 + 0.6 * 0.6)
    assert found.agreement.value == pytest.approx(0.8)
    assert found.overconfidence.value == pytest.approx(0.72 - 0.8)
    assert found.brier.value == pytest.approx((2 * 0.01 + 2 * 0.81 + 6 * 0.16) / 10)
    expected = -(2 * math.log(0.9) + 2 * math.log(0.1) + 6 * math.log(0.6)) / 10
    assert found.log_loss.value == pytest.approx(expected)
    full = {round(b.confidence.value, 6): b for b in found.bins if b.confidence.value is not None}
    assert sorted(full) == [0.6, 0.9]
    assert (full[0.9].agreement.value, full[0.9].weight) == (0.5, pytest.approx(0.4))
    assert (full[0.6].agreement.value, full[0.6].weight) == (1.0, pytest.approx(0.6))


def test_the_order_of_the_two_responses_changes_nothing():
    random = np.random.default_rng(0)
    llr = random.normal(0, 2, 300)
    llr[:20] = 0.0
    label = np.round(random.random(300), 1)
    weight = random.random(300)
    flip = random.random(300) < 0.5
    swapped = calibrate(np.where(flip, -llr, llr), np.where(flip, 1 - label, label), weight)
    given = calibrate(llr, label, weight)
    for name, figure in given.figures.items():
        assert swapped.figures[name].value == pytest.approx(figure.value), name
    for one, other in zip(given.bins, swapped.bins, strict=True):
        assert one.agreement.value == pytest.approx(other.agreement.value)


def test_soft_preferences_that_are_the_models_own_probabilities_are_perfectly_calibrated():
    p = np.array([0.55, 0.7, 0.7, 0.93])
    found = calibrate(np.log(p / (1 - p)), p)
    assert found.expected_calibration_error.value == pytest.approx(0.0, abs=1e-12)
    assert found.brier.value == pytest.approx(0.0, abs=1e-12)
    assert found.log_loss.value == pytest.approx(found.label_entropy.value)
    assert found.chance_level.reason == "some preferences are soft"


def test_certain_labels_leave_no_entropy_and_ties_leave_log_2():
    assert calibrate([1.0, 1.0], [1.0, 0.0]).label_entropy.value == 0.0
    tie = calibrate([0.0], [0.5])
    assert tie.label_entropy.value == pytest.approx(math.log(2))
    assert tie.log_loss.value == pytest.approx(math.log(2))


def test_an_undecided_model_is_half_sure_and_half_right():
    found = calibrate(np.zeros(50), np.ones(50))
    assert found.confidence.value == found.agreement.value == 0.5
    assert found.expected_calibration_error.value == 0.0
    assert found.brier.value == 0.25
    assert found.bins[0].weight == 1.0


def test_a_calibrated_model_stays_under_the_chance_level_in_95_percent_of_samples():
    random = np.random.default_rng(1)
    below = 0
    for _ in range(60):
        llr = random.normal(1.0, 1.0, 120)
        label = (random.random(120) < 1 / (1 + np.exp(-llr))).astype(float)
        found = calibrate(llr, label)
        below += found.expected_calibration_error.value <= found.chance_level.value
    assert below >= 52


def test_an_overconfident_model_is_above_the_chance_level():
    random = np.random.default_rng(2)
    llr = random.normal(0.5, 1.0, 500)
    label = (random.random(500) < 1 / (1 + np.exp(-llr))).astype(float)
    found = calibrate(4 * llr, label)
    assert found.expected_calibration_error.value > found.chance_level.value
    assert found.overconfidence.low > 0


def test_extreme_scores_stay_finite_and_exact():
    found = calibrate([1e4, -1e4], [1.0, 1.0])
    assert found.log_loss.value == pytest.approx(5e3)
    assert found.brier.value == pytest.approx(0.5)
    assert found.confidence.value == 1.0
    assert found.bins[-1].weight == 1.0


def test_scores_that_are_no_numbers_are_explained():
    for broken in (float("nan"), float("inf")):
        found = calibrate([1.0, broken], [1.0, 1.0])
        for name in ("expected_calibration_error", "log_loss", "agreement", "overconfidence"):
            assert found.figures[name].reason == "of 1 of 2 pairs the value is not finite", name
        json.dumps(found.as_dict(), allow_nan=False)


def test_an_empty_bin_says_so():
    found = calibrate([5.0], [1.0])
    assert found.bins[0].agreement.value is None
    assert found.bins[0].agreement.reason == "no pair has a confidence of 0.5 to 0.55"
    assert sum(b.weight for b in found.bins) == 1.0


def test_bins_of_few_pairs_are_merged_with_their_neighbours():
    # Confidences in the bins 0, 3 and 9: one pair alone in the middle, none elsewhere.
    found = calibrate([0.01] * 6 + [0.7] + [4.0] * 6, [1.0] * 13)
    assert [b.agreement.count for b in found.merged_bins] == [6, 7]
    assert [(b.low, b.high) for b in found.merged_bins] == [(0.5, 0.55), (0.55, 1.0)]
    few = calibrate([0.1, 4.0], [1.0, 1.0]).merged_bins
    assert [(b.low, b.high, b.agreement.count) for b in few] == [(0.5, 1.0, 2)]
    last = calibrate([0.01] * 6 + [4.0], [1.0] * 7).merged_bins
    assert [(b.high, b.agreement.count) for b in last] == [(1.0, 7)]
