"""`legacy.DPOModel` as a tf-keras model: policies, references, saving, callbacks, replicas."""

import contextlib

import keras
import numpy as np
import pytest
import tensorflow as tf
import tf_keras
from legacy_tiny import transformer
from tiny import VOCABULARY

import dpo_keras
from dpo_keras import legacy
from dpo_keras.batching import preference_dataset
from dpo_keras.errors import InputError
from dpo_keras.evaluation import evaluate_preferences
from dpo_keras.legacy.tf_keras_trainer import StepSums, adapted
from dpo_keras.losses import DPOLoss


@tf_keras.saving.register_keras_serializable("legacy_tests")
class Subclassed(tf_keras.Model):
    """A user's own class; its call has a Python `if` on a tensor, which autograph translates."""

    def __init__(self, width=8, **options):
        super().__init__(**options)
        self.width = width
        self.embedding = tf_keras.layers.Embedding(VOCABULARY, width)
        self.recurrent = tf_keras.layers.GRU(width, return_sequences=True)
        self.head = tf_keras.layers.Dense(VOCABULARY)

    def call(self, inputs, training=False):
        states = self.embedding(inputs["token_ids"])
        if tf.reduce_sum(inputs["padding_mask"]) > 0:
            states = self.recurrent(states)
        else:
            states = tf.zeros_like(states)
        return self.head(states)

    def get_config(self):
        return {"width": self.width, "name": self.name}


def compiled(policy=None, reference="auto", loss=None, **options):
    model = legacy.DPOModel(policy or transformer(tf_keras, layers=1), reference)
    model.compile(tf_keras.optimizers.Adam(1e-2), loss or DPOLoss(), **options)
    return model


def ids_alone():
    return transformer(tf_keras, layers=1, mask=False)


def _in_bfloat16():
    tf_keras.mixed_precision.set_global_policy("mixed_bfloat16")
    try:
        return transformer(tf_keras, layers=1)
    finally:
        tf_keras.mixed_precision.set_global_policy("float32")


POLICIES = {
    "ids and mask": lambda: transformer(tf_keras, layers=1),
    "ids alone": ids_alone,
    "a class of one's own": Subclassed,
    "in bfloat16": _in_bfloat16,
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_any_policy_trains_from_log_two(policy, dataset):
    model = compiled(policy())
    before = [weight.numpy() for weight in model.reference_model.weights]
    assert model.evaluate(dataset, return_dict=True, verbose=0)["loss"] == pytest.approx(np.log(2))
    history = model.fit(dataset, epochs=4, validation_data=dataset, verbose=0).history
    assert history["val_loss"][-1] < history["val_loss"][0] < np.log(2)
    assert {"reward_accuracy", "kl", "grad_norm", "tokens_per_second"} <= set(history)
    assert not {"at_reference", "tokens", "val_grad_norm"} & set(history)
    for one, other in zip(before, model.reference_model.weights, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


def test_an_if_on_a_tensor_is_translated_in_this_packages_graphs_too(tokenized):
    metrics = evaluate_preferences(compiled(Subclassed()), tokenized).metrics
    assert metrics["loss"] == pytest.approx(np.log(2))


def test_a_policy_without_mask_scores_like_the_same_one_with_it(dataset):
    one, other = transformer(tf_keras, layers=1), ids_alone()
    other.set_weights(one.get_weights())
    batch = next(iter(dataset))
    found = [compiled(policy).policy_logps(batch).numpy() for policy in (one, other)]
    np.testing.assert_allclose(*found, atol=1e-5)


def test_a_first_loss_that_is_not_log_two_ends_the_run(dataset):
    model = compiled()
    model.reference_model.weights[0].assign(model.reference_model.weights[0] + 1.0)
    model.reference_model.weights[-2].assign(2.0 * model.reference_model.weights[-2])
    with pytest.raises(RuntimeError, match="must be 0.693147"):
        model.fit(dataset, verbose=0)


def test_references_by_name_and_by_model_agree(dataset, tokenized):
    policy, frozen = transformer(tf_keras, layers=1), transformer(tf_keras, layers=1)
    cached = dpo_keras.cache_reference(policy, tokenized)
    data = preference_dataset(cached, batch_size=4, buckets=1, shuffle=False)
    batch = next(iter(data))
    wanted = compiled(policy, frozen).reference_logps(batch).numpy()
    for reference in ("frozen_copy", "cached"):
        found = compiled(policy, reference).reference_logps(batch).numpy()
        np.testing.assert_allclose(found, wanted, atol=1e-4, err_msg=reference)
    assert compiled(policy, "none", DPOLoss("simpo")).reference_logps(batch) is None
    # What "auto" copied is dropped where the loss asks for no reference.
    model = compiled(policy, "auto", DPOLoss("simpo"))
    assert model.reference_model is None
    assert len(model.weights) == len(policy.weights)


def test_the_reference_follows_the_policy_when_asked_to(dataset):
    model = compiled()
    follow = dpo_keras.callbacks.SyncReference(every=2, alpha=1.0)
    model.fit(dataset.take(2), callbacks=[follow], verbose=0)
    for one, other in zip(model.policy.weights, model.reference_model.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_saved_model_goes_on_as_the_first_would(dataset, tmp_path):
    # With a loss that has a state of its own, which is saved too.
    loss = DPOLoss("bco_pair", shift_momentum=0.9)
    model = compiled(loss=loss)
    model.fit(dataset, verbose=0)
    model.save(tmp_path / "model.keras")
    model.save_weights(tmp_path / "model.weights.h5")
    model.policy.save(tmp_path / "policy.keras")
    again = tf_keras.models.load_model(tmp_path / "model.keras")
    fresh = compiled(loss=DPOLoss.from_config(loss.get_config()))
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert again.preference_loss.get_config() == loss.get_config()
    policy = tf_keras.models.load_model(tmp_path / "policy.keras")
    for one, other in zip(policy.weights, model.policy.weights, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())
    assert float(model.objective_variables[0]) != 0.0
    logs = []
    for continued in (model, again, fresh):
        continued.run_eagerly = True
        logs.append(continued.fit(dataset, verbose=0).history)
    for other in logs[1:]:
        for name in ("loss", "preference_loss", "kl", "grad_norm"):
            assert other[name] == pytest.approx(logs[0][name], rel=1e-4), name


def test_a_model_saved_by_a_release_that_measured_less_loads(tmp_path, monkeypatch):
    model = compiled()
    model.save(tmp_path / "model.keras")
    names = legacy.DPOModel.metric_names
    monkeypatch.setattr(legacy.DPOModel, "metric_names", lambda self: [*names(self), "another"])
    again = tf_keras.models.load_model(tmp_path / "model.keras")
    assert "another" in again.metrics_names
    for mine, its in zip(model.policy.weights, again.policy.weights, strict=True):
        np.testing.assert_array_equal(mine.numpy(), its.numpy())


def test_callbacks_of_both_kinds_are_called(dataset, tmp_path):
    log = tmp_path / "log.jsonl"
    heard = []
    mine = tf_keras.callbacks.LambdaCallback(on_epoch_end=lambda epoch, logs: heard.append(logs))
    theirs = [dpo_keras.callbacks.RunLog(log), dpo_keras.callbacks.StopOnNonFinite()]
    best = tf_keras.callbacks.ModelCheckpoint(
        str(tmp_path / "best.weights.h5"), monitor="val_loss", save_weights_only=True
    )
    model = compiled()
    model.fit(dataset, validation_data=dataset, callbacks=[*theirs, mine, best], verbose=0)
    assert heard[0]["pairs_per_second"] > 0 and "val_loss" in heard[0]
    assert len(log.read_text().splitlines()) >= 3
    assert (tmp_path / "best.weights.h5").exists()


def test_an_adapted_callback_has_the_hooks_of_the_original_and_no_more():
    heard = []

    class Counts(keras.callbacks.Callback):
        def on_epoch_end(self, epoch, logs=None):
            heard.append((epoch, logs))

    callback = adapted(Counts())
    callback.on_epoch_end(3, {"loss": 0.5})
    assert heard == [(3, {"loss": 0.5})]
    base = tf_keras.callbacks.Callback
    assert type(callback).on_train_batch_end is base.on_train_batch_end
    assert adapted(callback) is callback


def test_sums_of_steps_are_averaged_by_their_weights():
    sums = StepSums(["loss", "pairs"])
    sums.update_state({"loss": (6.0, 3.0), "pairs": (3.0, 1.0)})
    sums.update_state({"loss": (2.0, 1.0), "pairs": (1.0, 1.0)})
    assert {name: float(value) for name, value in sums.result().items()} == {"loss": 2.0}
    assert float(sums.means(sums.first)["pairs"]) == 3.0
    assert float(sums.means(sums.last)["pairs"]) == 1.0
    sums.reset_state()
    assert float(sums.result()["loss"]) == 0.0


def steps(tokenized, optimizer, loss, scope=None, **options):
    """Four steps on batches of four of eleven pairs: logs and weights."""
    data = preference_dataset(tokenized, batch_size=4, buckets=1, epochs=None)
    with scope.scope() if scope else contextlib.nullcontext():
        model = legacy.DPOModel(transformer(tf_keras, layers=1))
        model.compile(optimizer(), DPOLoss(**loss), **options)
    logs = model.fit(data, steps_per_epoch=4, verbose=0).history
    return {name: v for name, v in logs.items() if "per_second" not in name}, model.policy


def assert_same(one, other):
    (logs, policy), (other_logs, other_policy) = one, other
    assert logs.keys() == other_logs.keys()
    for name, value in logs.items():
        assert other_logs[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    for mine, its in zip(policy.get_weights(), other_policy.get_weights(), strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5)


def adam():
    return tf_keras.optimizers.Adam(1e-2, global_clipnorm=0.05)


def old_sgd():
    return tf_keras.optimizers.legacy.SGD(0.5, global_clipnorm=0.05)


def test_several_steps_in_one_call_are_the_same_steps(tokenized):
    alone = steps(tokenized, adam, {}, run_eagerly=True)
    assert_same(steps(tokenized, adam, {}, steps_per_execution=2), alone)


REPLICATED = {
    "penalties": (adam, {"penalties": {"insufficient_confidence": 0.1}}),
    "sorted batches": (adam, {"loss_type": "aot"}),
    "groups, an optimizer of old": (old_sgd, {"group_robust": {"groups": 2, "eta": 0.5}}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REPLICATED)
def test_two_replicas_take_the_steps_of_one(name, tokenized):
    optimizer, loss = REPLICATED[name]
    mirrored = dpo_keras.strategy("mirrored")
    assert mirrored.num_replicas_in_sync == 2
    alone = steps(tokenized, optimizer, loss, run_eagerly=True)
    assert_same(steps(tokenized, optimizer, loss, mirrored), alone)


def test_a_prediction_has_preferences_of_every_pair(dataset):
    found = compiled(run_eagerly=True).predict(dataset, verbose=0)
    assert found["probabilities"].shape == (12, 2)
    np.testing.assert_allclose(found["probabilities"], 0.5, atol=1e-5)


def _embedding(vocabulary):
    return tf_keras.Sequential(
        [tf_keras.Input((None,), dtype="int32"), tf_keras.layers.Embedding(vocabulary, vocabulary)]
    )


def _two_named(first, second):
    inputs = {name: tf_keras.Input((None,), dtype="int32", name=name) for name in (first, second)}
    states = tf_keras.layers.Embedding(9, 9)(inputs[first])
    return tf_keras.Model(inputs, states)


class _Nameless(tf_keras.Model):
    def __init__(self):
        super().__init__()
        self.head = tf_keras.layers.Dense(3)

    def call(self, ids):
        return self.head(tf.one_hot(ids["input_ids"], 3))


FAULTS = {
    "a model of Keras 3": (lambda: compiled(transformer(keras)), "must be a tf_keras.Model"),
    "other inputs": (
        lambda: compiled(_two_named("input_ids", "mask")),
        "takes .'input_ids', 'mask'",
    ),
    "a class that wants other inputs": (lambda: compiled(_Nameless()), "KeyError"),
    "adapters": (lambda: compiled(_embedding(9), "adapters_off"), "LoRA of Keras 3"),
    "another vocabulary": (lambda: compiled(_embedding(9), _embedding(8)), "8 tokens"),
    "no reference": (lambda: compiled(_embedding(9), "none"), "reference='none'"),
    "no loss": (lambda: compiled(_embedding(9), loss=3), "must be a dpo_keras.DPOLoss"),
    "metrics": (lambda: compiled(_embedding(9), metrics=["mae"]), "metrics=….* has no effect"),
    "an optimizer of Keras 3": (
        lambda: legacy.DPOModel(_embedding(9)).compile(keras.optimizers.SGD()),
        "must be one of tf_keras.optimizers",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_what_cannot_be_is_refused_with_the_reason(name):
    make, message = FAULTS[name]
    with pytest.raises(InputError, match=message):
        make()


def test_packed_rows_are_refused_with_the_reason(tokenized):
    packed = preference_dataset(tokenized, batch_size=4, batching="packed", row_length=64)
    with pytest.raises(InputError, match="Use batching='buckets'"):
        compiled(run_eagerly=True).fit(packed, verbose=0)


def test_a_policy_that_cannot_be_copied_wants_a_second_instance(dataset):
    class Unnamed(Subclassed):
        def get_config(self):
            raise NotImplementedError("no configuration")

    with pytest.raises(InputError, match="second instance"):
        legacy.DPOModel(Unnamed())
    policy, second = Unnamed(), Unnamed()
    model = legacy.DPOModel(policy, second)
    second.set_weights(policy.get_weights())
    model.compile("sgd", DPOLoss())
    assert model.evaluate(dataset, verbose=0)[0] == pytest.approx(np.log(2), abs=1e-5)
