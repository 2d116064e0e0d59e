"""One small transformer, written in Keras 3 and in tf-keras."""

import keras
import numpy as np
import tf_keras
from tiny import VOCABULARY

WIDTH, HEADS, LENGTH = 32, 2, 64


def transformer(library, seed=0, layers=2, vocabulary=VOCABULARY, dropout=0.0, mask=True):
    """Decoder-only, pre-norm, learned positions; `library` is `keras` or `tf_keras`."""
    np.random.seed(seed)
    library.utils.set_random_seed(seed)
    token_ids = library.Input((None,), dtype="int32", name="token_ids")
    padding_mask = library.Input((None,), dtype="int32", name="padding_mask")
    add, layer = library.layers.Add, library.layers
    states = layer.Embedding(vocabulary, WIDTH, name="tokens")(token_ids)
    places = layer.Embedding(LENGTH, WIDTH, name="places")(Places(library)(token_ids))
    states = add()([states, places])
    seen = layer.Reshape((1, -1))(padding_mask)
    for number in range(layers):
        name = f"block_{number}_"
        inner = layer.LayerNormalization(epsilon=1e-5, name=name + "norm_1")(states)
        attention = layer.MultiHeadAttention(HEADS, WIDTH // HEADS, name=name + "attention")
        options = {"attention_mask": seen} if mask else {}
        states = add()([states, attention(inner, inner, use_causal_mask=True, **options)])
        inner = layer.LayerNormalization(epsilon=1e-5, name=name + "norm_2")(states)
        inner = layer.Dense(2 * WIDTH, "tanh", name=name + "up")(inner)
        inner = layer.Dense(WIDTH, name=name + "down")(inner)
        states = add()([states, layer.Dropout(dropout)(inner) if dropout else inner])
    states = layer.LayerNormalization(epsilon=1e-5, name="norm")(states)
    logits = layer.Dense(vocabulary, name="logits")(states)
    inputs = {"token_ids": token_ids, "padding_mask": padding_mask} if mask else token_ids
    return library.Model(inputs, logits)


def Places(library):
    """0, 1, 2, … for each token."""
    return {keras: _Places3, tf_keras: _Places2}[library]()


@keras.saving.register_keras_serializable("legacy_tests")
class _Places3(keras.layers.Layer):
    def call(self, ids):
        return keras.ops.zeros_like(ids) + keras.ops.arange(keras.ops.shape(ids)[1], dtype="int32")


@tf_keras.saving.register_keras_serializable("legacy_tests")
class _Places2(tf_keras.layers.Layer):
    def call(self, ids):
        return keras.ops.zeros_like(ids) + keras.ops.arange(keras.ops.shape(ids)[1], dtype="int32")


def copy_weights(source, target):
    """From the Keras 3 model to the tf-keras one, by name."""
    for layer in source.layers:
        if layer.weights:
            target.get_layer(layer.name).set_weights(layer.get_weights())
