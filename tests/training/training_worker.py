"""One worker of the test's cluster: trains and writes what it ended with."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "tiny_models"))

import numpy as np

import dpo_keras

# The strategy starts the cluster: before anything else touches a device.
WORKERS = dpo_keras.strategy("multi_worker")

from tiny import Letters, pairs  # noqa: E402
from training.test_training_distribution import train  # noqa: E402

if __name__ == "__main__":
    tokenized = dpo_keras.tokenize_pairs(pairs(11), Letters(), max_length=48)
    weights, history = train(WORKERS, tokenized)
    arrays = {f"w{number}": value for number, value in enumerate(weights)}
    arrays |= {f"h_{name.replace('/', '|')}": values for name, values in history.items()}
    np.savez(sys.argv[1], **arrays)
