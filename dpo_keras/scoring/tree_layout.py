"""Who sees whom in a packed row: attention within trees of one prompt and two responses.

A packed row holds trees one after another. A token sees its own prompt and its own response, up to
itself:

    sees(i, j) = (tree_i = tree_j) and (j <= i) and (branch_j = prompt or branch_j = branch_i)

and, where a layer looks back over a window of w tokens, only position_i - position_j < w. Distance
is counted in positions and not along the row, in which the second response stands behind the first.

Two ways of doing it, with equal results:

* *segments*: the row is cut between trees, and each piece attends to itself. No arithmetic is spent
  on pairs of tokens in different trees, which are most of a row's;
* *dense*: one mask over the whole row, whose shapes are static, as XLA needs.
"""

from typing import Any

import tensorflow as tf

SEGMENT = 256
# Pieces are filled up to a multiple of this. oneDNN compiles its products for each shape anew and
# keeps what it compiled: for all the lengths that pieces can have, hundreds of megabytes.
GRID = 32
_NEVER = -1e9


class TreeLayout:
    """Positions and attention of one packed batch, computed once for all layers.

    Args:
        positions: `[rows, length]` int32, the place of each token in its own text.
        tree: `[rows, length]` int32, 3 * (pair slot) + (0 prompt, 1 chosen, 2 rejected); -1 where
            the row is empty.
        dense: whether shapes must be static (XLA, TPUs).
        segment: tokens; a piece holds the trees that begin within so many.

    Example:
        >>> tree = tf.constant([[0, 1, 2, 3, 4, 5, -1, -1]])
        >>> positions = tf.constant([[0, 1, 1, 0, 1, 1, 0, 0]])
        >>> layout = TreeLayout(positions, tree, dense=True)
        >>> tf.cast(layout.biases(None)[0][0, 0] == 0.0, tf.int32).numpy()[:3, :3]
        array([[1, 0, 0],
               [1, 1, 0],
               [1, 0, 1]], dtype=int32)
    """

    def __init__(self, positions: Any, tree: Any, dense: bool = False, segment: int = SEGMENT):
        self.positions = positions
        self._tree = tree
        rows, length = tree.shape
        # Without static shapes the number of pieces is not known while tracing.
        self.dense = dense or rows is None or length is None
        self._biases: dict[int | None, list[Any]] = {}
        if not self.dense:
            self._sizes = segment_sizes(tree, segment)
            self._missing = tf.unstack(-self._sizes % GRID)

    def biases(self, window: int | None) -> list[Any]:
        """What is added to attention scores: 0 where a token sees another, else -1e9.

        Args:
            window: how many positions a layer looks back over, itself included; None for all.

        Returns:
            One float32 tensor for each piece: `[1, n, n]` for segments, n a multiple of `GRID`;
            `[rows, 1, length, length]` as the only one if dense.
        """
        if window not in self._biases:
            self._biases[window] = [
                _bias(tree, positions, window)
                for tree, positions in zip(
                    self._rows(self._tree, empty=-1), self._rows(self.positions), strict=True
                )
            ]
        return self._biases[window]

    def _rows(self, values: Any, empty: int = 0) -> list[Any]:
        if self.dense:
            return [values[:, None]]
        return self._pieces(tf.reshape(values, (1, -1)), empty)

    def _pieces(self, values: Any, empty: int = 0) -> list[Any]:
        """Cuts `[rows, all tokens, …]` into pieces, filled up to the grid."""
        rest = [[0, 0]] * (len(values.shape) - 2)
        return [
            tf.pad(piece, [[0, 0], [0, missing], *rest], constant_values=empty)
            for piece, missing in zip(
                tf.split(values, self._sizes, axis=1, num=self._sizes.shape[0]),
                self._missing,
                strict=True,
            )
        ]

    def attend(
        self,
        query: Any,
        key: Any,
        value: Any,
        scale: float,
        soft_cap: float | None = None,
        window: int | None = None,
        dropout: Any = None,
    ) -> Any:
        """Attention within trees: softmax(cap(scale q k') + bias) v.

        Args:
            query: `[rows, length, heads, D]`.
            key: `[rows, length, key heads, D]`; heads must be a multiple of key heads.
            value: `[rows, length, key heads, D']`.
            scale: of the scores.
            soft_cap: the c of cap(s) = c tanh(s / c), or None.
            window: see `biases`.
            dropout: function of the attention weights, or None.

        Returns:
            `[rows, length, heads, D']`, in the dtype of `value`.
        """
        rows, length, heads, _ = query.shape
        groups = heads // key.shape[2]
        if groups > 1:
            key, value = (tf.repeat(states, groups, axis=2) for states in (key, value))
        query = query * tf.cast(scale, query.dtype)
        if self.dense:
            query, key, value = (
                tf.transpose(states, (0, 2, 1, 3)) for states in (query, key, value)
            )
            (bias,) = self.biases(window)
            found = _attend(query, key, value, bias, soft_cap, dropout)
            return tf.transpose(found, (0, 2, 1, 3))

        def pieces(states: Any) -> list[Any]:
            states = tf.reshape(states, (rows * length, heads, states.shape[-1]))
            return self._pieces(tf.transpose(states, (1, 0, 2)))

        found = [
            _attend(q, k, v, bias, soft_cap, dropout)[:, :size]
            for q, k, v, bias, size in zip(
                pieces(query),
                pieces(key),
                pieces(value),
                self.biases(window),
                tf.unstack(self._sizes),
                strict=True,
            )
        ]
        together = tf.transpose(tf.concat(found, axis=1), (1, 0, 2))
        return tf.reshape(together, (rows, length, heads, value.shape[-1]))


def segment_sizes(tree: Any, segment: int) -> Any:
    """Cuts rows between trees, into a number of pieces that does not depend on the trees.

    Piece k of a row holds the trees that begin in `[segment k, segment (k + 1))`; it may be empty.

    Args:
        tree: `[rows, length]` int32 as in the batch contract.
        segment: tokens.

    Returns:
        `[rows * ceil(length / segment)]` int32; the sizes add up to `rows * length`.

    Example:
        >>> tree = tf.constant([[0, 1, 2, 3, 4, 5, 5, -1]])
        >>> segment_sizes(tree, 4).numpy()
        array([7, 1], dtype=int32)
        >>> segment_sizes(tree, 3).numpy()
        array([3, 4, 1], dtype=int32)
    """
    rows, length = tree.shape
    pieces = -(-length // segment)
    own = tree // 3
    begins = tf.concat([tf.ones((rows, 1), tf.bool), own[:, 1:] != own[:, :-1]], axis=1)
    start = tf.where(begins, tf.range(length), 0)
    step = 1
    while step < length:  # a running maximum, in log2(length) steps
        start = tf.maximum(start, tf.pad(start, [[0, 0], [step, 0]])[:, :length])
        step *= 2
    piece = start // segment + pieces * tf.range(rows)[:, None]
    count = rows * pieces
    sizes = tf.math.bincount(tf.reshape(piece, [-1]), minlength=count, maxlength=count)
    return tf.ensure_shape(sizes, (count,))


def _bias(tree: Any, positions: Any, window: int | None) -> Any:
    length = tf.shape(tree)[-1]
    seer, seen = tree[..., :, None], tree[..., None, :]
    sees = tf.logical_and(
        seer // 3 == seen // 3, tf.logical_or(seen % 3 == 0, seer % 3 == seen % 3)
    )
    places = tf.range(length)
    sees = tf.logical_and(sees, places[:, None] >= places)
    if window is not None:
        distance = positions[..., :, None] - positions[..., None, :]
        sees = tf.logical_and(sees, distance < window)
    # The empty end of a row must see something too, or its softmax is no number.
    sees = tf.logical_or(sees, places[:, None] == places)
    return tf.where(sees, 0.0, _NEVER)


def _attend(
    query: Any, key: Any, value: Any, bias: Any, soft_cap: float | None, dropout: Any
) -> Any:
    scores = tf.cast(tf.matmul(query, key, transpose_b=True), tf.float32)
    if soft_cap is not None:
        scores = soft_cap * tf.tanh(scores / soft_cap)
    weights = tf.cast(tf.nn.softmax(scores + bias), value.dtype)
    if dropout is not None:
        weights = dropout(weights)
    return tf.matmul(weights, value)
