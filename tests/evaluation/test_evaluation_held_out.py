"""One pass over held-out pairs: the numbers that `fit` and `evaluate` log, pair by pair."""

import gc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from tiny import Letters, gpt2

from dpo_keras.batching import preference_dataset, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.evaluation import evaluate_preferences, held_out
from dpo_keras.losses import DPOLoss
from dpo_keras.preferences import RankedResponses, Rankings
from dpo_keras.scoring import score_pairs
from dpo_keras.training import DPOModel, outputs_of

SIGMOID = DPOLoss(
    "sigmoid",
    beta=0.5,
    label_smoothing=0.1,
    penalties={"insufficient_confidence": 0.3, "nll": 0.2},
)


@pytest.fixture(scope="module")
def measured(moved, tokenized):
    moved.compile(loss=SIGMOID)
    return evaluate_preferences(moved, tokenized, batch_size=5, batching="buckets")


def same_as_evaluate(model, tokenized, found):
    dataset = preference_dataset(tokenized, batch_size=4, shuffle=False)
    expected = model.evaluate(dataset, return_dict=True, verbose=0)
    assert set(expected) <= set(found.metrics)
    for key, value in expected.items():
        assert found.metrics[key] == pytest.approx(float(value), rel=1e-5, abs=1e-6), key


def test_figures_equal_those_of_model_evaluate(moved, tokenized, measured):
    moved.compile(loss=SIGMOID)
    same_as_evaluate(moved, tokenized, measured)
    assert {"penalty/nll", "penalty/insufficient_confidence", "kl"} <= set(measured.metrics)


def test_figures_without_a_reference_equal_those_of_model_evaluate(moved, tokenized):
    moved.compile(loss=DPOLoss("simpo", beta=2.0))
    found = evaluate_preferences(moved, tokenized, batch_size=12)
    same_as_evaluate(moved, tokenized, found)
    assert found.metrics["kl"] is None
    assert "chosen_reference_logps" not in found.pairs


def test_figures_of_a_loss_over_whole_batches_equal_those_of_model_evaluate(moved, tokenized):
    moved.compile(loss=DPOLoss("aot"))
    same_as_evaluate(moved, tokenized, evaluate_preferences(moved, tokenized, batch_size=4))


def test_packed_rows_give_every_pair_the_same_figures(moved, tokenized, measured):
    moved.compile(loss=SIGMOID)
    packed = evaluate_preferences(moved, tokenized, batch_size=5, batching="packed")
    assert packed.pairs.keys() == measured.pairs.keys()
    for name, column in measured.pairs.items():
        np.testing.assert_allclose(packed.pairs[name], column, rtol=1e-4, atol=1e-5, err_msg=name)
    assert packed.entropy == pytest.approx(measured.entropy, rel=1e-5)


def test_prompts_of_equal_tokens_after_truncation_are_counted_by_their_text():
    prompts = ["one and the same end", "another and the same end", "one and the same end"]
    records = [
        {"prompt": p, "chosen": "cc", "rejected": n} for p, n in zip(prompts, "xyz", strict=True)
    ]
    tokens = tokenize_pairs(records, Letters(), max_length=8)
    assert len({tuple(ids) for ids in tokens.prompt.tolist()}) == 1
    assert held_out._known_columns(tokens)["prompt"].tolist() == [0, 1, 0]
    # Tokens that were not made of pairs have no text.
    assert held_out._known_columns(replace(tokens, prompt_hash=None))["prompt"].tolist() == [0] * 3


def test_rows_are_in_the_order_of_the_pairs_whatever_the_batches(moved, tokenized, measured):
    logps = score_pairs(moved.policy, tokenized)
    columns = measured.pairs
    np.testing.assert_allclose(columns["chosen_logps"], logps[:, 0], rtol=1e-5)
    np.testing.assert_allclose(columns["rejected_logps"], logps[:, 1], rtol=1e-5)
    np.testing.assert_array_equal(columns["chosen_tokens"], tokenized.chosen.lengths)
    np.testing.assert_array_equal(columns["preference"], tokenized.preference)
    # The implicit reward is beta times the log-ratio.
    ratio = columns["chosen_logps"] - columns["chosen_reference_logps"]
    np.testing.assert_allclose(columns["chosen_reward"], 0.5 * ratio, rtol=1e-5)
    # Pairs 0 and 11 are on one prompt.
    assert columns["prompt"].tolist() == [*range(11), 0]
    assert list(measured.groups) == ["even", "odd"]
    assert measured.fingerprint == tokenized.fingerprint


def test_all_batches_of_all_lengths_take_one_trace(moved, tokenized, monkeypatch):
    moved.compile(loss=DPOLoss("sigmoid"))
    traces, done = [], []
    monkeypatch.setattr(
        held_out, "outputs_of", lambda *given: traces.append(1) or outputs_of(*given)
    )
    evaluate_preferences(
        moved, tokenized, batch_size=2, batching="buckets", on_batch=lambda *at: done.append(at)
    )
    assert len(traces) == 1
    assert done == [(n, 12) for n in (2, 4, 6, 8, 10, 12)]


def test_a_policy_at_its_reference_is_undecided_and_evaluation_leaves_it_so(tokenized):
    model = DPOModel(gpt2(num_layers=1))
    model.compile(loss=DPOLoss("sigmoid", beta=0.1))
    before = [np.array(v) for v in model.variables]
    found = evaluate_preferences(model, tokenized)
    assert found.metrics["loss"] == pytest.approx(np.log(2), abs=1e-6)
    assert found.metrics["reward_accuracy"] == 0.5
    assert found.metrics["kl"] == 0.0
    assert np.abs(found.reward_margin).max() == 0.0
    assert found.calibration.confidence.value == 0.5
    for old, new in zip(before, model.variables, strict=True):
        np.testing.assert_array_equal(old, new)


def test_scores_that_are_no_probabilities_are_said_to_be_none(moved, tokenized):
    moved.compile(loss=DPOLoss(["ipo", "sft"]))
    note = evaluate_preferences(moved, tokenized.take([0, 1])).note
    assert note.startswith("The loss ipo, sft states no probabilities")


def test_cached_reference_without_log_probs_is_an_error_and_with_them_the_same(
    moved, tokenized, measured
):
    cached = DPOModel(moved.policy, reference="cached")
    cached.compile(loss=SIGMOID)
    with pytest.raises(InputError, match="reference='cached' needs batches"):
        evaluate_preferences(cached, tokenized)
    columns = [measured.pairs[f"{name}_reference_logps"] for name in ("chosen", "rejected")]
    found = evaluate_preferences(cached, tokenized.with_reference(np.stack(columns, axis=1)))
    assert found.metrics == pytest.approx(measured.metrics, rel=1e-5, abs=1e-6)


def test_wrong_arguments_are_reported_together(tokenized):
    model = DPOModel(gpt2(num_layers=1))
    with pytest.raises(InputError) as caught:
        evaluate_preferences(model, tokenized.take([]), batch_size=0)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "model",
        "tokenized",
        "batch_size",
    ]


def test_rankings_are_measured_as_pairs_only(moved):
    """`model.evaluate` counts all ordered pairs of a ranking; rows here are of one pair each."""
    ranked = Rankings([RankedResponses("ab", ("b", "c", "d"), (1, 2, 3))])
    moved.compile(loss="plackett_luce")
    with pytest.raises(InputError, match=r"must be pairs.*as_pairs"):
        evaluate_preferences(moved, tokenize_pairs(ranked, Letters()))
    found = evaluate_preferences(moved, tokenize_pairs(ranked.as_pairs(), Letters()))
    assert len(found.pairs["preference"]) == 3
    moved.compile(loss=SIGMOID)


def test_measurements_before_and_after_a_training_share_a_trace(tokenized, monkeypatch):
    model = DPOModel(gpt2())
    model.compile("adam", loss=DPOLoss("sigmoid"))
    traces, measure = [], held_out._measure
    monkeypatch.setattr(held_out, "_measure", lambda *given: traces.append(1) or measure(*given))
    before = evaluate_preferences(model, tokenized, batch_size=4)
    model.fit(preference_dataset(tokenized, batch_size=4), verbose=0)
    after = evaluate_preferences(model, tokenized, batch_size=4)
    assert len(traces) == 1
    assert after.metrics["reward_margin"] > before.metrics["reward_margin"] == 0
    same_as_evaluate(model, tokenized, after)
    model.compile("adam", loss=DPOLoss("ipo"))  # another loss is another function
    same_as_evaluate(model, tokenized, evaluate_preferences(model, tokenized, batch_size=4))
    assert len(traces) == 2


def test_a_measured_model_is_not_kept_alive(tokenized):
    model = DPOModel(gpt2())
    model.compile("adam", loss=DPOLoss("sigmoid"))
    evaluate_preferences(model, tokenized, batch_size=4)
    policy = weakref.ref(model.policy)
    assert model in held_out._functions
    del model
    gc.collect()
    assert policy() is None
