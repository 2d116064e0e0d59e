"""One tiny policy family, one data set, two logical CPUs."""

import pytest
import tensorflow as tf
from tiny import Letters, gpt2, pairs

from dpo_keras.batching import preference_dataset, tokenize_pairs

# Before anything runs on TensorFlow: devices cannot be split afterwards.
if len(tf.config.list_physical_devices("CPU")) == 1:
    try:
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
    except RuntimeError:  # another folder's tests did it already
        assert len(tf.config.list_logical_devices("CPU")) == 2


@pytest.fixture(scope="session")
def tokenized():
    return tokenize_pairs(pairs(11), Letters(), max_length=48)


@pytest.fixture
def policy():
    return gpt2(num_layers=1)


@pytest.fixture(scope="session")
def dataset(tokenized):
    """Three batches of four in one shape, the same at each iteration."""
    return preference_dataset(tokenized, batch_size=4, buckets=1, shuffle=False)
