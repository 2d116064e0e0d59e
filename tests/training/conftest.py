"""One tiny policy family, one data set, two logical CPUs."""

import pytest
from tiny import Letters, gpt2, pairs
from two_cpus import split_cpu

from dpo_keras.batching import preference_dataset, tokenize_pairs

split_cpu()


@pytest.fixture(scope="session")
def tokenized():
    return tokenize_pairs(pairs(11), Letters(), max_length=48)


@pytest.fixture
def policy():
    return gpt2(num_layers=1)


@pytest.fixture(scope="session")
def dataset(tokenized):
    """Three batches of four in one shape, the same at each iteration."""
    return preference_dataset(tokenized, batch_size=4, buckets=1, shuffle=False, batching="buckets")
