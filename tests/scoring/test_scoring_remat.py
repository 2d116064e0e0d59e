"""Gradient checkpointing and factored LoRA: the same numbers, less memory and fewer products."""

import keras
import numpy as np
import pytest
import tensorflow as tf
import tiny
from families import ALL_FAMILIES, FAMILIES
from scoring_samples import random_pairs

from dpo_keras.batching import collate, collate_packed
from dpo_keras.errors import InputError
from dpo_keras.scoring import scorer as scorer_module
from dpo_keras.scoring.layer_overrides import overridden_methods, remat_overrides
from dpo_keras.scoring.lora import low_rank_overrides
from dpo_keras.scoring.scorer import ResponseScorer

LENGTHS = [(9, 7, 12), (1, 1, 1), (5, 1, 3)]


@pytest.fixture(scope="module")
def batches():
    tokenized = random_pairs(LENGTHS)
    found = {
        "packed": collate_packed(tokenized, [[0, 1], [2]]),
        "buckets": collate(tokenized, [0, 1, 2]),
    }
    return {kind: {k: tf.constant(v) for k, v in batch.items()} for kind, batch in found.items()}


def gradients(policy, batch, jit_compile=False, **options):
    scorer = ResponseScorer(policy, static=jit_compile, **options)

    @tf.function(jit_compile=jit_compile, autograph=False)
    def step(batch):
        with tf.GradientTape() as tape:
            logps = scorer(batch)["logps"]
            loss = tf.reduce_mean(logps * [1.0, -0.7])
        found = tape.gradient(loss, policy.trainable_variables)
        return logps, [tf.convert_to_tensor(g) for g in found if g is not None]

    return step, step(batch)


def assert_same(found, expected):
    assert len(found[1]) == len(expected[1])
    for one, other in zip([found[0], *found[1]], [expected[0], *expected[1]], strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(other).max(), 1.0))


@pytest.mark.parametrize(
    ("family", "kind", "jit_compile"),
    [
        ("gpt2", "packed", False),
        ("gpt2", "packed", True),
        ("llama", "buckets", False),
        ("falcon", "buckets", False),
        ("gpt_oss", "packed", False),
    ],
)
def test_recomputed_blocks_have_the_same_gradients(family, kind, jit_compile, batches):
    policy = FAMILIES[family]()
    _, expected = gradients(policy, batches[kind])
    _, found = gradients(policy, batches[kind], jit_compile, remat=True)
    assert_same(found, expected)


@pytest.mark.parametrize("family", ["gemma4", "rwkv7", "gemma3n"])
def test_recomputed_blocks_pass_on_gradients_of_all_their_arguments(family):
    """Keys and values of an earlier layer, the first values, inputs of each layer: not states."""
    backbone = ALL_FAMILIES[family]().backbone
    inputs = {
        "token_ids": tf.reshape(tf.range(16), (2, 8)),
        "padding_mask": tf.ones((2, 8), "int32"),
    }
    if family == "gemma4":
        inputs["position_ids"] = tf.tile(tf.range(8)[None], (2, 1))
    found = []
    for overrides in ([], remat_overrides(backbone)):
        with tf.GradientTape() as tape, overridden_methods(overrides):
            loss = tf.reduce_mean(tf.sin(backbone(inputs)))
        gradients = tape.gradient(loss, backbone.trainable_variables)
        found.append([tf.convert_to_tensor(g) for g in gradients if g is not None])
    assert len(found[0]) == len(found[1])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-6 * max(np.abs(other).max(), 1.0))


def test_recomputed_blocks_work_with_fused_layers_and_adapters(batches, monkeypatch):
    monkeypatch.setattr(scorer_module, "FUSED_FROM", 0)
    policy = FAMILIES["gpt2"]()
    policy.backbone.enable_lora(2)
    for layer in policy.backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            layer.lora_kernel_b.assign(0.1 * keras.random.normal(layer.lora_kernel_b.shape, seed=1))
    _, expected = gradients(policy, batches["buckets"])
    _, found = gradients(policy, batches["packed"], remat=True)
    # Pairs stand in other rows; the mean over all of them, empty slots included, is scaled by it.
    scale = expected[0].shape[0] / found[0].shape[0]
    for one, other in zip(found[1], expected[1], strict=True):
        np.testing.assert_allclose(one / scale, other, atol=2e-5 * max(np.abs(other).max(), 1.0))


def test_blocks_are_computed_again_on_the_way_back_and_only_then(batches):
    """As many softmaxes again, each waiting for the gradient that comes from above."""

    def softmaxes(**options):
        step, _ = gradients(FAMILIES["gpt2"](), batches["buckets"], **options)
        graph = step.get_concrete_function(batches["buckets"]).graph
        return sum(operation.type == "Softmax" for operation in graph.get_operations())

    assert softmaxes(remat=True) == softmaxes() + 2  # one more for each of two layers


def test_remat_needs_blocks():
    with pytest.raises(InputError, match="remat needs a model made of transformer blocks"):
        ResponseScorer(tiny.plain_model(), remat=True)


@pytest.mark.parametrize("dtype", ["bfloat16", "mixed_bfloat16"])
def test_adapters_work_in_low_precision(dtype, batches):
    keras.config.set_dtype_policy(dtype)
    try:
        policy = tiny.llama(num_layers=1)
        policy.backbone.enable_lora(3)
        _, (logps, found) = gradients(policy, batches["buckets"])
    finally:
        keras.config.set_dtype_policy("float32")
    assert np.isfinite(logps).all() and len(found) >= 4


def test_low_rank_products_are_for_dense_layers_with_adapters():
    layer = keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((2,)), layer])
    assert low_rank_overrides(model) == [] == low_rank_overrides(object())
    layer.enable_lora(1)
    assert [override.owner for override in low_rank_overrides(model)] == [layer]


@pytest.mark.parametrize("kind", ["packed", "buckets"])
def test_factored_adapters_are_the_adapters_of_keras(kind, batches, monkeypatch):
    policy = FAMILIES["llama"]()
    policy.backbone.enable_lora(3)
    for layer in policy.backbone._flatten_layers():
        if getattr(layer, "lora_enabled", False):
            layer.lora_kernel_b.assign(0.1 * keras.random.normal(layer.lora_kernel_b.shape, seed=1))
    _, found = gradients(policy, batches[kind])
    monkeypatch.setattr(scorer_module, "low_rank_overrides", lambda model: [])
    _, expected = gradients(policy, batches[kind])
    assert_same(found, expected)
