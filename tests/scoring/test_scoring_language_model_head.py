"""The chunked head gives what full logits give, values and gradients."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from keras import ops

from dpo_keras.scoring.chunked_log_probs import chunk_size, log_probs_of, token_log_probs


def inputs(rows=13, width=8, vocabulary=19, seed=0):
    random = np.random.default_rng(seed)
    return (
        tf.constant(random.normal(size=(rows, width)), tf.float32),
        tf.constant(random.normal(size=(width, vocabulary)), tf.float32),
        tf.constant(random.normal(size=(vocabulary,)), tf.float32),
        tf.constant(random.integers(0, vocabulary, rows), tf.int32),
    )


@pytest.mark.parametrize("chunk", [1, 4, 13, 64])
@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("with_bias", [False, True])
def test_any_chunk_gives_the_values_and_gradients_of_full_logits(chunk, soft_cap, with_bias):
    hidden, kernel, bias, targets = inputs()
    bias = bias if with_bias else None
    watched = [hidden, kernel] + ([bias] if with_bias else [])
    upstream = tf.random.stateless_normal((13,), (1, 2))

    def chunked():
        return token_log_probs(hidden, kernel, bias, targets, soft_cap=soft_cap, chunk=chunk)[:, 0]

    def full():
        logits = hidden @ kernel
        logits = logits if bias is None else logits + bias
        logits = logits if soft_cap is None else soft_cap * tf.tanh(logits / soft_cap)
        return log_probs_of(logits, targets)[:, 0]

    results = []
    for function in (chunked, full):
        with tf.GradientTape() as tape:
            tape.watch(watched)
            values = function()
            loss = tf.reduce_sum(values * upstream)
        results.append((values, tape.gradient(loss, watched)))
    (values, gradients), (expected, expected_gradients) = results
    np.testing.assert_allclose(values, expected, atol=1e-6)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        np.testing.assert_allclose(gradient, wanted, atol=1e-5)


def test_rows_behind_the_count_are_not_computed():
    hidden, kernel, _, targets = inputs()
    hidden = tf.concat([hidden[:5], tf.fill((8, 8), np.nan)], axis=0)
    values = token_log_probs(hidden, kernel, None, targets, tf.constant(5), chunk=5)[:, 0]
    assert np.isfinite(values[:5]).all()
    assert (values[5:].numpy() == 0).all()


def test_a_frozen_kernel_gets_no_gradient():
    hidden, kernel, _, targets = inputs()
    with tf.GradientTape() as tape:
        tape.watch([hidden, kernel])
        loss = tf.reduce_sum(token_log_probs(hidden, kernel, None, targets, kernel_trainable=False))
    to_hidden, to_kernel = tape.gradient(loss, [hidden, kernel])
    assert to_kernel is None
    assert float(tf.norm(to_hidden)) > 0


def test_statistics_are_entropy_and_the_log_of_the_squared_norm_without_gradient():
    hidden, kernel, _, targets = inputs()
    names = ("entropy", "log_squared_norm")
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        values = token_log_probs(hidden, kernel, None, targets, statistics=names, chunk=4)
        loss = tf.reduce_sum(values[:, 1:])
    p = tf.nn.softmax(tf.cast(hidden @ kernel, tf.float64)).numpy()
    np.testing.assert_allclose(values[:, 1], -(p * np.log(p)).sum(-1), atol=1e-5)
    np.testing.assert_allclose(values[:, 2], np.log((p**2).sum(-1)), atol=1e-5)
    gradient = tape.gradient(loss, hidden)
    assert gradient is None or not np.any(gradient)


def test_uniform_logits_give_minus_log_of_the_vocabulary():
    values = token_log_probs(ops.zeros((3, 4)), ops.zeros((4, 32)), None, ops.zeros(3, "int32"))
    np.testing.assert_allclose(values[:, 0], -np.log(32), rtol=1e-6)


def test_extreme_logits_stay_finite():
    hidden = tf.constant([[1e4, 0.0], [-1e4, 0.0]])
    kernel = tf.constant([[1.0, -1.0, 0.0], [0.0, 0.0, 0.0]])
    with tf.GradientTape() as tape:
        tape.watch(hidden)
        values = token_log_probs(hidden, kernel, None, tf.constant([1, 0]))
    np.testing.assert_allclose(values[:, 0], [-2e4, -2e4], rtol=1e-6)
    assert np.isfinite(tape.gradient(values, hidden)).all()


def test_half_precision_products_give_float32_log_probs():
    hidden, kernel, _, targets = inputs()
    low = token_log_probs(tf.cast(hidden, "bfloat16"), tf.cast(kernel, "bfloat16"), None, targets)
    assert low.dtype == tf.float32
    high = token_log_probs(hidden, kernel, None, targets)
    np.testing.assert_allclose(low, high, atol=0.15)
    np.testing.assert_array_equal(keras.ops.isfinite(low), True)


def test_chunks_shrink_as_vocabularies_grow():
    assert [chunk_size(v) for v in (1_000, 32_000, 262_144)] == [256, 256, 64]
