"""Two logical CPUs, and the tests' pairs."""

import pytest
import tensorflow as tf
from tiny import Letters, pairs

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
    records = [{**pair, "group": "ab"[number % 2]} for number, pair in enumerate(pairs(11))]
    return tokenize_pairs(records, Letters(), max_length=48)


@pytest.fixture(scope="session")
def dataset(tokenized):
    """Three batches of four in one shape, the same at each iteration."""
    return preference_dataset(tokenized, batch_size=4, buckets=1, shuffle=False)
