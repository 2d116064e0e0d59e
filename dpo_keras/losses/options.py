"""Options of the objectives: what each may be, and the check of a whole set at once.

Example:
    >>> check_arguments(["hinge"], 0.1, 0.1, [], {"gamma": 0.5, "lenght_normalize": True})
    ['label_smoothing=0.1 has no effect with loss_type hinge. It acts with: sigmoid, exo_pair, ...',
     'gamma=0.5 has no effect with loss_type hinge. It acts with: simpo, alphapo.',
     "Unknown option 'lenght_normalize'; did you mean 'length_normalize'? ..."]
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from dpo_keras.losses.divergences import DIVERGENCES
from dpo_keras.losses.objectives import OBJECTIVES
from dpo_keras.losses.penalties import PENALTIES


def is_number(value: Any) -> bool:
    """Tell whether a value is a finite number (booleans are not)."""
    return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(float(value))


def _is_group_robust(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= {"groups", "eta"}
        and isinstance(value.get("groups"), int)
        and not isinstance(value["groups"], bool)
        and value["groups"] >= 2
        and is_number(value.get("eta", 0.01))
        and value.get("eta", 0.01) > 0
    )


@dataclass(frozen=True)
class Option:
    """One option: the rule that its value must keep, in words and as a test.

    Attributes:
        summary: what it does.
        rule: what its value must be, for messages.
        holds: the rule as a function.
        only_with: another option and the value of it without which this one has no effect.
    """

    summary: str
    rule: str
    holds: Callable[[Any], bool]
    only_with: tuple[str, Any] | None = None


OPTIONS: dict[str, Option] = {
    "length_normalize": Option(
        "ipo: average the log-ratio over the response's tokens (the paper's sum with False).",
        "true or false",
        lambda v: isinstance(v, bool),
    ),
    "gamma": Option(
        "Target margin γ that the LLR must exceed.",
        "a number >= 0",
        lambda v: is_number(v) and v >= 0,
    ),
    "discopop_tau": Option(
        "Temperature τ of DiscoPOP's gate.",
        "a number in (0, 1]",
        lambda v: is_number(v) and 0 < v <= 1,
    ),
    "cpo_alpha": Option(
        "Weight α of CPO's negative log-likelihood.",
        "a number >= 0",
        lambda v: is_number(v) and v >= 0,
    ),
    "alphapo_alpha": Option("Shape α of AlphaPO's reward (0 is SimPO).", "a number", is_number),
    "divergence": Option(
        "The f-divergence that ties the policy to the reference.",
        "one of " + ", ".join(DIVERGENCES),
        lambda v: isinstance(v, str) and v in DIVERGENCES,
    ),
    "divergence_alpha": Option(
        "α of the α-divergence: 0 forward KL, 1 reverse KL.",
        "a number",
        is_number,
        ("divergence", "alpha"),
    ),
    "ld_alpha": Option(
        "LD-DPO: how much the tokens beyond the shorter response's length count.",
        "a number in [0, 1]",
        lambda v: is_number(v) and 0 <= v <= 1,
    ),
    "margin": Option(
        "Take each pair's own margin m (column `margin`) off its LLR.",
        "true or false",
        lambda v: isinstance(v, bool),
    ),
    "wpo": Option(
        "WPO: weight pairs by how likely the policy is to write them.",
        "true or false",
        lambda v: isinstance(v, bool),
    ),
    "wpo_max_weight": Option(
        "Upper bound of a pair's WPO weight (TRL bounds it by 1).",
        "a number > 0",
        lambda v: is_number(v) and v > 0,
        ("wpo", True),
    ),
    "shift_momentum": Option(
        "Momentum of the running mean of the rewards, BCO's δ (without it δ = 0).",
        "a number in [0, 1)",
        lambda v: is_number(v) and 0 <= v < 1,
    ),
    "group_robust": Option(
        "Weight groups of pairs (column `group`) toward the worst one.",
        "a mapping {groups: whole number >= 2, eta: step size > 0}",
        _is_group_robust,
    ),
}


def nearest(name: Any, names: Iterable[str]) -> str:
    """Say which known name comes nearest, as a half-sentence (empty if none is near).

    Example:
        >>> nearest("sigmiod", ["sigmoid", "hinge"])
        "; did you mean 'sigmoid'?"
        >>> nearest("xyz", ["sigmoid"])
        '.'
    """
    close = difflib.get_close_matches(str(name), list(names), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else "."


def users_of(option: str) -> str:
    """Name the objectives that an option acts on.

    Example:
        >>> users_of("gamma")
        'simpo, alphapo'
    """
    return ", ".join(name for name, objective in OBJECTIVES.items() if option in objective.options)


def _check_loss_types(loss_types: Sequence[Any]) -> list[str]:
    if not loss_types:
        return ["loss_type must name at least one objective, got an empty list."]
    return [
        f"Unknown loss_type {name!r}{nearest(name, OBJECTIVES)} Available: {', '.join(OBJECTIVES)}."
        for name in loss_types
        if not (isinstance(name, str) and name in OBJECTIVES)
    ]


def _check_label_smoothing(known: Sequence[str], value: Any) -> list[str]:
    if not is_number(value) or not 0 <= value < 0.5:
        return [f"label_smoothing must be a number in [0, 0.5), got {value!r}."]
    users = [name for name in known if "label_smoothing" in OBJECTIVES[name].options]
    if value and known and not users:
        return [_no_effect("label_smoothing", value, known)]
    # exo_pair's target would be 0 and its logarithm infinite.
    if value == 0 and "exo_pair" in known:
        return ["exo_pair needs label_smoothing > 0, got 0; 0.001 is a usual value."]
    return []


def _no_effect(option: str, value: Any, loss_types: Sequence[str]) -> str:
    return (
        f"{option}={value!r} has no effect with loss_type {' + '.join(loss_types)}. "
        f"It acts with: {users_of(option)}."
    )


def _check_options(known: Sequence[str], options: dict[str, Any]) -> list[str]:
    problems = []
    used = {option for name in known for option in OBJECTIVES[name].options}
    for name, value in options.items():
        if name not in OPTIONS:
            choice = ", ".join(option for option in OPTIONS if option in used) or "none"
            problems.append(
                f"Unknown option {name!r}{nearest(name, OPTIONS)} "
                f"Options of {' + '.join(known) or 'this loss_type'}: {choice}."
            )
            continue
        option = OPTIONS[name]
        if not option.holds(value):
            problems.append(f"{name} must be {option.rule}, got {value!r}.")
        if known and name not in used:
            problems.append(_no_effect(name, value, known))
        elif option.only_with and options.get(option.only_with[0]) != option.only_with[1]:
            other, needed = option.only_with
            problems.append(f"{name}={value!r} has no effect without {other}={needed!r}.")
    return problems


def _check_penalties(known: Sequence[str], penalties: Sequence[tuple[Any, Any]]) -> list[str]:
    given = [penalty for penalty, _ in penalties]
    problems = [
        f"Penalty {penalty!r} is given {given.count(penalty)} times; add up its weights."
        for position, penalty in enumerate(given)
        if given.index(penalty) == position and given.count(penalty) > 1
    ]
    for penalty, weight in penalties:
        if not callable(penalty) and not (isinstance(penalty, str) and penalty in PENALTIES):
            problems.append(
                f"Unknown penalty {penalty!r}{nearest(penalty, PENALTIES)} "
                f"Available: {', '.join(PENALTIES)}, or a function."
            )
        elif isinstance(penalty, str) and known:
            takers = [name for name in OBJECTIVES if OBJECTIVES[name].takes_penalty(penalty)]
            if not set(known) & set(takers):
                problems.append(
                    f"Penalty {penalty!r} does not apply to loss_type {' + '.join(known)}. "
                    f"It applies to: {', '.join(takers)}."
                )
        if not is_number(weight) or weight < 0:
            problems.append(f"The weight of penalty {penalty!r} must be >= 0, got {weight!r}.")
    return problems


def check_arguments(
    loss_types: Sequence[Any],
    beta: Any,
    label_smoothing: Any,
    penalties: Sequence[tuple[Any, Any]],
    options: dict[str, Any],
) -> list[str]:
    """Find every fault of `DPOLoss`'s arguments.

    Args:
        loss_types: names of objectives.
        beta: must be a number > 0.
        label_smoothing: must be a number in [0, 0.5); for `exo_pair` not 0.
        penalties: pairs of a name or function, and a weight.
        options: the other options, by name.

    Returns:
        One sentence for each fault; empty if there is none.

    Example:
        >>> check_arguments(["sigmoid"], -1.0, 0.0, [("nll", 0.1)], {})
        ['beta must be a number > 0, got -1.0.']
    """
    problems = _check_loss_types(loss_types)
    known = [name for name in loss_types if isinstance(name, str) and name in OBJECTIVES]
    if not is_number(beta) or beta <= 0:
        problems.append(f"beta must be a number > 0, got {beta!r}.")
    return [
        *problems,
        *_check_label_smoothing(known, label_smoothing),
        *_check_options(known, options),
        *_check_penalties(known, penalties),
    ]


def check_loss_weights(loss_type: Any, loss_weights: Any) -> list[str]:
    """Find every fault of `loss_weights`.

    Example:
        >>> check_loss_weights(["sigmoid", "sft"], [1.0])
        ['loss_weights must have one weight for each of the 2 loss_type names, got 1.']
    """
    if loss_weights is None:
        return []
    if isinstance(loss_type, str):
        return [f"loss_weights goes with a list of loss_type; got the single name {loss_type!r}."]
    problems = []
    if len(loss_weights) != len(loss_type):
        problems.append(
            f"loss_weights must have one weight for each of the {len(loss_type)} loss_type names, "
            f"got {len(loss_weights)}."
        )
    problems += [
        f"Every weight in loss_weights must be >= 0, got {weight!r}."
        for weight in loss_weights
        if not is_number(weight) or weight < 0
    ]
    return problems


def check_reduction(reduction: Any) -> list[str]:
    """Find the fault of a name that Keras does not reduce by.

    Example:
        >>> check_reduction("avg")
        ["Unknown reduction 'avg'. Available: sum_over_batch_size, sum, mean, ..., None."]
    """
    names = ("sum_over_batch_size", "sum", "mean", "mean_with_sample_weight", "none")
    if reduction is None or reduction in names:
        return []
    return [
        f"Unknown reduction {reduction!r}{nearest(reduction, names)} "
        f"Available: {', '.join(names)}, None."
    ]
