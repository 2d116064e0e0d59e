"""Packed rows or buckets: who decides, and that the training is the same."""

import keras
import numpy as np
import pytest
from tiny import gpt2, plain_model

from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.training import (
    DPOModel,
    Layout,
    SupervisedModel,
    callbacks,
    choose_layout,
    make_optimizer,
    strategy,
    supervised_dataset,
    train_preferences,
    warm_up,
)
from dpo_keras.training.fit import RunOptions
from dpo_keras.training.supervised_model import chosen_alone


def test_auto_packs_where_every_model_can_and_says_once_why_not():
    policy, heard = gpt2(num_layers=1), []
    layout = choose_layout([policy], row_length=64, replicas=2, note=heard.append)
    assert layout == Layout("packed", 4, 64, 2) and not heard
    for models in ([plain_model()], [policy, plain_model()]):
        fallen = choose_layout(models, buckets=3, row_length=64, note=heard.append)
        assert fallen == Layout("buckets", 3)
    assert len(heard) == 4
    assert heard[0].startswith("batching: buckets instead of packed rows, because Functional is no")
    assert heard[1].startswith("warning: row_length has no effect with batching='buckets', got 64")


def test_packed_is_refused_by_name_where_it_cannot_be():
    with pytest.raises(InputError, match="batching cannot be 'packed': Functional is no KerasHub"):
        choose_layout([plain_model()], "packed")
    with pytest.raises(InputError, match="row_length has no effect with batching='buckets'"):
        choose_layout([plain_model()], "buckets", row_length=64)
    with pytest.raises(InputError, match="buckets has no effect with batching='packed', got 2"):
        choose_layout([gpt2(num_layers=1)], "packed", buckets=2)
    with pytest.raises(InputError, match="batching must be one of 'auto', 'packed', 'buckets'"):
        choose_layout([plain_model()], "pack")


@pytest.mark.parametrize(
    ("argument", "make"),
    [
        ("batching", lambda: choose_layout([plain_model()], "packed")),
        ("batching", lambda: choose_layout([plain_model()], "pack")),
        ("row_length", lambda: choose_layout([plain_model()], "buckets", row_length=64)),
        ("every", lambda: callbacks.SyncReference(every=0)),
        ("max_steps", lambda: RunOptions(max_steps=0)),
        ("log_every", lambda: RunOptions(log_every=0)),
        ("keep", lambda: callbacks.RunCheckpoint("checkpoints", keep=0)),
        ("schedule", lambda: make_optimizer(5, schedule="cosin")),
        ("strategy", lambda: strategy("miror")),
        ("remat", lambda: DPOModel(gpt2(num_layers=1), dropout=True, remat=True)),
        ("loss", lambda: DPOModel(gpt2(num_layers=1)).compile("sgd", loss=3)),
    ],
)
def test_a_wrong_argument_is_data_that_a_configuration_can_rename(argument, make):
    with pytest.raises(InputError) as caught:
        make()
    assert [problem.argument for problem in caught.value.problems] == [argument]
    assert str(caught.value.problems[0].renamed("some.key")).startswith("some.key ")


def test_supervised_packing_holds_the_chosen_responses_alone(tokenized):
    layout = Layout("packed")
    alone = chosen_alone(tokenized)
    (batch,) = layout.dataset(alone, 64, shuffle=False)
    owners = batch["owner"].numpy()
    assert (owners[owners >= 0] % 2 == 0).all()
    assert int((owners >= 0).sum()) == tokenized.chosen.lengths.sum()
    assert int(batch["padding_mask"].numpy().sum()) == alone.tree_tokens.sum()
    assert layout.steps(alone, 64) == 1
    # Whole trees can be narrowed too, as bucketed batches can.
    (whole,) = supervised_dataset(layout.dataset(tokenized, 64, shuffle=False))
    kept = whole["owner"].numpy() >= 0
    assert sorted(whole["target"].numpy()[kept]) == sorted(tokenized.chosen.flat_values)


def preference_model():
    model = DPOModel(gpt2(num_layers=1))
    model.compile(keras.optimizers.SGD(0.1), loss=DPOLoss("sigmoid"))
    return model


def supervised_model():
    # Dropout is drawn by place, so that only without it the two are the same.
    model = SupervisedModel(gpt2(num_layers=1), dropout=False)
    model.compile(keras.optimizers.SGD(0.1))
    return model


@pytest.mark.parametrize(
    ("make", "recipe"), [(preference_model, train_preferences), (supervised_model, warm_up)]
)
def test_packed_and_bucketed_training_take_the_same_steps(make, recipe, tokenized):
    """Two steps, each over all pairs."""
    policies, losses = [], []
    for batching in ("packed", "buckets"):
        model, logs = make(), []
        options = {} if recipe is warm_up else {"held_out": tokenized.take(np.arange(5))}
        steps = recipe(
            model,
            tokenized,
            epochs=2,
            batch_size=len(tokenized),
            batching=batching,
            progress=lambda report, logs=logs: logs.append(report["loss"]),
            **options,
        )
        assert steps == 2
        policies.append(model.policy)
        losses.append(logs)
    np.testing.assert_allclose(*losses, rtol=1e-5)
    for one, other in zip(*(policy.weights for policy in policies), strict=True):
        np.testing.assert_allclose(one.numpy(), other.numpy(), atol=1e-5)
