"""RewardModel: Bradley-Terry on a scalar head, by hand, packed, distributed, saved."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import VOCABULARY, Letters, gpt2, llama, pairs, plain_model

from dpo_keras.batching import collate, preference_dataset
from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.training import DPOModel, RewardModel, strategy


def compiled(policy, optimizer=None):
    """Compile without a graph, whose tracing takes longer than the few steps here."""
    keras.utils.set_random_seed(7)
    model = RewardModel(policy)
    model.compile(optimizer or keras.optimizers.SGD(0.5), run_eagerly=True)
    return model


def scalar_model(seed=0):
    """A model of the user's own: texts to one number each, which padding does not change."""
    keras.utils.set_random_seed(seed)
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    padding_mask = keras.Input((None,), dtype="int32", name="padding_mask")
    states = keras.layers.Embedding(VOCABULARY, 16)(token_ids)
    states = states * keras.ops.cast(padding_mask, "float32")[..., None]
    rewards = keras.layers.Dense(1)(keras.ops.sum(states, axis=1))
    return keras.Model({"token_ids": token_ids, "padding_mask": padding_mask}, rewards)


def rewards_by_hand(model, tokenized, pair):
    """The head on the backbone's state at the last token before the response's last."""
    found = []
    for response in (tokenized.chosen, tokenized.rejected):
        ids = [*tokenized.prompt[pair].tolist(), *response[pair].tolist()]
        inputs = {"token_ids": np.array([ids]), "padding_mask": np.ones((1, len(ids)), int)}
        states = np.asarray(model.policy.backbone(inputs))[0]
        found.append((states[len(ids) - 2] @ np.asarray(model.reward_head.kernel))[0])
    return found


def test_a_reward_is_the_head_on_the_state_that_has_read_the_response(policy, tokenized):
    model = compiled(policy)
    found = model.predict_on_batch(collate(tokenized, range(4), 24, 16))
    expected = [rewards_by_hand(model, tokenized, pair) for pair in range(4)]
    np.testing.assert_allclose(found["scores"], expected, atol=1e-5)


def test_one_sgd_step_is_the_gradient_of_the_bradley_terry_likelihood(policy, tokenized):
    model = compiled(policy)
    batch = {k: tf.constant(v) for k, v in collate(tokenized, range(4), 24, 16).items()}
    kernel = model.reward_head.kernel
    with tf.GradientTape() as tape:
        rewards = []
        for column, response in enumerate((tokenized.chosen, tokenized.rejected)):
            inputs = {k: batch[k][:, column] for k in ("token_ids", "padding_mask")}
            states = policy.backbone(inputs)
            place = tokenized.prompt.lengths[:4] + response.lengths[:4] - 2
            rewards.append(tf.gather(states, place, batch_dims=1) @ kernel.value)
        loss = tf.reduce_mean(tf.math.softplus(rewards[1] - rewards[0]))
    variables = [kernel, *policy.backbone.trainable_variables]
    gradients = tape.gradient(loss, [variable.value for variable in variables])
    expected = [
        variable.numpy() - 0.5 * tf.convert_to_tensor(gradient).numpy()
        for variable, gradient in zip(variables, gradients, strict=True)
    ]
    logs = model.train_on_batch(batch, return_dict=True)
    np.testing.assert_allclose(logs["loss"], loss, atol=1e-6)
    for variable, value in zip(variables, expected, strict=True):
        np.testing.assert_allclose(variable.numpy(), value, atol=1e-6)


@pytest.mark.parametrize("make", [gpt2, llama], ids=["gpt2", "llama"])
def test_packed_rows_train_as_rows_of_one_pair(make, tokenized):
    end = []
    for layout in ({"batching": "packed", "row_length": 256, "rows": 1}, {"batching": "buckets"}):
        model = compiled(make(num_layers=1))
        whole = preference_dataset(tokenized, batch_size=len(tokenized), shuffle=False, **layout)
        logs = model.fit(whole, epochs=3, verbose=0).history
        assert len(whole) == 1 and logs["loss"][2] < logs["loss"][0]
        end.append([*logs["loss"], *(v.numpy().sum() for v in model.trainable_variables)])
    np.testing.assert_allclose(end[0], end[1], rtol=1e-4, atol=1e-4)


def test_two_replicas_train_as_one(tokenized):
    end = []
    for name in ("one_device", "mirrored"):
        with strategy(name).scope():
            model = compiled(gpt2(num_layers=1))
        data = preference_dataset(tokenized, batch_size=4, shuffle=False, batching="buckets")
        model.fit(data, epochs=2, verbose=0)
        assert model.distribute_strategy.num_replicas_in_sync == 1 + (name == "mirrored")
        end.append(model.reward_head.kernel.numpy())
    np.testing.assert_allclose(end[0], end[1], atol=1e-6)


@pytest.mark.parametrize("make", [lambda: gpt2(num_layers=1), scalar_model], ids=["head", "own"])
def test_it_learns_and_comes_back_from_a_file(make, dataset, tmp_path):
    model = compiled(make(), keras.optimizers.Adam(1e-2))
    model.fit(dataset, epochs=12, verbose=0)
    logs = model.evaluate(dataset, verbose=0, return_dict=True)
    assert logs["reward_accuracy"] == 1.0
    assert logs["loss"] < 0.3
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again = loaded.evaluate(dataset, verbose=0, return_dict=True)
    np.testing.assert_allclose(again["loss"], logs["loss"], rtol=1e-5)


def test_rewards_of_strings_are_those_of_the_batch(policy, tokenized):
    model = compiled(policy)
    records = pairs(11)[:5]
    found = model.rewards(
        [record["prompt"] for record in records],
        [record["rejected"] for record in records],
        preprocessor=Letters(),
        batch_size=2,
    )
    expected = [rewards_by_hand(model, tokenized, pair)[1] for pair in range(5)]
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_policies_and_reward_models_have_their_own_objectives(policy, dataset):
    with pytest.raises(InputError, match="'reward' speaks of rewards.*RewardModel"):
        DPOModel(policy, "none").compile(loss="reward")
    with pytest.raises(InputError, match="must be 'reward'.*sigmoid.*DPOModel"):
        RewardModel(policy).compile(loss=DPOLoss("sigmoid"))
    with pytest.raises(InputError, match="penalties.nll does not apply to reward"):
        DPOLoss("reward", penalties={"nll": 1.0})
    with pytest.raises(InputError, match="must hold 'reward' alone"):
        DPOLoss(["reward", "sft"])
    with pytest.raises(InputError, match="wpo has no effect with reward"):
        DPOLoss("reward", wpo=True)
    model = RewardModel(plain_model())  # it returns logits
    model.compile("sgd")
    with pytest.raises(InputError, match=r"one number for each text"):
        model.evaluate(dataset, verbose=0)
