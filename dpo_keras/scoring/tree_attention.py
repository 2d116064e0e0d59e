"""Attention in packed rows: within trees of token sequences.

A packed row holds trees one after another, each laid out depth first: behind a token stand all that
follow it in some text, and only then its next sibling. So the tokens that see a token, itself and
its descendants, are one run of places, and its length `reach` is all that the mask needs:

    sees(i, j) = 0 <= i - j < reach_j

and, where a layer looks back over a window of w tokens, only position_i - position_j < w. Distance
is counted in positions and not along the row, in which the second response stands behind the first.
So is ALiBi's bias, slope * (position_j - position_i).

Two implementations give equal results:

* *segments*: the row is cut between trees, and each piece attends to itself. No arithmetic is spent
  on pairs of tokens in different trees, which are most pairs of a row;
* *dense*: one mask over the whole row, whose shapes are static, as XLA needs.

`tree_overrides` gives the positions of the batch to a backbone's position layers, and
`TreeLayout.attend` to its attention layers. Everything else is the backbone's own code.
"""

from collections.abc import Sequence

import keras
import tensorflow as tf

from dpo_keras.scoring.layer_overrides import Call, Override, made_after
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_attention import (
    ATTENTION_METHOD,
    AttentionSettings,
    Projections,
    attention_settings,
    is_position,
    is_rotary_table,
)
from dpo_keras.utils.keras_internals import all_layers

SEGMENT = 256
# Pieces are padded to a multiple of this. oneDNN compiles its products for each shape anew and
# keeps what it compiled: for all the lengths that pieces can have, hundreds of megabytes.
GRID = 32
NEVER = -1e9


class TreeLayout:
    """Positions and attention of one packed batch, computed once for all layers.

    `positions` and `reach` are `[rows, length]`, as in `Batch`; `dense` tells that shapes must be
    static (XLA, TPUs); a piece holds the trees that begin within `segment` tokens.
    """

    def __init__(
        self, positions: Tensor, reach: Tensor, dense: bool = False, segment: int = SEGMENT
    ):
        self.positions = positions
        self._reach = reach
        rows, length = reach.shape
        # Without static shapes the number of pieces is not known while tracing.
        self.dense = dense or rows is None or length is None
        self._biases: dict[int | None, list[Tensor]] = {}
        self._places: list[Tensor] | None = None
        if not self.dense:
            self._sizes = segment_sizes(reach, segment)
            self._missing = tf.unstack(-self._sizes % GRID)

    def biases(self, window: int | None) -> list[Tensor]:
        """Return what each piece adds to its attention scores, 0 or -1e9: float32 `[1, n, n]`.

        If dense, there is one for all: `[rows, 1, length, length]`.
        """
        if window not in self._biases:
            reaches, positions = (
                self._flat_pieces(self._reach, 1),
                self._flat_pieces(self.positions),
            )
            pieces = zip(reaches, positions, strict=True)
            self._biases[window] = [_bias(reach, places, window) for reach, places in pieces]
        return self._biases[window]

    def places(self) -> list[Tensor]:
        """Return each piece's positions as keys, float32 `[1, 1, n]`; dense `[rows, 1, 1, n]`."""
        if self._places is None:
            pieces = self._flat_pieces(self.positions)
            self._places = [tf.cast(piece, tf.float32)[..., None, :] for piece in pieces]
        return self._places

    def row_of_all_positions(self, states: Tensor) -> Tensor:
        """Return a row that is long enough for a table to have all positions: any of `states`."""
        return states[:1]  # row i of a table is for place i, and no position exceeds a row's length

    def _flat_pieces(self, values: Tensor, empty: int = 0) -> list[Tensor]:
        if self.dense:
            return [values[:, None]]
        return self._pieces(tf.reshape(values, (1, -1)), empty)

    def _pieces(self, values: Tensor, empty: int = 0) -> list[Tensor]:
        """Cut `[rows, all tokens, …]` into pieces, each padded to the grid."""
        rest = [[0, 0]] * (len(values.shape) - 2)
        pieces = tf.split(values, self._sizes, axis=1, num=self._sizes.shape[0])
        return [
            tf.pad(piece, [[0, 0], [0, missing], *rest], constant_values=empty)
            for piece, missing in zip(pieces, self._missing, strict=True)
        ]

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: AttentionSettings,
        training: bool | None = False,
    ) -> Tensor:
        """Attend within trees: softmax(cap(scale q k') + bias) v, in the dtype of v.

        ALiBi adds to the bias, and attention sinks to what the softmax divides by.

        Shapes are `[rows, length, heads, D]`; heads are a multiple of those of key and value.
        """
        rows, length, heads, _ = query.shape
        groups = heads // key.shape[2]
        if groups > 1:
            key, value = (tf.repeat(states, groups, axis=2) for states in (key, value))
        query = query * tf.cast(settings.scale, query.dtype)
        biases = self.biases(settings.window)
        if settings.slopes is not None:
            both = zip(biases, self.places(), strict=True)
            biases = [with_slopes(bias, places, settings.slopes) for bias, places in both]
        if self.dense:
            rows_of_heads = tuple(tf.transpose(s, (0, 2, 1, 3)) for s in (query, key, value))
            found = _attend(rows_of_heads, biases[0], settings, training)
            return tf.transpose(found, (0, 2, 1, 3))

        flat = [tf.reshape(s, (rows * length, heads, s.shape[-1])) for s in (query, key, value)]
        active_dropout = settings.dropout is not None and training is not False
        plain = settings.soft_cap is None and settings.sinks is None and not active_dropout
        if plain and query.dtype == value.dtype == tf.float32:
            together = self._attend_plainly(biases, *flat)
        else:
            states = zip(*map(self._cut, flat), strict=True)
            together = self._join(
                [
                    _attend(piece, bias, settings, training)
                    for piece, bias in zip(states, biases, strict=True)
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


def _bias(reach: Tensor, positions: Tensor, window: int | None) -> Tensor:
    places = tf.range(tf.shape(reach)[-1])
    behind = places[:, None] - places
    # Every token sees itself, padding too, or its softmax would be NaN.
    sees = tf.logical_and(behind >= 0, behind < reach[..., None, :])
    if window is not None:
        distance = positions[..., :, None] - positions[..., None, :]
        sees = tf.logical_and(sees, distance < window)
    return tf.where(sees, 0.0, NEVER)


def _attend(
    states: tuple[Tensor, ...], bias: Tensor, settings: AttentionSettings, training: bool | None
) -> Tensor:
    query, key, value = states
    scores = tf.matmul(query, key, transpose_b=True)
    weights = tf.cast(attention_weights(scores, bias, settings), value.dtype)
    if settings.dropout is not None and training is not False:
        weights = settings.dropout(weights, training=training)
    return tf.matmul(weights, value)


def attention_weights(scores: Tensor, bias: Tensor, settings: AttentionSettings) -> Tensor:
    """Compute softmax(cap(scores) + bias) of `[..., heads, n, m]`, in float32."""
    scores = tf.cast(scores, tf.float32)
    if settings.soft_cap is not None:
        scores = settings.soft_cap * tf.tanh(scores / settings.soft_cap)
    scores = scores + bias
    if settings.sinks is None:
        return tf.nn.softmax(scores)
    sinks = tf.reshape(tf.cast(settings.sinks, tf.float32), (-1, 1, 1))
    column = tf.broadcast_to(sinks, [*tf.unstack(tf.shape(scores)[:-1]), 1])
    return tf.nn.softmax(tf.concat([scores, column], axis=-1))[..., :-1]


def with_slopes(bias: Tensor, places: Tensor, slopes: Sequence[float]) -> Tensor:
    """Add ALiBi to a bias `[..., heads, n, m]`, by the positions of keys, float32 `[..., 1, m]`."""
    # Softmax drops what keys have in common, so a key's position serves as its distance.
    return bias + tf.reshape(tf.constant(slopes, tf.float32), (-1, 1, 1)) * places


def tree_overrides(backbone: keras.Model, layout: TreeLayout) -> list[Override]:
    """Run the position and attention layers of a backbone without `packing_obstacle` on trees."""
    overrides = []
    for layer in all_layers(backbone):
        if is_position(layer):
            overrides.append(Override(layer, "call", _at_positions(layer.call, layout.positions)))
        elif is_rotary_table(layer):
            overrides.append(Override(layer, "call", _table_rows(layer.call, layout)))
        elif (settings := attention_settings(layer)) is None:
            continue
        elif settings.projections is None:
            overrides.append(Override(layer, ATTENTION_METHOD, _within_trees(settings, layout)))
        else:
            call = _projected(settings, settings.projections, layout)
            overrides.append(Override(layer, "call", call))
    return overrides


def _at_positions(call: Call, positions: Tensor) -> Call:
    return lambda inputs, *_, **__: call(inputs, positions=positions)


def _table_rows(call: Call, layout: TreeLayout) -> Call:
    def rows_at_positions(inputs: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
        table = call(layout.row_of_all_positions(inputs))
        return tuple(tf.gather(column[0], layout.positions) for column in table)

    return rows_at_positions


def _projected(settings: AttentionSettings, projections: Projections, layout: TreeLayout) -> Call:
    def attend(*arguments: Tensor, **options: Tensor) -> Tensor:
        # The first argument has a name of its own in each family; masks and biases are unused.
        states = arguments[0] if arguments else options.get("hidden_states", options.get("inputs"))
        query, key, value = (project(states) for project in projections[:3])
        # None: the dropout layer knows whether the model trains.
        found = layout.attend(query, key, value, settings, training=None)
        rows, length, heads, width = keras.ops.shape(found)
        found = projections.output(tf.reshape(found, (rows, length, heads * width)))
        dropout = settings.output_dropout
        return found if dropout is None else dropout(found)

    return attend


def _within_trees(settings: AttentionSettings, layout: TreeLayout) -> Call:
    def within_trees(
        query: Tensor, key: Tensor, value: Tensor, *_: object, training: bool = False, **__: object
    ) -> Tensor:
        found = layout.attend(query, key, value, settings, training)
        return (found, None) if settings.returns_weights else found

    return within_trees
