"""What a model runs of `preference_dataset` as users write it, without `batching`."""

import keras
import numpy as np
import pytest
from tiny import Letters, gpt2, pairs, plain_model

import dpo_keras
from dpo_keras.batching import preference_dataset
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.batch_layout import laid_out
from dpo_keras.training import DPOModel, SupervisedModel, strategy, supervised_dataset
from dpo_keras.training import policy_trainer as trainer


class Seen(DPOModel):
    """Keep what each step got."""

    def train_step(self, batch):
        self.trained.append({name: np.array(value) for name, value in batch.items()})
        return super().train_step(batch)

    def test_step(self, batch):
        self.measured.append(set(batch))
        return super().test_step(batch)


def watched(policy=None, **options):
    model = Seen(policy or gpt2(num_layers=1), **options)
    model.trained, model.measured = [], []
    model.compile(keras.optimizers.SGD(0.1), run_eagerly=True)
    return model


def same(found, expected):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.keys() == other.keys()
        for name, value in other.items():
            np.testing.assert_array_equal(one[name], np.array(value), err_msg=name)


def test_fit_and_evaluate_pack_where_the_policy_can_and_epochs_go_on(tokenized):
    model = watched()
    data = preference_dataset(tokenized, batch_size=4)
    held_out = preference_dataset(tokenized, batch_size=4)
    model.fit(data, validation_data=held_out, epochs=2, verbose=0)  # without a warning
    model.fit(data, verbose=0)
    same(
        model.trained,
        list(preference_dataset(tokenized, batch_size=4, batching="packed", epochs=3)),
    )
    assert model.measured and all("reach" in names for names in model.measured)
    again = watched()
    again.fit(preference_dataset(tokenized, batch_size=4, start_step=2, epochs=None),
              steps_per_epoch=2, verbose=0)  # fmt: skip
    same(again.trained, model.trained[2:4])


def test_default_and_buckets_give_the_same_figures(tokenized):
    model = watched()
    for variable in model.policy.trainable_variables:
        variable.assign(variable * 1.2)
    found, expected = (
        model.evaluate(
            preference_dataset(tokenized, batch_size=4, shuffle=False, **options),
            return_dict=True, verbose=0,
        )
        for options in ({}, {"batching": "buckets"})
    )  # fmt: skip
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("own", ["policy", "reference"])
def test_a_model_that_cannot_run_packed_rows_gets_buckets_and_the_reason(own, tokenized):
    policy, reference = gpt2(num_layers=1), "frozen_copy"
    if own == "policy":
        policy = plain_model()
    else:
        reference = plain_model()
    model = watched(policy, reference=reference)
    model.reference.starts_as_policy = False
    data = preference_dataset(tokenized, batch_size=4, shuffle=False)
    with pytest.warns(UserWarning, match="buckets instead of packed rows, because Functional"):
        model.fit(data, verbose=0)
    same(model.trained, list(data))
    assert "reach" not in model.trained[0]


def test_a_policy_that_scores_packed_rows_otherwise_gets_buckets(tokenized, monkeypatch):
    def refuse(scorer):
        raise InputError(InputProblem("batching", "must be 'buckets' for this policy"))

    monkeypatch.setattr(trainer, "check_packing", refuse)
    model = watched()
    with pytest.warns(UserWarning, match="batching must be 'buckets' for this policy"):
        model.fit(preference_dataset(tokenized, batch_size=11), verbose=0)
    assert "reach" not in model.trained[0]
    with pytest.raises(InputError, match="batching must be 'buckets'"):
        model.fit(preference_dataset(tokenized, batch_size=11, batching="packed"), verbose=0)


def test_options_of_one_layout_are_heeded_or_named(tokenized):
    model = watched()
    model.fit(preference_dataset(tokenized, batch_size=11, row_length=128), verbose=0)
    assert model.trained[0]["token_ids"].shape[-1] == 128
    data = preference_dataset(tokenized, batch_size=11, buckets=1, drop_remainder=True)
    with pytest.warns(UserWarning) as heard:
        model.fit(data, verbose=0)
    said = sorted(str(w.message) for w in heard if "no effect" in str(w.message))
    for name, line in zip(("buckets", "drop_remainder"), said, strict=True):
        assert line.startswith(f"{name} has no effect with batching='packed'")


def test_what_is_iterated_predicted_or_changed_by_tf_data_is_in_buckets(tokenized):
    model = watched()
    data = preference_dataset(tokenized, batch_size=4, shuffle=False)
    slots = sum(batch["weight"].shape[0] for batch in data)
    assert len(model.predict(data, verbose=0)["llr"]) == slots
    model.fit(data.take(2), verbose=0)
    same(model.trained, list(data.take(2)))
    assert "reach" not in model.trained[0]


def test_replicas_of_the_strategy_share_the_rows(tokenized):
    policies = [gpt2(num_layers=1)]
    in_sync = strategy("mirrored").num_replicas_in_sync
    for given, replicas in ((1, 2), (3, 6)):
        data = preference_dataset(tokenized, batch_size=11, replicas=given)
        found, again = (laid_out(data, policies, in_sync, list) for _ in range(2))
        assert found.element_spec["token_ids"].shape[0] % replicas == 0
        options = {"batching": "packed", "replicas": replicas}
        same(list(found), list(preference_dataset(tokenized, batch_size=11, **options)))
        assert again is found  # its epochs go on


def test_a_supervised_model_packs_the_chosen_responses_alone(tokenized):
    losses = []
    for options in ({}, {"batching": "buckets"}):
        model = SupervisedModel(gpt2(num_layers=1), dropout=False)
        model.compile("sgd", run_eagerly=True)
        data = supervised_dataset(preference_dataset(tokenized, batch_size=11, **options))
        losses.append(model.evaluate(data, verbose=0)[0])
        tokens = model.counts()["tokens"]
        assert tokens == (tokenized.prompt.lengths + tokenized.chosen.lengths).sum()
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_raw_pairs_are_tokenized_once_for_both_layouts(monkeypatch):
    calls = []
    original = dpo_keras.batching.dataset.tokenize_pairs

    def counted(*args, **options):
        calls.append(args)
        return original(*args, **options)

    monkeypatch.setattr(dpo_keras.batching.dataset, "tokenize_pairs", counted)
    watched().fit(preference_dataset(pairs(4), Letters(), batch_size=4), verbose=0)
    assert len(calls) == 1
