"""Attention that fills and reads caches of keys and values, for policies that run on packed rows.

A backbone runs its own code on whole prompts or on one token of each text; only its attention and
its positions are replaced, by `scoring.tree_attention.tree_overrides`.
"""

import tensorflow as tf

from dpo_keras.scoring.tree_attention import NEVER, TreeLayout, attention_weights, with_slopes
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_attention import AttentionSettings


class _OneText(TreeLayout):
    """Attention of rows that hold one text each."""

    def __init__(self, positions: Tensor):
        super().__init__(positions, tf.zeros_like(positions) + tf.shape(positions)[1])


class PromptAttention(_OneText):
    """Attention of prompts that keeps their keys and values, `[rows, heads, n, D]`."""

    def __init__(self, positions: Tensor):
        super().__init__(positions)
        self.found: list[Tensor] = []

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

    def row_of_all_positions(self, states: Tensor) -> Tensor:
        """Return a row as long as the caches: the row of a token has one place."""
        return tf.zeros([1, tf.shape(self.caches[0])[2], 1], states.dtype)

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
        queries, width = query.shape[1:]
        groups = queries // keys.shape[1]
        query = tf.reshape(query, (slots, heads, groups, width))
        # The queries of one head of keys stand together, as their sinks and slopes do.
        scores = tf.reshape(tf.matmul(query, keys, transpose_b=True), (slots, queries, 1, length))
        weights = tf.cast(attention_weights(scores, self._bias(settings), settings), values.dtype)
        found = tf.matmul(tf.reshape(weights, (slots, heads, groups, length)), values)
        return tf.reshape(found, (slots, 1, queries, values.shape[3]))

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

    def _bias(self, settings: AttentionSettings) -> Tensor:
        """Return what is added to scores `[slots, heads, 1, n]`."""
        place = tf.range(tf.shape(self.caches[0])[2])
        distance = self.positions - place
        seen = distance >= 0
        if settings.window is not None:
            seen &= distance < settings.window
        bias = tf.where(seen, 0.0, NEVER)[:, None, None]
        if settings.slopes is None:
            return bias
        return with_slopes(bias, tf.cast(place, tf.float32), settings.slopes)


def _own_heads(states: Tensor, settings: AttentionSettings) -> Tensor:
    """Return each head of keys or values once, where a layer repeats them for its queries."""
    heads = settings.key_value_heads
    return states if heads is None else states[:, :, :: max(states.shape[2] // heads, 1)]
