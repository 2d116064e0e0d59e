"""One tiny policy that left its reference, on pairs with everything that pairs may carry."""

import numpy as np
import pytest
from tiny import Letters, gpt2, pairs

from dpo_keras.batching import tokenize_pairs
from dpo_keras.training import DPOModel


@pytest.fixture(scope="session")
def tokenized():
    records = pairs(11)
    for number, record in enumerate(records):
        record |= {
            "preference": (1.0, 0.8, 0.5)[number % 3],
            "weight": (1.0, 2.0, 0.0, 0.5)[number % 4],
            "group": ("even", "odd")[number % 2],
        }
    records.append({**records[0], "chosen": "zz"})  # a second pair on one prompt
    return tokenize_pairs(records, Letters(), max_length=48)


@pytest.fixture(scope="session")
def moved():
    """A model whose policy is some way off its reference."""
    model = DPOModel(gpt2(num_layers=1))
    random = np.random.default_rng(0)
    for variable in model.policy.trainable_variables:
        variable.assign(variable + random.normal(0, 0.1, variable.shape))
    return model
