import itertools

import numpy as np
import pytest

from dpo_keras.batching import BucketPlan, Ragged, TokenizedPairs, epoch_order, plan_buckets
from dpo_keras.errors import InputError


def of_lengths(lengths, response=1, max_length=None):
    """Pairs whose longer sequence has the given lengths."""
    prompt = Ragged.from_lists([[5] * (n - response) for n in lengths])
    answer = Ragged.from_lists([[6] * response for _ in lengths])
    ones = np.ones(len(lengths), np.float32)
    return TokenizedPairs(prompt, answer, answer, ones, ones, max_length=max_length)


@pytest.fixture
def skewed():
    random = np.random.default_rng(0)
    return np.minimum(2 + random.lognormal(3, 0.8, 500).astype(int), 120)


@pytest.mark.parametrize("buckets", [1, 2, 3, 4])
def test_no_choice_of_as_many_lengths_computes_fewer_token_places(skewed, buckets):
    plan = plan_buckets(of_lengths(skewed), batch_size=1, buckets=buckets)

    def places(bounds):
        return np.array(bounds)[np.searchsorted(bounds, skewed)].sum()

    top = -(-skewed.max() // 8) * 8
    best = min(
        places([*choice, top])
        for n in range(buckets)
        for choice in itertools.combinations(range(8, top, 8), n)
    )
    assert places(plan.lengths) == best and len(plan.lengths) <= buckets


def test_every_pair_is_in_the_smallest_bucket_that_holds_it(skewed):
    plan = plan_buckets(of_lengths(skewed), batch_size=8, buckets=4)
    lengths = np.array((0, *plan.lengths))
    assert (skewed <= lengths[plan.bucket + 1]).all()
    assert (skewed > lengths[plan.bucket]).all()


def test_slots_hold_the_longest_responses_and_never_fall():
    # The short pairs have the long responses.
    prompt = Ragged.from_lists([[5] * n for n in (1, 1, 60, 60)])
    answer = Ragged.from_lists([[6] * n for n in (14, 15, 1, 2)])
    ones = np.ones(4, np.float32)
    pairs = TokenizedPairs(prompt, answer, answer, ones, ones)
    plan = plan_buckets(pairs, batch_size=2, buckets=2)
    assert plan.lengths == (16, 64) and plan.slots == (32, 32)


def test_a_bucket_with_less_than_one_batch_is_merged_upwards():
    lengths = [8] * 3 + [64] * 20 + [128] * 20
    assert plan_buckets(of_lengths(lengths), 4, 3).lengths == (64, 128)
    assert plan_buckets(of_lengths(lengths), 3, 3).lengths == (8, 64, 128)


def test_one_bucket_is_as_long_as_the_longest_pair():
    plan = plan_buckets(of_lengths([5, 30, 31]), 8, buckets=1)
    assert plan.lengths == (32,) and plan.bucket.tolist() == [0, 0, 0]


def test_rounding_never_leads_beyond_max_length():
    assert plan_buckets(of_lengths([30, 60, 61], max_length=61), 1, 2).lengths[-1] == 61


@pytest.mark.parametrize(
    ("longest", "bounds"),
    [(256, (248, 256)), (257, (256, 272)), (1024, (1008, 1024)), (1025, (1024, 1088))],
)
def test_lengths_are_multiples_of_8_then_of_16_then_of_64(longest, bounds):
    shorter = {256: 248, 257: 248, 1024: 1000, 1025: 1000}[longest]
    assert plan_buckets(of_lengths([shorter] * 5 + [longest]), 1, buckets=2).lengths == bounds


def test_given_lengths_are_used():
    plan = plan_buckets(of_lengths([5, 20, 31]), 1, buckets=[40, 10])
    assert plan.lengths == (10, 40) and plan.bucket.tolist() == [0, 1, 1]
    with pytest.raises(InputError, match="buckets must hold the longest pair, 31 tokens"):
        plan_buckets(of_lengths([5, 31]), 1, buckets=[10, 30])
    assert plan_buckets(of_lengths([5, 20, 31]), 1, buckets=[10, 20, 40]).lengths == (10, 20, 40)


@pytest.mark.parametrize("buckets", [0, 17, True])
def test_wrong_bucket_counts_are_refused(buckets):
    with pytest.raises(InputError, match="buckets must be 1 to 16"):
        plan_buckets(of_lengths([5]), 1, buckets=buckets)


@pytest.fixture
def plan(skewed):
    return plan_buckets(of_lengths(skewed[:203]), batch_size=8, buckets=4)


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("epoch", [0, 1, 7])
def test_an_epoch_brings_every_pair_exactly_once(plan, shuffle, epoch):
    order = epoch_order(plan, 8, seed=3, epoch=epoch, shuffle=shuffle)
    rows = order.rows[order.rows >= 0]
    assert sorted(rows) == list(range(203))


def test_at_most_one_batch_is_short_and_it_is_the_last(plan):
    order = epoch_order(plan, 8)
    assert len(order) == 26  # ceil(203 / 8)
    assert (order.rows[:-1] >= 0).all() and (order.rows[-1] >= 0).sum() == 203 % 8
    assert len(epoch_order(plan, 8, drop_remainder=True)) == 25


def test_pairs_only_move_up_into_longer_buckets(plan):
    order = epoch_order(plan, 8)
    for shape, rows in zip(order.bucket, order.rows, strict=True):
        assert (plan.bucket[rows[rows >= 0]] <= shape).all()
    # Only the left-over pairs do: fewer than a batch per bucket.
    moved = sum(
        (plan.bucket[rows[rows >= 0]] < shape).sum()
        for shape, rows in zip(order.bucket, order.rows, strict=True)
    )
    assert moved < 8 * len(plan.lengths)


def test_the_order_is_a_function_of_seed_and_epoch_alone(plan):
    first = epoch_order(plan, 8, seed=1, epoch=2)
    again = epoch_order(plan, 8, seed=1, epoch=2)
    assert (first.rows == again.rows).all() and (first.bucket == again.bucket).all()
    for other in ({"seed": 2, "epoch": 2}, {"seed": 1, "epoch": 3}):
        assert (epoch_order(plan, 8, **other).rows != first.rows).any()


def test_batches_of_all_lengths_are_mixed(plan):
    buckets = epoch_order(plan, 8).bucket
    assert (np.diff(buckets) < 0).any()


def test_without_shuffling_one_bucket_keeps_file_order():
    plan = BucketPlan((8,), (8,), np.zeros(5, np.int64))
    order = epoch_order(plan, 2, shuffle=False)
    assert order.rows.tolist() == [[0, 1], [2, 3], [4, -1]]


def test_without_shuffling_batches_come_as_they_fill_up():
    plan = BucketPlan((8, 16), (8, 8), np.array([1, 0, 0, 1, 0, 0]))
    order = epoch_order(plan, 2, shuffle=False)
    assert order.rows.tolist() == [[1, 2], [0, 3], [4, 5]]


def test_fewer_pairs_than_one_batch_still_make_one():
    plan = BucketPlan((8, 16), (8, 8), np.array([0, 1]))
    order = epoch_order(plan, 4, shuffle=False)
    assert order.rows.tolist() == [[0, 1, -1, -1]] and order.bucket.tolist() == [1]
