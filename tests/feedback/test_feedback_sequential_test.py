"""The anytime-valid test: closed forms, false alarms under constant looking, power, extremes."""

import math

import numpy as np
import pytest
from scipy.stats import betabinom

from dpo_keras.errors import InputError
from dpo_keras.feedback.sequential_test import SequentialTest, confidence_interval, log_e_value


def paths(mean, runs=2000, looks=1000, ties=0.0, seed=0):
    """Log e-values against 1/2 at every look, `[runs, looks]`, and the sums of the values."""
    random = np.random.default_rng(seed)
    values = (random.random((runs, looks)) < mean).astype(float)
    values[random.random((runs, looks)) < ties] = 0.5
    wins, count = values.cumsum(1), np.arange(1.0, looks + 1)
    lgamma = np.frompyfunc(math.lgamma, 1, 1)
    mixture = lgamma(1 + wins) + lgamma(1 + count - wins) - lgamma(2 + count)
    return mixture.astype(float) + count * math.log(2), wins


@pytest.fixture(scope="module")
def equal():
    return paths(0.5)


@pytest.mark.parametrize(("wins", "count"), [(0, 0), (3, 3), (7, 10), (40, 90)])
@pytest.mark.parametrize("mean", [0.5, 0.2, 0.97])
def test_evidence_is_the_beta_binomial_against_the_binomial(wins, count, mean):
    """Under a uniform prior every number of wins is as likely: 1 / (n + 1)."""
    assert betabinom.pmf(wins, count, 1, 1) == pytest.approx(1 / (count + 1))
    binomial = math.comb(count, wins) * mean**wins * (1 - mean) ** (count - wins)
    assert math.exp(log_e_value(wins, count, mean)) == pytest.approx(1 / (count + 1) / binomial)


def test_the_simulation_follows_the_test(equal):
    log_e, wins = equal
    values = np.diff(wins[0], prepend=0)
    test, seen = SequentialTest(), []
    for value in values[:50]:
        test.add(value)
        seen.append(test.log_e)
    np.testing.assert_allclose(seen, log_e[0, :50], atol=1e-9)


@pytest.mark.parametrize("ties", [0.0, 0.4])
def test_looking_after_every_choice_gives_no_more_false_alarms_than_alpha(equal, ties):
    log_e = paths(0.5, ties=ties)[0] if ties else equal[0]
    for alpha in (0.05, 0.2):
        alarms = (log_e.max(axis=1) >= -math.log(alpha)).mean()
        assert alarms <= alpha
    assert alarms > 0.01 or ties  # the test is not empty


def test_a_test_that_is_valid_only_once_would_be_cheated_by_looking(equal):
    """What the ordinary z-test does with the same 1,000 looks."""
    count = np.arange(1.0, 1001)
    z = np.abs(equal[1] - count / 2) / np.sqrt(count / 4)
    assert (z[:, 20:].max(axis=1) > 1.96).mean() > 0.3


def test_a_difference_of_sixty_to_forty_is_found():
    decided = paths(0.6)[0] >= math.log(20)
    assert decided.any(axis=1).mean() > 0.995
    assert np.median(decided.argmax(axis=1)) < 350


@pytest.mark.parametrize("mean", [0.1, 0.5, 0.8])
def test_all_intervals_together_hold_the_mean(mean):
    random = np.random.default_rng(5)
    missed = 0
    for _ in range(300):
        wins = (random.random(300) < mean).cumsum()
        missed += any(log_e_value(int(wins[n - 1]), n, mean) >= math.log(20) for n in range(1, 301))
    assert missed / 300 <= 0.05


def test_the_ends_of_an_interval_are_where_the_evidence_is_one_over_alpha():
    for wins, count in [(3, 10), (500.5, 1000), (1, 40)]:
        for end in confidence_interval(wins, count, 0.1):
            assert math.exp(log_e_value(wins, count, end)) == pytest.approx(10, rel=1e-6)
    assert confidence_interval(0, 0) == (0, 1)
    assert confidence_interval(0, 9)[0] == 0 and confidence_interval(9, 9)[1] == 1
    low, high = confidence_interval(20, 80)
    mirrored = confidence_interval(60, 80)
    assert (1 - high, 1 - low) == pytest.approx(mirrored)


def test_order_changes_neither_evidence_nor_interval():
    values = np.random.default_rng(1).choice([0, 0.5, 1], 200)
    one, other = SequentialTest().extend(values), SequentialTest().extend(values[::-1])
    assert (one.log_e, one.interval) == (other.log_e, other.interval)


def test_what_is_decided_stays_decided():
    test = SequentialTest().extend([1] * 20)
    p = test.p_value
    test.extend([0] * 20)
    assert (test.decided_after, test.first_wins, test.p_value) == (8, True, p)
    assert test.log_e < 0
    assert SequentialTest().extend([0] * 20).first_wins is False


def test_a_million_choices_stay_finite():
    test = SequentialTest()
    test.count, test.wins = 999_999, 502_999.5
    test.add(0.5)
    assert test.count == 1_000_000 and math.isfinite(test.log_e) and test.decided_after
    low, high = test.interval
    assert 0.5 < low < 0.503 < high < 0.506
    # Stirling: log B = n log-likelihood at the maximum, less log sqrt(n / (2 pi q (1 - q))).
    q, n = 0.503, 1e6
    kl = q * math.log(2 * q) + (1 - q) * math.log(2 * (1 - q))
    by_stirling = n * kl - 0.5 * math.log(n / (2 * math.pi * q * (1 - q)))
    assert test.log_e == pytest.approx(by_stirling, abs=1e-4)
    assert math.isfinite(log_e_value(10**6, 10**6)) and log_e_value(0, 10**6) > 6e5


@pytest.mark.parametrize("alpha", [0, 1, -0.1])
def test_alpha_is_a_chance(alpha):
    with pytest.raises(InputError, match="alpha must be between 0 and 1"):
        SequentialTest(alpha)


@pytest.mark.parametrize("value", [-0.1, 1.1, math.nan])
def test_a_value_is_a_share_of_votes(value):
    with pytest.raises(InputError, match="value must be in"):
        SequentialTest().add(value)
