"""The losses of a mixture of experts' routers: added with their own weight, over real tokens."""

import functools

import keras
import numpy as np
import pytest
import tensorflow as tf
from families import ALL_FAMILIES
from tiny import gpt2, plain_model

from dpo_keras.batching import collate, collate_packed, preference_dataset
from dpo_keras.errors import InputError
from dpo_keras.scoring import ResponseScorer
from dpo_keras.scoring.auxiliary_loss import auxiliary_loss
from dpo_keras.training import DPOModel, SupervisedModel, strategy, supervised_dataset

pytestmark = pytest.mark.slow

ROUTED = ("mixtral", "qwen_moe", "qwen3_moe", "qwen3_5_moe")


def mixtral(coefficient=1.0):
    return ALL_FAMILIES["mixtral"](num_layers=1, router_aux_loss_coef=coefficient)


def summed(collected):
    return auxiliary_loss(collected, lambda value: value, 1)


def collected_of(policy, batch, **options):
    collected = []
    ResponseScorer(policy, **options)(batch, collected=collected)
    return collected


def train(policy, dataset, steps=1, kind=DPOModel, accumulation=None, compiled=None, **options):
    model = kind(policy, **options)
    optimizer = keras.optimizers.SGD(0.05, gradient_accumulation_steps=accumulation)
    model.compile(optimizer, **(compiled or {"run_eagerly": True}))
    history = model.fit(dataset, epochs=1, steps_per_epoch=steps, verbose=0).history
    return [v.numpy() for v in policy.trainable_variables], history


def assert_same(weights, expected, atol=1e-6):
    for one, other in zip(weights, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


@pytest.fixture(scope="module")
def batch(tokenized):
    return next(iter(preference_dataset(tokenized, batch_size=4, buckets=1, shuffle=False)))


@pytest.mark.parametrize("family", ROUTED)
def test_the_loss_is_that_of_keras_hub_where_nothing_is_padding(family, batch):
    policy = ALL_FAMILIES[family]()
    full = {**batch, "padding_mask": tf.ones_like(batch["padding_mask"])}
    collected = collected_of(policy, full)
    assert len(collected) == 2  # of two blocks
    inputs = {name: tf.reshape(full[name], (8, -1)) for name in ("token_ids", "padding_mask")}
    policy.backbone(inputs, training=True)
    expected = sum(policy.backbone.losses)
    assert float(expected) > 0
    np.testing.assert_allclose(summed(collected), expected, rtol=1e-5)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_neither_padding_nor_rows_without_pairs_count(family, tokenized):
    """KerasHub counts the padding of Qwen's mixtures."""
    policy = ALL_FAMILIES[family]()
    real = int(collate(tokenized, [0])["padding_mask"].sum(-1).max())
    tight, padded = collate(tokenized, [0], real), collate(tokenized, [0, 1], 40)
    padded["weight"][1] = 0.0  # a row that fills a batch up
    found = [summed(collected_of(policy, one)) for one in (tight, padded)]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-5)


def test_a_packed_prompt_counts_once(tokenized):
    policy = mixtral()
    lengths = [len(column[0]) for column in (tokenized.prompt, tokenized.chosen)]
    choices = [
        float(tf.reduce_sum(collected_of(policy, one)[0][0])) / 2  # two experts a token
        for one in (collate(tokenized, [0]), collate_packed(tokenized, [[0]]))
    ]
    assert choices[0] - choices[1] == lengths[0] > 0


@pytest.mark.parametrize("kind", ["buckets", "packed"])
def test_a_recomputed_block_adds_its_loss_once_and_with_its_gradient(kind, tokenized):
    policy = ALL_FAMILIES["mixtral"](router_aux_loss_coef=1.0)
    rows = [0, 1, 2]
    batch = collate_packed(tokenized, [rows]) if kind == "packed" else collate(tokenized, rows)
    batch = {name: tf.constant(value) for name, value in batch.items()}
    found = []
    for remat in (False, True):
        with tf.GradientTape() as tape:
            collected = collected_of(policy, batch, remat=remat)
            loss = summed(collected)
        assert len(collected) == 2
        # A recomputed block has zeros where the loss does not depend on a weight of it.
        zero = tf.UnconnectedGradients.ZERO
        weights = [variable.value for variable in policy.trainable_variables]
        gradients = tape.gradient(loss, weights, unconnected_gradients=zero)
        found.append([loss, *map(tf.convert_to_tensor, gradients)])
    assert float(tf.linalg.global_norm(found[0][1:])) > 0.01
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, rtol=1e-4, atol=1e-6)


def test_the_coefficient_of_the_routers_matters_and_drop_leaves_it_out(dataset):
    none, large = (train(mixtral(coefficient), dataset) for coefficient in (0.0, 100.0))
    dropped = train(mixtral(100.0), dataset, auxiliary_loss="drop")
    assert large[1]["loss"][0] > none[1]["loss"][0] + 50
    difference = large[1]["loss"][0] - none[1]["loss"][0]
    np.testing.assert_allclose(large[1]["auxiliary_loss"][0], difference, rtol=1e-5)
    assert any(np.abs(a - b).max() > 1e-3 for a, b in zip(large[0], none[0], strict=True))
    assert_same(dropped[0], none[0])
    assert "auxiliary_loss" not in dropped[1] and none[1]["auxiliary_loss"] == [0.0]


def test_supervised_training_adds_it_as_well(dataset):
    chosen = supervised_dataset(dataset)
    kept = train(mixtral(), chosen, kind=SupervisedModel)
    dropped = train(mixtral(), chosen, kind=SupervisedModel, auxiliary_loss="drop")
    difference = kept[1]["loss"][0] - dropped[1]["loss"][0]
    np.testing.assert_allclose(kept[1]["auxiliary_loss"][0], difference, rtol=1e-4)
    assert difference > 0.5


def test_two_replicas_balance_the_experts_of_the_whole_batch(dataset):
    """Each holds half of the tokens: a mean of their own losses would be another."""
    alone, together = (train_under(strategy(name), dataset) for name in ("one_device", "mirrored"))
    np.testing.assert_allclose(together[1]["loss"], alone[1]["loss"], rtol=1e-5)
    np.testing.assert_allclose(together[1]["auxiliary_loss"], alone[1]["auxiliary_loss"], rtol=1e-5)
    assert_same(together[0], alone[0], atol=1e-5)


def train_under(scope, dataset):
    with scope.scope():
        return train(mixtral(), dataset, steps=2, compiled={"jit_compile": False})


def test_micro_batches_and_xla_have_it_too(dataset):
    expected = train(mixtral(), dataset)
    twice = dataset.take(1).repeat(2)
    accumulated = train(mixtral(), twice, steps=2, accumulation=2)
    assert_same(accumulated[0], expected[0], atol=1e-5)
    compiled = train(mixtral(), dataset, compiled={"jit_compile": True})
    np.testing.assert_allclose(compiled[1]["loss"], expected[1]["loss"], rtol=1e-5)
    assert_same(compiled[0], expected[0], atol=1e-5)


def test_models_without_such_a_loss_do_not_log_one(dataset):
    assert not DPOModel(gpt2(num_layers=1)).has_auxiliary_loss
    assert not DPOModel(ALL_FAMILIES["gpt_oss"](num_layers=1)).has_auxiliary_loss


def test_a_model_of_the_users_own_adds_its_losses(dataset):
    base = plain_model()
    logits = keras.layers.ActivityRegularization(l2=0.1)(base.output)
    _, history = train(keras.Model(base.input, logits), dataset)
    assert history["auxiliary_loss"][0] > 0


@pytest.mark.parametrize("kind", [DPOModel, functools.partial(SupervisedModel, dropout=False)])
def test_another_choice_is_refused_and_the_choice_is_saved(kind):
    with pytest.raises(InputError, match="auxiliary_loss must be 'keep' or 'drop'"):
        kind(gpt2(num_layers=1), auxiliary_loss="0.5")
    assert kind(gpt2(num_layers=1), auxiliary_loss="drop").get_config()["auxiliary_loss"] == "drop"
