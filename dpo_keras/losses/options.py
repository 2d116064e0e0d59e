"""What `DPOLoss` takes: the tables of objectives and options, and the check of its arguments.

A new objective is a class (`objectives.py`, `other_objectives.py`) and a line in `OBJECTIVES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from dpo_keras.errors import InputProblem
from dpo_keras.losses import objectives, other_objectives, unpaired_objectives
from dpo_keras.losses.objectives import Objective
from dpo_keras.losses.penalties import PENALTIES
from dpo_keras.losses.scores import DIVERGENCES
from dpo_keras.utils.text import did_you_mean

OBJECTIVES: dict[str, type[Objective]] = {
    "sigmoid": objectives.Sigmoid,
    "hinge": objectives.Hinge,
    "ipo": objectives.IPO,
    "exo_pair": objectives.EXO,
    "nca_pair": other_objectives.NCA,
    "robust": objectives.Robust,
    "bco_pair": other_objectives.BCO,
    "sppo_hard": other_objectives.SPPO,
    "aot": other_objectives.AOT,
    "aot_unpaired": other_objectives.AOTUnpaired,
    "apo_zero": other_objectives.APOZero,
    "apo_down": other_objectives.APODown,
    "discopop": objectives.DiscoPOP,
    "sigmoid_norm": objectives.SigmoidNorm,
    "simpo": other_objectives.SimPO,
    "cpo": other_objectives.CPO,
    "slic": other_objectives.SLiC,
    "orpo": other_objectives.ORPO,
    "alphapo": other_objectives.AlphaPO,
    "sft": other_objectives.SFT,
    "reward": other_objectives.Reward,
    "plackett_luce": other_objectives.PlackettLuce,
    "kto": unpaired_objectives.KTO,
}
"""Objectives by the name that `DPOLoss` takes."""

# What papers and other libraries call an objective: its name here, and the option that makes it.
PAPER_NAMES: dict[str, tuple[str, str]] = {
    **dict.fromkeys(("dpo", "logistic", "bradleyterry"), ("sigmoid", "")),
    **dict.fromkeys(("cdpo", "conservativedpo"), ("sigmoid", "label_smoothing")),
    **dict.fromkeys(("rdpo", "robustdpo"), ("robust", "")),
    **dict.fromkeys(("dpop", "dpopositive", "smaug"), ("sigmoid", "dpo_positive")),
    **dict.fromkeys(("odpo", "dpowithoffset"), ("sigmoid", "margin")),
    **dict.fromkeys(("grdpo", "groupdpo"), ("sigmoid", "group_robust")),
    "fdpo": ("sigmoid", "divergence"),
    "lddpo": ("sigmoid", "ld_alpha"),
    "wpo": ("sigmoid", "wpo"),
    "rpo": ("sigmoid", "the penalty nll"),
    "lndpo": ("sigmoid_norm", ""),
    "rso": ("hinge", ""),
    "slichf": ("slic", ""),
    "exo": ("exo_pair", "label_smoothing"),
    "nca": ("nca_pair", ""),
    "bco": ("bco_pair", ""),
    "sppo": ("sppo_hard", ""),
    "apo": ("apo_zero", ""),
    **dict.fromkeys(("pldpo", "pl", "listwise"), ("plackett_luce", "")),
}
# Outputs of the scorer that an option reads.
READ_BY_OPTION: dict[str, frozenset[str]] = {
    "ld_alpha": frozenset({"policy_shared", "reference_shared"}),
    "wpo": frozenset({"wpo_log_weight"}),
    "margin": frozenset({"margin"}),
    "group_robust": frozenset({"group"}),
}


def available() -> dict[str, str]:
    """List the names that `DPOLoss(loss_type=…)` takes, each with one line on what it does.

    Example:
        >>> list(available())[:3]
        ['sigmoid', 'hinge', 'ipo']
    """
    return {name: objective.summary() for name, objective in OBJECTIVES.items()}


@dataclass(frozen=True)
class Option:
    """One option: what it does, and the rule that its value must keep, in words and as a test."""

    summary: str
    rule: str
    holds: Callable[[object], bool]
    only_with: tuple[str, object] | None = None
    """Another option and the value of it without which this one has no effect."""


def is_number(value: object, holds: Callable[[float], bool] = lambda number: True) -> bool:
    """Tell whether a value is a finite number that keeps a rule (booleans are not numbers)."""
    if isinstance(value, bool) or not isinstance(value, int | float | np.number):
        return False
    try:
        return math.isfinite(value) and holds(float(value))
    except OverflowError:  # a whole number of 400 digits
        return False


def _flag(summary: str) -> Option:
    return Option(summary, "true or false", lambda value: isinstance(value, bool))


def _number(
    summary: str,
    rule: str = "",
    holds: Callable[[float], bool] = lambda number: True,
    only_with: tuple[str, object] | None = None,
) -> Option:
    return Option(summary, f"a number {rule}".strip(), lambda v: is_number(v, holds), only_with)


def _is_group_robust(value: object) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= {"groups", "eta"}
        and isinstance(value.get("groups"), int)
        and is_number(value["groups"], lambda groups: 2 <= groups < 2**31)
        and is_number(value.get("eta", 0.01), lambda eta: eta > 0)
    )


OPTIONS: dict[str, Option] = {
    "length_normalize": _flag(
        "ipo: average the log-ratio over the response's tokens (the paper's sum with False)."
    ),
    "gamma": _number("Target margin γ that the LLR must exceed.", ">= 0", lambda v: v >= 0),
    "discopop_tau": _number("Temperature τ of DiscoPOP's gate.", "in (0, 1]", lambda v: 0 < v <= 1),
    "cpo_alpha": _number("Weight α of CPO's negative log-likelihood.", ">= 0", lambda v: v >= 0),
    "alphapo_alpha": _number("Shape α of AlphaPO's reward (0 is SimPO)."),
    "divergence": Option(
        "The f-divergence that ties the policy to the reference.",
        "one of " + ", ".join(DIVERGENCES),
        lambda value: value in DIVERGENCES,
    ),
    "divergence_alpha": _number(
        "α of the α-divergence: 0 forward KL, 1 reverse KL.", only_with=("divergence", "alpha")
    ),
    "ld_alpha": _number(
        "LD-DPO: how much the tokens beyond the shorter response's length count.",
        "in [0, 1]",
        lambda v: 0 <= v <= 1,
    ),
    "margin": _flag("Take each pair's own margin m (column `margin`) off its LLR."),
    "dpo_positive": _number(
        "DPO-positive: λ; take βλ·max(0, -c), what the chosen response lost, off the LLR.",
        ">= 0",
        lambda v: v >= 0,
    ),
    "wpo": _flag("WPO: weight pairs by how likely the policy is to write them."),
    "wpo_max_weight": _number(
        "Upper bound of a pair's WPO weight (TRL bounds it by 1).",
        "> 0",
        lambda v: v > 0,
        ("wpo", True),
    ),
    "shift_momentum": _number(
        "Momentum of the running mean of the rewards, BCO's δ (without it δ = 0).",
        "in [0, 1)",
        lambda v: 0 <= v < 1,
    ),
    "desirable_weight": _number("kto: λ_D, how much a thumb up counts.", ">= 0", lambda v: v >= 0),
    "undesirable_weight": _number("kto: λ_U, the same of a down.", ">= 0", lambda v: v >= 0),
    "group_robust": Option(
        "Weight groups of pairs (column `group`) toward the worst one.",
        "a mapping {groups: whole number >= 2, eta: step size > 0}",
        _is_group_robust,
    ),
}


def users_of(option: str) -> list[str]:
    """Return the names of the objectives that an option acts on."""
    return [name for name, objective in OBJECTIVES.items() if option in objective.option_names()]


def takers_of(penalty: str) -> list[str]:
    """Return the names of the objectives beside which a penalty has a meaning."""
    if PENALTIES[penalty].about_probabilities:
        return [name for name, objective in OBJECTIVES.items() if objective.probabilistic]
    return [name for name, objective in OBJECTIVES.items() if objective.of_policies]


def outputs_read(
    objectives: Iterable[type[Objective] | Objective],
    penalties: Iterable[object] = (),
    options: Mapping[str, object] | None = None,
) -> frozenset[str]:
    """Return the names of the scorer's outputs that objectives with their options read."""
    names = {name for objective in objectives for name in objective.reads}
    for penalty in penalties:
        own = getattr(penalty, "needs", ())
        names |= PENALTIES[penalty].reads if isinstance(penalty, str) else set(own)
    for option, value in (options or {}).items():
        if value is not None and value is not False:  # 0.0 is a value of ld_alpha
            names |= READ_BY_OPTION.get(option, frozenset())
    return frozenset(names)


def check_arguments(
    loss_type: str | Sequence[object],
    beta: object,
    label_smoothing: object,
    penalties: Sequence[tuple[object, object]],
    loss_weights: object,
    reduction: object,
    options: dict[str, object],
) -> list[InputProblem]:
    """Find every problem of `DPOLoss`'s arguments."""
    loss_types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
    known = [name for name in loss_types if isinstance(name, str) and name in OBJECTIVES]
    problems = _loss_type_problems(loss_types, known)
    if not is_number(beta, lambda number: number > 0):
        problems.append(InputProblem("beta", "must be a number > 0", beta))
    return [
        *problems,
        *_label_smoothing_problems(known, label_smoothing),
        *_option_problems(known, options),
        *_penalty_problems(known, penalties),
        *_loss_weight_problems(loss_type, loss_weights),
        *_reduction_problems(reduction),
    ]


def _loss_type_problems(loss_types: Sequence[object], known: list[str]) -> list[InputProblem]:
    if not loss_types:
        rule = "must name at least one objective, got an empty list"
        return [InputProblem("loss_type", rule)]
    if len({OBJECTIVES[name].unpaired for name in known}) > 1:
        rule = "mixes objectives on pairs with objectives on rated responses"
        return [InputProblem("loss_type", rule, loss_types)]
    names = f"must be one of {', '.join(OBJECTIVES)}"
    if "reward" in loss_types and len(loss_types) > 1:
        rule = "must hold 'reward' alone, which speaks of rewards and not of log-probs"
        return [InputProblem("loss_type", rule, list(loss_types))]
    return [
        InputProblem("loss_type", names, name, _objective_meant(name))
        for name in loss_types
        if not (isinstance(name, str) and name in OBJECTIVES)
    ]


def _objective_meant(name: object) -> str:
    paper = "".join(character for character in str(name).lower() if character.isalnum())
    if paper in PAPER_NAMES:
        objective, option = PAPER_NAMES[paper]
        return f"Did you mean {objective!r}{f' with {option}' if option else ''}?"
    return _suggestion(name, OBJECTIVES)


def _label_smoothing_problems(known: Sequence[str], value: object) -> list[InputProblem]:
    if not is_number(value, lambda rate: 0 <= rate < 0.5):
        return [InputProblem("label_smoothing", "must be a number in [0, 0.5)", value)]
    if value and known and not set(known) & set(users_of("label_smoothing")):
        return [_no_effect("label_smoothing", value, known)]
    # exo_pair's target would be 0 and its logarithm infinite.
    if value == 0 and "exo_pair" in known:
        rule = "must be > 0 for exo_pair"
        return [InputProblem("label_smoothing", rule, value, "0.001 is a usual value.")]
    return []


def _option_problems(known: Sequence[str], options: dict[str, object]) -> list[InputProblem]:
    problems = []
    used = {option for name in known for option in OBJECTIVES[name].option_names()}
    for name, value in options.items():
        if name not in OPTIONS:
            choice = ", ".join(option for option in OPTIONS if option in used) or "none"
            listed = f"Options of {' + '.join(known) or 'this objective'}: {choice}."
            hint = f"{_suggestion(name, OPTIONS)} {listed}".strip()
            problems.append(InputProblem(name, "is not an option", hint=hint))
            continue
        option = OPTIONS[name]
        if not option.holds(value):
            problems.append(InputProblem(name, f"must be {option.rule}", value))
        if known and name not in used:
            problems.append(_no_effect(name, value, known))
        elif option.only_with and options.get(option.only_with[0]) != option.only_with[1]:
            other, needed = option.only_with
            problems.append(InputProblem(name, f"has no effect without {other}={needed!r}", value))
    return problems


def _no_effect(option: str, value: object, loss_types: Sequence[str]) -> InputProblem:
    rule = f"has no effect with {' + '.join(loss_types)}"
    return InputProblem(option, rule, value, f"It acts with: {', '.join(users_of(option))}.")


def _penalty_problems(
    known: Sequence[str], penalties: Sequence[tuple[object, object]]
) -> list[InputProblem]:
    given = [penalty for penalty, _ in penalties]
    problems = []
    for position, (penalty, weight) in enumerate(penalties):
        argument = f"penalties.{penalty_name(penalty)}"
        if given.index(penalty) < position:
            problems.append(InputProblem(argument, "is given twice", hint="Add up its weights."))
        if penalty == "dpo_positive":
            rule = "is a margin inside the loss and no longer a penalty"
            hint = f"Give the option dpo_positive={weight!r} instead."
            problems.append(InputProblem(argument, rule, hint=hint))
            continue
        if isinstance(penalty, str) and penalty in PENALTIES:
            takers = takers_of(penalty)
            if known and not set(known) & set(takers):
                rule = f"does not apply to {' + '.join(known)}"
                hint = f"It applies to: {', '.join(takers)}."
                problems.append(InputProblem(argument, rule, hint=hint))
        elif not callable(penalty):
            listed = f"Available: {', '.join(PENALTIES)}, or a function."
            hint = f"{_suggestion(penalty, PENALTIES)} {listed}".strip()
            problems.append(InputProblem(argument, "is not a penalty", hint=hint))
        if not is_number(weight, lambda number: number >= 0):
            problems.append(InputProblem(argument, "must have a weight >= 0", weight))
    return problems


def penalty_name(penalty: object) -> str:
    """Return the name of a penalty that is given by name or as a function."""
    return penalty if isinstance(penalty, str) else getattr(penalty, "__name__", str(penalty))


def _loss_weight_problems(
    loss_type: str | Sequence[object], loss_weights: object
) -> list[InputProblem]:
    if loss_weights is None:
        return []
    if isinstance(loss_type, str):
        return [InputProblem("loss_weights", "goes with a list of objectives", loss_weights)]
    if not isinstance(loss_weights, Sequence) or len(loss_weights) != len(loss_type):
        rule = f"must have one weight for each of the {len(loss_type)} objectives"
        return [InputProblem("loss_weights", rule, loss_weights)]
    if not all(is_number(weight, lambda number: number >= 0) for weight in loss_weights):
        return [InputProblem("loss_weights", "must all be >= 0", loss_weights)]
    return []


def _reduction_problems(reduction: object) -> list[InputProblem]:
    names = ("sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none")
    if reduction is None or reduction in names:
        return []
    rule = f"must be one of {', '.join(names)}, None"
    return [InputProblem("reduction", rule, reduction, _suggestion(reduction, names))]


def _suggestion(name: object, known: Iterable[str]) -> str:
    near = did_you_mean(name, known, cutoff=0.5)
    return near[:1].upper() + near[1:]
