"""What `fit` promises holds on JAX, too."""

import keras
import numpy as np
import pytest
import tiny
from backends_training import StepLosses, batches, compiled_model, policy_of, weights_of

import dpo_keras
from dpo_keras.evaluation import evaluate_preferences
from dpo_keras.scoring import check_packing, score_pairs
from dpo_keras.scoring.scorer import ResponseScorer
from dpo_keras.training.fit import train_preferences, warm_up


@pytest.fixture(scope="module")
def tokenized():
    return dpo_keras.tokenize_pairs(tiny.pairs(24), tiny.Letters(), max_length=24)


def assert_equal(ours, theirs, atol):
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0)


def test_the_first_loss_is_that_of_the_reference():
    model = compiled_model(policy_of("gpt2"))
    model.preference_loss.penalties = {}
    log = StepLosses()
    model.fit(batches(8), verbose=0, callbacks=[log])  # StartsAtReference checks it as well
    assert float(model.first_step_logs["at_reference"]) == pytest.approx(np.log(2), abs=1e-5)
    assert model.reference.mode == "frozen_copy" and model.steps_taken() == 1


def test_micro_batches_are_one_batch():
    found = []
    for size, steps in ((8, None), (4, 2)):
        optimizer = keras.optimizers.SGD(
            0.3, momentum=0.9, global_clipnorm=1.0, gradient_accumulation_steps=steps
        )
        model = compiled_model(policy_of("gpt2"), optimizer)
        model.fit(batches(16, batch_size=size, shuffle=False), verbose=0)
        found.append(weights_of(model.policy))
    assert_equal(*found, atol=1e-6)


def test_recomputed_blocks_are_the_same_training():
    found = []
    for remat in (False, True):
        model = compiled_model(policy_of("gpt2", num_layers=2), remat=remat)
        model.fit(batches(16, "packed"), verbose=0)
        found.append(weights_of(model.policy))
    assert_equal(*found, atol=1e-6)


def test_steps_run_eagerly_are_those_that_xla_compiles():
    """To look into a step with a debugger; warnings are errors here, and Keras has one for XLA."""
    found = []
    for eagerly in (False, True):
        model = dpo_keras.DPOModel(policy_of("gpt2"))
        model.compile(keras.optimizers.SGD(0.1), run_eagerly=eagerly)
        model.fit(batches(8, "packed"), verbose=0)
        found.append(weights_of(model.policy))
    assert_equal(*found, atol=1e-6)


def test_several_steps_in_a_call_and_whole_epochs_log_the_same():
    logs = []
    for at_once in (1, 3):
        model = compiled_model(policy_of("gpt2"))
        model.steps_per_execution = at_once
        logs.append(model.fit(batches(48), verbose=0).history)
    for name in ("loss", "reward_accuracy", "kl", "grad_norm"):
        assert logs[0][name][0] == pytest.approx(logs[1][name][0], abs=1e-6)


def test_weights_that_the_loss_does_not_read_do_not_decay():
    policy = policy_of("llama")
    model = dpo_keras.RewardModel(policy)
    model.compile(keras.optimizers.AdamW(1e-2, weight_decay=0.5))
    head = policy.backbone.token_embedding.reverse_embeddings
    before = np.array(head)
    model.fit(batches(8), verbose=0)
    np.testing.assert_array_equal(before, head)
    assert np.abs(np.array(model.head.kernel)).max() > 0


def test_dropout_draws_anew_in_each_step():
    policy = policy_of("gpt2", dropout=0.5)
    model = compiled_model(policy, dropout=True)
    seeds = [v for v in model.variables if "seed" in v.name]
    before = [np.array(seed) for seed in seeds]
    model.fit(batches(16), verbose=0)
    assert seeds and not any(map(np.array_equal, before, map(np.array, seeds)))


def test_a_stopped_run_goes_on_where_its_checkpoint_is(tokenized, tmp_path):
    def run(directory, **options):
        model = compiled_model(policy_of("gpt2"))
        said = []
        options = {"epochs": 2, "batch_size": 8, "batching": "buckets", "buckets": 1, **options}
        options |= {"checkpoints": directory, "checkpoint_every": 1, "note": said.append}
        train_preferences(model, tokenized, **options)
        return weights_of(model.policy), said

    undisturbed, _ = run(tmp_path / "one")
    run(tmp_path / "two", max_steps=4)
    resumed, said = run(tmp_path / "two", resume=True)
    assert said == ["resumed after step 4 of 6."]
    assert_equal(resumed, undisturbed, atol=1e-6)


def test_warm_up_packed_and_in_buckets_is_the_same(tokenized):
    found = []
    for layout in ("packed", "buckets"):
        policy = policy_of("gpt2")
        model = dpo_keras.SupervisedModel(policy, dropout=False)
        model.compile(keras.optimizers.SGD(0.1))
        # One batch of all pairs, so that their order does not matter.
        warm_up(model, tokenized, epochs=1, batch_size=24, batching=layout)
        found.append((weights_of(policy), model.steps_taken()))
    assert found[0][1] == found[1][1] == 1
    assert_equal(found[0][0], found[1][0], atol=1e-5)


def test_scores_packed_and_in_buckets_are_the_same(tokenized):
    policy = policy_of("qwen3")
    packed, buckets = (score_pairs(policy, tokenized, batching=b) for b in ("packed", "buckets"))
    np.testing.assert_allclose(packed, buckets, atol=1e-4)
    assert check_packing(ResponseScorer(policy)) < 1e-5


def test_evaluation_prediction_saving_and_single_batches(tokenized, tmp_path):
    model = compiled_model(policy_of("gpt2"))
    data = batches(24, shuffle=False)
    model.fit(data, verbose=0)
    logs = model.evaluate(data, return_dict=True, verbose=0)
    held_out = evaluate_preferences(model, tokenized)
    assert held_out.pairs["loss"].mean() == pytest.approx(logs["loss"], abs=1e-5)
    predicted = model.predict(data, verbose=0)
    np.testing.assert_allclose(predicted["policy"].mean(0)[0], logs["chosen_logps"], atol=1e-4)
    model.save(tmp_path / "model.keras")
    again = keras.saving.load_model(tmp_path / "model.keras")
    assert again.evaluate(data, return_dict=True, verbose=0) == pytest.approx(logs, abs=1e-6)
    batch = next(iter(data))
    tested = model.test_on_batch(batch, return_dict=True)
    assert np.isfinite(tested["loss"])
    assert np.isfinite(model.train_on_batch(batch, return_dict=True)["grad_norm"])
    assert model.predict_on_batch(batch)["llr"].shape == (8,)


def test_weights_in_bfloat16_train_with_state_in_float32():
    policy = policy_of("gpt2", dtype="bfloat16")
    model = dpo_keras.DPOModel(policy)
    model.compile(keras.optimizers.AdamW(1e-2))
    before = weights_of(policy)
    model.fit(batches(16), verbose=0)
    assert {str(weight.dtype) for weight in policy.weights} == {"bfloat16"}
    assert {str(v.dtype) for v in model.optimizer.variables} <= {"float32", "int32"}
    changed = [not np.array_equal(a, b) for a, b in zip(before, weights_of(policy), strict=True)]
    assert sum(changed) > len(changed) / 2
