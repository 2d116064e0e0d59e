"""Pieces of a packed row: few shapes, whatever the trees, and nothing changed by it."""

import keras
import numpy as np
import pytest
import tensorflow as tf

from dpo_keras.scoring.tree_attention import TreeLayout
from dpo_keras.scoring.tree_segments import GRID, SegmentedTreeLayout, segment_sizes
from dpo_keras.utils.keras_hub_attention import AttentionSettings

LENGTH = 200


@pytest.fixture
def rows():
    """Two rows of random trees, the second with an empty end."""
    random = np.random.default_rng(5)
    reach = np.ones((2, LENGTH), np.int32)
    positions = np.zeros((2, LENGTH), np.int32)
    for row, end in enumerate((LENGTH, LENGTH - 30)):
        at = 0
        while at < end:
            prompt, *responses = random.integers(1, 25, 3)
            behind = min(at + prompt + sum(responses), end)
            for start, size in zip((0, prompt, prompt), (prompt, *responses), strict=True):
                kept = min(size, end - at)
                last = at + kept if start else behind
                reach[row, at : at + kept] = last - np.arange(at, at + kept)
                positions[row, at : at + kept] = np.arange(start, start + kept)
                at += kept
    return tf.constant(positions), tf.constant(reach)


def test_a_token_sees_what_is_before_it_in_its_own_text():
    reach = tf.constant([[4, 1, 2, 1, 3, 1, 1, 1]])  # two trees and the empty end of the row
    positions = tf.constant([[0, 1, 1, 2, 0, 1, 1, 0]])
    (bias,) = TreeLayout(positions, reach).biases(None)
    expected = np.eye(8)
    expected[1:4, 0] = expected[3, 2] = expected[5:7, 4] = 1
    np.testing.assert_array_equal((bias[0, 0] == 0.0).numpy(), expected)


@pytest.mark.parametrize(("segment", "sizes"), [(4, [7, 1]), (3, [3, 4, 1])])
def test_pieces_hold_the_trees_that_begin_in_a_segment(segment, sizes):
    reach = tf.constant([[3, 1, 1, 4, 1, 2, 1, 1]])
    np.testing.assert_array_equal(segment_sizes(reach, segment), sizes)


def test_pieces_come_in_few_lengths(rows):
    layout = SegmentedTreeLayout(*rows, segment=48)
    lengths = [bias.shape[-1] for bias in layout.biases(None)]
    assert len(set(lengths)) > 1 and all(length % GRID == 0 for length in lengths)


@pytest.mark.parametrize("window", [None, 5])
def test_filled_up_pieces_attend_as_whole_rows_do(rows, window):
    random = np.random.default_rng(6)
    states = [tf.constant(random.normal(size=(2, LENGTH, 2, 8)), tf.float32) for _ in range(3)]

    def found(dense):
        layout = TreeLayout(*rows) if dense else SegmentedTreeLayout(*rows, segment=48)
        with tf.GradientTape() as tape:
            tape.watch(states)
            attended = layout.attend(*states, AttentionSettings(0.3, window=window))
            loss = tf.reduce_sum(attended * tf.range(8, dtype=tf.float32))
        return attended, *tape.gradient(loss, states)

    real = (np.arange(LENGTH) < np.array([[LENGTH], [LENGTH - 30]]))[:, :, None, None]
    pieces, whole = found(False), found(True)
    np.testing.assert_allclose(pieces[0] * real, whole[0] * real, atol=1e-5)
    for ours, theirs in zip(pieces[1:], whole[1:], strict=True):
        np.testing.assert_allclose(ours * real, theirs * real, atol=1e-4)


@pytest.mark.parametrize("window", [None, 5])
def test_the_gradient_of_fewer_passes_is_that_of_tensorflow(rows, window):
    random = np.random.default_rng(7)
    states = [tf.constant(random.normal(size=(2, LENGTH, 2, 8)), tf.float32) for _ in range(3)]
    # Keys and values of one head serve two of the queries.
    states[1:] = [state[:, :, :1] for state in states[1:]]
    upstream = tf.constant(random.normal(size=(2, LENGTH, 2, 8)), tf.float32)
    found = []
    # An active dropout, here of nothing, leaves the gradient to TensorFlow.
    for dropout in (None, keras.layers.Dropout(0.0)):
        layout = SegmentedTreeLayout(*rows, segment=48)
        with tf.GradientTape() as tape:
            tape.watch(states)
            settings = AttentionSettings(0.3, window=window, dropout=dropout)
            attended = layout.attend(*states, settings, training=True)
        found.append((attended, *tape.gradient(attended, states, upstream)))
    for ours, theirs in zip(*found, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


def test_no_weights_of_attention_wait_for_the_backward_pass(rows):
    """They are n numbers a token and head, the largest that a layer would hold."""

    @tf.function(autograph=False)
    def gradient(*states):
        layout = SegmentedTreeLayout(*rows, segment=48)
        attended = layout.attend(*states, AttentionSettings(0.3))
        return tf.gradients(attended, states)

    spec = tf.TensorSpec((2, LENGTH, 2, 8), tf.float32)
    graph = gradient.get_concrete_function(spec, spec, spec).graph
    weights = [op for op in graph.get_operations() if op.type == "Softmax"]
    pieces = len(weights) // 2
    readers = [len(op.outputs[0].consumers()) for op in weights]
    assert pieces and readers == [1] * pieces + [2] * pieces
    for op in weights[pieces:]:  # a pass of its own, which waits for the gradient from above
        scores = op.inputs[0].op.inputs[0].op
        assert scores.inputs[0].op.control_inputs
