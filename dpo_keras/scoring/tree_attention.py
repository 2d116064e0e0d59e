"""Attention in packed rows: within trees of token sequences.

A packed row holds trees one after another, each laid out depth first: behind a token stand all that
follow it in some text, and only then its next sibling. So the tokens that see a token, itself and
its descendants, are one run of places, and its length `reach` is all that the mask needs:

    sees(i, j) = 0 <= i - j < reach_j

and, where a layer looks back over a window of w tokens, only position_i - position_j < w. Distance
is counted in positions and not along the row, in which the second response stands behind the first.
So is ALiBi's bias, slope * (position_j - position_i).

Two implementations give equal results:

* *dense*, here: one mask over the whole row, of static shapes, in `keras.ops`;
* *segments*, in `tree_segments`: TensorFlow cuts the row between trees, and each piece attends to
  itself. No arithmetic is spent on pairs of tokens in different trees, most pairs of a row.

`tree_overrides` gives the positions of the batch to a backbone's position layers, and
`TreeLayout.attend` to its attention layers. Everything else is the backbone's own code.
"""

from collections.abc import Sequence

from keras import Model, ops

from dpo_keras.scoring.layer_overrides import Call, Override
from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import softmax
from dpo_keras.utils.keras_hub_attention import (
    ATTENTION_METHOD,
    AttentionSettings,
    Projections,
    attention_settings,
    is_position,
    is_rotary_table,
)
from dpo_keras.utils.keras_internals import all_layers

NEVER = -1e9


class TreeLayout:
    """Positions and attention of one packed batch, computed once for all layers.

    `positions` and `reach` are `[rows, length]`, as in `Batch`.
    """

    dense = True
    """Whether each row attends as a whole."""

    def __init__(self, positions: Tensor, reach: Tensor):
        self.positions, self.reach = positions, reach
        self._biases: dict[int | None, list[Tensor]] = {}
        self._places: list[Tensor] | None = None

    def biases(self, window: int | None) -> list[Tensor]:
        """Return what each piece adds to its attention scores, 0 or -1e9.

        There is one for all rows here, float32 `[rows, 1, length, length]`.
        """
        if window not in self._biases:
            pieces = zip(self.pieces(self.reach, 1), self.pieces(self.positions), strict=True)
            self._biases[window] = [_bias(reach, places, window) for reach, places in pieces]
        return self._biases[window]

    def places(self) -> list[Tensor]:
        """Return each piece's positions as keys, float32; here one, `[rows, 1, 1, length]`."""
        if self._places is None:
            pieces = self.pieces(self.positions)
            self._places = [ops.cast(piece, "float32")[..., None, :] for piece in pieces]
        return self._places

    def pieces(self, values: Tensor, empty: int = 0) -> list[Tensor]:
        """Cut `[rows, length]` into what attends to itself, filled up with `empty`."""
        return [values[:, None]]

    def row_of_all_positions(self, states: Tensor) -> Tensor:
        """Return a row that is long enough for a table to have all positions: any of `states`."""
        return states[:1]  # row i of a table is for place i, and no position exceeds a row's length

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
        groups = query.shape[2] // key.shape[2]
        if groups > 1:
            key, value = (ops.repeat(states, groups, axis=2) for states in (key, value))
        query = query * ops.cast(settings.scale, query.dtype)
        biases = self.biases(settings.window)
        if settings.slopes is not None:
            both = zip(biases, self.places(), strict=True)
            biases = [with_slopes(bias, places, settings.slopes) for bias, places in both]
        return self.attend_in_pieces(biases, (query, key, value), settings, training)

    def attend_in_pieces(
        self,
        biases: list[Tensor],
        states: tuple[Tensor, Tensor, Tensor],
        settings: AttentionSettings,
        training: bool | None,
    ) -> Tensor:
        """Attend with the scaled queries, keys and values of equally many heads."""
        rows_of_heads = tuple(ops.transpose(s, (0, 2, 1, 3)) for s in states)
        found = attend_with_bias(rows_of_heads, biases[0], settings, training)
        return ops.transpose(found, (0, 2, 1, 3))


def _bias(reach: Tensor, positions: Tensor, window: int | None) -> Tensor:
    places = ops.arange(ops.shape(reach)[-1], dtype="int32")
    behind = places[:, None] - places
    # Every token sees itself, padding too, or its softmax would be NaN.
    sees = ops.logical_and(behind >= 0, behind < reach[..., None, :])
    if window is not None:
        distance = positions[..., :, None] - positions[..., None, :]
        sees = ops.logical_and(sees, distance < window)
    return ops.where(sees, 0.0, NEVER)


def attend_with_bias(
    states: tuple[Tensor, ...], bias: Tensor, settings: AttentionSettings, training: bool | None
) -> Tensor:
    """Attend with queries, keys and values `[..., heads, n, D]`."""
    query, key, value = states
    scores = ops.matmul(query, ops.swapaxes(key, -1, -2))
    weights = ops.cast(attention_weights(scores, bias, settings), value.dtype)
    if settings.dropout is not None and training is not False:
        weights = settings.dropout(weights, training=training)
    return ops.matmul(weights, value)


def attention_weights(scores: Tensor, bias: Tensor, settings: AttentionSettings) -> Tensor:
    """Compute softmax(cap(scores) + bias) of `[..., heads, n, m]`, in float32."""
    scores = ops.cast(scores, "float32")
    if settings.soft_cap is not None:
        scores = settings.soft_cap * ops.tanh(scores / settings.soft_cap)
    scores = scores + bias
    if settings.sinks is None:
        return softmax(scores)
    sinks = ops.reshape(ops.cast(settings.sinks, "float32"), (-1, 1, 1))
    column = ops.broadcast_to(sinks, (*ops.shape(scores)[:-1], 1))
    return softmax(ops.concatenate([scores, column], axis=-1))[..., :-1]


def with_slopes(bias: Tensor, places: Tensor, slopes: Sequence[float]) -> Tensor:
    """Add ALiBi to a bias `[..., heads, n, m]`, by the positions of keys, float32 `[..., 1, m]`."""
    # Softmax drops what keys have in common, so a key's position serves as its distance.
    return bias + ops.reshape(ops.convert_to_tensor(slopes, "float32"), (-1, 1, 1)) * places


def tree_overrides(backbone: Model, layout: TreeLayout) -> list[Override]:
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


def make_biases(backbone: Model, layout: TreeLayout) -> None:
    """Make what a backbone's attention layers will ask `layout` for."""
    for layer in all_layers(backbone):
        settings = attention_settings(layer)
        if settings is not None:
            layout.biases(settings.window)
            if settings.slopes is not None:
                layout.places()


def _at_positions(call: Call, positions: Tensor) -> Call:
    return lambda inputs, *_, **__: call(inputs, positions=positions)


def _table_rows(call: Call, layout: TreeLayout) -> Call:
    def rows_at_positions(inputs: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
        table = call(layout.row_of_all_positions(inputs))
        return tuple(ops.take(column[0], layout.positions, axis=0) for column in table)

    return rows_at_positions


def _projected(settings: AttentionSettings, projections: Projections, layout: TreeLayout) -> Call:
    def attend(*arguments: Tensor, **options: Tensor) -> Tensor:
        # The first argument has a name of its own in each family; masks and biases are unused.
        states = arguments[0] if arguments else options.get("hidden_states", options.get("inputs"))
        query, key, value = (project(states) for project in projections[:3])
        # None: the dropout layer knows whether the model trains.
        found = layout.attend(query, key, value, settings, training=None)
        rows, length, heads, width = ops.shape(found)
        found = projections.output(ops.reshape(found, (rows, length, heads * width)))
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
