"""Recurrences as loops give what KerasHub's unrolled ones give, for any length."""

import importlib

import numpy as np
import pytest
import tensorflow as tf
import tiny
from families import ALL_FAMILIES
from scoring_samples import random_pairs

from dpo_keras.batching import collate
from dpo_keras.scoring import ResponseScorer
from dpo_keras.scoring.recurrences import (
    gated_delta_rule,
    generalized_delta_rule,
    recurrence_overrides,
)

BATCH, HEADS, WIDTH = 2, 3, 4
RULES = {
    "qwen3_5": (gated_delta_rule, "qwen3_5.qwen3_5_gated_delta_net", "_chunk_gated_delta_rule"),
    "rwkv7": (generalized_delta_rule, "rwkv7.rwkv7_layer", "rnn_generalized_delta_rule"),
}


def arguments(family, length, values=6):
    random = np.random.default_rng(0)
    normal = [random.normal(size=(BATCH, length, HEADS, WIDTH)) for _ in range(6)]
    if family == "rwkv7":
        return [*(0.5 * x for x in normal), random.normal(size=(BATCH, HEADS, WIDTH, WIDTH))]
    gates = random.uniform(0.01, 0.9, size=(2, BATCH, length, HEADS))
    value = random.normal(size=(BATCH, length, HEADS, values))
    state = random.normal(size=(BATCH, HEADS, WIDTH, values))
    return [*normal[:2], value, -gates[0], gates[1], state]


def results(rule, inputs):
    """Outputs, last state, and the gradients of a function of both."""
    *inputs, state = inputs
    with tf.GradientTape() as tape:
        tape.watch([*inputs, state])
        found = rule(*inputs, initial_state=state, output_final_state=True)
        total = sum(tf.reduce_sum(tf.sin(x)) for x in found)
    return [*found, *tape.gradient(total, [*inputs, state])]


@pytest.mark.parametrize("family", RULES)
@pytest.mark.parametrize("length", [3, 70])  # within a chunk of 64, and over one
def test_loops_equal_the_unrolled_recurrence_in_values_and_gradients(family, length):
    ours, module, name = RULES[family]
    module = importlib.import_module(f"keras_hub.src.models.{module}")
    given = [tf.constant(x, tf.float32) for x in arguments(family, length)]
    expected = results(getattr(module, name), given)
    unknown = [tf.TensorSpec([None, None, *x.shape[2:]], tf.float32) for x in given[:-1]]
    unknown.append(tf.TensorSpec([None, *given[-1].shape[1:]], tf.float32))

    @tf.function(input_signature=unknown, autograph=False)
    def in_graph(*inputs):
        return results(ours, inputs)

    for found in (results(ours, given), in_graph(*given)):
        for one, other in zip(found, expected, strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe", "rwkv7"])
def test_recurrent_models_are_scored_at_lengths_that_are_not_known(family):
    policy = ALL_FAMILIES[family]()
    assert recurrence_overrides(policy)
    batch = collate(random_pairs([(9, 4, 6), (1, 1, 1), (5, 1, 3)]), [0, 1, 2])
    batch = {name: tf.constant(value) for name, value in batch.items()}
    scorer = ResponseScorer(policy)
    specs = {k: tf.TensorSpec([None] * len(v.shape), v.dtype) for k, v in batch.items()}
    specs["weight"] = tf.TensorSpec([None, 1], tf.float32)

    @tf.function(input_signature=[specs], autograph=False)
    def in_graph(batch):
        return scorer(batch)["logps"]

    expected = tiny.full_logits_log_probs(policy, batch)
    np.testing.assert_allclose(in_graph(batch), expected, atol=1e-4)


def test_other_models_have_no_recurrence():
    assert not recurrence_overrides(tiny.gpt2())
