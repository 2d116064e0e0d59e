"""Pipelines that call Python give the mutex back in every case, and let the process end."""

import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import tensorflow as tf

from dpo_keras.batching import Part, Ragged, TokenizedPairs
from dpo_keras.batching.batch_stream import PythonCalls, one_pass, signature_of


def numbers(function, prefetch=0):
    calls = PythonCalls()
    dataset = tf.data.Dataset.range(1_000_000).map(
        lambda n: calls.numpy_function(function, [n], [tf.int64])[0]
    )
    return dataset.prefetch(prefetch) if prefetch else dataset


def test_a_failed_call_leaves_the_next_one_free():
    def odd_only(n):
        if n % 2 == 0:
            raise ValueError(f"{n} is even")
        return [n]

    iterator = iter(numbers(odd_only))
    with pytest.raises(tf.errors.InvalidArgumentError, match="0 is even"):
        next(iterator)
    assert next(iterator) == 1
    with pytest.raises(tf.errors.InvalidArgumentError, match="2 is even"):
        next(iterator)
    assert next(iterator) == 3


def test_an_iterator_abandoned_in_the_middle_of_a_call_leaves_the_dataset_free():
    def slow(n):
        time.sleep(0.02)
        return [n]

    dataset = numbers(slow, prefetch=4)
    for _ in range(10):
        iterator = iter(dataset)
        assert next(iterator) == 0
        del iterator  # while the next number is being made


def test_iterators_of_one_dataset_take_turns():
    dataset = numbers(lambda n: [n])
    first, second = iter(dataset), iter(dataset)
    assert [(int(next(first)), int(next(second))) for _ in range(5)] == [(n, n) for n in range(5)]


def test_a_process_that_leaves_an_iterator_behind_ends():
    program = textwrap.dedent("""
        import sys
        import time
        import numpy as np
        import tensorflow as tf
        from dpo_keras.batching.batch_stream import Source, signature_of, stream

        def make(epoch, step):
            time.sleep(0.3)  # so that the program ends in the middle of a call
            return {"step": np.array([step])}

        sample = {"step": np.array([0])}
        endless = stream(Source(10, make, signature_of(sample, {})), 0, None)
        sys.leftover = iter(endless)  # freed later than any module
        next(sys.leftover)
        iterator = iter(endless)
        print(next(iterator)["step"].numpy())
    """)
    ended = subprocess.run(
        [sys.executable, "-c", program], check=False, capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout == "[0]\n"


def test_results_keep_their_order_and_types():
    calls = PythonCalls()
    function = tf.function(
        lambda n: calls.numpy_function(
            lambda n: [np.arange(n), np.float32(n)], [n], [tf.int64, tf.float32]
        )
    )
    first, second = function(tf.constant(3))
    assert first.numpy().tolist() == [0, 1, 2] and second.numpy() == np.float32(3)


def test_a_signature_leaves_the_named_dimensions_open():
    sample = {"owner": np.zeros((2, 8), np.int32), "weight": np.zeros((2, 1), np.float32)}
    signature = signature_of(sample, {"owner": 1})
    assert signature["owner"].shape.as_list() == [2, None] and signature["owner"].dtype == tf.int32
    assert signature["weight"].shape.as_list() == [2, 1]


def test_a_part_puts_results_at_its_pairs_and_skips_empty_slots():
    results = np.zeros(3)
    assert Part(np.array([2, 0, -1]), {}).put(np.array([5.0, 6.0, 7.0]), results) == 2
    assert results.tolist() == [6.0, 0.0, 5.0]


@pytest.mark.parametrize("batching", ["buckets", "packed"])
def test_one_pass_reads_the_pairs_in_the_order_of_the_file(batching):
    texts, ones = Ragged.from_lists([[5, 6]] * 20), np.ones(20, np.float32)
    parts = one_pass(TokenizedPairs(texts, texts, texts, ones, ones), 4, batching)
    seen = np.concatenate([part.pairs for part in parts])
    assert seen[seen >= 0].tolist() == list(range(20))
