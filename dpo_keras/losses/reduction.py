"""From one loss per pair to the loss of a step, over any number of replicas.

Divisors count the pairs of *all* replicas (`all_reduce` sums a tensor over them), so the replicas'
results add up to the loss, whatever share of the pairs each of them holds.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from keras import ops

from dpo_keras.losses.numerics import Tensor

AllReduce = Callable[[Tensor], Tensor]


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Add up a loss's terms: `[N]`."""
    return sum(terms.values())


def weighted_sum(losses: Tensor, weight: Tensor) -> Tensor:
    """Give Σ wᵢ ℓᵢ over the pairs that weigh anything: padding may hold what is not finite.

    Example:
        >>> from keras import ops
        >>> losses = ops.convert_to_tensor([2.0, float("inf")])
        >>> float(weighted_sum(losses, ops.convert_to_tensor([0.5, 0.0])))
        1.0
    """
    return ops.sum(ops.where(weight > 0, weight * losses, 0.0))


def weighted_mean(losses: Tensor, weight: Tensor, all_reduce: AllReduce) -> Tensor:
    """Give this replica's share of Σ wᵢ ℓᵢ / Σ wᵢ.

    Example:
        >>> from keras import ops
        >>> losses, weight = ops.convert_to_tensor([1.0, 4.0]), ops.convert_to_tensor([2.0, 1.0])
        >>> float(weighted_mean(losses, weight, lambda total: total))
        2.0
    """
    return ops.divide_no_nan(weighted_sum(losses, weight), all_reduce(ops.sum(weight)))


def group_means(
    losses: Tensor, weight: Tensor, member: Tensor, all_reduce: AllReduce
) -> tuple[Tensor, Tensor]:
    """Give each group's mean loss and the sum of its weights, over all replicas.

    Args:
        losses: `[N]`.
        weight: `[N]`, >= 0.
        member: `[N, G]`, one where the pair belongs to the group, else zero.
        all_reduce: sums a tensor over replicas.

    Returns:
        Means `[G]` (0 for an absent group) and sums of weights `[G]`, without gradient.

    Example:
        >>> from keras import ops
        >>> member = ops.one_hot([0, 1, 1], 3)
        >>> losses = ops.convert_to_tensor([1.0, 2.0, 4.0])
        >>> means, weights = group_means(losses, ops.ones(3), member, lambda total: total)
        >>> print(ops.convert_to_numpy(means), ops.convert_to_numpy(weights))
        [1. 3. 0.] [1. 2. 0.]
    """
    kept = ops.where(weight > 0, weight * ops.stop_gradient(losses), 0.0)
    sums = all_reduce(ops.matmul(ops.stack([kept, weight]), member))
    return ops.divide_no_nan(sums[0], sums[1]), sums[1]


def group_mean_of_means(
    losses: Tensor, weight: Tensor, member: Tensor, group_share: Tensor, group_weight: Tensor
) -> Tensor:
    """Give this replica's share of Σ_g q_g L_g (arXiv 2405.20304).

    Args:
        losses: `[N]`.
        weight: `[N]`, >= 0.
        member: `[N, G]`.
        group_share: `[G]`, q.
        group_weight: `[G]`, sums of weights over all replicas.

    Returns:
        A scalar.

    Example:
        >>> from keras import ops
        >>> member, losses = ops.one_hot([0, 1, 1], 2), ops.convert_to_tensor([1.0, 2.0, 4.0])
        >>> share, sizes = ops.convert_to_tensor([0.25, 0.75]), ops.convert_to_tensor([1.0, 2.0])
        >>> float(group_mean_of_means(losses, ops.ones(3), member, share, sizes))
        2.5
    """
    factor = ops.matmul(member, ops.divide_no_nan(group_share, group_weight)[:, None])[:, 0]
    return weighted_sum(losses, weight * factor)
