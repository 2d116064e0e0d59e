"""The benchmark of wrong labels: what it flips, what it compares, how it tells of it."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
from tiny import Letters, pairs

from dpo_keras.batching import tokenize_pairs


@pytest.fixture(scope="module")
def label_noise():
    path = Path(__file__).parents[2] / "scripts" / "bench" / "label_noise.py"
    spec = importlib.util.spec_from_file_location("label_noise", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def many():
    return tokenize_pairs(pairs(300), Letters(), max_length=48)


def test_the_flipped_pairs_of_a_rate_are_among_those_of_a_higher_one(label_noise, many):
    few, more = (label_noise.with_flips(many, 200, rate, seed=1) for rate in (0.1, 0.4))
    assert few.fingerprint == more.fingerprint  # the same pairs, whatever the rate
    assert set(np.flatnonzero(few.preference == 0)) < set(np.flatnonzero(more.preference == 0))
    # 200 coins of 0.4: five standard deviations.
    assert np.sum(more.preference == 0) == pytest.approx(80, abs=35)
    np.testing.assert_array_equal(label_noise.with_flips(many, 200, 0.0, 1).preference, 1)


def test_another_seed_draws_other_pairs_and_other_flips(label_noise, many):
    first, second = (label_noise.with_flips(many, 200, 0.4, seed=seed) for seed in (1, 2))
    assert first.fingerprint != second.fingerprint
    assert (first.preference != second.preference).any()
    again = label_noise.with_flips(many, 200, 0.4, seed=1)
    np.testing.assert_array_equal(again.preference, first.preference)


def test_robust_and_cdpo_are_told_the_rate_and_sigmoid_is_not(label_noise):
    made = {name: make(1.0, 0.3) for name, make in label_noise.OBJECTIVES.items()}
    assert {name: loss.loss_type for name, loss in made.items()} == {
        "sigmoid": "sigmoid",
        "cDPO": "sigmoid",
        "robust": "robust",
    }
    assert [loss.label_smoothing for loss in made.values()] == [0.0, 0.3, 0.3]


def test_the_table_shows_mean_and_spread_over_seeds(label_noise):
    def record(objective, rate, seed, accuracy):
        return {"objective": objective, "rate": rate, "seed": seed, "accuracy": accuracy}

    records = [record("sigmoid", 0.0, seed, value) for seed, value in enumerate((0.8, 0.9, 1.0))]
    for name, value in (("sigmoid", 0.5), ("cDPO", 0.6), ("robust", 0.7)):
        records += [record(name, 0.4, seed, value) for seed in range(3)]
    lines = label_noise.table(records, "accuracy", [0.0, 0.4]).splitlines()
    # Without flips all three are one loss, which is trained once.
    assert lines[2] == "| 0 | 0.900 ± 0.100 | 0.900 ± 0.100 | 0.900 ± 0.100 |"
    assert lines[3] == "| 0.4 | 0.500 ± 0.000 | 0.600 ± 0.000 | 0.700 ± 0.000 |"
