"""Attention within trees on TensorFlow: rows are cut between trees, and pieces attend alone."""

from collections.abc import Sequence

import tensorflow as tf

from dpo_keras.scoring.layer_overrides import Call
from dpo_keras.scoring.tree_attention import TreeLayout, attend_with_bias
from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import made_after
from dpo_keras.utils.keras_hub_attention import AttentionSettings

SEGMENT = 256
# Pieces are padded to a multiple of this. oneDNN compiles its products for each shape anew and
# keeps what it compiled: for all the lengths that pieces can have, hundreds of megabytes.
GRID = 32


class SegmentedTreeLayout(TreeLayout):
    """A `TreeLayout` of static `[rows, length]` that attends piece by piece.

    A piece holds the trees that begin within `segment` tokens. Biases are `[1, n, n]`, places
    `[1, 1, n]`.
    """

    dense = False

    def __init__(self, positions: Tensor, reach: Tensor, segment: int = SEGMENT):
        super().__init__(positions, reach)
        self._sizes = segment_sizes(reach, segment)
        self._missing = tf.unstack(-self._sizes % GRID)

    def pieces(self, values: Tensor, empty: int = 0) -> list[Tensor]:
        """Cut `[rows, length]` into pieces `[1, n]`, each padded to the grid."""
        pieces = tf.split(
            tf.reshape(values, (1, -1)), self._sizes, axis=1, num=self._sizes.shape[0]
        )
        return [
            tf.pad(piece, [[0, 0], [0, missing]], constant_values=empty)
            for piece, missing in zip(pieces, self._missing, strict=True)
        ]

    def attend_in_pieces(
        self,
        biases: list[Tensor],
        states: tuple[Tensor, Tensor, Tensor],
        settings: AttentionSettings,
        training: bool | None,
    ) -> Tensor:
        """Attend, see `TreeLayout.attend`."""
        query, _, value = states
        rows, length, heads, _ = query.shape
        flat = [tf.reshape(s, (rows * length, heads, s.shape[-1])) for s in states]
        active_dropout = settings.dropout is not None and training is not False
        plain = settings.soft_cap is None and settings.sinks is None and not active_dropout
        if plain and query.dtype == value.dtype == tf.float32:
            together = self._attend_plainly(biases, *flat)
        else:
            pieces = zip(*map(self._cut, flat), strict=True)
            together = self._join(
                [
                    attend_with_bias(piece, bias, settings, training)
                    for piece, bias in zip(pieces, biases, strict=True)
                ]
            )
        return tf.reshape(together, (rows, length, heads, value.shape[-1]))

    def _attend_plainly(self, biases: list[Tensor], *states: Tensor) -> Tensor:
        """Compute softmax(q k' + bias) v with a gradient of fewer passes than TensorFlow's.

        With weights P, values found O = P v and their gradient dO, the gradient of the scores is
        P * (dP - m) where m_i = sum_j P_ij dP_ij = dO_i . O_i: a sum over D numbers instead of n.
        P is computed again, so that no layer holds n numbers a token for the backward pass.
        """

        @tf.custom_gradient
        def attended(*states: Tensor) -> tuple[Tensor, Call]:
            queries, keys, values = map(self._cut, states)

            def weights_of(queries: list[Tensor]) -> list[Tensor]:
                return [
                    tf.nn.softmax(tf.matmul(query, key, transpose_b=True) + bias)
                    for query, key, bias in zip(queries, keys, biases, strict=True)
                ]

            both = zip(weights_of(queries), values, strict=True)
            found = self._join([tf.matmul(weight, value) for weight, value in both])

            def gradient(upstream: Tensor) -> list[Tensor]:
                weights = weights_of(made_after(upstream, queries))
                means = self._cut(tf.reduce_sum(upstream * found, axis=-1, keepdims=True))
                to_states: list[tuple[Tensor, ...]] = []
                pieces = (queries, keys, values, weights, self._cut(upstream), means)
                for query, key, value, weight, to_found, mean in zip(*pieces, strict=True):
                    to_weight = tf.matmul(to_found, value, transpose_b=True)
                    to_scores = (to_weight - mean) * weight
                    to_key = tf.matmul(to_scores, query, transpose_a=True)
                    to_value = tf.matmul(weight, to_found, transpose_a=True)
                    to_states.append((tf.matmul(to_scores, key), to_key, to_value))
                return [self._join(pieces) for pieces in zip(*to_states, strict=True)]

            return found, gradient

        found: Tensor = attended(*states)
        return found

    def _cut(self, states: Tensor) -> list[Tensor]:
        """Cut `[all tokens, heads, D]` into pieces `[heads, n, D]`, each padded to the grid."""
        # Along the first axis a split is a view.
        pieces = tf.split(states, self._sizes, num=self._sizes.shape[0])
        return [
            tf.transpose(tf.pad(piece, [[0, missing], [0, 0], [0, 0]]), (1, 0, 2))
            for piece, missing in zip(pieces, self._missing, strict=True)
        ]

    def _join(self, pieces: Sequence[Tensor]) -> Tensor:
        """Join pieces `[heads, n, D]` to `[all tokens, heads, D]`: the inverse of `_cut`."""
        sizes = tf.unstack(self._sizes)
        rows = [tf.transpose(piece, (1, 0, 2)) for piece in pieces]
        return tf.concat([row[:size] for row, size in zip(rows, sizes, strict=True)], axis=0)


def segment_sizes(reach: Tensor, segment: int) -> Tensor:
    """Cut rows between trees, into a number of pieces that does not depend on the trees.

    Piece k of a row holds the trees that begin in `[segment k, segment (k + 1))`; it may be empty.
    The result is `[rows * ceil(length / segment)]` int32; the sizes add up to `rows * length`.
    """
    rows, length = reach.shape
    pieces = -(-length // segment)
    place = tf.range(length)
    # A tree begins where no earlier token reaches.
    before = tf.pad(_running_maximum(place + reach), [[0, 0], [1, 0]])[:, :length]
    start = _running_maximum(tf.where(before <= place, place, 0))
    piece = start // segment + pieces * tf.range(rows)[:, None]
    count = rows * pieces
    sizes = tf.math.bincount(tf.reshape(piece, [-1]), minlength=count, maxlength=count)
    return tf.ensure_shape(sizes, (count,))


def _running_maximum(values: Tensor) -> Tensor:
    """Return the greatest value so far in each row, in log2(length) steps; values are >= 0."""
    length, step = values.shape[1], 1
    while step < length:
        values = tf.maximum(values, tf.pad(values, [[0, 0], [step, 0]])[:, :length])
        step *= 2
    return values
