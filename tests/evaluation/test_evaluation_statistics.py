"""Means, shares and changes: closed forms, invariances, and what is undefined."""

import json
import math

import numpy as np
import pytest
from evaluation_columns import held_out, samples

from dpo_keras.errors import InputError
from dpo_keras.evaluation import change
from dpo_keras.evaluation.statistics import (
    Z,
    average,
    correlation,
    mean,
    percentiles,
    share,
    share_difference,
)
from dpo_keras.utils.intervals import Estimate, undefined, wilson_interval


def test_known_mean_and_share():
    assert str(mean([1.0, 2.0, 3.0, 4.0])) == "2.500 (1.235 to 3.765)"  # ± 1.96 sqrt(5 / 3 / 4)
    assert str(share([1, 1, 1, 0])) == "0.750 (0.301 to 0.954)"


def test_mean_of_independent_values_has_the_textbook_interval():
    values = [1.0, 2.0, 4.0, 9.0]
    error = np.std(values, ddof=1) / 2
    found = mean(values)
    assert (found.value, found.count) == (4.0, 4)
    assert found.low == pytest.approx(4 - Z * error)
    assert found.high == pytest.approx(4 + Z * error)


def test_wilson_solves_its_quadratic():
    for p, n in ((0.0, 3), (0.2, 10), (0.5, 7.5), (0.97, 400), (1.0, 1)):
        for end in wilson_interval(p, n):
            assert (end - p) ** 2 == pytest.approx(Z * Z * end * (1 - end) / n, abs=1e-12)


def test_interval_of_a_share_holds_the_share_and_stays_within_zero_and_one():
    for hits in range(6):
        found = share([1] * hits + [0] * (5 - hits))
        assert 0 <= found.low <= found.value <= found.high <= 1
        assert found.low < found.high


def test_wilson_covers_about_95_percent():
    random = np.random.default_rng(0)
    inside = 0
    for hits in random.binomial(40, 0.85, 2000):
        low, high = wilson_interval(hits / 40, 40)
        inside += low <= 0.85 <= high
    assert 0.93 <= inside / 2000 <= 0.98


def test_copies_of_a_pair_on_one_prompt_add_no_certainty():
    values = np.array([1, 0, 1, 1, 0, 1, 1], float)
    clusters = np.repeat(np.arange(7), 10)
    for figure in (mean, share):
        once, copied = figure(values), figure(np.repeat(values, 10), None, clusters)
        assert copied.value == pytest.approx(once.value)
        assert (copied.low, copied.high) == pytest.approx((once.low, once.high))
        assert copied.count == 70


def test_where_all_agree_a_share_counts_prompts_not_pairs():
    apart, together = share(np.ones(40)), share(np.ones(40), None, np.repeat(np.arange(4), 10))
    assert apart.low == pytest.approx(40 / (40 + Z * Z))
    assert together.low == pytest.approx(4 / (4 + Z * Z))


def test_weights_scale_freely_and_weight_zero_is_absent():
    values, weight = [1.0, 0.0, 1.0, 0.5], [2.0, 1.0, 1.0, 0.0]
    for figure in (mean, share):
        found = figure(values, weight)
        assert found.value == 0.75
        assert found.count == 3
        assert figure(values, np.array(weight) * 7) == found
        assert figure(values[:3], weight[:3]) == found


def test_unequal_weights_are_worth_fewer_items():
    # Kish: (1 + 1 + 2)^2 / (1 + 1 + 4)
    found = share([1, 1, 1], [1, 1, 2])
    assert found.low == pytest.approx(wilson_interval(1.0, 16 / 6)[0])


@pytest.mark.parametrize("figure", [mean, share])
def test_what_is_undefined_says_why(figure):
    assert figure([]).reason == "there is no pair"
    assert figure([], absent="nobody came").reason == "nobody came"
    assert figure([1.0], [0.0]).reason == "every pair has weight 0"
    broken = figure([1.0, float("nan"), float("inf")], of="response")
    assert broken.value is None
    assert broken.reason == "of 2 of 3 responses the value is not finite"
    # What has no weight may hold anything.
    assert figure([1.0, float("nan")], [1.0, 0.0]).value == 1.0


def test_one_item_has_a_mean_and_no_interval():
    assert mean([3.0]) == Estimate(3.0, count=1)
    assert mean([3.0, 5.0], None, [4, 4]) == Estimate(4.0, count=2)


def test_difference_of_equal_shares_that_always_agree_is_exactly_zero():
    found = share([1, 0, 1, 0])
    same = share_difference(found, found, 1.0)
    assert same.value == same.low == same.high == 0.0


def test_paired_difference_covers_about_95_percent():
    # Both right, only before, only after, neither: the true difference is 0.25.
    chances, outcomes = [0.6, 0.05, 0.3, 0.05], np.array([[1, 1], [1, 0], [0, 1], [0, 0]])
    random = np.random.default_rng(0)
    inside = 0
    for _ in range(1000):
        before, after = outcomes[random.choice(4, 60, p=chances)].T
        found = share_difference(share(before), share(after), correlation(before, after))
        inside += found.low <= 0.25 <= found.high
    assert 0.93 <= inside / 1000 <= 0.98


def test_difference_of_certain_shares_stays_within_minus_one_and_one():
    zero, one = share(np.zeros(8)), share(np.ones(8))
    found = share_difference(zero, one, 0.0)
    assert found.value == 1.0
    assert 0.5 < found.low < found.high <= 1.0
    assert share_difference(undefined("why"), one, 0.0).reason == "why"


def test_percentiles_are_values_of_the_data():
    values = np.arange(1, 101)
    found = percentiles(values[::-1], np.ones(100), (1, 5, 50, 95, 100))
    assert found == {"1": 1.0, "5": 5.0, "50": 50.0, "95": 95.0, "100": 100.0}
    # A weight of 3 is three copies.
    doubled = percentiles([1.0, 2.0], [1.0, 3.0], (25, 26))
    assert (
        doubled
        == percentiles([1.0, 2.0, 2.0, 2.0], np.ones(4), (25, 26))
        == {
            "25": 1.0,
            "26": 2.0,
        }
    )


def test_figures_are_json_and_come_back():
    for figure in (share([1, 0, 1]), mean([2.0]), undefined("no pair", 3)):
        record = json.loads(json.dumps(figure.as_dict(), allow_nan=False))
        assert Estimate.from_dict(record) == figure
    assert undefined("no pair").as_dict() == {"value": None, "count": 0, "reason": "no pair"}


def test_correlation_follows_weights():
    assert correlation([0, 1, 5], [0, -1, 5], [1, 1, 0]) == pytest.approx(-1.0)
    assert math.isclose(correlation([1, 2, 3], [1, 2, 3]), 1.0)
    assert correlation([1, 2], [1, 2], [0, 0]) == correlation([0, 1], [1, 1]) == 0.0


def test_the_average_of_two_shares_squares_and_adds_their_distances():
    one, other = Estimate(0.5, 0.2, 0.8, 10), Estimate(0.7, 0.3, 0.9, 6)
    found = average(one, other)
    assert (found.value, found.count) == (pytest.approx(0.6), 16)
    assert found.low == pytest.approx(0.6 - 0.25)  # half of sqrt(0.3² + 0.4²)
    assert found.high == pytest.approx(0.6 + 0.5 * math.sqrt(0.3**2 + 0.2**2))
    assert average(one, undefined("why", 3)) == undefined("why", 13)


def test_a_constant_change_is_certain_however_much_pairs_differ():
    random = np.random.default_rng(0)
    margin = random.normal(0, 10, 50)
    found = change(held_out(margin), held_out(margin + 0.25), "reward_margin")
    assert found.value == pytest.approx(0.25)
    assert found.high - found.low < 1e-9


def test_change_of_accuracy_is_the_difference_and_narrower_where_outcomes_agree():
    before = held_out([1, 1, 1, -1, -1, -1, -1, -1] * 5)
    same_side = held_out([1, 1, 1, 1, 1, -1, -1, -1] * 5)
    other_side = held_out([-1, -1, -1, 1, 1, 1, 1, 1] * 5)
    found = change(before, same_side, "reward_accuracy")
    assert found.value == pytest.approx(0.25)
    apart = change(before, other_side, "reward_accuracy")
    assert apart.value == pytest.approx(0.25)
    assert found.high - found.low < apart.high - apart.low


def test_change_needs_the_same_pairs():
    reason = "before and after are of different pairs"
    before = held_out([1.0, 1.0])
    assert change(before, held_out([1.0]), "loss").reason == reason
    assert change(before, held_out([1.0, 1.0], fingerprint="x"), "loss").reason == reason
    assert change(before, held_out([1.0, 1.0], preference=[1.0, 0.5]), "loss").reason == reason


def test_change_of_what_is_not_per_pair_has_no_interval():
    found = change(held_out([1.0], entropy=2.0), held_out([1.0], entropy=1.5), "entropy")
    assert (found.value, found.low) == (-0.5, None)
    found = change(held_out([1.0]), held_out([1.0], entropy=1.5), "entropy")
    assert found.reason == "it was not measured before"


def test_change_of_samples_is_paired_by_prompt():
    before, after = samples([0] * 20), samples([1] * 15 + [0] * 5, tokens=[7] * 20)
    found = change(before, after, "preferred")
    assert found.value == 0.75
    assert 0.45 < found.low < found.value < found.high < 0.95
    assert change(before, after, "tokens").value == 2.0
    other = samples([1] * 20, prompts=["x"] * 20)
    assert change(before, other, "preferred").reason == (
        "before and after answer different prompts"
    )
    assert change(before, after, "distinct_responses").value == 0.0


def test_unlike_things_and_unknown_names_are_refused():
    with pytest.raises(InputError, match="both be HeldOut or both be Samples"):
        change(samples([1]), held_out([1.0]), "loss")
    with pytest.raises(
        InputError, match="name must be one of loss, .*, got 'lost'. did you mean 'loss'"
    ):
        change(held_out([1.0]), held_out([1.0]), "lost")
