"""Changes, item by item."""

import numpy as np
import pytest
from evaluation_columns import held_out, samples

from dpo_keras.errors import InputError
from dpo_keras.evaluation import change


def test_a_constant_change_is_certain_however_much_pairs_differ():
    random = np.random.default_rng(0)
    margin = random.normal(0, 10, 50)
    found = change(held_out(margin), held_out(margin + 0.25), "reward_margin")
    assert found.value == pytest.approx(0.25)
    assert found.high - found.low < 1e-9


def test_change_of_accuracy_is_the_difference_and_narrower_where_outcomes_agree():
    before = held_out([1, 1, 1, -1, -1, -1, -1, -1] * 5)
    same_side = held_out([1, 1, 1, 1, 1, -1, -1, -1] * 5)
    other_side = held_out([-1, -1, -1, 1, 1, 1, 1, 1] * 5)
    found = change(before, same_side, "reward_accuracy")
    assert found.value == pytest.approx(0.25)
    apart = change(before, other_side, "reward_accuracy")
    assert apart.value == pytest.approx(0.25)
    assert found.high - found.low < apart.high - apart.low


def test_change_needs_the_same_pairs():
    reason = "before and after are of different pairs"
    before = held_out([1.0, 1.0])
    assert change(before, held_out([1.0]), "loss").reason == reason
    assert change(before, held_out([1.0, 1.0], fingerprint="x"), "loss").reason == reason
    assert change(before, held_out([1.0, 1.0], preference=[1.0, 0.5]), "loss").reason == reason


def test_change_of_what_is_not_per_pair_has_no_interval():
    found = change(held_out([1.0], entropy=2.0), held_out([1.0], entropy=1.5), "entropy")
    assert (found.value, found.low) == (-0.5, None)
    found = change(held_out([1.0]), held_out([1.0], entropy=1.5), "entropy")
    assert found.reason == "it was not measured before"


def test_change_of_samples_is_paired_by_prompt():
    before, after = samples([0] * 20), samples([1] * 15 + [0] * 5, tokens=[7] * 20)
    found = change(before, after, "preferred")
    assert found.value == 0.75
    assert 0.45 < found.low < found.value < found.high < 0.95
    assert change(before, after, "tokens").value == 2.0
    other = samples([1] * 20, prompts=["x"] * 20)
    assert change(before, other, "preferred").reason == (
        "before and after answer different prompts"
    )
    assert change(before, after, "distinct_responses").value == 0.0


def test_unlike_things_and_unknown_names_are_refused():
    with pytest.raises(InputError, match="both be HeldOut or both be Samples"):
        change(samples([1]), held_out([1.0]), "loss")
    with pytest.raises(InputError, match="name must be one of loss, .*; got 'lost'"):
        change(held_out([1.0]), held_out([1.0]), "lost")
