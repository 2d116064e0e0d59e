"""Sizes, texts and comparisons that the tests of `app` share."""

import numpy as np

TEXTS = ["The lamp is red and costs 40 euros. What does it cost?", "It costs 40 euros, sir."] * 20
SIZES = {
    "vocabulary_size": 300,
    "num_layers": 2,
    "num_heads": 2,
    "hidden_dim": 16,
    "intermediate_dim": 64,
    "max_sequence_length": 64,
}


def same_logits(one, other):
    ids = np.arange(10, 22, dtype="int32").reshape(2, 6)
    batch = {"token_ids": ids, "padding_mask": np.ones_like(ids)}
    np.testing.assert_allclose(np.asarray(one(batch)), np.asarray(other(batch)), atol=1e-5)
