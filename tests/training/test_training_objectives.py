"""Every objective trains through DPOModel, the same on two replicas as on one."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import VOCABULARY, Letters, gpt2, pairs

from dpo_keras.batching import preference_dataset, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.losses import OBJECTIVES, DPOLoss, available
from dpo_keras.training import DPOModel, callbacks, strategy

REQUIRED = {"exo_pair": {"label_smoothing": 0.1}, "robust": {"label_smoothing": 0.1}}
ON_PAIRS = [n for n in available() if OBJECTIVES[n].of_policies and not OBJECTIVES[n].unpaired]
VARIANTS = [({"loss_type": name, **REQUIRED.get(name, {})}, name) for name in ON_PAIRS]
VARIANTS += [
    ({"loss_type": "sigmoid", "ld_alpha": 0.3}, "length desensitised"),
    ({"loss_type": "sigmoid", "wpo": True}, "WPO"),
    ({"loss_type": "sigmoid", "margin": True}, "margins"),
    ({"loss_type": "sigmoid", "divergence": "js"}, "Jensen-Shannon"),
    ({"loss_type": "sigmoid", "dpo_positive": 5.0, "penalties": {"kl_to_reference": 0.1}}, "DPOP"),
    ({"loss_type": "sigmoid", "group_robust": {"groups": 2, "eta": 0.5}}, "group robust"),
    ({"loss_type": "bco_pair", "shift_momentum": 0.9}, "running shift"),
    ({"loss_type": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}, "MPO"),
]


def embedding_policy():
    """The smallest causal policy: each token predicts the next by itself."""
    keras.utils.set_random_seed(0)
    token_ids = keras.Input((None,), dtype="int32", name="token_ids")
    mask = keras.Input((None,), dtype="int32", name="padding_mask")
    states = keras.layers.Embedding(VOCABULARY, 8)(token_ids)
    logits = keras.layers.Dense(VOCABULARY)(states)
    return keras.Model({"token_ids": token_ids, "padding_mask": mask}, logits)


@pytest.fixture(scope="module")
def grouped():
    records = [
        {**pair, "group": "ab"[number % 2], "margin": 0.1 * number}
        for number, pair in enumerate(pairs(7))
    ]
    return tokenize_pairs(records, Letters(), max_length=48)


def train(scope, tokenized, options):
    """Three steps; the second epoch's first batch has different log-ratios from zero."""
    with scope.scope():
        loss = DPOLoss(**options)
        model = DPOModel(embedding_policy(), "auto" if loss.needs_reference else "none")
        model.compile(keras.optimizers.SGD(0.2), loss=loss, run_eagerly=True)
    data = preference_dataset(tokenized, batch_size=4, buckets=1, batching="buckets", epochs=None)
    history = model.fit(data, steps_per_epoch=3, verbose=0).history
    state = [] if model.objective_state is None else model.objective_state.weights
    return [v.numpy() for v in [*model.policy.weights, *state]], history


@pytest.mark.parametrize("options", [v for v, _ in VARIANTS], ids=[n for _, n in VARIANTS])
def test_two_replicas_train_as_one(options, grouped):
    start = [v.numpy() for v in embedding_policy().weights]
    alone, logs = train(tf.distribute.get_strategy(), grouped, options)
    replicated, their_logs = train(strategy("mirrored"), grouped, options)
    for one, other in zip(alone, replicated, strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6)
    np.testing.assert_allclose(logs["loss"], their_logs["loss"], rtol=1e-4)
    assert max(np.abs(a - b).max() for a, b in zip(alone, start, strict=False)) > 1e-4


def test_groups_that_do_worse_gain_weight_and_the_worst_is_logged(grouped):
    options = {"group_robust": {"groups": 2, "eta": 0.5}}
    (*_, log_weights), logs = train(tf.distribute.get_strategy(), grouped, options)
    losses = [logs["group_loss/0"][-1], logs["group_loss/1"][-1]]
    np.testing.assert_allclose(logs["worst_group_loss"][-1], max(losses), rtol=1e-6)
    assert np.argmax(log_weights) == np.argmax(losses)


def test_a_loss_that_needs_columns_names_those_that_pairs_lack():
    model = DPOModel(embedding_policy())
    model.compile("sgd", loss=DPOLoss(margin=True), run_eagerly=True)
    data = preference_dataset(pairs(4), Letters(), batch_size=4, batching="buckets")
    with pytest.raises(InputError, match="needs margin of every pair"):
        model.fit(data, verbose=0)


def test_length_desensitised_sums_stop_where_the_shorter_response_ends():
    from dpo_keras.scoring import ResponseScorer

    records = [{"prompt": "ab", "chosen": "cdefg", "rejected": "h"}]
    batch = next(iter(preference_dataset(records, Letters(), batch_size=1)))
    scored = ResponseScorer(gpt2())(batch, shared=True)
    tokens = scored["token_logps"].numpy()[0]
    # "h" and its end token make two; chosen has six.
    np.testing.assert_allclose(scored["shared_logps"][0], [tokens[:2].sum(), tokens[6:8].sum()])


def test_the_reference_follows_the_policy_every_k_steps(grouped):
    model = DPOModel(embedding_policy())
    model.compile(keras.optimizers.SGD(0.2), run_eagerly=True)
    seen = []

    class Watch(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            policy = self.model.policy.trainable_variables[0].numpy()
            seen.append((policy, self.model.reference.copies[0].numpy()))

    start = model.reference.copies[0].numpy()
    data = preference_dataset(grouped, batch_size=4, buckets=1, batching="buckets", epochs=None)
    sync = callbacks.SyncReference(every=2, alpha=0.25)
    model.fit(data, steps_per_epoch=3, verbose=0, callbacks=[sync, Watch()])
    np.testing.assert_array_equal(seen[0][1], start)
    np.testing.assert_allclose(seen[1][1], 0.25 * seen[1][0] + 0.75 * start, atol=1e-6)
    np.testing.assert_array_equal(seen[2][1], seen[1][1])


def test_a_reference_that_cannot_move_is_refused(grouped):
    policy = gpt2(num_layers=1)
    policy.backbone.enable_lora(2)
    model = DPOModel(policy)
    model.compile("sgd")
    data = preference_dataset(grouped, batch_size=4, batching="buckets")
    with pytest.raises(InputError, match="must be reference='frozen_copy', got 'adapters_off'"):
        model.fit(data, verbose=0, callbacks=[callbacks.SyncReference()])
    with pytest.raises(InputError, match=r"every must be >= 1.*\n.*alpha must be in"):
        callbacks.SyncReference(every=0, alpha=2.0)
