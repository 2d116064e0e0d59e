"""Figures of held-out pairs, from columns that can be counted by hand."""

import json
import math

import numpy as np
import pytest
from evaluation_columns import columns, held_out

from dpo_keras.errors import InputError
from dpo_keras.evaluation import HeldOut


def test_accuracy_counts_score_ties_half_and_leaves_out_what_people_tied_on():
    found = held_out([2.0, -1.0, 0.0, 3.0], preference=[1.0, 1.0, 1.0, 0.5])
    accuracy = found.figures["reward_accuracy"]
    assert (accuracy.value, accuracy.count) == (0.5, 3)
    # The mean margin is over all four.
    assert found.metrics["reward_margin"] == 1.0


def test_accuracy_follows_soft_preferences_to_either_side():
    found = held_out([2.0, 2.0, -2.0], preference=[0.7, 0.3, 0.3])
    assert found.metrics["reward_accuracy"] == pytest.approx(2 / 3)


def test_weights_count_in_every_figure():
    found = held_out([1.0, -1.0, 5.0], weight=[3.0, 1.0, 0.0])
    assert found.metrics["reward_accuracy"] == 0.75
    assert found.metrics["reward_margin"] == 0.5
    assert found.figures["loss"].count == 2
    assert found.percentiles["reward_margin"]["99"] == 1.0


def test_every_further_column_is_averaged():
    found = held_out([0.0, 0.0], **{"penalty/nll": [1.0, 3.0], "kl": [0.25, 0.75]})
    assert found.metrics["penalty/nll"] == 2.0
    assert found.metrics["kl"] == 0.5
    assert "source" not in found.metrics


def test_kl_without_a_reference_is_explained():
    assert held_out([1.0]).figures["kl"].reason == "the loss has no reference"


def test_all_pairs_tied_on_or_without_weight_are_explained():
    tied = held_out([1.0, 2.0], preference=[0.5, 0.5])
    assert tied.figures["reward_accuracy"].reason == "no pair has a preference other than 0.5"
    assert tied.metrics["reward_margin"] == 1.5
    nothing = held_out([1.0], weight=[0.0])
    assert nothing.figures["reward_margin"].reason == "every pair has weight 0"
    assert nothing.percentiles == {}
    for found in (tied, nothing):
        json.dumps(found.as_dict(), allow_nan=False)


def test_a_diverged_policy_is_explained_and_never_nan():
    found = held_out([1.0, float("nan")], entropy=float("nan"))
    assert found.figures["reward_margin"].reason == "of 1 of 2 pairs the value is not finite"
    assert found.figures["reward_accuracy"].value is None
    assert found.figures["entropy"].reason == "it is not finite"
    json.dumps(found.as_dict(), allow_nan=False)


def test_going_by_length_alone_gives_a_length_controlled_accuracy_of_one_half():
    # Longer is better in four of five pairs, and the policy goes by length.
    chosen, rejected = [9, 9, 9, 9, 3], [3, 3, 3, 3, 9]
    margin = np.sign(np.subtract(chosen, rejected))
    found = held_out(margin, chosen_tokens=chosen, rejected_tokens=rejected)
    assert found.metrics["reward_accuracy"] == 0.8
    values = {name: figure.value for name, figure in found.by_length.items()}
    assert values == {
        "chosen_longer": 1.0,
        "chosen_shorter": 0.0,
        "equal": None,
        "length_controlled": 0.5,
    }
    assert found.by_length["equal"].reason == (
        "in no pair is the preferred response as long as the other"
    )
    controlled = found.by_length["length_controlled"]
    assert 0 <= controlled.low < 0.5 < controlled.high <= 1


def test_which_response_is_longer_is_told_from_the_preferred_one():
    # People prefer the second response here, and it is the longer one.
    found = held_out([-1.0], preference=[0.0], chosen_tokens=[3], rejected_tokens=[9])
    assert found.by_length["chosen_longer"].value == 1.0


def test_groups_add_up_to_the_whole():
    found = held_out(
        [1.0, -1.0, 1.0, 1.0, 1.0],
        group=[0, 0, 1, 1, -1],
        group_names=("colour", "price"),
    )
    accuracy = {name: figures["reward_accuracy"] for name, figures in found.groups.items()}
    assert {name: figure.value for name, figure in accuracy.items()} == {
        "colour": 0.5,
        "price": 1.0,
        "(no group)": 1.0,
    }
    assert sum(figure.count for figure in accuracy.values()) == 5
    assert held_out([1.0]).groups == {}


def test_pairs_of_one_prompt_widen_the_interval():
    margin = [1.0, -1.0] * 10
    apart = held_out(np.repeat(margin, 3))
    together = held_out(np.repeat(margin, 3), prompt=np.repeat(np.arange(20), 3))
    assert together.metrics == apart.metrics
    one, other = (found.figures["reward_accuracy"] for found in (apart, together))
    assert other.high - other.low > one.high - one.low


def test_calibration_is_that_of_the_margins():
    found = held_out([math.log(3)] * 4)
    assert found.calibration.confidence.value == pytest.approx(0.75)
    assert found.calibration.agreement.value == 1.0


def test_saving_and_loading_gives_the_same_figures(tmp_path):
    given = held_out(
        [0.5, -0.25, 3.0],
        group=[0, -1, 1],
        group_names=("größe", "prix"),
        note="mind this",
        fingerprint="abc",
        entropy=1.25,
    )
    given.save(tmp_path / "pairs.npz")
    loaded = HeldOut.load(tmp_path / "pairs.npz")
    assert loaded.as_dict() == given.as_dict()
    assert loaded.note == "mind this"
    for name, column in given.pairs.items():
        np.testing.assert_array_equal(loaded.pairs[name], column)
        assert loaded.pairs[name].dtype == column.dtype


def test_what_is_no_measurement_is_refused(tmp_path):
    with pytest.raises(InputError, match="There is no file"):
        HeldOut.load(tmp_path / "nothing.npz")
    (tmp_path / "text.npz").write_text("not a zip")
    np.savez(tmp_path / "other.npz", loss=np.ones(2))
    for name in ("text.npz", "other.npz"):
        with pytest.raises(InputError, match="does not hold measured pairs"):
            HeldOut.load(tmp_path / name)
    with pytest.raises(InputError, match="missing: loss, "):
        HeldOut({name: v for name, v in columns([1.0]).items() if name != "loss"})
    with pytest.raises(InputError, match="'weight': 2"):
        HeldOut({**columns([1.0]), "weight": np.ones(2)})


def test_summary_names_what_matters():
    text = held_out([1.0, 2.0]).summary()
    assert text.startswith("2 pairs on 2 prompts\nreward accuracy")
    assert "expected calibration error" in text
