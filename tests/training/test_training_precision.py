"""Weights in half precision: they train as float32 does, and say when they cannot."""

import warnings

import keras
import numpy as np
import pytest
from families import FAMILIES

from dpo_keras import DPOLoss, DPOModel

OPTIMIZERS = {
    "adamw": lambda: keras.optimizers.AdamW(1e-2, global_clipnorm=1.0),
    "accumulating": lambda: keras.optimizers.Adam(
        1e-2, global_clipnorm=1.0, gradient_accumulation_steps=2
    ),
    "lion": lambda: keras.optimizers.Lion(1e-3),
}


def losses(dataset, family, dtype, lora, optimizer):
    policy = FAMILIES[family](dtype=dtype, num_layers=1)
    policy.set_weights(FAMILIES[family](num_layers=1).get_weights())
    if lora:
        policy.backbone.enable_lora(4)
    model = DPOModel(policy)
    # One case in a graph, as it costs seconds.
    eager = optimizer != "adamw" or lora
    model.compile(OPTIMIZERS[optimizer](), DPOLoss("sigmoid", beta=0.5), run_eagerly=eager)
    return np.array(model.fit(dataset, epochs=2, verbose=0).history["loss"]), model


@pytest.mark.parametrize(
    ("family", "dtype", "lora", "optimizer"),
    [
        ("gpt2", "bfloat16", False, "adamw"),
        ("llama", "bfloat16", True, "adamw"),
        ("gpt2", "bfloat16", True, "accumulating"),
        ("gpt2", "float16", False, "lion"),
    ],
)
def test_half_precision_follows_float32(dataset, family, dtype, lora, optimizer):
    expected, _ = losses(dataset, family, "float32", lora, optimizer)
    found, model = losses(dataset, family, dtype, lora, optimizer)
    np.testing.assert_allclose(found, expected, atol=0.02)
    assert expected[1] < expected[0] - 0.02
    assert model.policy.backbone.token_embedding.embeddings.dtype == dtype
    state = {v.dtype for v in model.optimizer.variables if len(v.shape) > 0}
    assert state == {"float32"}
    adapters = [v for v in model.policy.weights if "lora_" in v.name]
    assert all(v.dtype == "float32" for v in adapters) and bool(adapters) == lora
    scales = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scales == (dtype == "float16")


def test_a_learning_rate_that_bfloat16_cannot_tell_apart_is_warned_of(dataset):
    policy = FAMILIES["gpt2"](dtype="bfloat16")
    model = DPOModel(policy)
    model.compile(keras.optimizers.Adam(5e-6), run_eagerly=True)
    with pytest.warns(UserWarning, match=r"learning rate of 5e-06, \d+% of the trained weights"):
        model.fit(dataset.take(1), verbose=0)
    adapted = FAMILIES["llama"](dtype="bfloat16")
    adapted.backbone.enable_lora(2)
    for other in (adapted, FAMILIES["gpt2"]()):
        model = DPOModel(other)
        model.compile(keras.optimizers.Adam(5e-6), run_eagerly=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            model.fit(dataset.take(1), verbose=0)
