"""Response log-probs: equal to full logits for every kind of model; padding changes nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import Letters, full_logits_log_probs, gemma3, gpt2, llama, pairs, plain_model

from dpo_keras.batching import collate, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.scoring import ResponseScorer
from dpo_keras.scoring.scorer import compared_tokens, sum_by_response, within_shorter


@pytest.fixture(scope="module")
def tokenized():
    return tokenize_pairs(pairs(5), Letters(), max_length=64)


def batch_of(tokenized, length=32, slots=24, rows=None, batch_size=None):
    rows = range(len(tokenized)) if rows is None else rows
    batch = collate(tokenized, list(rows), length, slots, batch_size)
    return {name: tf.constant(value) for name, value in batch.items()}


@pytest.mark.parametrize("make", [gpt2, llama, gemma3], ids=["tied", "untied", "soft_capped"])
def test_hidden_state_path_equals_full_logits_values_and_gradients(make, tokenized):
    policy = make()
    batch = batch_of(tokenized)
    results = []
    for scorer in (ResponseScorer(policy, chunk=8), ResponseScorer(policy, plain=True)):
        assert (scorer.parts is None) == (len(results) == 1)

        @tf.function
        def run(batch, scorer=scorer):
            with tf.GradientTape() as tape:
                logps = scorer(batch)["logps"]
                loss = tf.reduce_sum(logps * [[1.0, -2.0]])
            return logps, tape.gradient(loss, policy.trainable_variables)

        results.append(run(batch))
    (logps, gradients), (plain, plain_gradients) = results
    np.testing.assert_allclose(logps, full_logits_log_probs(policy, batch), atol=1e-4)
    np.testing.assert_allclose(logps, plain, atol=1e-4)
    for gradient, wanted in zip(gradients, plain_gradients, strict=True):
        np.testing.assert_allclose(
            tf.convert_to_tensor(gradient), tf.convert_to_tensor(wanted), atol=1e-5
        )


def test_any_keras_model_is_scored_by_the_plain_path(tokenized):
    policy = plain_model()
    scorer = ResponseScorer(policy)
    assert scorer.parts is None
    batch = batch_of(tokenized)
    np.testing.assert_allclose(
        scorer(batch)["logps"], full_logits_log_probs(policy, batch), atol=1e-4
    )


def test_padding_slots_order_and_neighbours_change_nothing(tokenized):
    scorer = ResponseScorer(gpt2())
    narrow = scorer(batch_of(tokenized, 24, 16))["logps"].numpy()
    wide = scorer(batch_of(tokenized, 48, 40, batch_size=8))["logps"].numpy()
    np.testing.assert_allclose(wide[:5], narrow, atol=1e-5)
    np.testing.assert_array_equal(wide[5:], 0)
    backward = scorer(batch_of(tokenized, 24, 16, rows=[4, 3, 2, 1, 0]))["logps"].numpy()
    np.testing.assert_allclose(backward[::-1], narrow, atol=1e-5)
    alone = scorer(batch_of(tokenized, 24, 16, rows=[2]))["logps"].numpy()
    np.testing.assert_allclose(alone[0], narrow[2], atol=1e-5)


def test_lengths_count_response_tokens_and_the_end_token(tokenized):
    lengths = ResponseScorer(gpt2())(batch_of(tokenized))["lengths"].numpy()
    expected = np.stack([tokenized.chosen.lengths, tokenized.rejected.lengths], axis=1)
    np.testing.assert_array_equal(lengths, expected)


def owned(owners, responses):
    """One row of response tokens, compared by as many pairs as there are in `responses`."""
    weight = np.ones((1, len(responses)), np.float32)
    return {"owner": tf.constant([owners]), "responses": tf.constant([responses]), "weight": weight}


def test_values_are_summed_by_response_and_a_response_counts_in_each_of_its_pairs():
    values = tf.constant([[1.0, 2.0, 4.0, 8.0]])
    batch = owned([0, 1, 1, -1], [[0, 1], [1, 0], [-1, -1]])
    sums = sum_by_response(values, compared_tokens(batch))
    np.testing.assert_array_equal(sums, [[1.0, 6.0], [6.0, 1.0], [0.0, 0.0]])
    del batch["responses"]
    sums = sum_by_response(values, compared_tokens(batch))
    np.testing.assert_array_equal(sums, [[1.0, 6.0], [0.0, 0.0], [0.0, 0.0]])


def test_the_shared_length_ends_with_the_shorter_response_of_each_pair():
    compared = compared_tokens(owned([0, 0, 0, 1, 1, 2, -1], [[0, 1], [2, 0]]))
    inside = within_shorter(compared)[0].numpy().T.astype(int).tolist()
    assert inside[:2] == [[1, 1, 0, 0, 0, 0, 0], [0, 0, 0, 1, 1, 0, 0]]
    assert inside[2:] == [[0, 0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 0, 0]]


def test_mixed_bfloat16_is_scored_in_float32(tokenized):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        low = gpt2()
    finally:
        keras.config.set_dtype_policy("float32")
    logps = ResponseScorer(low)(batch_of(tokenized))["logps"]
    assert logps.dtype == tf.float32
    np.testing.assert_allclose(
        logps, ResponseScorer(gpt2())(batch_of(tokenized))["logps"], rtol=0.02
    )


def test_a_model_with_other_inputs_is_refused_by_name():
    inputs = keras.Input((None,), dtype="int32", name="tokens")
    model = keras.Model(inputs, keras.layers.Embedding(9, 9)(inputs))
    with pytest.raises(InputError, match="token_ids.*takes .*tokens"):
        ResponseScorer(model)


def test_a_model_without_logits_is_refused(tokenized):
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="int32", name="padding_mask")
    model = keras.Model({"token_ids": token_ids, "padding_mask": mask}, token_ids)
    with pytest.raises(InputError, match="logits of shape"):
        ResponseScorer(model)(batch_of(tokenized))
