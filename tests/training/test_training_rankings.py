"""Training on rankings: packed = buckets, two replicas = one, K = 2 is DPO, references agree."""

from dataclasses import replace

import keras
import numpy as np
import pytest
from tiny import Letters, gpt2, llama, pairs

from dpo_keras.batching import preference_dataset, tokenize_pairs
from dpo_keras.preferences.ranked_responses import RankedResponses, as_pairs
from dpo_keras.scoring import cache_reference, score_pairs
from dpo_keras.training import DPOModel, SupervisedModel, strategy, supervised_dataset


def rankings(count=8, seed=1):
    """Rankings of two to four words, of which the better repeat the prompt's letter more often."""
    random = np.random.default_rng(seed)
    found = []
    for number in range(count):
        letter = chr(97 + number)
        size = int(random.integers(2, 5))
        words = [letter * (5 - place) + chr(65 + place) * (1 + place) for place in range(size)]
        found.append(RankedResponses(letter * 4, tuple(words), tuple(range(1, size + 1))))
    return found


@pytest.fixture(scope="module")
def ranked():
    return tokenize_pairs(rankings(), Letters(), max_length=32)


def trained(data, policy, loss="plackett_luce", reference="auto", epochs=3):
    model = DPOModel(policy, reference)
    model.compile(keras.optimizers.SGD(0.5), loss=loss, run_eagerly=True)
    logs = model.fit(data, epochs=epochs, verbose=0).history
    return model, logs


def weights(model):
    return [variable.numpy() for variable in model.policy.weights]


def same(one, other, atol=1e-5):
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_packed_rows_train_as_rows_of_one_ranking(make, ranked):
    ends = []
    for layout in ({"batching": "packed", "row_length": 192, "rows": 1}, {"batching": "buckets"}):
        data = preference_dataset(ranked, batch_size=len(ranked), shuffle=False, **layout)
        assert len(data) == 1
        model, logs = trained(data, make(num_layers=1))
        ends.append(weights(model))
        sizes = [len(ranking.responses) for ranking in rankings()]
        first = np.mean([np.log(np.prod(np.arange(1, size + 1))) for size in sizes])
        assert logs["loss"][0] == pytest.approx(first, abs=1e-5)  # log K! where all are equal
        assert logs["reward_accuracy"][0] == 0.5
        assert logs["reward_accuracy"][-1] > 0.6
    same(*ends)


def test_log_probs_of_all_responses_are_those_of_pairs(ranked):
    policy = gpt2(num_layers=1)
    places = [
        (row, place)
        for row, ranking in enumerate(rankings())
        for place in range(len(ranking.responses) - 1)
    ]
    records = [
        {
            "prompt": rankings()[row].prompt,
            "chosen": rankings()[row].responses[place],
            "rejected": rankings()[row].responses[place + 1],
        }
        for row, place in places
    ]
    alone = score_pairs(policy, tokenize_pairs(records, Letters(), max_length=32))
    for batching in ("packed", "buckets"):
        found = score_pairs(policy, ranked, batching=batching)
        assert found.shape == (len(ranked), 4)
        beside = [found[row, place : place + 2] for row, place in places]
        np.testing.assert_allclose(beside, alone, atol=1e-4)


def test_two_replicas_train_as_one(ranked):
    ends = []
    for name in ("one_device", "mirrored"):
        with strategy(name).scope():
            policy = gpt2(num_layers=1)
            model = DPOModel(policy)
            model.compile(keras.optimizers.SGD(0.5), loss="plackett_luce", run_eagerly=True)
        data = preference_dataset(ranked, batch_size=4, shuffle=False, batching="buckets")
        model.fit(data, epochs=2, verbose=0)
        assert model.distribute_strategy.num_replicas_in_sync == 1 + (name == "mirrored")
        ends.append(weights(model))
    same(*ends)


def test_a_cached_reference_trains_as_a_frozen_copy(ranked):
    ends = []
    for reference in ("frozen_copy", "cached"):
        policy = gpt2(num_layers=1)
        pairs = ranked if reference == "frozen_copy" else cache_reference(policy, ranked)
        data = preference_dataset(pairs, batch_size=4, shuffle=False, batching="packed", rows=1)
        model, _ = trained(data, policy, reference=reference, epochs=2)
        ends.append(weights(model))
    same(*ends)


def test_pairs_under_plackett_luce_are_pairs_under_sigmoid():
    data = preference_dataset(pairs(6), Letters(), batch_size=3, shuffle=False, max_length=32)
    ends = [
        weights(trained(data, gpt2(num_layers=1), loss)[0]) for loss in ("plackett_luce", "sigmoid")
    ]
    same(*ends, atol=1e-7)


def test_pairs_of_one_ranking_share_its_prompt_and_its_responses():
    ranking = rankings(1, seed=3)
    pairs = tokenize_pairs(as_pairs(ranking), Letters(), max_length=32)
    whole = tokenize_pairs(ranking, Letters(), max_length=32)
    batches = [
        next(iter(preference_dataset(tokens, batch_size=8, batching="packed", rows=1)))
        for tokens in (pairs, whole)
    ]
    used = [int(np.sum(batch["padding_mask"])) for batch in batches]
    assert used[0] == used[1]
    assert [int(np.sum(batch["owner"] >= 0)) for batch in batches][0] == sum(
        part.lengths.sum() for part in whole.responses
    )


def test_a_warm_up_learns_from_the_best_response_alone(ranked):
    ends = []
    first_two = [replace(ranking.pairs()[0], weight=1.0) for ranking in rankings()]
    best = tokenize_pairs(first_two, Letters(), max_length=32)
    for tokens, layout in ((ranked, "buckets"), (best, "buckets"), (ranked, "packed")):
        data = preference_dataset(tokens, batch_size=8, shuffle=False, batching=layout)
        model = SupervisedModel(gpt2(num_layers=1), dropout=False)
        model.compile(keras.optimizers.SGD(0.5), run_eagerly=True)
        model.fit(supervised_dataset(data), verbose=0)
        ends.append(weights(model))
    same(ends[0], ends[1])
    same(ends[0], ends[2])
