"""What objectives carry between steps is kept with the model; what WPO reads of the policy."""

import keras
import numpy as np
import pytest
from tiny import Letters, full_logits_log_probs, gpt2, pairs

from dpo_keras.batching import preference_dataset, tokenize_pairs
from dpo_keras.losses import DPOLoss
from dpo_keras.scoring import ResponseScorer
from dpo_keras.training import DPOModel, callbacks
from dpo_keras.training.checkpoints import load_checkpoint, save_checkpoint
from dpo_keras.training.dpo_model import wpo_log_weight

WITH_MEMORY = {
    "group weights": {"group_robust": {"groups": 2, "eta": 0.5}},
    "running shift": {"loss_type": "bco_pair", "shift_momentum": 0.9},
}


@pytest.fixture(scope="module")
def data():
    records = [{**pair, "group": "ab"[number % 2]} for number, pair in enumerate(pairs(8))]
    tokenized = tokenize_pairs(records, Letters(), max_length=48)
    return preference_dataset(tokenized, batch_size=4, buckets=1, batching="buckets", shuffle=False)


def compiled(options):
    model = DPOModel(gpt2(num_layers=1, hidden_dim=8, intermediate_dim=16))
    model.compile(keras.optimizers.SGD(0.2), loss=DPOLoss(**options), run_eagerly=True)
    return model


def memory(model):
    return [weight.numpy() for weight in model.objective_state.weights]


def assert_equal(model, other, data):
    ours, theirs = (m.evaluate(data, return_dict=True, verbose=0) for m in (model, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        np.testing.assert_allclose(theirs[name], value, rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("options", WITH_MEMORY.values(), ids=WITH_MEMORY)
def test_what_an_objective_remembers_is_in_files_and_checkpoints(options, data, tmp_path):
    model = compiled(options)
    start = memory(model)
    model.fit(data, verbose=0)
    assert all((a != b).any() for a, b in zip(start, memory(model), strict=True))
    model.save(tmp_path / "model.keras")
    save_checkpoint(model, tmp_path / "checkpoints", 2)
    resumed = compiled(options)
    assert load_checkpoint(resumed, tmp_path / "checkpoints") == 2
    for other in (keras.saving.load_model(tmp_path / "model.keras"), resumed):
        for one, its in zip(memory(model), memory(other), strict=True):
            np.testing.assert_array_equal(one, its)
        assert_equal(model, other, data)


def test_a_reference_that_moved_is_in_files_and_checkpoints(data, tmp_path):
    model = compiled({})
    start = [copy.numpy() for copy in model.reference.copies]
    model.fit(data, verbose=0, callbacks=[callbacks.SyncReference(every=1, alpha=0.6)])
    moved = [copy.numpy() for copy in model.reference.copies]
    assert any((a != b).any() for a, b in zip(start, moved, strict=True))
    model.save(tmp_path / "model.keras")
    save_checkpoint(model, tmp_path / "checkpoints", 2)
    resumed = compiled({})
    load_checkpoint(resumed, tmp_path / "checkpoints")
    for other in (keras.saving.load_model(tmp_path / "model.keras"), resumed):
        for one, its in zip(moved, other.reference.copies, strict=True):
            np.testing.assert_array_equal(one, its.numpy())


def test_wpo_reads_how_sure_the_policy_is_of_each_token(data):
    """Mean over a response of log p_t - log Σ p², from full logits in NumPy."""
    policy = gpt2(num_layers=1)
    batch = next(iter(data))
    scored = ResponseScorer(policy)(batch, statistics=("entropy", "log_squared_norm"))
    found = keras.ops.convert_to_numpy(wpo_log_weight(batch, scored))

    rows, sequences, length = batch["token_ids"].shape
    flat = {
        key: keras.ops.reshape(batch[key], (rows * sequences, length))
        for key in ("token_ids", "padding_mask")
    }
    logits = keras.ops.convert_to_numpy(policy(flat, training=False)).astype(np.float64)
    logps = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    squared = np.log(np.exp(2 * logps).sum(-1)).reshape(rows, -1)
    sums, lengths = np.zeros((rows, 2)), np.zeros((rows, 2))
    for row, owners in enumerate(batch["owner"].numpy()):
        for slot, owner in enumerate(owners):
            if owner >= 0:
                sums[row, owner] += squared[row, batch["source"][row, slot]]
                lengths[row, owner] += 1
    expected = (full_logits_log_probs(policy, batch) - sums) / lengths
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
