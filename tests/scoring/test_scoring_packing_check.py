"""Packed rows score exactly as rows of one pair each."""

from functools import partial

import keras
import keras_hub
import numpy as np
import pytest
import tensorflow as tf
import tiny
from families import ALL_FAMILIES, FAMILIES
from scoring_samples import random_pairs

from dpo_keras.batching import Ragged, TokenizedPairs, collate, collate_packed
from dpo_keras.errors import InputError
from dpo_keras.scoring import ResponseScorer, check_packing, packing_obstacle
from dpo_keras.scoring.layer_overrides import Override, overridden_methods
from dpo_keras.scoring.scorer import compared_tokens, sum_by_response
from dpo_keras.scoring.tree_attention import TreeLayout
from dpo_keras.scoring.tree_segments import SegmentedTreeLayout, segment_sizes

# Prompt, chosen and rejected: ones of a single token, short trees, and texts of up to 21 tokens.
LENGTHS = [(9, 7, 12), (1, 1, 1), (5, 1, 3), (1, 6, 2), (12, 9, 4), (2, 2, 1), (3, 8, 1)]
# Three responses to one prompt, two of which begin alike, in all pairs; and a turn that goes on
# from the first. Each number stands for a token.
PROMPT, ANSWERS = [1, 2, 3, 4, 5, 6], ([7, 8, 9], [7, 8, 1, 2, 3], [4, 2])
FOREST = [
    *((PROMPT, ANSWERS[i], ANSWERS[j]) for i, j in ((0, 1), (0, 2), (2, 1))),
    ([*PROMPT, *ANSWERS[0], 5], [6, 1, 2], [6, 1, 4, 8]),
]
# Many trees in a row, a row exactly full (54 tokens), a row of one tree, and a tree of four pairs.
ROWS = [[0, 1, 2, 3], [4, 5, 6, 1, 3], [2], [7, 8, 9, 10, 1]]
TREES = np.array([*range(len(LENGTHS)), *[len(LENGTHS)] * len(FOREST)])
LENGTH = 54
# Their kernels are so large that the rounding of KerasHub's softmax alone, which is float32 even in
# float64 models, moves gradients by more than 1e-5. At half their size it moves them by 1e-6.
STEEP = ("falcon", "gemma", "smollm3")
# Float32 alone rounds their gradients by more than 1e-5 on some processors.
DOUBLE = ("gemma4",)


@pytest.fixture(scope="module")
def tokenized():
    alone = random_pairs(LENGTHS, weighed=True)
    parts = [
        Ragged.from_lists([*part.tolist(), *texts])
        for part, texts in zip(alone.parts, zip(*FOREST, strict=True), strict=True)
    ]
    ones = np.ones(len(TREES), np.float32)
    return TokenizedPairs(*parts, ones, np.append(alone.weight, ones[: len(FOREST)] * 1.5))


@pytest.fixture(scope="module")
def batches(tokenized):
    order = [pair for row in ROWS for pair in row]
    apart = collate(tokenized, order)
    packed = collate_packed(tokenized, ROWS, length=LENGTH, trees=TREES)
    assert packed["padding_mask"][1].min() == 1, "the second row is to be exactly full"
    return [{k: tf.constant(v) for k, v in batch.items()} for batch in (apart, packed)]


def filled(batch, values):
    return tf.boolean_mask(values, tf.reshape(batch["weight"], (-1,)) > 0)


def scored(policy, batch, layout=None):
    """Log-probs of the pairs in order, and the gradient of a mean that weighs all of them."""
    scorer = ResponseScorer(policy)
    if "reach" in batch and layout is not None:
        reach, positions = batch["reach"][:, 0], batch["positions"][:, 0]
        batch = {**batch, "layout": layout(positions, reach)}
    with tf.GradientTape() as tape:
        logps = filled(batch, scorer(batch)["logps"])
        signs = tf.sin(tf.range(tf.size(logps), dtype=tf.float32) + 1.0)
        loss = tf.reduce_mean(signs * tf.reshape(logps, [-1]))
    gradients = tape.gradient(loss, policy.trainable_variables)
    return logps.numpy(), [tf.convert_to_tensor(g).numpy() for g in gradients if g is not None]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_equals_unpacked_in_log_probs_and_gradients(family, batches):
    policy = FAMILIES[family](dtype="float64" if family in DOUBLE else "float32")
    if family in STEEP:
        for variable in policy.trainable_variables:
            variable.assign((0.5 if len(variable.shape) > 1 else 1.0) * variable)
    apart, packed = batches
    logps, gradients = scored(policy, apart)
    for layout in (partial(SegmentedTreeLayout, segment=8), TreeLayout):
        found, found_gradients = scored(policy, packed, layout)
        np.testing.assert_allclose(found, logps, rtol=2e-6, atol=2e-5)
        assert len(found_gradients) == len(gradients)
        for one, other in zip(found_gradients, gradients, strict=True):
            np.testing.assert_allclose(one, other, atol=1e-5 * max(np.abs(other).max(), 1.0))
    if family in DOUBLE:
        policy = FAMILIES[family]()  # the check below is of float32
    assert check_packing(ResponseScorer(policy)) < 1e-5


def test_other_trees_in_the_row_change_nothing(batches, tokenized):
    """Not even by being wrong: every other token of the row is replaced."""
    policy = FAMILIES["llama"]()
    packed = {k: v.numpy() for k, v in batches[1].items()}
    before = ResponseScorer(policy)(packed)["logps"].numpy()
    sizes = [sum(LENGTHS[pair]) for pair in ROWS[0][:3]]
    own = slice(sum(sizes[:2]), sum(sizes))  # the third tree of the row
    kept = packed["token_ids"][0, 0][own].copy()
    packed["token_ids"][0, 0] = 7
    packed["token_ids"][0, 0][own] = kept
    after = ResponseScorer(policy)(packed)["logps"].numpy()
    np.testing.assert_allclose(after[2], before[2], rtol=1e-6)
    assert np.abs(after[0] - before[0]).max() > 1e-2


def test_a_response_does_not_see_the_other_one(batches):
    policy = FAMILIES["gpt2"]()
    packed = {k: v.numpy() for k, v in batches[1].items()}
    before = ResponseScorer(policy)(packed)["logps"].numpy()
    chosen = packed["source"][0][packed["owner"][0] == packed["responses"][0, 0, 0]][1:]
    packed["token_ids"][0, 0][chosen] = 7
    after = ResponseScorer(policy)(packed)["logps"].numpy()
    np.testing.assert_allclose(after[0, 1], before[0, 1], rtol=1e-6)


def test_empty_rows_and_the_end_of_a_row_are_finite(tokenized):
    batch = collate_packed(tokenized, [[1], []], length=16, slots=8, pairs=2)
    policy = FAMILIES["gpt2"]()
    logps, gradients = scored(policy, {k: tf.constant(v) for k, v in batch.items()})
    assert np.isfinite(logps).all()
    assert all(np.isfinite(gradient).all() for gradient in gradients)


@pytest.mark.parametrize("segment", [1, 3, 8, 54, 100])
def test_pieces_cover_the_rows_and_never_cut_a_tree(batches, segment):
    reach = batches[1]["reach"][:, 0]
    sizes = segment_sizes(reach, segment).numpy()
    assert sizes.sum() == reach.shape[0] * reach.shape[1]
    assert len(sizes) == reach.shape[0] * -(-reach.shape[1] // segment)
    seen = np.arange(sizes.sum()) + reach.numpy().reshape(-1)
    for end in np.cumsum(sizes)[:-1]:
        assert (seen[:end] <= end).all()


def test_statistics_and_shared_sums_are_those_of_unpacked_rows(batches):
    policy = FAMILIES["gemma3"]()
    apart, packed = (
        ResponseScorer(policy)(batch, statistics=("entropy",), shared=True) for batch in batches
    )
    for name in ("shared_logps", "lengths"):
        one, other = filled(batches[0], apart[name]), filled(batches[1], packed[name])
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)
    entropies = [
        filled(batch, sum_by_response(found["entropy"], compared_tokens(batch)))
        for found, batch in zip((apart, packed), batches, strict=True)
    ][::-1]
    np.testing.assert_allclose(*entropies, rtol=1e-5)


def test_low_precision_stays_within_its_rounding(batches):
    keras.utils.set_random_seed(0)
    sizes = {**tiny.SIZES, "num_query_heads": 2, "num_key_value_heads": 1}
    policy = keras_hub.models.LlamaCausalLM(
        keras_hub.models.LlamaBackbone(**sizes, dtype="mixed_bfloat16")
    )
    assert check_packing(ResponseScorer(policy)) < 1e-2
    one, other = scored(policy, batches[0])[0], scored(policy, batches[1])[0]
    np.testing.assert_allclose(one, other, rtol=1e-2)


def test_models_are_left_as_they_were(batches):
    policy = FAMILIES["mistral"]()
    layers = policy.backbone._flatten_layers()
    before = [set(vars(layer)) for layer in layers]
    with pytest.raises(RuntimeError):
        scorer = ResponseScorer(policy, remat=True)
        with overridden_methods(scorer._overrides(scorer.prepared(batches[1]))):
            raise RuntimeError
    assert [set(vars(layer)) for layer in layers] == before


def test_what_cannot_be_packed_is_named():
    for family, layer in [("rwkv7", "RWKV7TimeMix"), ("qwen3_5_moe", "Qwen3_5GatedDeltaNet")]:
        reason = packing_obstacle(ALL_FAMILIES[family]())
        assert "is recurrent" in reason and layer in reason and "into the next" in reason
    factors = [1.0] * 4
    phi = keras_hub.models.Phi3Backbone(
        **tiny.SIZES,
        num_query_heads=4,
        num_key_value_heads=2,
        rope_scaling_type="su",
        rope_scaling_short_factor=factors,
        rope_scaling_long_factor=factors,
    )
    reason = packing_obstacle(keras_hub.models.Phi3CausalLM(backbone=phi))
    assert "length of a row" in reason
    assert "Functional" in packing_obstacle(tiny.plain_model())
    with pytest.raises(InputError, match="batching must be 'buckets'.*Functional"):
        check_packing(ResponseScorer(tiny.plain_model()))


def test_a_backbone_without_attention_is_named():
    embedding = keras.layers.ReversibleEmbedding(9, 4)
    ids = keras.Input((None,), dtype="int32")
    backbone = keras.Model(ids, keras.layers.Dense(4)(embedding(ids)))
    policy = keras.Model(ids, embedding(backbone(ids), reverse=True))
    policy.backbone = backbone
    expected = "Functional has no attention layers that dpo_keras knows"
    assert packing_obstacle(policy) == expected


def test_a_model_that_differs_when_packed_is_refused():
    """Here by a layer that lets every token see its neighbour in the row."""
    policy = FAMILIES["gpt2"]()
    layer = policy.backbone.transformer_layers[0]._feedforward_layer_norm
    call = layer.call
    leak = Override(layer, "call", lambda states: call(states + 0.1 * tf.roll(states, 1, axis=1)))
    refused = pytest.raises(InputError, match="differ from unpacked ones by")
    with overridden_methods([leak]), refused as raised:
        check_packing(ResponseScorer(policy))
    assert raised.value.problems[0].argument == "batching"


def test_the_plain_path_refuses_packed_batches(batches):
    with pytest.raises(InputError, match="packed batches need a KerasHub"):
        ResponseScorer(tiny.plain_model())(batches[1])
