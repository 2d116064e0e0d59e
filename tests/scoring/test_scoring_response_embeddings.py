"""Embeddings of responses: the mean of the states that predict their tokens."""

import numpy as np
import pytest
from tiny import Letters, gpt2, pairs, plain_model

from dpo_keras.batching import collate, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.scoring.response_embeddings import response_embeddings


@pytest.fixture(scope="module")
def tokenized():
    return tokenize_pairs(pairs(5), Letters(), max_length=64)


def test_an_embedding_is_the_mean_of_the_states_before_each_token(tokenized):
    policy = gpt2()
    batch = collate(tokenized, list(range(5)))
    rows, sides, length = batch["token_ids"].shape
    flat = {k: batch[k].reshape(rows * sides, length) for k in ("token_ids", "padding_mask")}
    states = np.asarray(policy.backbone(flat, training=False)).reshape(rows, sides, length, -1)
    expected = np.zeros((rows, 2, states.shape[-1]))
    for row in range(rows):
        start = len(tokenized.prompt[row]) - 1
        for side, part in enumerate((tokenized.chosen, tokenized.rejected)):
            expected[row, side] = states[row, side, start : start + len(part[row])].mean(axis=0)
    found = response_embeddings(policy, tokenized, batch_size=2, batching="buckets")
    np.testing.assert_allclose(found, expected, atol=1e-5)
    packed = response_embeddings(policy, tokenized, batch_size=2, batching="packed")
    np.testing.assert_allclose(packed, expected, atol=1e-5)


def test_a_model_without_hidden_states_is_refused(tokenized):
    with pytest.raises(InputError, match="model must be a KerasHub causal language model"):
        response_embeddings(plain_model(), tokenized)
