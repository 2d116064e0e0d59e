"""Before and after, item by item: what training changed, with an interval."""

from __future__ import annotations

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.samples import Samples
from dpo_keras.evaluation.statistics import correlation, mean, share_difference
from dpo_keras.utils.intervals import Estimate, undefined


def change(before: HeldOut | Samples, after: HeldOut | Samples, name: str) -> Estimate:
    """The change of a figure, taken over the same pairs or prompts one by one.

    Pairing takes away what makes items easy or hard, so that smaller changes can be seen than from
    two intervals side by side. Means: mean of the differences ± 1.96 standard errors. Shares:
    Newcombe's interval for paired shares (see `figures.share_difference`).

    Args:
        before: held-out figures or samples of one policy.
        after: the same kind, of another policy.
        name: a name in `after.figures`.

    Returns:
        after - before; undefined where the two are not about the same pairs or prompts, without
        an interval where the figure is not a mean over items.

    Raises:
        InputError: two different kinds, or an unknown name.

    Example:
        >>> from dpo_keras.evaluation.statistics import share
        >>> def judged(*found):
        ...     rows = [{"prompt": str(i), "response": "", "tokens": 0, "ended": True,
        ...              "verdict": {"preferred": v}} for i, v in enumerate(found)]
        ...     return Samples(rows, {"preferred": share(found)})
        >>> before, after = judged(True, False, False, False), judged(True, True, True, False)
        >>> change(before, after, "preferred").value
        0.5
    """
    if name not in after.figures:
        raise InputError(f"name must be one of {', '.join(after.figures)}; got {name!r}.")
    if isinstance(before, HeldOut) and isinstance(after, HeldOut):
        return _pairs_change(before, after, name)
    if isinstance(before, Samples) and isinstance(after, Samples):
        return _samples_change(before, after, name)
    raise InputError(
        "before and after must both be HeldOut or both be Samples; got "
        f"{type(before).__name__} and {type(after).__name__}."
    )


def same_pairs(before: HeldOut, after: HeldOut) -> bool:
    """Whether two measurements are of the same pairs, labels and weights included.

    Args:
        before: one.
        after: the other.
    """
    columns = ("source", "prompt", "preference", "weight", "chosen_tokens", "rejected_tokens")
    return before.fingerprint == after.fingerprint and all(
        np.array_equal(before.pairs[name], after.pairs[name]) for name in columns
    )


def _pairs_change(before: HeldOut, after: HeldOut, name: str) -> Estimate:
    if not same_pairs(before, after):
        return undefined("before and after are of different pairs", len(after))
    if name == "reward_accuracy":
        tied = correlation(before.right, after.right, after.decided) if after.decided.any() else 0.0
        return share_difference(before.figures[name], after.figures[name], tied)
    one, other = (
        held_out.reward_margin if name == "reward_margin" else held_out.pairs.get(name)
        for held_out in (before, after)
    )
    if one is None or other is None:
        return _plain(before.figures.get(name), after.figures[name])
    difference = other.astype(np.float64) - one
    return mean(difference, after.pairs["weight"], after.pairs["prompt"])


def _samples_change(before: Samples, after: Samples, name: str) -> Estimate:
    if before.prompts != after.prompts:
        return undefined("before and after answer different prompts", len(after))
    one, other = before.values(name), after.values(name)
    if one is None or other is None:
        return _plain(before.figures.get(name), after.figures[name])
    if name == "tokens":
        clusters = np.unique(after.prompts, return_inverse=True)[1].reshape(-1)
        return mean(other - one, None, clusters, of="response")
    return share_difference(before.figures[name], after.figures[name], correlation(one, other))


def _plain(before: Estimate | None, after: Estimate) -> Estimate:
    if before is None:
        return undefined("it was not measured before")
    if before.value is None or after.value is None:
        return undefined(before.reason or after.reason or "")
    return Estimate(after.value - before.value, count=after.count)
