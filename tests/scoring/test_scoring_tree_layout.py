"""Pieces of a packed row: few shapes, whatever the trees, and nothing changed by it."""

import numpy as np
import pytest
import tensorflow as tf

from dpo_keras.scoring.tree_layout import GRID, TreeLayout

LENGTH = 200


@pytest.fixture
def rows():
    """Two rows of random trees, the second with an empty end."""
    random = np.random.default_rng(5)
    tree = np.full((2, LENGTH), -1, np.int32)
    positions = np.zeros((2, LENGTH), np.int32)
    for row, end in enumerate((LENGTH, LENGTH - 30)):
        at = slot = 0
        while at < end:
            prompt, *responses = random.integers(1, 25, 3)
            starts = (0, prompt, prompt)
            for kind, (start, size) in enumerate(zip(starts, (prompt, *responses), strict=True)):
                size = min(size, end - at)
                tree[row, at : at + size] = 3 * slot + kind
                positions[row, at : at + size] = np.arange(start, start + size)
                at += size
            slot += 1
    return tf.constant(positions), tf.constant(tree)


def test_pieces_come_in_few_lengths(rows):
    layout = TreeLayout(*rows, segment=48)
    lengths = [bias.shape[-1] for bias in layout.biases(None)]
    assert len(set(lengths)) > 1 and all(length % GRID == 0 for length in lengths)


@pytest.mark.parametrize("window", [None, 5])
def test_filled_up_pieces_attend_as_whole_rows_do(rows, window):
    random = np.random.default_rng(6)
    states = [tf.constant(random.normal(size=(2, LENGTH, 2, 8)), tf.float32) for _ in range(3)]

    def found(dense):
        layout = TreeLayout(*rows, dense=dense, segment=48)
        with tf.GradientTape() as tape:
            tape.watch(states)
            attended = layout.attend(*states, scale=0.3, window=window)
            loss = tf.reduce_sum(attended * tf.range(8, dtype=tf.float32))
        return attended, *tape.gradient(loss, states)

    real = (rows[1].numpy() >= 0)[:, :, None, None]
    pieces, whole = found(False), found(True)
    np.testing.assert_allclose(pieces[0] * real, whole[0] * real, atol=1e-5)
    for ours, theirs in zip(pieces[1:], whole[1:], strict=True):
        np.testing.assert_allclose(ours * real, theirs * real, atol=1e-4)
