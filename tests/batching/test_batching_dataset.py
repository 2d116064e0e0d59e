import itertools
import json
import os
import socket
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import tensorflow as tf
from batching_compared import assert_same, batches

from dpo_keras.batching import (
    collate,
    epoch_order,
    plan_buckets,
    preference_dataset,
    steps_per_epoch,
    tokenize_pairs,
)
from dpo_keras.errors import InputError
from dpo_keras.training import supervised_dataset


class Letters:
    start_token_id, end_token_id, pad_token_id = 1, 2, 0
    tokenize = staticmethod(lambda texts: [[ord(letter) for letter in text] for text in texts])


@pytest.fixture(scope="module")
def tokens(pair):
    random = np.random.default_rng(0)

    def word(most):
        return "".join(map(chr, random.integers(97, 123, random.integers(1, most))))

    pairs = [pair(word(60), word(30) + "y", word(30) + "n") for _ in range(43)]
    return tokenize_pairs(pairs, Letters(), max_length=64)


def names(found):
    """One recognisable number per pair: its targets."""
    return [
        tuple(row[owner >= 0])
        for batch in found
        for row, owner, weight in zip(batch["target"], batch["owner"], batch["weight"], strict=True)
        if weight[0] > 0
    ]


@pytest.mark.parametrize("buckets", [1, 4])
def test_the_stream_is_the_reference_collation_of_the_epochs_orders(tokens, buckets):
    plan = plan_buckets(tokens, 4, buckets)
    expected = []
    for epoch in range(2):
        order = epoch_order(plan, 4, seed=5, epoch=epoch)
        expected += [
            collate(tokens, rows, plan.lengths[shape], plan.slots[shape], 4)
            for shape, rows in zip(order.bucket, order.rows, strict=True)
        ]
    found = batches(preference_dataset(tokens, batch_size=4, seed=5, epochs=2, buckets=buckets))
    assert_same(found, expected)


def test_every_pair_comes_once_an_epoch_in_batches_of_one_size(tokens):
    found = batches(preference_dataset(tokens, batch_size=8))
    assert {len(batch["token_ids"]) for batch in found} == {8}
    assert sorted(names(found)) == sorted(names([collate(tokens, np.arange(43))]))
    assert sum(batch["weight"].sum() for batch in found) == 43


def test_shapes_are_few(tokens):
    found = batches(preference_dataset(tokens, batch_size=4, epochs=5, buckets=3))
    shapes = {batch["token_ids"].shape + batch["owner"].shape for batch in found}
    assert 1 < len(shapes) <= 3


def test_one_bucket_is_static_throughout_and_more_leave_only_lengths_open(tokens):
    static = preference_dataset(tokens, batch_size=8, buckets=1).element_spec
    assert all(spec.shape.is_fully_defined() for spec in static.values())
    few = preference_dataset(tokens, batch_size=8, buckets=4).element_spec
    assert {name: spec.shape.as_list() for name, spec in few.items()} == {
        "token_ids": [8, 2, None],
        "padding_mask": [8, 2, None],
        "source": [8, None],
        "target": [8, None],
        "owner": [8, None],
        "preference": [8, 1],
        "weight": [8, 1],
    }
    assert few["padding_mask"].dtype == tf.int32


def test_reference_group_and_margin_are_part_of_the_batches(tokens, pair):
    pairs = [pair("a", "b", "c", group="g", margin=1.0), pair("d", "e", "f")]
    rich = tokenize_pairs(pairs, Letters()).with_reference(np.array([[-1, -2], [-3, -4]]))
    dataset = preference_dataset(rich, batch_size=2, shuffle=False)
    (batch,) = batches(dataset)
    assert batch["reference"].tolist() == [[[-1, -2]], [[-3, -4]]]
    assert batch["group"].tolist() == [[0], [-1]] and batch["margin"].tolist() == [[1], [0]]
    assert dataset.element_spec["reference"].shape == (2, 1, 2)


def test_two_datasets_of_one_seed_are_the_same_and_another_seed_is_not(tokens):
    first, again, other = (
        batches(preference_dataset(tokens, batch_size=8, seed=seed)) for seed in (1, 1, 2)
    )
    assert_same(first, again)
    assert names(first) != names(other)


@pytest.mark.parametrize("start", [1, 5, 6, 11, 17])
def test_starting_at_a_step_goes_on_as_if_never_stopped(tokens, start):
    def stream(**options):
        return preference_dataset(tokens, batch_size=8, seed=4, epochs=3, **options)

    whole = batches(stream())
    rest = stream(start_step=start)
    assert_same(whole[start:], batches(rest))
    assert int(rest.cardinality()) == len(whole) - start
    assert_same(whole[start:], batches(rest))  # and again: no epoch is skipped


def test_an_endless_stream_can_be_taken_up_anywhere(tokens):
    endless = preference_dataset(tokens, batch_size=8, epochs=None)
    assert endless.cardinality() == tf.data.INFINITE_CARDINALITY
    whole = batches(endless.take(15))
    later = preference_dataset(tokens, batch_size=8, epochs=None, start_step=9)
    assert_same(whole[9:], batches(later.take(6)))
    assert_same(whole[:2], batches(endless.take(2)))  # a new iteration is the same stream


@pytest.mark.parametrize("drop", [False, True])
@pytest.mark.parametrize("size", [1, 4, 8, 43, 50])
def test_cardinality_is_what_comes(tokens, size, drop):
    if drop and size > 43:
        with pytest.raises(InputError, match="drop_remainder leaves no batch"):
            preference_dataset(tokens, batch_size=size, drop_remainder=drop)
        return
    dataset = preference_dataset(tokens, batch_size=size, drop_remainder=drop, epochs=2)
    steps = steps_per_epoch(tokens, size, drop)
    assert int(dataset.cardinality()) == 2 * steps == len(batches(dataset))


def test_iterating_again_brings_the_next_epoch(tokens):
    """As `fit(epochs=2)` iterates; the two orders are those of one stream of two epochs."""
    dataset = preference_dataset(tokens, batch_size=8, seed=9)
    first, second = batches(dataset), batches(dataset)
    assert names(first) != names(second) and sorted(names(first)) == sorted(names(second))
    assert_same(first + second, batches(preference_dataset(tokens, batch_size=8, seed=9, epochs=2)))


@pytest.mark.parametrize("batching", ["packed", "buckets"])
def test_no_autotuning_thread_holds_up_the_end_of_an_epoch(tokens, batching):
    """It sleeps longer and longer, and may miss the call that ends it (TensorFlow 2.21)."""
    dataset = preference_dataset(tokens, batch_size=4, batching=batching)
    assert dataset.options().autotune.enabled is False
    assert supervised_dataset(dataset).options().autotune.enabled is False


def test_without_shuffling_every_iteration_is_the_same(tokens):
    dataset = preference_dataset(tokens, batch_size=8, shuffle=False, buckets=1)
    first = batches(dataset)
    assert_same(first, batches(dataset))
    assert names(first) == names([collate(tokens, np.arange(43))])


def test_pairs_and_tokenized_pairs_make_the_same_batches(pair):
    pairs = [pair("ab", "cd", "efgh"), pair("i", "j", "k")]
    options = {"max_length": 6, "min_prompt_tokens": 3}
    own = tokenize_pairs(pairs, Letters(), **options)
    assert own.prompt.tolist() == [[1, 97, 98], [1, 105]] and own.chosen[0].tolist() == [99, 100, 2]
    with pytest.warns(UserWarning, match="cuts 1 of 2 pairs"):
        dataset = preference_dataset(pairs, Letters(), batch_size=2, **options)
    assert_same(batches(dataset), batches(preference_dataset(own, batch_size=2)))


def test_a_dataset_of_raw_pairs_warns_of_what_was_cut_and_dropped(pair):
    pairs = [pair("?" * 52, "c" * 400, "r" * 300) for _ in range(9)]
    pairs += [pair("a", "b", "c"), pair("a", "\x02", "c")]
    with pytest.warns(UserWarning) as caught:
        preference_dataset(pairs, Letters(), batch_size=2, max_length=200)
    assert [str(one.message) for one in caught] == [
        "Dropped 1 of 11 pairs: empty_response 1.",
        "max_length=200 cuts 9 of 10 pairs: 9 prompts (50 of 53 tokens are left on average), and "
        "the responses of 9 pairs. max_length=454 would leave 95% of the pairs whole.",
    ]
    assert all(one.filename == __file__ for one in caught)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        preference_dataset(pairs[:10], Letters(), batch_size=2, max_length=454)


def test_all_wrong_arguments_are_named_together(tokens):
    with pytest.raises(InputError) as error:
        preference_dataset([], batch_size=0, seed=-1, epochs=0, start_step=-2)
    for word in ("batch_size", "seed", "epochs", "start_step", "preprocessor is needed"):
        assert word in str(error.value)
    assert [problem.argument for problem in error.value.problems] == [
        "batch_size", "epochs", "seed", "start_step", "preprocessor"
    ]  # fmt: skip
    with pytest.raises(InputError, match="start_step must be less than the 6 batches"):
        preference_dataset(tokens, batch_size=8, start_step=6)


# What every replica receives, in its own process: logical devices and workers are per process.
REPLICAS = """
import json, os, sys
import tensorflow as tf
cpu = tf.config.list_physical_devices("CPU")[0]
count = int(sys.argv[1])
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * count)
if "TF_CONFIG" in os.environ:
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
else:
    strategy = tf.distribute.MirroredStrategy([f"CPU:{i}" for i in range(count)])
from types import SimpleNamespace
from dpo_keras.batching import preference_dataset

class Letters:
    start_token_id, end_token_id, pad_token_id = 1, 2, 0
    tokenize = staticmethod(lambda texts: [list(map(ord, text)) for text in texts])

from dpo_keras.preferences import PreferencePair
pairs = [PreferencePair("p" * n, f"{n}", f"-{n}") for n in range(1, 22)]
dataset = preference_dataset(pairs, Letters(), batch_size=8, epochs=2, buckets=3)
seen = [
    [part.numpy().tolist() for part in strategy.experimental_local_results(batch["target"])]
    for batch in strategy.experimental_distribute_dataset(dataset)
]
whole = [batch["target"].numpy().tolist() for batch in
         preference_dataset(pairs, Letters(), batch_size=8, epochs=2, buckets=3)]
print("RESULT", json.dumps([seen, whole]))
"""


def run(processes):
    found = []
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err[-2000:]
        found.append(json.loads(out[out.index("RESULT") + 7 :]))
    return found


def start(replicas, **environment):
    root = str(Path(__file__).resolve().parents[2])
    return subprocess.Popen(
        [sys.executable, "-c", REPLICAS, str(replicas)],
        env={**os.environ, "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": "", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_two_replicas_get_exactly_the_rows_of_each_global_batch():
    ((seen, whole),) = run([start(2)])
    assert [list(itertools.chain(*parts)) for parts in seen] == whole
    assert all([len(part) for part in parts] == [4, 4] for parts in seen)


@pytest.mark.slow
def test_two_workers_get_exactly_the_rows_of_each_global_batch():
    sockets = [socket.socket() for _ in range(2)]
    for each in sockets:
        each.bind(("localhost", 0))
    cluster = {"worker": [f"localhost:{each.getsockname()[1]}" for each in sockets]}
    for each in sockets:
        each.close()
    config = [
        json.dumps({"cluster": cluster, "task": {"type": "worker", "index": i}}) for i in range(2)
    ]
    (first, whole), (second, same) = run([start(1, TF_CONFIG=text) for text in config])
    assert whole == same
    assert [a + b for (a,), (b,) in zip(first, second, strict=True)] == whole
