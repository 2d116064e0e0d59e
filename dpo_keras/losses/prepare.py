"""From what the scorer hands over to tensors that the formulas can count on."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.losses.numerics import Tensor, as_floating

COLUMNS = ("policy", "reference", "lengths", "policy_shared", "reference_shared", "wpo_log_weight")
"""Outputs with one column for each response, `[N, 2]`."""

SCALARS = ("margin", "weight", "reward_shift")
"""Outputs with one value for each pair, `[N]`; `reward_shift` is a single number."""

CONSTANT = ("reference", "reference_shared", "wpo_log_weight")
"""Outputs that no gradient may enter: with `adapters_off` the reference shares the weights."""

SOURCE_OF = {
    "reference": "this loss compares with a reference policy: give DPOModel one",
    "margin": "margin=True reads it: give the pairs a `margin` column",
    "group": "group_robust reads it: give the pairs a `group` column",
    "lengths": "number of response tokens, [N, 2]",
    "policy": "the policy's response log-probs, [N, 2]",
}


def prepare_outputs(outputs: Mapping[str, Tensor], needs: Iterable[str]) -> dict[str, Tensor]:
    """Check the scorer's outputs and bring them to one dtype and rank.

    Args:
        outputs: name -> tensor; see `DPOLoss.needs` for names. None counts as absent.
        needs: the names that must be there.

    Returns:
        Name -> tensor: columns as `[N, 2]`, values per pair as `[N]`, in float64 if `policy` is
        float64, else in float32; `group` as int32. Names that the losses do not know pass through.

    Raises:
        InputError: a needed output is missing, or one that has two columns has not.

    Example:
        >>> prepare_outputs({"policy": [[-1.0, -2.0]]}, {"policy", "reference"})
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: outputs['reference'] is missing; this loss compares with ...
    """
    if not isinstance(outputs, Mapping):
        kind = type(outputs).__name__
        raise InputError(f"outputs must be a mapping with 'policy' [N, 2] and more, got {kind}.")
    given = {name: value for name, value in outputs.items() if value is not None}
    problems = [
        f"outputs[{name!r}] is missing; {SOURCE_OF.get(name, 'the scorer has to provide it')}."
        for name in sorted(needs)
        if name not in given
    ]
    prepared: dict[str, Tensor] = dict(given)
    dtype = as_floating(given["policy"]).dtype if "policy" in given else None
    for name in COLUMNS:
        if name in given:
            value = as_floating(given[name], dtype)
            if len(value.shape) < 1 or value.shape[-1] != 2:
                problems.append(
                    f"outputs[{name!r}] must have the shape [N, 2] (chosen, rejected), "
                    f"got {tuple(value.shape)}."
                )
                continue
            prepared[name] = ops.reshape(value, (-1, 2))
    if problems:
        raise InputError(problems)
    for name in SCALARS:
        if name in given:
            value = as_floating(given[name], dtype)
            prepared[name] = value if name == "reward_shift" else ops.reshape(value, (-1,))
    if "group" in given:
        prepared["group"] = ops.reshape(ops.cast(given["group"], "int32"), (-1,))
    for name in CONSTANT:
        if name in prepared:
            prepared[name] = ops.stop_gradient(prepared[name])
    return prepared


def prepare_preference(preference: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
    """Bring labels to `[N]` in the outputs' dtype.

    Raises:
        InputError: there are not as many labels as pairs.

    Example:
        >>> prepare_preference([[1.0], [0.5]], prepare_outputs({"policy": [[-1.0, -2.0]]}, ()))
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: preference must hold one label for each of the 1 pairs, got 2.
    """
    policy = outputs["policy"]
    labels = ops.reshape(as_floating(preference, policy.dtype), (-1,))
    pairs, given = policy.shape[0], labels.shape[0]
    if pairs is not None and given is not None and pairs != given:
        raise InputError(
            f"preference must hold one label for each of the {pairs} pairs, got {given}."
        )
    return labels
