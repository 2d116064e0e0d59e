"""Response log-probs: equal to full logits for every kind of model; padding changes nothing."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import Letters, full_logits_log_probs, gemma3, gpt2, llama, pairs, plain_model

from dpo_keras.batching import collate, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.scoring import ResponseScorer, response_log_probs, score_pairs


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
        gradient, wanted = tf.convert_to_tensor(gradient), tf.convert_to_tensor(wanted)
        np.testing.assert_allclose(gradient, wanted, atol=1e-5)


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


def test_log_prob_of_a_whole_response_is_the_sum_of_its_parts():
    policy = gpt2()
    (both,), (count,) = response_log_probs(policy, ["ab"], ["cd"], preprocessor=Letters())
    tokens = np.array([[1, *Letters().tokenize(["abcd"])[0]]])
    logits = policy({"token_ids": tokens, "padding_mask": np.ones_like(tokens)}, training=False)
    logps = tf.nn.log_softmax(logits[0]).numpy()
    by_hand = logps[2, tokens[0, 3]] + logps[3, tokens[0, 4]] + logps[4, 2]
    assert count == 3
    np.testing.assert_allclose(both, by_hand, atol=1e-5)


def test_batch_size_does_not_change_log_probs():
    policy = gpt2()
    prompts = [p["prompt"] for p in pairs(5)]
    responses = [p["chosen"] for p in pairs(5)]
    one, _ = response_log_probs(policy, prompts, responses, preprocessor=Letters(), batch_size=2)
    all_, _ = response_log_probs(policy, prompts, responses, preprocessor=Letters(), batch_size=16)
    np.testing.assert_allclose(one, all_, atol=1e-5)


def test_score_pairs_puts_every_pair_in_its_place(tokenized):
    policy = gpt2()
    logps = score_pairs(policy, tokenized, batch_size=2)
    np.testing.assert_allclose(logps, full_logits_log_probs(policy, batch_of(tokenized)), atol=1e-4)


def test_score_pairs_packed_puts_every_pair_in_its_place(tokenized):
    policy, done = gpt2(), []
    logps = score_pairs(
        policy, tokenized, batch_size=3, batching="packed", on_batch=lambda *at: done.append(at)
    )
    np.testing.assert_allclose(logps, score_pairs(policy, tokenized), rtol=1e-5, atol=1e-5)
    assert len(done) > 1 and done[-1] == (len(tokenized), len(tokenized))
    with pytest.raises(InputError, match="batching must be 'buckets' for this policy"):
        score_pairs(plain_model(), tokenized, batching="packed")


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
