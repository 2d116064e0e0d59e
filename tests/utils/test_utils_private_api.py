"""Private API: a library that moved is named, with its release and the missing name."""

import keras
import pytest
import tensorflow as tf

from dpo_keras.utils.keras_internals import (
    all_layers,
    base_kernel,
    optimization_barrier,
    unmerged_weights,
)
from dpo_keras.utils.private_api import KERAS, KERAS_HUB, private

WRITTEN_FOR = "which dpo_keras was written for"


def test_a_missing_name_is_told_with_library_and_release():
    message = rf"KerasHub [\d.]+ has no int\._gone, .* Install keras-hub 0\.32, {WRITTEN_FOR}"
    with pytest.raises(RuntimeError, match=message):
        private(3, "_gone", KERAS_HUB)
    with pytest.raises(RuntimeError, match=rf"Keras {keras.__version__} has no int\._gone"):
        private(3, "_gone", KERAS)


def adapted():
    layer = keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((3,)), layer])
    layer.enable_lora(1)
    return model, layer


def test_layers_and_weights_of_keras_are_found():
    model, layer = adapted()
    assert layer in all_layers(model) and model in all_layers(model)
    assert base_kernel(layer) is layer.weights[0]
    assert list(unmerged_weights(layer)) == ["_kernel", "lora_kernel_a", "lora_kernel_b"]
    assert layer.lora_enabled and (layer.lora_rank, layer.lora_alpha) == (1, 1)
    embedding = keras.layers.Embedding(4, 2)
    embedding.build()
    embedding.enable_lora(1)
    names = ["_embeddings", "lora_embeddings_a", "lora_embeddings_b"]
    assert list(unmerged_weights(embedding)) == names


@pytest.mark.parametrize("read", [base_kernel, unmerged_weights])
def test_a_layer_without_its_kernel_is_told(read):
    _, layer = adapted()
    del layer._kernel
    with pytest.raises(RuntimeError, match=rf"Keras [\d.]+ has no Dense\._kernel, .*{WRITTEN_FOR}"):
        read(layer)


def test_a_model_without_flat_layers_is_told():
    with pytest.raises(RuntimeError, match=r"Keras [\d.]+ has no object\._flatten_layers"):
        all_layers(object())


def test_a_barrier_gives_back_its_values():
    function = tf.function(lambda x: optimization_barrier([x, x + 1.0]), jit_compile=True)
    assert [float(value) for value in function(tf.constant(1.0))] == [1.0, 2.0]
