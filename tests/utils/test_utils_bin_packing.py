import numpy as np

from dpo_keras.utils.bin_packing import Capacity, Sizes, best_fit, split_rows, squeeze_rows


def of_one_pair(tokens, responses):
    return Sizes(tokens, responses, np.ones_like(tokens))


def test_each_pair_goes_into_the_fullest_row_that_holds_it():
    sizes = of_one_pair(np.array([6, 5, 4, 5]), np.array([2, 2, 2, 2]))
    rows = best_fit(np.arange(4), sizes, Capacity(length=10, slots=8, pairs=4))
    assert rows == [[0, 2], [1, 3]]


def test_a_row_takes_no_pair_from_far_behind_in_the_stream():
    sizes = of_one_pair(np.array([6] + [9] * 20 + [4]), np.ones(22, np.int64))
    rows = best_fit(np.arange(22), sizes, Capacity(10, 10, 10), window=4)
    assert rows[0] == [0] and rows[-1] == [21]
    assert best_fit(np.arange(22), sizes, Capacity(10, 10, 10))[0] == [0, 21]


def test_response_slots_and_pair_slots_bound_a_row_as_tokens_do():
    sizes = of_one_pair(np.full(6, 2), np.array([3, 3, 1, 1, 1, 1]))
    rows = best_fit(np.arange(6), sizes, Capacity(length=100, slots=4, pairs=3))
    assert rows == [[0, 2], [1, 3], [4, 5]]
    rows = best_fit(np.arange(6), sizes, Capacity(length=100, slots=100, pairs=4))
    assert rows == [[0, 1, 2, 3], [4, 5]]
    of_trees = Sizes(np.full(4, 2), np.ones(4, int), np.array([3, 2, 1, 1]))
    rows = best_fit(np.arange(4), of_trees, Capacity(length=100, slots=100, pairs=4))
    assert rows == [[0, 2], [1, 3]]


def test_rows_are_split_until_there_are_enough_and_left_empty_only_without_pairs():
    assert split_rows([[0, 1, 2], [3]], 4) == [[0], [1], [2], [3]]
    assert split_rows([[0, 1]], 3) == [[0], [1], []]
    assert split_rows([[0, 1, 2, 3], [4]], 3) == [[0, 1], [2, 3], [4]]
    order = list(range(16))
    assert split_rows([order], 8) == [order[begin : begin + 2] for begin in range(0, 16, 2)]


def test_the_pairs_of_dissolved_rows_are_packed_longest_first():
    sizes = of_one_pair(np.array([6, 4, 4, 6]), np.ones(4, int))
    assert squeeze_rows([[1, 2], [0], [3]], 2, sizes, Capacity(10, 10, 10)) == [[0, 1], [3, 2]]


def test_rows_too_many_are_dissolved_into_others_or_given_up():
    sizes, capacity = (
        of_one_pair(np.array([5, 5, 7, 3, 9]), np.ones(5, np.int64)),
        Capacity(10, 9, 9),
    )
    squeezed = squeeze_rows([[0], [1], [2], [3], [4]], 3, sizes, capacity)
    assert sorted(map(sorted, squeezed)) == [[0, 1], [2, 3], [4]]
    assert squeeze_rows([[0], [1], [2], [3], [4]], 2, sizes, capacity) is None
