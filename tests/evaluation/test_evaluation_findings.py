"""Each warning speaks where the data bear it out, and is silent where they do not."""

import numpy as np
import pytest
from evaluation_columns import held_out, samples

from dpo_keras.evaluation.findings import CHECKS, Measured, findings
from dpo_keras.training.callbacks import TrainingLog

random = np.random.default_rng(0)
GOOD = random.normal(1.5, 1.0, 200)
NOISE = random.normal(0.0, 1.0, 200)


def codes(after, **parts):
    return [finding.code for finding in findings(Measured(after, **parts))]


def steps(count, **series):
    names = list(series)
    rows = zip(*(series[name] for name in names), strict=True)
    return [{"step": i + 1, **dict(zip(names, r, strict=True))} for i, r in enumerate(rows)]


def test_a_training_that_went_well_has_no_warnings():
    before, after = held_out(0 * GOOD, chosen_logps=NOISE - 20), held_out(GOOD)
    after.pairs["chosen_logps"] = NOISE - 19
    found = findings(
        Measured(after, before, samples([0, 1] * 30), samples([1] * 60), TrainingLog())
    )
    assert [finding for finding in found if finding.severity == "warning"] == []


def test_prompts_that_were_trained_on_are_counted():
    (found,) = (f for f in findings(Measured(held_out(GOOD), trained_on=3)) if f.severity != "note")
    assert found.code == "prompts_trained_on" and found.severity == "warning"
    assert found.text.startswith("The policy was trained on the prompts of 3 of these 200 pairs.")
    assert "prompts_trained_on" not in codes(held_out(GOOD))


def fallen(**others):
    before = held_out(0 * GOOD, chosen_logps=NOISE - 20)
    return before, held_out(GOOD, chosen_logps=NOISE - 25, **others)


def test_falling_chosen_log_probs_are_told_with_their_remedies():
    before, after = fallen()
    (found,) = (f for f in findings(Measured(after, before)) if f.code == "chosen_logps_fell")
    assert found.severity == "warning"
    assert "less likely than before the training, by 5.000 nats" in found.text
    assert "`nll`" in found.text and "`dpo_positive`" in found.text and "trl#800" in found.text


def test_a_remedy_that_is_there_is_to_be_raised():
    before, after = fallen(**{"penalty/nll": np.ones(200)})
    (found,) = (f for f in findings(Measured(after, before)) if f.code == "chosen_logps_fell")
    assert "raise the weight of the penalty nll, or give the loss the option" in found.text
    assert "add the penalty" not in found.text


def test_dpo_positive_is_recommended_as_an_option_and_never_as_a_penalty():
    before, after = fallen()
    (found,) = (f for f in findings(Measured(after, before)) if f.code == "chosen_logps_fell")
    assert "add the penalty `nll` (arXiv 2404.19733)" in found.text
    assert "the option `dpo_positive` (arXiv 2402.13228)" in found.text


def test_the_fall_is_seen_against_the_reference_too():
    columns = {"chosen_logps": NOISE - 25, "chosen_reference_logps": NOISE - 20}
    assert "chosen_logps_fell" in codes(held_out(GOOD, **columns))
    assert "chosen_logps_fell" not in codes(held_out(-GOOD, **columns))
    columns["chosen_reference_logps"] = NOISE - 26
    assert "chosen_logps_fell" not in codes(held_out(GOOD, **columns))


def test_the_fall_is_seen_in_the_log_where_nothing_else_is_known():
    time = np.linspace(0, 1, 100)
    noise = random.normal(0, 0.1, 100)
    falls = TrainingLog(steps(100, chosen_logps=-5 * time + noise, reward_margin=time + noise))
    rises = TrainingLog(steps(100, chosen_logps=5 * time + noise, reward_margin=time + noise))
    assert "chosen_logps_fell" in codes(held_out(GOOD), log=falls)
    assert "chosen_logps_fell" not in codes(held_out(GOOD), log=rises)


def test_accuracy_that_guessing_reaches():
    assert "accuracy_at_chance" in codes(held_out([1.0, -1.0] * 50))
    assert "accuracy_at_chance" in codes(held_out([1.0, 1.0]))
    assert "accuracy_at_chance" not in codes(held_out(GOOD))


def test_accuracy_that_fell():
    assert "accuracy_fell" in codes(held_out(GOOD - 1.5), before=held_out(GOOD))
    assert "accuracy_fell" not in codes(held_out(GOOD), before=held_out(GOOD))


def test_a_broken_training_is_named_at_its_first_broken_step():
    log = TrainingLog(steps(3, loss=[0.7, float("nan"), float("nan")]))
    (found,) = (f for f in findings(Measured(held_out(GOOD), log=log)) if "broke" in f.code)
    assert "at step 2" in found.text
    (found,) = findings(Measured(held_out([1.0, float("nan")])))
    assert "The policy is broken: of 1 of 2 pairs" in found.text


def test_overfitting_is_a_held_out_loss_that_came_back_up():
    def log(*losses):
        rows = [{"epoch": i, "step": 10 * i, "val_loss": v} for i, v in enumerate(losses, 1)]
        return TrainingLog([], rows)

    assert "overfitting" in codes(held_out(GOOD), log=log(0.6, 0.4, 0.5))
    assert "overfitting" not in codes(held_out(GOOD), log=log(0.6, 0.5, 0.4))
    assert "overfitting" not in codes(held_out(GOOD), log=log(0.6, 0.5, 0.505))
    assert "overfitting" not in codes(held_out(GOOD), log=log(0.5))


def test_leaning_on_length():
    chosen, rejected = [9, 3] * 50, [3, 9] * 50
    by_length = held_out([2.0, -2.0] * 50, chosen_tokens=chosen, rejected_tokens=rejected)
    (found,) = (f for f in findings(Measured(by_length)) if f.code == "length_bias")
    assert "leans towards longer responses" in found.text
    fair = held_out(GOOD, chosen_tokens=chosen * 2, rejected_tokens=rejected * 2)
    assert "length_bias" not in codes(fair)


def test_groups_that_lag_are_named():
    group = np.arange(200) % 2
    lagging = held_out(np.where(group, 1.0, -1.0), group=group, group_names=("price", "colour"))
    (found,) = (f for f in findings(Measured(lagging)) if f.code == "weak_groups")
    assert "price 0.000" in found.text and "colour" not in found.text


def test_confidence_that_people_do_not_bear_out():
    label = (random.random(200) < 0.7).astype(float)
    assert "overconfident" in codes(held_out(np.full(200, 4.0), preference=label))
    assert "underconfident" in codes(held_out(np.full(200, 0.1)))
    assert "underconfident" not in codes(held_out(np.full(200, 0.1), note="no probabilities"))


def test_what_the_policy_writes_is_watched():
    after = held_out(GOOD)

    def of(before, now):
        return codes(after, samples_before=before, samples_after=now)

    assert "preferred_fell" in of(samples([1] * 60), samples([1, 0] * 30))
    assert "preferred_fell" not in of(samples([1, 0] * 30), samples([1] * 60))
    tokens = random.integers(4, 8, 60)
    assert "responses_grew" in of(
        samples([1] * 60, tokens=tokens), samples([1] * 60, tokens=2 * tokens)
    )
    assert "responses_grew" not in of(
        samples([1] * 60, tokens=tokens), samples([1] * 60, tokens=tokens)
    )
    assert "responses_collapsed" in of(samples([1] * 60), samples([1] * 60, responses=["x"] * 60))
    assert "responses_collapsed" not in of(samples([1] * 60), samples([1] * 60))
    assert "responses_cut" in of(None, samples([1] * 60, ended=[0] * 60))
    assert "responses_cut" not in of(None, samples([1] * 60, ended=[1] * 59 + [0]))


def test_warnings_come_before_notes():
    found = findings(
        Measured(held_out(np.full(200, 0.1)), log=TrainingLog(steps(1, loss=[np.inf])))
    )
    assert [finding.severity for finding in found] == ["warning", "note"]


@pytest.mark.parametrize("name", CHECKS)
def test_checks_are_silent_where_nothing_was_measured(name):
    _, check = CHECKS[name]
    if name != "accuracy_at_chance":
        assert check(Measured(held_out([1.0]))) is None
