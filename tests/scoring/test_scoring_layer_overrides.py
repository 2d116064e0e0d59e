"""Overrides end with their block; fused layers are the layers that they stand for."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from families import FAMILIES

from dpo_keras.scoring.layer_overrides import (
    Override,
    fused,
    fused_overrides,
    overridden_methods,
)
from dpo_keras.utils.keras_internals import all_layers


class Layer:
    def call(self):
        return "its own"


def test_overrides_end_with_their_block_and_nest():
    layer = Layer()
    with overridden_methods([Override(layer, "call", lambda: "outer")]):
        with overridden_methods([Override(layer, "call", lambda: "inner")]):
            assert layer.call() == "inner"
        assert layer.call() == "outer"
    assert (layer.call(), vars(layer)) == ("its own", {})


def test_a_fused_function_has_its_value_and_gradient():
    square = fused(tf.square)
    with tf.GradientTape() as tape:
        x = tf.constant(3.0)
        tape.watch(x)
        y = square(x)
    assert (float(y), float(tape.gradient(y, x))) == (9.0, 6.0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3", "gpt_oss"])
def test_a_backbone_with_fused_layers_is_the_same_backbone(family):
    backbone = FAMILIES[family]().backbone
    ids = np.random.default_rng(0).integers(0, 97, (2, 8))
    inputs = {"token_ids": tf.constant(ids), "padding_mask": tf.ones((2, 8), "int32")}
    found = []
    calls = fused_overrides(backbone)
    assert len(calls) >= 3
    for overrides in (calls, []):
        with tf.GradientTape() as tape:
            with overridden_methods(overrides):
                states = backbone(inputs)
            loss = tf.reduce_mean(tf.sin(states))
        gradients = tape.gradient(loss, backbone.trainable_variables)
        found.append([states, *(tf.convert_to_tensor(g) for g in gradients if g is not None)])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(other).max(), 1.0))


def test_dense_layers_without_adapters_are_one_product_with_its_bias():
    backbone = FAMILIES["gpt2"]().backbone
    kinds = keras.layers.Dense, keras.layers.EinsumDense
    dense = [layer for layer in all_layers(backbone) if isinstance(layer, kinds)]
    dense[0].enable_lora(2)

    def overridden():
        calls = [o.owner for o in fused_overrides(backbone) if o.name == "call"]
        return [layer for layer in dense if any(layer is owner for owner in calls)]

    assert overridden() == dense[1:]

    @tf.function
    def step(states):
        with overridden_methods(fused_overrides(backbone)):
            return dense[1](states)

    width = backbone.hidden_dim
    graph = step.get_concrete_function(tf.TensorSpec((2, 8, width))).graph
    (bias,) = [node for node in graph.get_operations() if node.type == "BiasAdd"]
    # Only so does TensorFlow fuse them.
    assert bias.inputs[0].op.type == "MatMul"


def test_norms_of_the_same_settings_share_a_kernel_but_not_their_weights():
    layers = [keras.layers.LayerNormalization(epsilon=1e-5) for _ in range(2)]
    model = keras.Sequential([keras.Input((4,)), *layers])
    layers[1].gamma.assign([1.0, 2.0, 3.0, 4.0])
    states = tf.constant([[1.0, 2.0, 4.0, 9.0]])
    expected = model(states)
    with overridden_methods(fused_overrides(model)):
        np.testing.assert_allclose(model(states), expected, rtol=1e-6)


def test_only_arguments_are_kept_for_the_gradient():
    """Recomputed: the forward pass hands nothing on but what it was given."""
    activation = fused(lambda x: tf.nn.gelu(x, approximate=True))

    @tf.function
    def step(x):
        with tf.GradientTape() as tape:
            tape.watch(x)
            y = activation(x)
        return tape.gradient(y, x)

    graph = step.get_concrete_function(tf.zeros((3, 5))).graph
    calls = [operation for operation in graph.get_operations() if "Call" in operation.type]
    assert len(calls) == 2
    assert all(len(operation.outputs) == 1 for operation in calls)
