"""DPOModel: the step is the one of the paper, and everything Keras promises works."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from tiny import Letters, full_logits_log_probs, gpt2, pairs, plain_model

import dpo_keras
from dpo_keras.batching import collate, preference_dataset, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.training import DPOModel, PolicyTrainer


def compiled(policy, loss="sigmoid", optimizer=None, reference="auto", graph=False, **options):
    """Compile a model; without a graph, whose tracing takes longer than the few steps here."""
    model = DPOModel(policy, reference)
    optimizer = optimizer or keras.optimizers.SGD(0.5)
    model.compile(optimizer, loss=loss, run_eagerly=not graph, **options)
    return model


def weights(model):
    return [variable.numpy() for variable in model.policy.weights]


def assert_same(ours, theirs, atol=1e-5):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=atol)


def test_the_first_loss_is_log_2_and_training_moves_it(policy, dataset):
    model = compiled(policy, DPOLoss(penalties={"insufficient_confidence": 0.5}), graph=True)
    steps = []
    record = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: steps.append(
            {k: float(v) for k, v in model.step_logs.items()}
        )
    )
    model.fit(dataset, epochs=4, verbose=0, callbacks=[record])
    assert abs(steps[0]["preference_loss"] - np.log(2)) < 1e-5
    assert abs(steps[0]["loss"] - 1.5 * np.log(2)) < 1e-5
    after = model.evaluate(dataset, verbose=0, return_dict=True)
    assert after["preference_loss"] < 0.6
    assert after["reward_accuracy"] > 0.9


def test_before_training_every_ratio_is_zero_and_accuracy_a_tie(policy, dataset):
    logs = compiled(policy).evaluate(dataset, verbose=0, return_dict=True)
    np.testing.assert_allclose(logs["loss"], np.log(2), atol=1e-6)
    assert logs["reward_accuracy"] == 0.5
    assert logs["chosen_probability"] == 0.5
    assert logs["kl"] == 0
    assert logs["reward_margin"] == 0


def test_one_sgd_step_is_the_gradient_of_the_papers_equation(policy, tokenized):
    """w <- w - lr/N d/dw sum -log sigmoid(beta (log-ratio difference)), from full logits."""
    batch = {k: tf.constant(v) for k, v in collate(tokenized, [0, 1, 2, 3], 24, 16).items()}
    rows, _, length = batch["token_ids"].shape
    reference = full_logits_log_probs(policy, batch)
    with tf.GradientTape() as tape:
        flat = {k: tf.reshape(batch[k], (-1, length)) for k in ("token_ids", "padding_mask")}
        logps = tf.nn.log_softmax(policy(flat, training=False))
        logps = tf.reshape(logps, (rows, 2 * length, -1))
        picked = tf.gather(logps, batch["source"], batch_dims=1)
        picked = tf.gather(picked, batch["target"], batch_dims=2)
        sums = [tf.reduce_sum(tf.where(batch["owner"] == k, picked, 0.0), axis=1) for k in (0, 1)]
        delta = (sums[0] - reference[:, 0]) - (sums[1] - reference[:, 1])
        loss = tf.reduce_mean(-tf.math.log_sigmoid(0.1 * delta))
    gradients = tape.gradient(loss, policy.trainable_variables)
    expected = [
        v.numpy() - 0.5 * tf.convert_to_tensor(g).numpy()
        for v, g in zip(policy.trainable_variables, gradients, strict=True)
    ]
    model = compiled(policy)
    model.train_on_batch(batch)
    assert_same([v.numpy() for v in policy.trainable_variables], expected, 1e-6)


@pytest.mark.slow
def test_all_names_of_the_design_are_logged(policy, dataset):
    loss = DPOLoss(penalties={"insufficient_confidence": 0.1, "nll": 0.2})
    model = compiled(policy, loss)
    history = model.fit(dataset, validation_data=dataset, verbose=0).history
    names = {
        *("loss", "preference_loss", "penalty/insufficient_confidence", "penalty/nll"),
        *("reward_accuracy", "reward_margin", "chosen_probability"),
        *("chosen_reward", "rejected_reward"),
        *("chosen_logps", "rejected_logps", "kl", "entropy"),
    }
    training = names | {"grad_norm", "tokens_per_second", "pairs_per_second"}
    assert set(history) == training | {f"val_{name}" for name in names}
    logs = model.evaluate(dataset, verbose=0, return_dict=True)
    np.testing.assert_allclose(
        logs["loss"],
        logs["preference_loss"] + logs["penalty/insufficient_confidence"] + logs["penalty/nll"],
        rtol=1e-5,
    )
    np.testing.assert_allclose(
        logs["reward_margin"], logs["chosen_reward"] - logs["rejected_reward"], atol=1e-5
    )
    # Uniform guessing over the vocabulary would have this entropy; a random start is close to it.
    np.testing.assert_allclose(logs["entropy"], np.log(97), rtol=0.1)


def test_evaluate_returns_loss_first_and_changes_nothing(policy, dataset):
    model = compiled(policy)
    before = weights(model)
    values = model.evaluate(dataset, verbose=0)
    np.testing.assert_allclose(values[0], np.log(2), atol=1e-6)
    assert_same(weights(model), before, 0)


def test_predict_gives_probabilities_of_both_responses(policy, dataset):
    model = compiled(policy)
    model.fit(dataset, epochs=2, verbose=0)
    found = model.predict(dataset, verbose=0)
    assert found["probabilities"].shape == (12, 2)
    np.testing.assert_allclose(found["probabilities"].sum(axis=1), 1, rtol=1e-6)
    np.testing.assert_allclose(
        found["llr"], found["scores"][:, 0] - found["scores"][:, 1], atol=1e-6
    )
    # The last of the twelve rows is padding.
    logged = model.evaluate(dataset, verbose=0, return_dict=True)["chosen_probability"]
    np.testing.assert_allclose(logged, found["probabilities"][:11, 0].mean(), rtol=1e-5)


@pytest.mark.slow
def test_weights_count_pairs_and_soft_preferences_swap(policy):
    """Weight 2 is the pair twice; (A, B, y) is (B, A, 1 - y)."""
    first, second = pairs(2)
    start = weights(compiled(policy))

    def after(records):
        for variable, value in zip(policy.weights, start, strict=True):
            variable.assign(value)
        model = compiled(policy)
        tokenized = tokenize_pairs(records, Letters(), max_length=48)
        model.train_on_batch(collate(tokenized, list(range(len(records))), 24, 16))
        return weights(model)

    assert_same(after([{**first, "weight": 2.0}, second]), after([first, first, second]))
    swapped = {**first, "chosen": first["rejected"], "rejected": first["chosen"]}
    soft = after([{**first, "preference": 0.8}, {**first, "preference": 0.6}])
    assert_same(soft, after([{**first, "preference": 0.8}, {**swapped, "preference": 0.4}]))


def test_rows_that_pad_a_batch_change_nothing(policy, tokenized):
    start = weights(compiled(policy))
    model = compiled(policy)
    model.train_on_batch(collate(tokenized, [0, 1, 2], 24, 16))
    unpadded = weights(model)
    for variable, value in zip(policy.weights, start, strict=True):
        variable.assign(value)
    model = compiled(policy)
    model.train_on_batch(collate(tokenized, [0, 1, 2], 32, 24, batch_size=7))
    assert_same(weights(model), unpadded)


@pytest.mark.slow
def test_eight_accumulated_batches_of_one_are_one_batch_of_eight(tokenized):
    results = []
    for size, steps in ((8, None), (1, 8)):
        model = compiled(
            gpt2(num_layers=1),
            DPOLoss(penalties={"nll": 0.1}),
            keras.optimizers.Adam(1e-2, gradient_accumulation_steps=steps, global_clipnorm=0.5),
            graph=True,
        )
        data = preference_dataset(
            tokenized.take(np.arange(8)),
            batch_size=size,
            buckets=1,
            batching="buckets",
            shuffle=False,
        )
        model.fit(data, epochs=2, verbose=0)
        results.append(weights(model))
    assert_same(*results)


@pytest.fixture(scope="module")
def weights_of_a_graph(dataset):
    """The weights after two epochs, run as by default."""
    model = compiled(gpt2(num_layers=1), graph=True)
    model.fit(dataset, epochs=2, verbose=0)
    return weights(model)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"jit_compile": True}, {"steps_per_execution": 2}, {"graph": False}]
)
def test_ways_to_run_a_step_give_the_same_weights(options, dataset, weights_of_a_graph):
    other = compiled(gpt2(num_layers=1), **{"graph": True, **options})
    history = other.fit(dataset, epochs=2, verbose=0).history
    assert_same(weights(other), weights_of_a_graph)
    assert len(history["loss"]) == 2
    assert int(other.optimizer.iterations) == 6


def test_one_trace_serves_all_buckets(policy):
    records = [{"prompt": "a" * n, "chosen": "b" * n, "rejected": "c"} for n in (2, 9, 17, 25) * 2]
    data = preference_dataset(records, Letters(), batch_size=2, buckets=4, batching="buckets")
    assert len({batch["token_ids"].shape for batch in data}) == 4
    traces = []

    class Counted(DPOModel):
        def train_step(self, batch):
            traces.append(batch["token_ids"].shape)
            return super().train_step(batch)

    model = Counted(policy)
    model.compile(keras.optimizers.SGD(0.1))
    model.fit(data, epochs=2, verbose=0)
    assert len(traces) == 1


def test_mixed_bfloat16_trains_from_log_2(dataset):
    keras.config.set_dtype_policy("mixed_bfloat16")
    try:
        policy = gpt2(num_layers=1)
    finally:
        keras.config.set_dtype_policy("float32")
    model = compiled(policy, optimizer=keras.optimizers.Adam(1e-2))
    history = model.fit(dataset, epochs=3, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert all(v.dtype == "float32" for v in policy.weights)


@pytest.mark.slow
def test_mixed_float16_scales_its_loss_and_logs_the_true_gradient_norm(dataset):
    keras.config.set_dtype_policy("mixed_float16")
    try:
        policy = gpt2(num_layers=1)
        model = compiled(policy, optimizer=keras.optimizers.SGD(0.1))
    finally:
        keras.config.set_dtype_policy("float32")
    scaled = model.fit(dataset, verbose=0).history
    plain = compiled(gpt2(num_layers=1), optimizer=keras.optimizers.SGD(0.1))
    expected = plain.fit(dataset, verbose=0).history
    np.testing.assert_allclose(scaled["grad_norm"], expected["grad_norm"], rtol=0.05)


def test_a_model_of_the_users_own_trains(dataset):
    model = compiled(plain_model(), optimizer=keras.optimizers.Adam(1e-2), graph=True)
    history = model.fit(dataset, epochs=4, verbose=0).history
    assert history["loss"][-1] < np.log(2)


@pytest.mark.parametrize(
    ("bias", "trained"), [("none", ["a", "b"]), ("lora_only", ["a", "b", "bias"])]
)
def test_only_adapters_move_under_lora(bias, trained, dataset):
    policy = gpt2(num_layers=1)
    dpo_keras.enable_lora(policy, 2, bias=bias)
    before = {v.path: v.numpy() for v in policy.weights}
    model = compiled(policy, optimizer=keras.optimizers.Adam(1e-2), graph=True)
    assert model.reference.mode == "adapters_off"
    model.fit(dataset, epochs=2, verbose=0)
    moved = {v.path for v in policy.weights if np.abs(v.numpy() - before[v.path]).max() > 0}
    assert moved == {v.path for v in policy.trainable_variables}
    assert sorted({path.split("_")[-1].split("/")[-1] for path in moved}) == trained


def test_reference_free_losses_never_run_a_reference(policy, dataset):
    model = compiled(policy, DPOLoss("simpo", beta=2.0, gamma=0.5), reference="none")
    assert not model.reference.weights
    automatic = DPOModel(policy)
    automatic.compile("sgd", loss="simpo")
    assert automatic.reference.mode == "none"
    assert not automatic.non_trainable_weights
    with pytest.raises(InputError, match="reference='frozen_copy'"):
        automatic.compile("sgd", loss="sigmoid")
    kept = DPOModel(policy)
    kept.compile("sgd", loss="sigmoid")
    reference = kept.reference
    kept.compile("sgd", loss="simpo")
    kept.compile("sgd", loss="bco_pair")
    assert kept.reference is reference
    logs = model.fit(dataset, verbose=0).history
    assert "kl" not in logs
    with pytest.raises(InputError, match="reference='none'"):
        model.compile(keras.optimizers.SGD(0.1), loss="sigmoid")


@pytest.mark.parametrize(
    "options",
    [{}, {"steps_per_execution": 2}, {"optimizer": {"gradient_accumulation_steps": 2}}],
    ids=["plain", "several steps at once", "accumulating"],
)
def test_a_run_that_does_not_start_at_its_reference_is_refused(policy, tokenized, options):
    wrong = tokenized.with_reference(np.tile(np.float32([-5.0, -50.0]), (11, 1)))
    model = DPOModel(policy, reference="cached")
    model.reference.starts_as_policy = True
    options = dict(options)
    model.compile(keras.optimizers.SGD(0.1, **options.pop("optimizer", {})), **options)
    with pytest.raises(RuntimeError, match=r"first preference loss is .* must be 0\.693147"):
        model.fit(preference_dataset(wrong, batch_size=4, batching="buckets"), verbose=0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: DPOModel("gpt2"), "policy must be a keras.Model"),
        (lambda: compiled(gpt2(num_layers=1), loss=keras.losses.MeanSquaredError()), "DPOLoss"),
    ],
)
def test_wrong_arguments_are_named(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("step", ["train_step", "test_step"])
def test_a_trainer_without_steps_of_its_own_is_refused_by_name(step, policy):
    """Keras' own steps would train on something else."""
    with pytest.raises(NotImplementedError, match=f"PolicyTrainer must define {step}"):
        getattr(PolicyTrainer(policy), step)({})
