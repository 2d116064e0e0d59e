"""Two logical CPUs, and the tests' pairs."""

import pytest
from tiny import Letters, pairs
from two_cpus import split_cpu

from dpo_keras.batching import preference_dataset, tokenize_pairs

split_cpu()


@pytest.fixture(scope="session")
def tokenized():
    records = [{**pair, "group": "ab"[number % 2]} for number, pair in enumerate(pairs(11))]
    return tokenize_pairs(records, Letters(), max_length=48)


@pytest.fixture(scope="session")
def dataset(tokenized):
    """Three batches of four in one shape, the same at each iteration."""
    return preference_dataset(tokenized, batch_size=4, buckets=1, shuffle=False)
