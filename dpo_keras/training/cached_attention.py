"""Attention that fills and reads caches of keys and values, for policies that run on packed rows.

A backbone runs its own code on whole prompts or on one token of each text; only its attention and
its positions are replaced, by `scoring.tree_attention.tree_overrides`.
"""

import keras
import tensorflow as tf

from dpo_keras.scoring.layer_overrides import Override
from dpo_keras.scoring.tree_attention import TreeLayout, tree_overrides
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_attention import AttentionSettings, is_rotary_table
from dpo_keras.utils.keras_internals import all_layers

_NEVER = -1e9


class _OneText(TreeLayout):
    """Attention of rows that hold one text each."""

    def __init__(self, positions: Tensor):
        super().__init__(positions, tf.zeros_like(positions) + tf.shape(positions)[1], dense=True)


class PromptAttention(_OneText):
    """Attention of prompts that keeps their keys and values, `[rows, heads, n, D]`."""

    def __init__(self, positions: Tensor):
        super().__init__(positions)
        self.found: list[Tensor] = []

    def overrides(self, backbone: keras.Model) -> list[Override]:
        """Return what makes a backbone attend so."""
        return tree_overrides(backbone, self)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: AttentionSettings,
        training: bool | None = False,
    ) -> Tensor:
        """Attend to the tokens before."""
        self.found += [tf.transpose(_own_heads(s, settings), (0, 2, 1, 3)) for s in (key, value)]
        return super().attend(query, key, value, settings, training)


class CachedAttention(_OneText):
    """Attention of one token in each slot to its cache, into which the token goes first.

    `caches` are keys and values of each layer in turn, `[slots, heads, n, D]`.
    """

    def __init__(self, positions: Tensor, caches: list[Tensor]):
        super().__init__(positions)
        self.caches = list(caches)
        self._next = 0

    def overrides(self, backbone: keras.Model) -> list[Override]:
        """Return what makes a backbone attend so."""
        places = tf.shape(self.caches[0])[2]
        return tree_overrides(backbone, self) + _table_overrides(backbone, self.positions, places)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        settings: AttentionSettings,
        training: bool | None = False,
    ) -> Tensor:
        """Attend to what the cache holds of each slot: softmax(cap(scale q k') + bias) v."""
        keys, values = (self._put(states, settings) for states in (key, value))
        slots, heads, length, _ = tf.unstack(tf.shape(keys))
        query = query[:, 0] * tf.cast(settings.scale, query.dtype)
        groups = query.shape[1] // keys.shape[1]
        query = tf.reshape(query, (slots, heads, groups, query.shape[2]))
        # Twice as fast as query by key, in TensorFlow 2.21 on CPUs.
        scores = tf.cast(tf.matmul(keys, query, transpose_b=True), tf.float32)
        if groups == 1:
            scores = tf.reshape(scores, (slots, heads, 1, length))
        else:
            scores = tf.linalg.matrix_transpose(scores)
        weights = tf.cast(self._weights(scores, settings), values.dtype)
        found = tf.matmul(weights, values)
        return tf.reshape(found, (slots, 1, keys.shape[1] * groups, values.shape[3]))

    def _put(self, states: Tensor, settings: AttentionSettings) -> Tensor:
        """Write keys or values of one token in each slot into the next cache, and return it."""
        states = _own_heads(states, settings)
        cache = self.caches[self._next]
        slots, heads, length, width = tf.unstack(tf.shape(cache))
        first = tf.reshape(tf.range(slots * heads) * length, (slots, heads))
        # In place: nothing else reads the cache of the step before. `tf.tensor_scatter_nd_update`
        # copies all of a cache at each step (TensorFlow 2.21).
        written = tf.raw_ops.InplaceUpdate(
            x=tf.reshape(cache, (-1, width)),
            i=tf.reshape(first + self.positions, [-1]),
            v=tf.reshape(states, (-1, width)),
        )
        written = tf.ensure_shape(tf.reshape(written, tf.shape(cache)), cache.shape)
        self.caches[self._next] = written
        self._next += 1
        return written

    def _weights(self, scores: Tensor, settings: AttentionSettings) -> Tensor:
        """Turn scores `[slots, heads, groups, n]` into weights."""
        if settings.soft_cap is not None:
            scores = settings.soft_cap * tf.tanh(scores / settings.soft_cap)
        place = tf.range(tf.shape(scores)[3])
        distance = self.positions - place
        seen = distance >= 0
        if settings.window is not None:
            seen &= distance < settings.window
        scores += tf.where(seen, 0.0, _NEVER)[:, None, None]
        by_head = (1, *scores.shape[1:3], 1)
        if settings.slopes is not None:
            slopes = tf.reshape(tf.constant(settings.slopes, tf.float32), by_head)
            scores += slopes * tf.cast(place, tf.float32)
        if settings.sinks is None:
            return tf.nn.softmax(scores)
        sinks = tf.reshape(tf.cast(settings.sinks, tf.float32), by_head)
        sinks = tf.broadcast_to(sinks, [*tf.unstack(tf.shape(scores)[:3]), 1])
        return tf.nn.softmax(tf.concat([scores, sinks], axis=-1))[..., :-1]


def _own_heads(states: Tensor, settings: AttentionSettings) -> Tensor:
    """Return each head of keys or values once, where a layer repeats them for its queries."""
    heads = settings.key_value_heads
    return states if heads is None else states[:, :, :: max(states.shape[2] // heads, 1)]


def _table_overrides(backbone: keras.Model, positions: Tensor, length: Tensor) -> list[Override]:
    """Look positions up in a table of all places, not in one as long as the row of one token."""

    def at_positions(layer: keras.layers.Layer) -> Override:
        call = layer.call

        def rows(inputs: Tensor, *_: object, **__: object) -> tuple[Tensor, ...]:
            table = call(tf.zeros([1, length, 1], inputs.dtype))
            return tuple(tf.gather(column[0], positions) for column in table)

        return Override(layer, "call", rows)

    return [at_positions(layer) for layer in all_layers(backbone) if is_rotary_table(layer)]
