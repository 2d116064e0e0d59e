"""Pairs of random tokens."""

import numpy as np
import tiny

from dpo_keras.batching import Ragged, TokenizedPairs


def random_pairs(lengths, weighed=False):
    """Pairs of the given lengths (prompt, chosen, rejected), of unequal weight where `weighed`."""
    random = np.random.default_rng(0)
    columns = [
        Ragged.from_lists([random.integers(0, tiny.VOCABULARY, sizes[k]) for sizes in lengths])
        for k in range(3)
    ]
    ones = np.ones(len(lengths), np.float32)
    weight = random.uniform(0.5, 2.0, len(lengths)).astype(np.float32) if weighed else ones
    return TokenizedPairs(*columns, ones, weight)
