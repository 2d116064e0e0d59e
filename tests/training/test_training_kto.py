"""KTO trains alike in buckets and packed rows, on one replica and two, and after a resumption."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from test_training_packed import train
from tiny import Letters, gpt2, pairs

from dpo_keras.batching import collate, collate_packed, preference_dataset, tokenize_pairs
from dpo_keras.batching.packing import packed_order, plan_packing
from dpo_keras.errors import InputError
from dpo_keras.evaluation import RatedHeldOut, evaluate_preferences, load_held_out
from dpo_keras.losses import DPOLoss
from dpo_keras.preferences import read_preferences
from dpo_keras.scoring import cache_reference
from dpo_keras.training import DPOModel, strategy, train_preferences
from dpo_keras.training.supervised_model import worth_imitating

LOGGED = (
    *("loss", "reward_accuracy", "desirable_reward", "undesirable_reward"),
    *("reference_point", "kl", "grad_norm"),
)


def kto():
    return DPOLoss("kto", beta=0.5, undesirable_weight=1.3, penalties={"nll": 0.1})


@pytest.fixture(scope="module")
def thumbs():
    """Rated responses of unequal weight to 11 prompts; soft ratings are among them."""
    rated = read_preferences(pairs(11)).unpaired()
    tokens = tokenize_pairs(rated, Letters(), max_length=24)
    random = np.random.default_rng(0)
    tokens.weight[:] = random.uniform(0.5, 2.0, len(tokens))
    tokens.preference[:3] = (0.8, 0.3, 0.5)
    return tokens


def stream(tokenized, packed):
    """The same steps of one epoch again and again, as packed rows or as a response per row."""
    plan = plan_packing(tokenized, 4, length=64, rows=2, seed=1)
    steps = packed_order(plan).pairs
    assert len({int((step >= 0).sum()) for step in steps}) > 1
    most = max(int((step >= 0).sum()) for step in steps)
    found = [
        collate_packed(tokenized, step, plan.length, plan.slots, plan.pairs, plan.trees)
        if packed
        else collate(tokenized, step[step >= 0], 24, 24, most)
        for step in steps
    ]
    data = {name: np.stack([batch[name] for batch in found]) for name in found[0]}
    options = tf.data.Options()
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    return tf.data.Dataset.from_tensor_slices(data).repeat().with_options(options)


@pytest.fixture(scope="module")
def packed(thumbs):
    return train(stream(thumbs, packed=True), kto(), steps=8)


def assert_logged(found, expected, atol=1e-4):
    for name in LOGGED:
        one, other = ([log[name] for log in logs] for logs in (found, expected))
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=atol, err_msg=name)


def test_packed_rows_train_as_rows_of_one_response(packed, thumbs):
    weights, logged = train(stream(thumbs, packed=False), kto(), steps=8)
    assert_logged(packed[1], logged)
    for ours, theirs in zip(packed[0], weights, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
    points = [log["reference_point"] for log in packed[1]]
    assert points[0] == 0 and max(points) > 0


def test_two_replicas_have_one_reference_point(packed, thumbs):
    with strategy("mirrored").scope():
        _, found = train(stream(thumbs, packed=True), kto(), steps=8, policy=gpt2(num_layers=1))
    assert_logged(found, packed[1])


def test_a_cached_reference_is_the_frozen_copy(packed, thumbs):
    policy = gpt2(num_layers=1)
    cached = cache_reference(policy, thumbs)
    found = train(stream(cached, packed=True), kto(), 8, policy=policy, reference="cached")
    # Before the first update every response is a tie, up to rounding.
    assert_logged(found[1][1:], packed[1][1:])


def test_the_margin_is_the_difference_of_the_means(thumbs):
    model = DPOModel(gpt2(num_layers=1))
    model.compile(keras.optimizers.Adam(3e-3), loss=kto())
    logged = model.fit(stream(thumbs, packed=False), steps_per_epoch=8, verbose=0).history
    rewards = (logged[f"{side}_reward"][0] for side in ("desirable", "undesirable"))
    assert logged["reward_margin"][0] == pytest.approx(next(rewards) - next(rewards), abs=1e-6)
    assert logged["reward_margin"][0] > 0 and "chosen_reward" not in logged


def test_a_resumed_run_has_the_weights_of_one_that_was_not_stopped(thumbs, tmp_path):
    def run(steps, folder, resume=False):
        model = DPOModel(gpt2(num_layers=1))
        model.compile(keras.optimizers.Adam(3e-3), loss=kto())
        options = {"batch_size": 6, "max_steps": steps, "resume": resume}
        train_preferences(
            model, thumbs, checkpoints=tmp_path / folder, batching="packed", **options
        )
        return [variable.numpy() for variable in model.policy.weights]

    whole = run(6, "whole")
    run(3, "stopped")
    for one, other in zip(run(6, "stopped", resume=True), whole, strict=True):
        np.testing.assert_array_equal(one, other)


def test_pairs_and_rated_responses_are_refused_by_the_other_objective(thumbs, tokenized):
    for tokens, loss, words in (
        (tokenized, "kto", "'kto' takes rated responses .*, got pairs.*unpaired"),
        (thumbs, "sigmoid", "'sigmoid' takes pairs, got rated responses"),
    ):
        model = DPOModel(gpt2(num_layers=1))
        model.compile(loss=loss)
        for use in (model.fit, model.evaluate, model.predict):
            with pytest.raises(InputError, match=words):
                use(preference_dataset(tokens, batch_size=4, batching="buckets"), verbose=0)
        with pytest.raises(InputError, match=words):
            evaluate_preferences(model, tokens, batching="buckets")


def test_the_warm_up_learns_the_desirable_responses(thumbs, tokenized):
    kept = worth_imitating(thumbs)
    assert len(kept) and (kept.preference > 0.5).all()
    assert len(kept) == int((thumbs.preference > 0.5).sum())
    assert worth_imitating(tokenized) is tokenized
    with pytest.raises(InputError, match="must hold a desirable response"):
        worth_imitating(thumbs.take(np.flatnonzero(thumbs.preference < 0.5)))


@pytest.fixture(scope="module")
def moved(thumbs):
    policy = gpt2(num_layers=1)
    model = DPOModel(policy)
    random = np.random.default_rng(1)
    for variable in policy.trainable_variables:
        variable.assign(variable + random.normal(0, 0.05, variable.shape))
    model.compile(loss=kto())
    return model


def test_held_out_figures_are_those_of_one_batch_of_all(moved, thumbs, tmp_path):
    whole = preference_dataset(thumbs, batch_size=len(thumbs), batching="buckets", buckets=1)
    expected = moved.evaluate(whole, verbose=0, return_dict=True)
    for batching in ("buckets", "packed"):
        held_out = evaluate_preferences(moved, thumbs, batch_size=4, batching=batching)
        assert isinstance(held_out, RatedHeldOut)
        for name in expected.keys() - {"tokens_per_second", "pairs_per_second"}:
            found = held_out.metrics[name]
            assert found == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name
    held_out.save(tmp_path / "rows.npz")
    again = load_held_out(tmp_path / "rows.npz")
    assert isinstance(again, RatedHeldOut) and again.metrics == held_out.metrics


def test_held_out_accuracy_compares_with_the_reference_point(moved, thumbs):
    held_out = evaluate_preferences(moved, thumbs, batching="buckets")
    rows = held_out.pairs
    z = max(0.0, np.average(rows["rejected_reward"], weights=rows["weight"]))
    decided = rows["preference"] != 0.5
    right = (rows["chosen_reward"] > z) == (rows["preference"] > 0.5)
    wanted = np.average(right[decided], weights=rows["weight"][decided])
    assert held_out.figures["reward_accuracy"].value == pytest.approx(wanted)
    assert held_out.calibration.agreement.value is None and not held_out.by_length
    assert "rated responses" in held_out.summary()
