"""What is saved comes back: policy, reference, adapters, optimizer."""

import keras
import numpy as np
import pytest
from tiny import gpt2, llama, plain_model

import dpo_keras
from dpo_keras.losses import DPOLoss
from dpo_keras.training import DPOModel, callbacks


def with_lora():
    policy = gpt2(num_layers=1)
    policy.backbone.enable_lora(2)
    return policy


def with_queries_and_values():
    policy = gpt2(num_layers=1)
    dpo_keras.enable_lora(policy, 2)
    return policy


def with_targets():
    policy = gpt2(num_layers=1)
    dpo_keras.enable_lora(policy, 2, 8, ["all-linear"], scaling="rank_stabilized")
    return policy


def with_adapters_of_ones_own():
    policy = plain_model()
    dpo_keras.enable_lora(policy, 2, alpha=16, targets=policy.layers[-1].name)
    return policy


def trained(make, dataset, loss=None):
    model = DPOModel(make())
    model.compile(keras.optimizers.Adam(1e-2), loss=loss or DPOLoss(beta=0.3))
    model.fit(dataset, epochs=2, verbose=0)
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: gpt2(num_layers=1),
        with_lora,
        with_targets,
        with_adapters_of_ones_own,
        lambda: llama(num_layers=1, tie_word_embeddings=True),
        plain_model,
    ],
    ids=["full", "lora", "lora_targets", "lora_of_ones_own", "tied_llama", "of_ones_own"],
)
def test_a_saved_model_evaluates_and_goes_on_as_the_original(make, dataset, tmp_path):
    """The reference is state of its own: trl#6443 evaluated a policy against itself."""
    model = trained(make, dataset)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    ours = model.evaluate(dataset, verbose=0, return_dict=True)
    theirs = loaded.evaluate(dataset, verbose=0, return_dict=True)
    assert ours["reward_margin"] > 0.01
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-5, atol=1e-6, err_msg=name)
    assert loaded.reference.mode == model.reference.mode
    assert loaded.preference_loss.beta == 0.3
    assert [v.trainable for v in loaded.policy.weights] == [
        v.trainable for v in model.policy.weights
    ]
    model.fit(dataset, verbose=0)
    loaded.fit(dataset, verbose=0)
    for one, other in zip(model.policy.weights, loaded.policy.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-6)


def test_weights_alone_bring_policy_and_reference_back(dataset, tmp_path):
    model = trained(with_lora, dataset)
    model.save_weights(tmp_path / "model.weights.h5")
    fresh = DPOModel(with_lora())
    fresh.compile(keras.optimizers.Adam(1e-2), loss=DPOLoss(beta=0.3))
    fresh.load_weights(tmp_path / "model.weights.h5")
    ours = model.evaluate(dataset, verbose=0, return_dict=True)
    theirs = fresh.evaluate(dataset, verbose=0, return_dict=True)
    np.testing.assert_allclose(theirs["loss"], ours["loss"], rtol=1e-6)
    assert int(fresh.optimizer.iterations) == int(model.optimizer.iterations)


def test_kerashubs_own_lora_file_holds_the_trained_adapters(dataset, tmp_path):
    model = trained(with_queries_and_values, dataset)
    path = tmp_path / "adapters.lora.h5"
    model.policy.backbone.save_lora_weights(path)
    fresh = gpt2(num_layers=1)
    fresh.backbone.load_lora_weights(path)
    trained_adapters = [v for v in model.policy.weights if "lora" in v.name]
    loaded = [v for v in fresh.weights if "lora" in v.name]
    assert trained_adapters
    for one, other in zip(trained_adapters, loaded, strict=True):
        np.testing.assert_array_equal(one.numpy(), other.numpy())


def test_a_reference_model_of_its_own_is_saved_too(dataset, tmp_path):
    model = DPOModel(gpt2(num_layers=1), reference=gpt2(1, num_layers=1))
    model.compile(keras.optimizers.Adam(1e-2))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    ours = model.evaluate(dataset, verbose=0, return_dict=True)
    assert loaded.evaluate(dataset, verbose=0, return_dict=True) == pytest.approx(ours, rel=1e-5)


def test_kerass_own_callbacks_work_together(dataset, tmp_path):
    model = DPOModel(gpt2(num_layers=1))
    model.compile(keras.optimizers.Adam(1e-2), loss=DPOLoss())
    seen = model.fit(
        dataset,
        validation_data=dataset,
        epochs=6,
        verbose=0,
        callbacks=[
            keras.callbacks.TensorBoard(tmp_path / "logs"),
            keras.callbacks.ModelCheckpoint(tmp_path / "best.keras", save_best_only=True),
            keras.callbacks.EarlyStopping("val_reward_accuracy", mode="max", patience=1),
            keras.callbacks.BackupAndRestore(tmp_path / "backup"),
            keras.callbacks.CSVLogger(tmp_path / "log.csv"),
            callbacks.StopOnNonFinite(),
        ],
    )
    assert len(seen.epoch) < 6
    assert list((tmp_path / "logs").rglob("*tfevents*"))
    assert "val_reward_margin" in (tmp_path / "log.csv").read_text()
    best = keras.saving.load_model(tmp_path / "best.keras")
    assert best.evaluate(dataset, verbose=0)[0] <= np.log(2)
