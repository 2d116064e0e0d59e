import json
import zlib
from dataclasses import replace

import numpy as np
import pytest
from batching_compared import assert_same, batches
from hh_sample import write_hh_sample

from dpo_keras.batching import (
    Ragged,
    TokenizedPairs,
    packed_order,
    plan_packing,
    preference_dataset,
    steps_per_epoch,
    tokenize_pairs,
)
from dpo_keras.errors import InputError
from dpo_keras.preferences import read_preferences
from dpo_keras.utils.bin_packing import best_fit, squeeze_rows


def of_lengths(*lengths, **fields):
    """Pairs of the given tokens (prompts, chosen, rejected); every token is a number of its own."""
    total, parts = 0, []
    for sizes in lengths:
        splits = np.concatenate([[0], np.cumsum(sizes)])
        parts.append(Ragged(np.arange(total, total + splits[-1], dtype=np.int32), splits))
        total += int(splits[-1])
    ones = np.ones(len(lengths[0]), np.float32)
    return TokenizedPairs(*parts, ones, ones, pad=-1, **fields)


@pytest.fixture(scope="module")
def tokens():
    """As uneven as preference data are: mean 90 tokens, some of 300."""
    random = np.random.default_rng(0)
    sizes = np.minimum(random.lognormal([[3], [2.4], [2.4]], 0.9, (3, 211)).astype(int) + 1, 100)
    return of_lengths(*sizes)


def numbers(batch):
    """Each pair is known by its chosen response's first token."""
    first = np.where(batch["owner"] % 2 == 0, batch["owner"], -1)
    return [
        int(target[np.argmax(owner == slot)])
        for owner, target in zip(first, batch["target"], strict=True)
        for slot in np.unique(owner[owner >= 0])
    ]


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize(
    "shape", [{}, {"rows": 1}, {"length": 400, "rows": 3}, {"replicas": 2}, {"rows": 50}]
)
def test_every_epoch_holds_each_pair_once_in_as_many_steps_and_within_every_row(
    tokens, shape, shuffle
):
    plan = plan_packing(tokens, 8, shuffle=shuffle, **shape)
    for epoch in range(6):
        order = packed_order(plan, epoch)
        assert order.pairs.shape == (plan.steps, plan.rows, plan.pairs)
        assert sorted(order.pairs[order.pairs >= 0]) == list(range(len(tokens)))
        for row in order.pairs.reshape(-1, plan.pairs):
            pairs = row[row >= 0]
            assert tokens.tree_tokens[pairs].sum() <= plan.length
            assert tokens.response_tokens[pairs].sum() <= plan.slots


def test_rows_are_full_and_steps_alike_on_data_as_uneven_as_preferences(tokens):
    plan = plan_packing(tokens, 8, length=512, rows=2)
    assert plan.fill >= 0.95
    counts = (packed_order(plan, 1).pairs >= 0).sum(axis=(1, 2))
    assert counts.std() < 0.15 * counts.mean()


def test_rows_of_1024_tokens_are_95_percent_full_on_conversations(tmp_path):
    class Quarters:
        """Four letters to a token, about what byte pairs come to."""

        start_token_id, end_token_id, pad_token_id = 1, 2, 0

        def tokenize(self, texts):
            return [
                [
                    3 + zlib.crc32(text[at : at + 4].encode()) % 2**20
                    for at in range(0, len(text), 4)
                ]
                for text in texts
            ]

    sample = write_hh_sample(tmp_path / "sample.jsonl.gz", count=1000)
    pairs = tokenize_pairs(read_preferences(sample), Quarters(), max_length=512)
    assert len(pairs) > 900
    for rows in (1, 4):
        plan = plan_packing(pairs, length=1024, rows=rows)
        assert plan.fill >= 0.95
        order = packed_order(plan, 3)
        assert sorted(order.pairs[order.pairs >= 0]) == list(range(len(pairs)))


@pytest.mark.parametrize("batch_size", [4, 8, 16, 64])
@pytest.mark.parametrize("replicas", [1, 2])
def test_steps_hold_batch_size_pairs_on_average_in_rows_that_replicas_share(
    tokens, batch_size, replicas
):
    plan = plan_packing(tokens, batch_size, replicas=replicas)
    assert plan.rows % replicas == 0
    assert plan.length % 8 == 0 and plan.length >= tokens.tree_tokens.max()
    # Rows must hold the longest tree, so that a small batch may become a larger one.
    least = plan.length == -(-tokens.tree_tokens.max() // 8) * 8 and plan.rows == replicas
    assert least or plan.steps == pytest.approx(-(-len(tokens) // batch_size), rel=0.1)


def test_a_small_set_takes_no_step_more_for_the_coarseness_of_lengths():
    """Rows of 896 tokens would hold these in 9 steps, and rows of 960 are longer than 8 need."""
    pairs = of_lengths(*np.random.default_rng(1).integers(20, 120, (3, 64)))
    plan = plan_packing(pairs, 8)
    assert (plan.steps, plan.rows, plan.length) == (8, 2, 928)


def test_orders_differ_by_epoch_and_seed_and_by_nothing_else(tokens):
    def pairs(seed, epoch):
        return packed_order(plan_packing(tokens, 8, seed=seed), epoch).pairs.tolist()

    assert pairs(1, 2) == pairs(1, 2)
    assert pairs(1, 2) != pairs(1, 1) != pairs(2, 1)


def test_equal_plans_are_made_once(tokens):
    plan = plan_packing(tokens, 8)
    assert plan_packing(tokens, 8) is plan
    assert plan_packing(tokens, 8, seed=1) is not plan


def test_without_shuffling_pairs_come_in_file_order_as_far_as_rows_allow(tokens):
    plan = plan_packing(tokens, 8, shuffle=False)
    order = packed_order(plan, 3).pairs
    assert order.tolist() == packed_order(plan, 0).pairs.tolist()
    flat = order.reshape(-1, plan.pairs)
    assert (np.diff(flat[:, 0]) > 0).all()  # rows in the order of their first pair
    assert all((np.diff(row[row >= 0]) > 0).all() for row in flat)


def test_an_epoch_that_packs_badly_takes_the_rows_of_the_first():
    """5 + 3 + 2 and 4 + 3 + 3 fill two rows; best fit decreasing begins with 5 + 4: three rows."""
    pairs = of_lengths([3, 1, 1, 2, 1, 1], [1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1])
    plan = plan_packing(pairs, length=10, rows=1)
    plan = replace(plan, steps=2, pairs=3, slots=10, partition=[[0, 1, 2], [3, 4, 5]])
    assert pairs.tree_tokens.tolist() == [5, 3, 2, 4, 3, 3]
    assert squeeze_rows([[i] for i in range(6)], 2, plan.sizes, plan.capacity) is None
    fallen = 0
    for epoch in range(1, 9):
        order = packed_order(plan, epoch).pairs
        assert sorted(order.reshape(-1).tolist()) == list(range(6))
        assert (pairs.tree_tokens[order].sum(-1) == 10).all()
        stream = np.random.default_rng([0, epoch]).permutation(6)
        fallen += len(best_fit(stream, plan.sizes, plan.capacity)) > 2
    assert fallen


def test_a_row_may_be_exactly_full_and_responses_and_prompts_of_one_token():
    pairs = of_lengths([1, 6, 1, 6], [1, 1, 1, 1], [1, 1, 1, 1])
    plan = plan_packing(pairs, length=11, rows=2, shuffle=False)
    assert (plan.steps, plan.fill) == (1, 1.0)
    dataset = preference_dataset(pairs, batching="packed", row_length=11, rows=2, shuffle=False)
    (batch,) = batches(dataset)
    assert batch["padding_mask"].min() == 1
    assert batch["reach"][0, 0].tolist() == [3, 1, 1] + [8, 7, 6, 5, 4, 3] + [1, 1]
    assert batch["source"][0, :4].tolist() == [0, 0, 8, 8]


def test_rows_stay_empty_where_there_are_fewer_pairs_than_rows():
    pairs = of_lengths([1, 2, 3], [1, 1, 1], [1, 1, 1])
    for epoch in (0, 1):
        order = packed_order(plan_packing(pairs, length=5, rows=4), epoch).pairs
        assert order.shape[:2] == (1, 4) and sorted(order[order >= 0]) == [0, 1, 2]


def test_a_pair_longer_than_the_row_is_named():
    pairs = of_lengths([10, 50, 60], [5, 5, 5], [5, 5, 5])
    with pytest.raises(InputError) as error:
        plan_packing(pairs, length=60)
    assert "row_length must hold the longest pair, 70 tokens" in str(error.value)
    assert error.value.problems[0].argument == "row_length"
    assert error.value.problems[1:] == ["pair 2: 70 tokens"]
    assert plan_packing(pairs, length=70).length == 70


def test_what_cannot_be_packed_is_refused_by_name(tokens):
    with pytest.raises(InputError, match="rows must be a multiple of the 2 replicas"):
        plan_packing(tokens, rows=3, replicas=2)
    with pytest.raises(InputError) as error:
        plan_packing(tokens, 0, length=0, rows=0, replicas=0)
    for name in ("batch_size", "row_length", "rows", "replicas"):
        assert f"{name} must be an integer >= 1, got 0" in str(error.value)
    with pytest.raises(InputError, match="no pair to pack"):
        plan_packing(of_lengths([], [], []))
    with pytest.raises(InputError, match="prompt 1 has no token"):
        plan_packing(of_lengths([2, 0], [1, 1], [1, 1]))
    with pytest.raises(InputError) as error:
        preference_dataset(tokens, row_length=512, rows=2, batching="buckets")
    assert [problem.argument for problem in error.value.problems] == ["row_length", "rows"]
    with pytest.raises(InputError, match="must be 'auto', 'packed' or 'buckets', got 'pack'"):
        preference_dataset(tokens, batching="pack")
    with pytest.raises(InputError, match="drop_remainder has no effect"):
        preference_dataset(tokens, batching="packed", drop_remainder=True)
    with pytest.raises(InputError, match="TokenizedPairs"):
        steps_per_epoch(10, 4, batching="packed")


def test_packed_streams_bring_each_pair_once_an_epoch_in_one_static_shape(tokens):
    dataset = preference_dataset(tokens, batch_size=8, batching="packed", epochs=3)
    assert all(spec.shape.is_fully_defined() for spec in dataset.element_spec.values())
    found = batches(dataset)
    steps = steps_per_epoch(tokens, 8, batching="packed")
    assert int(dataset.cardinality()) == len(found) == 3 * steps
    assert len({tuple((n, v.shape, v.dtype) for n, v in batch.items()) for batch in found}) == 1
    every = sorted(tokens.chosen.flat_values[tokens.chosen.row_splits[:-1]].tolist())
    epochs = [sum(map(numbers, found[at : at + steps]), []) for at in range(0, len(found), steps)]
    assert [sorted(epoch) for epoch in epochs] == [every] * 3
    assert epochs[0] != epochs[1]
    assert sum(batch["weight"].sum() for batch in found) == 3 * len(tokens)


@pytest.mark.parametrize("start", [1, 7, 40, 53])
def test_a_packed_stream_can_be_taken_up_at_any_step(tokens, start):
    def stream(**options):
        return preference_dataset(
            tokens, batch_size=8, batching="packed", seed=4, epochs=3, **options
        )

    whole, rest = batches(stream()), stream(start_step=start)
    assert int(rest.cardinality()) == len(whole) - start
    assert_same(whole[start:], batches(rest))


def test_iterating_a_packed_stream_again_brings_the_next_epoch(tokens):
    dataset = preference_dataset(tokens, batch_size=16, batching="packed")
    two = preference_dataset(tokens, batch_size=16, batching="packed", epochs=2)
    assert_same(batches(dataset) + batches(dataset), batches(two))
    still = preference_dataset(tokens, batch_size=16, batching="packed", shuffle=False)
    assert_same(batches(still), batches(still))


def test_a_set_smaller_than_a_batch_is_one_step_with_nothing_lost():
    pairs = of_lengths([3, 4], [2, 2], [1, 5])
    (batch,) = batches(preference_dataset(pairs, batch_size=64, batching="packed", replicas=2))
    assert batch["weight"].sum() == 2 and len(batch["owner"]) % 2 == 0
    json.dumps(numbers(batch))


def conversations():
    """Three prompts with four responses in all pairs, a dialog of three turns, and lone pairs."""
    random = np.random.default_rng(7)

    def text(least, most):
        return random.integers(5, 1000, random.integers(least, most)).tolist()

    found = []
    for _ in range(3):
        prompt, answers = text(20, 40), [text(5, 20) for _ in range(4)]
        found += [(prompt, a, b) for n, a in enumerate(answers) for b in answers[n + 1 :]]
    dialog = text(20, 30)
    for _ in range(3):
        answer = text(5, 9)
        found.append((dialog, answer, text(5, 9)))
        dialog = dialog + answer + text(5, 9)
    found += [(text(20, 40), text(5, 20), text(5, 20)) for _ in range(6)]
    found = [found[place] for place in random.permutation(len(found))]
    ones = np.ones(len(found), np.float32)
    return TokenizedPairs(
        *(Ragged.from_lists(part) for part in zip(*found, strict=True)), ones, ones
    )


def test_pairs_of_a_prompt_and_turns_that_continue_it_share_a_tree():
    pairs = conversations()
    plan = plan_packing(pairs, 16, length=512, rows=1)
    assert sorted(plan.sizes.pairs.tolist()) == [1] * 6 + [3] + [6] * 3
    assert plan.trees.max() == 9
    alone = plan_packing(pairs, 16, length=512, rows=1, share_prompts=False)
    assert (alone.sizes.pairs == 1).all()
    assert plan.sizes.tokens.sum() < 0.6 * alone.sizes.tokens.sum()
    for epoch in range(3):
        order = packed_order(plan, epoch).pairs
        assert sorted(order[order >= 0]) == list(range(len(pairs)))
        # Pairs of a tree are in one row, and what the plan counts is what the row holds.
        row_of = np.empty(len(pairs), int)
        for number, row in enumerate(order.reshape(-1, plan.pairs)):
            row_of[row[row >= 0]] = number
        assert len(set(zip(plan.trees, row_of, strict=True))) == 10
    (found, *_) = batches(preference_dataset(pairs, batch_size=64, batching="packed"))
    whole = plan_packing(pairs, 64)
    assert found["padding_mask"].sum() == whole.sizes.tokens.sum()
    assert (found["owner"] >= 0).sum() == whole.sizes.responses.sum()


def test_trees_are_halved_until_they_fit_and_undone_where_they_save_little():
    pairs = conversations()
    for most in ({"length": 110, "rows": 1}, {"replicas": 4}):
        plan = plan_packing(pairs, 8, **most)
        assert plan.sizes.pairs.max() <= 8 // most.get("replicas", 1)
        assert plan.sizes.tokens.max() <= plan.length
        assert plan.sizes.pairs.sum() == len(pairs)
    start = [[1]] * 20  # every text begins with the start token alone
    answers = [[[n] * 10 for n in range(k, 20 * k + k, k)] for k in (5, 7)]
    ones = np.ones(20, np.float32)
    parts = (Ragged.from_lists(part) for part in (start, *answers))
    assert (plan_packing(TokenizedPairs(*parts, ones, ones), 64).sizes.pairs == 1).all()


def test_a_resumed_stream_of_trees_goes_on_as_the_whole_one_does():
    pairs = conversations()
    options = {"batch_size": 8, "batching": "packed", "seed": 4, "epochs": 3}
    whole = batches(preference_dataset(pairs, **options))
    assert_same(whole[3:], batches(preference_dataset(pairs, start_step=3, **options)))
