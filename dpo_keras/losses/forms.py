"""How a loss meets a pair and its label y: the step between a pure function and a batch.

A loss is written for the case that the first response won. A label y in [0, 1] says how likely
that case is, so the loss of the pair is its mean, y ℓ(first won) + (1 - y) ℓ(second won). Swapping
the two responses and taking 1 - y then changes nothing, for every objective alike.

Every form is `(loss, preference [N], scores [N, 2], outputs, offset, options) -> [N]`. `offset`
`[N, 2]` (or 0) is what the LLR has to clear before it counts, in each of the two cases.

Example:
    >>> from keras import ops
    >>> from dpo_keras.losses.links import hinge
    >>> pair = ops.convert_to_tensor([[0.5, 0.0]])
    >>> [round(float(on_llr(hinge, ops.convert_to_tensor([y]), pair, {}, 0.0, {})[0]), 4)
    ...  for y in (1.0, 0.5, 0.0)]
    [0.5, 1.0, 1.5]
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from dpo_keras.losses.bradley_terry import log_likelihood_ratio
from dpo_keras.losses.numerics import Tensor
from dpo_keras.losses.scores import Outputs

Loss = Callable[..., Tensor]
Options = Mapping[str, Any]


def on_llr(
    loss: Loss,
    preference: Tensor,
    scores: Tensor,
    outputs: Outputs,
    offset: Tensor,
    options: Options,
) -> Tensor:
    """Mix ℓ(LLR - offset₀) and ℓ(-LLR - offset₁)."""
    del outputs
    llr = log_likelihood_ratio(scores)
    first, second = (offset, offset) if isinstance(offset, float) else (offset[:, 0], offset[:, 1])
    return preference * loss(llr - first, **options) + (1.0 - preference) * loss(
        -llr - second, **options
    )


def on_scores(
    loss: Loss,
    preference: Tensor,
    scores: Tensor,
    outputs: Outputs,
    offset: Tensor,
    options: Options,
) -> Tensor:
    """Mix ℓ(S₀, S₁) and ℓ(S₁, S₀)."""
    del outputs, offset
    first, second = scores[:, 0], scores[:, 1]
    return preference * loss(first, second, **options) + (1.0 - preference) * loss(
        second, first, **options
    )


def on_centred_scores(
    loss: Loss,
    preference: Tensor,
    scores: Tensor,
    outputs: Outputs,
    offset: Tensor,
    options: Options,
) -> Tensor:
    """Take the running mean of the rewards, `outputs["reward_shift"]`, off both scores first."""
    centred = scores - outputs.get("reward_shift", 0.0)
    return on_scores(loss, preference, centred, outputs, offset, options)


def on_label(
    loss: Loss,
    preference: Tensor,
    scores: Tensor,
    outputs: Outputs,
    offset: Tensor,
    options: Options,
) -> Tensor:
    """Hand LLR and label to a loss that has a form of its own for soft labels."""
    del outputs, offset
    return loss(log_likelihood_ratio(scores), preference, **options)


def on_outputs(
    loss: Loss,
    preference: Tensor,
    scores: Tensor,
    outputs: Outputs,
    offset: Tensor,
    options: Options,
) -> Tensor:
    """Hand everything to a loss that is more than a function of one pair's scores."""
    del offset
    return loss(preference, scores, outputs, **options)
