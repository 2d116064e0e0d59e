"""Selection of pairs: closed forms, and what must not matter."""

import numpy as np
import pytest

from dpo_keras.errors import InputError
from dpo_keras.feedback.selection import SELECTIONS, Pool, select_pairs


def pool_of(size, seed=0):
    random = np.random.default_rng(seed)
    return Pool(
        probabilities=random.random(size),
        committee=random.random((3, size)),
        embeddings=random.normal(size=(size, 5)),
    )


@pytest.mark.parametrize("selection", SELECTIONS)
def test_choices_are_distinct_and_a_shorter_one_begins_a_longer_one(selection):
    pool = pool_of(40)
    all_pairs = select_pairs(selection, 99, pool, 40)
    assert sorted(all_pairs) == list(range(40))
    assert select_pairs(selection, 7, pool, 40).tolist() == all_pairs[:7].tolist()
    assert select_pairs(selection, 0, pool, 40).tolist() == []


@pytest.mark.parametrize("selection", SELECTIONS)
def test_an_empty_pool_has_nothing_to_choose(selection):
    assert select_pairs(selection, 3, pool_of(0), 0).tolist() == []


@pytest.mark.parametrize("selection", SELECTIONS)
def test_which_response_is_first_does_not_matter(selection):
    pool = pool_of(40)
    swapped = Pool(1 - pool.probabilities, 1 - pool.committee, -pool.embeddings)
    assert np.array_equal(
        select_pairs(selection, 15, pool, 40), select_pairs(selection, 15, swapped, 40)
    )


def test_random_is_fair_and_repeatable():
    counts = np.zeros(10)
    for seed in range(3000):
        counts[select_pairs("random", 3, Pool(), 10, seed)] += 1
    # Each is chosen 900 times on average; five standard deviations are 125.
    assert np.abs(counts - 900).max() < 125
    assert np.array_equal(
        select_pairs("random", 9, Pool(), 99, 4), select_pairs("random", 9, Pool(), 99, 4)
    )


def test_uncertain_orders_by_entropy():
    p = np.random.default_rng(1).random(200)
    entropy = -(p * np.log(p) + (1 - p) * np.log1p(-p))
    chosen = select_pairs("uncertain", 200, Pool(probabilities=p), 200)
    assert np.array_equal(chosen, np.argsort(-entropy))


def test_near_one_half_differences_below_the_rounding_of_entropy_count():
    p = 0.5 + np.array([3e-9, 1e-9, 2e-9])
    assert select_pairs("uncertain", 3, Pool(probabilities=p), 3).tolist() == [1, 2, 0]


def test_pairs_of_equal_worth_come_in_a_random_order():
    pool = Pool(probabilities=np.full(50, 0.5))
    chosen = [select_pairs("uncertain", 5, pool, 50, seed).tolist() for seed in range(4)]
    assert len({tuple(one) for one in chosen}) == 4


def test_disagreement_is_not_uncertainty():
    """All say 1/2: certain that it is a tie. One says yes, one no: they disagree."""
    committee = np.array([[0.5, 0.0, 0.4], [0.5, 1.0, 0.6]])
    assert select_pairs("disagreement", 3, Pool(committee=committee), 3).tolist() == [1, 2, 0]


def test_diverse_takes_one_of_each_cluster_first():
    random = np.random.default_rng(2)
    centres = 10 * np.eye(4)
    # Half of each cluster has the other sign: the same pairs with the responses swapped.
    sign = random.choice([-1, 1], 80)[:, None]
    points = sign * (centres.repeat(20, axis=0) + 0.1 * random.normal(size=(80, 4)))
    for seed in range(5):
        chosen = select_pairs("diverse", 4, Pool(embeddings=points), 80, seed)
        assert sorted(chosen // 20) == [0, 1, 2, 3]


def test_diverse_covers_within_twice_the_best_radius():
    """The guarantee of the greedy choice, against all choices of three of twelve points."""
    from itertools import combinations

    points = np.random.default_rng(3).normal(size=(12, 2))
    apart = np.minimum(
        np.linalg.norm(points[:, None] - points, axis=2),
        np.linalg.norm(points[:, None] + points, axis=2),
    )
    best = min(apart[:, list(some)].min(1).max() for some in combinations(range(12), 3))
    chosen = select_pairs("diverse", 3, Pool(embeddings=points), 12)
    assert best <= apart[:, chosen].min(1).max() <= 2 * best


def test_diverse_among_equal_points_repeats_none():
    chosen = select_pairs("diverse", 6, Pool(embeddings=np.full((6, 3), 0.1)), 6)
    assert sorted(chosen) == list(range(6))


@pytest.mark.parametrize(
    ("selection", "count", "pool", "says"),
    [
        ("uncertian", 1, Pool(), "selection must be one of random, uncertain, disagreement, "
         "diverse, got 'uncertian'. did you mean 'uncertain'?"),
        ("random", -1, Pool(), "count must be 0 or more, got -1."),
        ("diverse", 1, Pool(), "pool.embeddings must be given for selection 'diverse'."),
        ("uncertain", 1, Pool(probabilities=np.ones(3)), r"must have shape [2], got (3,)."),
        ("disagreement", 1, Pool(committee=np.ones((1, 2))), "must have shape [M >= 2, 2]"),
        ("uncertain", 1, Pool(probabilities=np.array([0.5, np.nan])), "must be finite"),
        ("disagreement", 1, Pool(committee=np.array([[0.5, 2], [1, 1]])), "in [0, 1], got 2.0."),
    ],
)  # fmt: skip
def test_wrong_input_is_named(selection, count, pool, says):
    with pytest.raises(InputError) as caught:
        select_pairs(selection, count, pool, 2)
    assert says in str(caught.value)
