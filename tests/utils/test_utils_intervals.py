"""Estimates, and Wilson's interval of a share."""

import json
import math

import pytest

from dpo_keras.utils.intervals import Estimate, Z, short, undefined, wilson, wilson_interval


def test_the_quantile_is_that_of_the_normal_distribution():
    assert 0.5 * (1 + math.erf(Z / math.sqrt(2))) == pytest.approx(0.975, abs=1e-15)


@pytest.mark.parametrize("count", [1, 2.5, 40, 10_000])
def test_at_the_ends_the_interval_has_a_closed_form(count):
    # For p = 0 it is [0, z² / (n + z²)]; p = 1 mirrors it.
    far = Z * Z / (count + Z * Z)
    assert wilson_interval(0.0, count) == pytest.approx((0.0, far), abs=1e-12)
    assert wilson_interval(1.0, count) == pytest.approx((1 - far, 1.0), abs=1e-12)


@pytest.mark.parametrize(("share", "count"), [(0.5, 10), (0.2, 7.5), (0.97, 400), (1 / 3, 3)])
def test_both_ends_lie_z_standard_errors_from_the_share(share, count):
    low, high = wilson_interval(share, count)
    assert 0 <= low < share < high <= 1
    for end in (low, high):
        assert abs(end - share) == pytest.approx(Z * math.sqrt(end * (1 - end) / count))
    mirrored = wilson_interval(1 - share, count)
    assert mirrored == pytest.approx((1 - high, 1 - low))


@pytest.mark.parametrize("share", [0.0, 0.1, 1 / 3, 0.7, 1.0])
def test_the_share_never_lies_outside_its_interval(share):
    for count in (1e-3, 1, 1e6, 1e15):
        low, high = wilson_interval(share, count)
        assert 0 <= low <= share <= high <= 1


def test_a_share_of_counts():
    found = wilson(9, 10)
    assert (found.value, found.count) == (0.9, 10)
    assert (found.low, found.high) == wilson_interval(0.9, 10)
    assert wilson(0, 0) == undefined("there is nothing to count")
    assert wilson(0, 0, "nobody judged").reason == "nobody judged"


def test_estimates_are_written_with_their_interval_or_their_reason():
    found = Estimate(0.9123, 0.8741, 0.9402, count=250)
    assert str(found) == f"{found}" == "0.912 (0.874 to 0.940)"
    assert f"{found:.0%}" == "91% (87% to 94%)"
    assert str(Estimate(2.0)) == "2.000"
    assert f"{Estimate(2.0, low=1.0):.1f}" == "2.0"  # half an interval is none
    assert f"{undefined('no pair'):.0%}" == str(undefined("no pair")) == "undefined: no pair"


@pytest.mark.parametrize(
    "estimate",
    [Estimate(0.0, 0.0, 0.0, 3), Estimate(2.5, count=1), Estimate(1.0), undefined("none", 4)],
)
def test_estimates_come_back_from_json(estimate):
    record = json.loads(json.dumps(estimate.as_dict(), allow_nan=False))
    assert Estimate.from_dict(record) == estimate


def test_only_what_is_known_is_written():
    assert Estimate(0.5, count=3).as_dict() == {"value": 0.5, "count": 3}
    assert undefined("why").as_dict() == {"value": None, "count": 0, "reason": "why"}


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.5, "0.500"),
        (0.0, "0.000"),
        (-0.0125, "-0.013"),
        (0.00012, "0.00012"),
        (9.9994, "9.999"),
        (12.3456, "12.35"),
        (-1234.5, "-1234"),
        (1234567.0, "1.23e+06"),
    ],
)
def test_numbers_are_short_for_people(value, text):
    assert short(value) == text
