"""What `DPOLoss` refuses, and what its messages say."""

import math

import numpy as np
import pytest

from dpo_keras.errors import InputError
from dpo_keras.losses import OBJECTIVES, DPOLoss, available
from dpo_keras.losses.options import OPTIONS

VALUES = {
    "length_normalize": False,
    "gamma": 1.0,
    "desirable_weight": 2.0,
    "undesirable_weight": 2.0,
    "discopop_tau": 0.5,
    "cpo_alpha": 0.5,
    "alphapo_alpha": 0.5,
    "divergence": "js",
    "divergence_alpha": 0.2,
    "ld_alpha": 0.5,
    "margin": True,
    "dpo_positive": 0.7,
    "wpo": True,
    "wpo_max_weight": 1.0,
    "shift_momentum": 0.9,
    "group_robust": {"groups": 3},
}
TOGETHER = {"divergence_alpha": {"divergence": "alpha"}, "wpo_max_weight": {"wpo": True}}


def problems(*args, **kwargs):
    with pytest.raises(InputError) as caught:
        DPOLoss(*args, **kwargs)
    return caught.value.problems


def make(name, **options):
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    return DPOLoss(name, **{**smoothing, **options}, reduction=None)


def test_every_option_is_tried_here():
    assert VALUES.keys() == OPTIONS.keys()


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_option_is_taken_by_the_objectives_that_use_it_and_refused_by_all_others(name, option):
    options = {option: VALUES[option], **TOGETHER.get(option, {})}
    if option in OBJECTIVES[name].option_names():
        assert make(name, **options).options[option] == VALUES[option]
        return
    smoothing = {"label_smoothing": 0.1} if name == "exo_pair" else {}
    found = [p for p in problems(name, **smoothing, **options) if p.argument == option]
    assert len(found) == 1
    assert f"has no effect with {name}, got " in found[0]
    users = found[0].split("It acts with: ")[1].rstrip(".").split(", ")
    assert users == [n for n in OBJECTIVES if option in OBJECTIVES[n].option_names()]


CHANGES_NOTHING_ALONE = {"group_robust", "shift_momentum"}


@pytest.mark.parametrize("option", sorted(OPTIONS.keys() - CHANGES_NOTHING_ALONE))
@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_option_that_is_taken_changes_the_loss(name, option):
    if option not in OBJECTIVES[name].option_names():
        return
    outputs = {
        "policy": np.array([[-9.0, -8.0], [-7.0, -9.5]]),
        "reference": np.array([[-10.0, -7.0], [-8.0, -8.0]]),
        "lengths": np.array([[4.0, 3.0], [5.0, 2.0]]),
        "policy_shared": np.array([[-5.0, -8.0], [-3.0, -9.5]]),
        "reference_shared": np.array([[-6.5, -7.0], [-3.5, -8.0]]),
        "margin": np.array([0.3, 0.1]),
        "wpo_log_weight": np.array([[0.5, 0.2], [0.6, 0.1]]),
    }
    options = {option: VALUES[option], **TOGETHER.get(option, {})}
    without = {key: value for key, value in options.items() if key != option}
    labels = np.array([1.0, 0.8])
    with_it = np.asarray(make(name, beta=0.8, **options)(labels, outputs))
    assert not np.allclose(with_it, np.asarray(make(name, beta=0.8, **without)(labels, outputs)))


@pytest.mark.parametrize("name", OBJECTIVES)
def test_label_smoothing_is_taken_where_it_acts_and_refused_elsewhere(name):
    if "label_smoothing" in OBJECTIVES[name].option_names():
        DPOLoss(name, label_smoothing=0.1)
    else:
        (found,) = problems(name, label_smoothing=0.1)
        assert found.startswith(f"label_smoothing has no effect with {name}, got 0.1.")
        assert "sigmoid" in found and "robust" in found


@pytest.mark.parametrize("value", [-0.1, 0.5, 1.0, math.nan, "0.1", True])
def test_label_smoothing_is_at_least_zero_and_less_than_half(value):
    assert problems("sigmoid", label_smoothing=value) == [
        f"label_smoothing must be a number in [0, 0.5), got {value!r}."
    ]


def test_exo_needs_label_smoothing():
    assert problems("exo_pair") == [
        "label_smoothing must be > 0 for exo_pair, got 0.0. 0.001 is a usual value."
    ]


@pytest.mark.parametrize("beta", [0, -1.0, math.inf, math.nan, None, "0.1", True])
def test_beta_is_a_number_above_zero(beta):
    assert problems("sigmoid", beta=beta) == [f"beta must be a number > 0, got {beta!r}."]


def test_unknown_names_come_with_the_nearest_right_one():
    (name,) = problems("sigmiod")
    assert name.startswith("loss_type must be one of ")
    assert name.endswith("got 'sigmiod'. Did you mean 'sigmoid'?")
    assert "Did you mean 'gamma'?" in problems("simpo", gama=1.0)[0]
    (penalty,) = problems("sigmoid", penalties={"overconfident": 0.1})
    assert "Did you mean 'overconfidence'?" in penalty
    assert "Did you mean 'sum_over_batch_size'?" in problems(reduction="sum_over_batch")[0]


def test_an_unknown_name_that_is_near_nothing_lists_what_there_is():
    (found,) = problems("xyzzy")
    assert all(name in found for name in available())


@pytest.mark.parametrize("penalty", ["insufficient_confidence", "overconfidence"])
def test_ipo_with_a_penalty_that_does_not_apply_names_the_losses_that_take_it(penalty):
    (found,) = problems("ipo", penalties={penalty: 0.1})
    assert found.startswith(f"penalties.{penalty} does not apply to ipo.")
    assert "sigmoid" in found


@pytest.mark.parametrize("weight", [-1.0, math.nan, math.inf, "1", None])
def test_weights_of_penalties_are_finite_and_not_negative(weight):
    (found,) = problems("sigmoid", penalties={"nll": weight})
    assert found == f"penalties.nll must have a weight >= 0, got {weight!r}."


def test_a_penalty_given_twice_is_named():
    (found,) = problems("sigmoid", penalties=[("nll", 0.1), ("nll", 0.2)])
    assert found == "penalties.nll is given twice. Add up its weights."


@pytest.mark.parametrize(
    ("option", "value", "loss_type"),
    [
        ("gamma", -1.0, "simpo"),
        ("discopop_tau", 0.0, "discopop"),
        ("discopop_tau", 1.5, "discopop"),
        ("ld_alpha", 1.1, "sigmoid"),
        ("divergence", "kl", "sigmoid"),
        ("margin", 1, "sigmoid"),
        ("shift_momentum", 1.0, "bco_pair"),
        ("wpo", "yes", "sigmoid"),
        ("group_robust", {"groups": 1}, "sigmoid"),
        ("group_robust", {"groups": 2, "eta": 0}, "sigmoid"),
        ("group_robust", {"groups": 2, "step": 1}, "sigmoid"),
        ("length_normalize", None, "ipo"),
    ],
)
def test_values_out_of_range_are_named_with_their_rule(option, value, loss_type):
    (found,) = problems(loss_type, **{option: value})
    assert found == f"{option} must be {OPTIONS[option].rule}, got {value!r}."


def test_options_that_hang_on_another_need_it():
    assert problems("sigmoid", divergence_alpha=0.5) == [
        "divergence_alpha has no effect without divergence='alpha', got 0.5."
    ]
    assert problems("sigmoid", wpo_max_weight=1.0) == [
        "wpo_max_weight has no effect without wpo=True, got 1.0."
    ]


def test_weights_of_a_list_fit_it():
    assert problems(["sigmoid", "sft"], loss_weights=[1.0]) == [
        "loss_weights must have one weight for each of the 2 objectives, got [1.0]."
    ]
    assert problems("sigmoid", loss_weights=[1.0])[0].startswith("loss_weights goes with a list")
    assert "must all be >= 0, got [1, -1]" in problems(["sigmoid", "sft"], loss_weights=[1, -1])[0]
    assert problems([]) == ["loss_type must name at least one objective, got an empty list."]


def test_dpo_positive_as_a_penalty_names_its_new_place():
    assert problems("sigmoid", penalties={"dpo_positive": 5.0}) == [
        "penalties.dpo_positive is a margin inside the loss and no longer a penalty. "
        "Give the option dpo_positive=5.0 instead."
    ]


def test_every_problem_carries_the_name_of_its_argument():
    found = problems(
        ["sigmiod"],
        beta=0,
        label_smoothing=1,
        penalties={"nll": -1, "nl": 1},
        loss_weights=[1, 2],
        reduction="avg",
        gama=1,
        margin="yes",
    )
    assert [problem.argument for problem in found] == [
        "loss_type",
        "beta",
        "label_smoothing",
        "gama",
        "margin",
        "penalties.nll",
        "penalties.nl",
        "loss_weights",
        "reduction",
    ]
    assert found[1].renamed("loss.beta") == "loss.beta must be a number > 0, got 0."


def test_an_option_of_any_objective_of_a_list_is_taken():
    loss = DPOLoss(["sigmoid", "simpo"], gamma=1.0, label_smoothing=0.1)
    assert loss.options == {"gamma": 1.0}
    assert "has no effect with sigmoid + hinge" in problems(["sigmoid", "hinge"], gamma=1.0)[0]


def test_all_faults_are_told_together():
    found = problems(
        "ipo", beta=-1, label_smoothing=0.1, penalties={"overconfidence": 1, "nl": 1}, gamma=1, x=1
    )
    assert len(found) == 6


def test_a_missing_output_is_named_with_the_way_to_get_it():
    loss = DPOLoss("ipo", margin=True)
    with pytest.raises(InputError) as caught:
        loss([1.0], {"policy": np.zeros((1, 2)), "reference": None})
    assert [problem.split(";")[0] for problem in caught.value.problems] == [
        "outputs['lengths'] is missing",
        "outputs['margin'] is missing",
        "outputs['reference'] is missing",
    ]
    assert "`margin` column" in str(caught.value)


def test_wrong_shapes_are_named():
    loss = DPOLoss("slic")
    with pytest.raises(InputError, match=r"must have the shape \[N, 2\].*got \(1, 3\)"):
        loss([1.0], {"policy": np.zeros((1, 3))})
    with pytest.raises(InputError, match="one label for each of the 1 pairs, got 2"):
        loss([1.0, 1.0], {"policy": np.zeros((1, 2))})
    with pytest.raises(InputError, match="outputs must be a mapping"):
        loss([1.0], np.zeros((1, 2)))


REFERENCE_FREE = {"simpo", "cpo", "slic", "orpo", "alphapo", "sft", "reward"}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_reference_is_asked_for_exactly_where_it_is_read(name):
    assert make(name).needs_reference == (name not in REFERENCE_FREE)


def test_needs_name_every_output_that_an_option_reads():
    assert DPOLoss("sigmoid").needs == {"policy", "reference"}
    assert DPOLoss("sigmoid", penalties={"nll": 1.0}).needs == {"policy", "reference", "lengths"}
    assert DPOLoss("simpo").needs == {"policy", "lengths"}
    assert DPOLoss("simpo", penalties={"kl_to_reference": 1.0}).needs_reference
    assert DPOLoss("sigmoid", ld_alpha=0.5).needs >= {"policy_shared", "reference_shared"}
    assert "wpo_log_weight" in DPOLoss("simpo", wpo=True).needs
    assert "wpo_log_weight" not in DPOLoss("simpo", wpo=False).needs
    assert "margin" in DPOLoss("hinge", margin=True).needs
    assert "group" in DPOLoss("hinge", group_robust={"groups": 2}).needs
    assert DPOLoss(["simpo", "sigmoid"]).needs_reference


@pytest.mark.parametrize("name", OBJECTIVES)
def test_what_is_needed_is_enough(name):
    given = {
        "policy": np.array([[-3.0, -4.0]]),
        "reference": np.array([[-3.5, -4.0]]),
        "lengths": np.array([[2, 3]]),
    }
    loss = make(name)
    outputs = {key: given[key] for key in loss.needs}
    assert np.isfinite(np.asarray(loss([1.0], outputs))).all()
    for key in loss.needs:
        with pytest.raises(InputError, match=key):
            loss([1.0], {k: v for k, v in outputs.items() if k != key})
