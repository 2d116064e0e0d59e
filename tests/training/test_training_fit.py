"""Recipes: what stops goes on exactly, and what is saved is whole."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import keras
import numpy as np
import pytest
from damage import overwrite
from tiny import Letters, gpt2, pairs

from dpo_keras.batching import tokenize_pairs
from dpo_keras.cluster import RunStopped, StopRequest
from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.training import (
    DPOModel,
    SupervisedModel,
    callbacks,
    latest_checkpoint,
    make_optimizer,
    train_preferences,
    warm_up,
)

STEPS = 12  # four epochs of three batches


def run(  # noqa: PLR0913, PLR0917 (ways to disturb it)
    folder,
    tokenized,
    resume=False,
    stop_after=None,
    stop_in_evaluation_after=None,
    slow=False,
    callback=None,
    **options,
):
    """The run whose end must not depend on what happened in its middle.

    The model keeps what the run said of itself: `taken`, the steps that it took, and `notes`.
    """
    model = DPOModel(gpt2(num_layers=1))
    optimizer = make_optimizer(STEPS, learning_rate=1e-2, schedule="cosine", warmup_fraction=0.2)
    model.compile(optimizer, loss=DPOLoss(penalties={"nll": 0.1}))

    model.taken, model.notes = [], []

    class Interrupt(keras.callbacks.Callback):
        def on_train_batch_end(self, batch, logs=None):
            if slow:
                time.sleep(0.3)
            if stop_after is not None and int(self.model.optimizer.iterations) == stop_after:
                raise KeyboardInterrupt

        def on_test_begin(self, logs=None):
            if int(self.model.optimizer.iterations) == stop_in_evaluation_after:
                raise KeyboardInterrupt

    folder = pathlib.Path(folder)
    train_preferences(
        model,
        tokenized,
        epochs=4,
        batch_size=4,
        batching="packed",
        held_out=tokenized.take(np.arange(4)),
        checkpoints=folder / "checkpoints",
        checkpoint_every=2,
        resume=resume,
        log=folder / "metrics.jsonl",
        callbacks=[callback or Interrupt()],
        progress=lambda report: model.taken.append(report["step"]),
        note=model.notes.append,
        **options,
    )
    return model


def records(folder, kind="step"):
    lines = (pathlib.Path(folder) / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line) for line in lines]
    return [r for r in parsed if ("epoch" in r) == (kind == "epoch")]


@pytest.fixture(scope="module")
def undisturbed(tokenized, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder, tokenized), folder


def assert_same_run(model, folder, undisturbed, resumed_after):
    """The end is the undisturbed run's, and no step up to `resumed_after` was taken again."""
    assert model.taken == list(range(resumed_after + 1, STEPS + 1))
    assert model.notes == [f"resumed after step {resumed_after} of {STEPS}."]
    expected, its_folder = undisturbed
    for one, other in zip(model.policy.weights, expected.policy.weights, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-6)
    ours, theirs = records(folder), records(its_folder)
    assert [r["step"] for r in ours] == [r["step"] for r in theirs] == list(range(1, STEPS + 1))
    np.testing.assert_allclose([r["loss"] for r in ours], [r["loss"] for r in theirs], atol=1e-6)


def assert_same_epochs(folder, undisturbed_folder):
    epochs = [records(place, "epoch") for place in (folder, undisturbed_folder)]
    assert [record["step"] for record in epochs[0]] == [3, 6, 9, 12]
    for ours, theirs in zip(*epochs, strict=True):
        assert ours["epoch"] == theirs["epoch"]
        assert ours["val_loss"] == pytest.approx(theirs["val_loss"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "interrupted",
    [{"stop_after": 5}, {"stop_in_evaluation_after": 6}],
    ids=["in the middle of an epoch", "in the evaluation at its end"],
)
def test_an_interrupted_run_goes_on_as_if_it_had_not_been(
    interrupted, tokenized, undisturbed, tmp_path
):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, tokenized, **interrupted)
    assert latest_checkpoint(tmp_path / "checkpoints")[0] == 4
    assert_same_run(run(tmp_path, tokenized, resume=True), tmp_path, undisturbed, 4)
    assert_same_epochs(tmp_path, undisturbed[1])


@pytest.mark.slow
@pytest.mark.parametrize("step", [7, 6], ids=["in an epoch", "in the evaluation at its end"])
def test_a_run_asked_to_stop_ends_its_step_saves_it_and_goes_on(
    step, tokenized, undisturbed, tmp_path
):
    stop = StopRequest()

    class Ask(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if int(self.model.optimizer.iterations) == step - 1 == 6:  # no checkpoint is due
                stop.request("SIGTERM")

        def on_test_begin(self, logs=None):
            if int(self.model.optimizer.iterations) == step:
                stop.request("SIGTERM")

    with pytest.raises(RunStopped, match=f"by SIGTERM after step {step}, which is saved"):
        run(tmp_path, tokenized, callback=Ask(), stop=stop)
    assert latest_checkpoint(tmp_path / "checkpoints")[0] == step
    assert_same_run(run(tmp_path, tokenized, resume=True), tmp_path, undisturbed, step)
    assert_same_epochs(tmp_path, undisturbed[1])


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_it(
    tokenized, undisturbed, tmp_path
):
    shutil.copytree(undisturbed[1], tmp_path, dirs_exist_ok=True)
    overwrite(tmp_path / "checkpoints" / "step-00000012")
    model = run(tmp_path, tokenized, resume=True)
    warning, resumed = model.notes
    assert "step-00000012 is damaged (the SHA-256 checksum" in warning
    assert "goes on from step-00000010" in warning
    model.notes = [resumed]
    assert_same_run(model, tmp_path, undisturbed, 10)
    assert latest_checkpoint(tmp_path / "checkpoints")[0] == 12, "written again, and whole"


@pytest.mark.slow
def test_a_moving_reference_is_where_it_was_after_an_interruption(tokenized, tmp_path):
    options = {"sync_reference": (3, 0.5)}
    whole = run(tmp_path / "whole", tokenized, **options)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", tokenized, stop_after=5, **options)
    resumed = run(tmp_path / "cut", tokenized, resume=True, **options)
    for one, other in zip(resumed.reference.copies, whole.reference.copies, strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-6)


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_it_had_not_been(tokenized, undisturbed, tmp_path):
    code = (
        "import sys; sys.path[:0] = sys.argv[2:]\n"
        "from tiny import Letters, pairs\n"
        "from dpo_keras.batching import tokenize_pairs\n"
        "from training.test_training_fit import run\n"
        "run(sys.argv[1], tokenize_pairs(pairs(11), Letters(), max_length=48), slow=True)\n"
    )
    tests = pathlib.Path(__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), str(tests), str(tests / "tiny_models")],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=dict(os.environ),
    )
    try:
        for _ in range(2400):
            log = tmp_path / "metrics.jsonl"
            if log.exists() and len(log.read_text().splitlines()) >= 6:
                break
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.05)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    killed_at = latest_checkpoint(tmp_path / "checkpoints")[0]
    assert 4 <= killed_at < STEPS
    assert_same_run(run(tmp_path, tokenized, resume=True), tmp_path, undisturbed, killed_at)


def test_a_finished_run_resumed_takes_no_step(tokenized, undisturbed):
    _, folder = undisturbed
    again = run(folder, tokenized, resume=True)
    assert again.taken == []
    assert_same_run(again, folder, undisturbed, STEPS)


def test_a_run_without_a_checkpoint_takes_every_step_and_says_nothing(undisturbed):
    model, _ = undisturbed
    assert model.taken == list(range(1, STEPS + 1)) and model.notes == []


def test_epochs_are_logged_with_validation(undisturbed):
    epochs = records(undisturbed[1], "epoch")
    assert [r["step"] for r in epochs] == [3, 6, 9, 12]
    assert all("val_reward_accuracy" in r and "tokens_per_second" in r for r in epochs)


def test_checkpoints_are_pruned_to_the_newest(undisturbed):
    found = sorted(path.name for path in (undisturbed[1] / "checkpoints").iterdir())
    assert found == ["step-00000010", "step-00000012"]


def test_a_new_run_does_not_write_over_another_ones_checkpoints(tokenized, undisturbed):
    with pytest.raises(InputError, match="holds those of another run"):
        run(undisturbed[1], tokenized)


def test_warm_up_teaches_the_chosen_responses(tokenized):
    model = SupervisedModel(gpt2(num_layers=1))
    model.compile(make_optimizer(30, learning_rate=1e-2))
    seen = []
    taken = warm_up(model, tokenized, epochs=10, batch_size=4, progress=seen.append)
    assert taken == 30
    assert seen[-1]["step"] == seen[-1]["steps"] == 30
    assert seen[-1]["loss"] < 0.7 * seen[0]["loss"]
    assert seen[-1]["pairs_per_second"] > 0


def test_supervised_loss_is_the_mean_over_chosen_tokens(tokenized):
    from dpo_keras.scoring import score_pairs

    policy = gpt2(num_layers=1)
    logps = score_pairs(policy, tokenized)[:, 0]
    model = SupervisedModel(policy, dropout=False)
    model.compile(keras.optimizers.SGD(0.0))
    seen = []
    warm_up(model, tokenized, batch_size=4, progress=seen.append)
    mean = -logps.sum() / tokenized.chosen.lengths.sum()
    np.testing.assert_allclose(seen[-1]["loss"], mean, rtol=1e-5)


def test_a_loss_that_is_no_number_stops_the_run_by_name(tokenized):
    model = DPOModel(gpt2(num_layers=1))
    model.compile(keras.optimizers.SGD(1e30))
    with pytest.raises(RuntimeError, match=r"(loss|grad_norm) is (nan|inf).* at step \d"):
        train_preferences(model, tokenized, batch_size=4)


@pytest.mark.slow
def test_samples_are_taken_before_and_during_training(tokenized, tmp_path):
    policy = gpt2(num_layers=1)
    model = DPOModel(policy)
    model.compile("adam")
    sampler = callbacks.SampleResponses(
        ["0aa", "1bb"], path=tmp_path / "samples.jsonl", preprocessor=Letters(), max_new_tokens=4
    )
    train_preferences(model, tokenized, batch_size=4, epochs=2, callbacks=[sampler])
    assert [s["epoch"] for s in sampler.samples] == [0, 0, 1, 1, 2, 2]
    lines = (tmp_path / "samples.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == sampler.samples


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("constant", [0.25, 1, 1, 1]), ("linear", [0.25, 1, 0.5, 0]), ("cosine", [0.25, 1, 0.5, 0])],
)
def test_learning_rates_rise_and_fall_as_named(schedule, expected):
    optimizer = make_optimizer(20, learning_rate=1.0, schedule=schedule, warmup_fraction=0.2)
    rates = []
    for step in (0, 4, 12, 20):
        optimizer.iterations.assign(step)
        rates.append(float(optimizer.learning_rate))
    np.testing.assert_allclose(rates, expected, atol=1e-6)
    config = keras.saving.serialize_keras_object(optimizer)
    again = keras.saving.deserialize_keras_object(config)
    again.iterations.assign(20)
    np.testing.assert_allclose(float(again.learning_rate), expected[-1], atol=1e-6)


def test_impossible_options_are_named(tokenized):
    with pytest.raises(InputError, match="schedule must be one of constant, linear, cosine"):
        make_optimizer(5, schedule="cosin")
    model = DPOModel(gpt2(num_layers=1))
    model.compile("adam", steps_per_execution=2)
    with pytest.raises(InputError, match="steps_per_execution"):
        train_preferences(model, tokenized, batch_size=4)


def test_more_groups_than_the_loss_knows_are_refused():
    records = [{**pair, "group": "abc"[n % 3]} for n, pair in enumerate(pairs(6))]
    model = DPOModel(gpt2(num_layers=1))
    model.compile("adam", loss=DPOLoss(group_robust={"groups": 2}))
    with pytest.raises(InputError, match=r"groups=2, and the pairs have 3 \(a, b, c\)"):
        train_preferences(model, tokenize_pairs(records, Letters(), max_length=48))


def test_tokenized_pairs_fixture_has_a_short_last_batch():
    assert len(tokenize_pairs(pairs(11), Letters(), max_length=48)) % 4
