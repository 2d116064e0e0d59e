"""From one loss per pair to the loss of a step: reduction over pairs and replicas, and state.

Divisors count the pairs of *all* replicas (`all_reduce` sums a tensor over them), so the replicas'
results add up to the loss, whatever share of the pairs each of them holds.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import keras
from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.losses.bradley_terry import as_floating
from dpo_keras.losses.scores import Outputs
from dpo_keras.utils import Tensor

AllReduce = Callable[[Tensor], Tensor]


class _PerPair(keras.losses.Loss):
    """Reduce values that are losses already, as Keras reduces its own."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return y_pred


class StepLoss(keras.losses.Loss):
    """A loss with one value per pair, reduced over a step's pairs and replicas."""

    def __init__(
        self,
        reduction: str | None,
        name: str,
        group_robust: Mapping[str, Any] | None = None,
        shift_momentum: float | None = None,
    ):
        super().__init__(name=name, reduction=reduction)
        self.group_robust = group_robust
        self.shift_momentum = shift_momentum

    @property
    def batchwise(self) -> bool:
        """Whether a pair's loss depends on the rest of the batch."""
        return False

    @abstractmethod
    def scores(self, outputs: Outputs) -> Tensor:
        """Compute the implicit rewards `[N, 2]`."""

    @cached_property
    def state(self) -> ObjectiveState | Any:
        """The layer that holds the objective's variables, or None if it has none.

        The first read makes the variables: read it in the scope of the strategy that trains.
        """
        groups = (self.group_robust or {}).get("groups", 0)
        keeps_shift = self.shift_momentum is not None
        if not groups and not keeps_shift:
            return None
        return ObjectiveState(groups=groups, reward_shift=keeps_shift)

    def __call__(
        self, y_true: Tensor, y_pred: Outputs, sample_weight: Tensor | None = None
    ) -> Tensor:
        """Compute the reduced loss; Keras' own `__call__` would turn group ids into floats.

        `y_true` are the labels y `[N]`, `y_pred` the scorer's outputs.
        """
        if self.group_robust and self.reduction not in (None, "none"):
            raise InputError(
                "group_robust weights groups, not pairs: train with DPOModel, or reduce "
                "`terms` with `combine`."
            )
        if self.batchwise and sample_weight is not None:
            y_pred = {"weight": sample_weight, **y_pred}
        values = self.call(y_true, y_pred)
        dtype = keras.backend.standardize_dtype(values.dtype)
        reduce = _PerPair(name=self.name, reduction=self.reduction, dtype=dtype)
        return reduce(values, values, sample_weight=sample_weight)

    def combine(
        self,
        terms: Mapping[str, Tensor],
        weight: Tensor,
        outputs: Outputs,
        training: bool = False,
        all_reduce: AllReduce | None = None,
    ) -> Tensor:
        """Reduce a step's terms to the loss that is differentiated.

        Without groups: Σ wᵢ ℓᵢ / Σ wᵢ. With `group_robust`: Σ_g q_g L_g, L_g the weighted mean of
        group g, after q_g <- q_g exp(η L_g) in training (arXiv 2405.20304). The divisors count the
        pairs of all replicas, so the replicas' results *add up* to the loss.

        `weight` `[N]` is 0 for padding. In `training` the variables in `state` take a step. Returns
        a scalar, this replica's share.
        """
        all_reduce = all_reduce or (lambda value: value)
        losses = total(terms)
        weight = ops.reshape(as_floating(weight, losses.dtype), (-1,))
        if training and self.shift_momentum is not None:
            self._update_reward_shift(weight, outputs, self.shift_momentum, all_reduce)
        if not self.group_robust:
            return ops.divide_no_nan(_weighted_sum(losses, weight), all_reduce(ops.sum(weight)))
        member = self._group_members(outputs, losses.dtype)
        means, group_weight = group_means(losses, weight, member, all_reduce)
        if training:
            eta = self.group_robust.get("eta", 0.01)
            share = self.state.update_group_weights(means, group_weight > 0, eta)
        else:
            share = self.state.group_weights
        # Σ_g q_g L_g, with this replica's pairs only: wᵢ q_g / W_g is the factor of pair i.
        share = ops.cast(share, losses.dtype)
        factor = ops.matmul(member, ops.divide_no_nan(share, group_weight)[:, None])[:, 0]
        return _weighted_sum(losses, weight * factor)

    def _update_reward_shift(
        self, weight: Tensor, outputs: Outputs, momentum: float, all_reduce: AllReduce
    ) -> None:
        rewards = 0.5 * ops.sum(ops.stop_gradient(self.scores(outputs)), axis=-1)
        sums = all_reduce(ops.stack([_weighted_sum(rewards, weight), ops.sum(weight)]))
        self.state.update_reward_shift(ops.divide_no_nan(sums[0], sums[1]), momentum)

    def _group_members(self, outputs: Outputs, dtype: str) -> Tensor:
        """Return `[N, G]`: one where the pair belongs to the group, else zero."""
        group = ops.reshape(ops.cast(outputs["group"], "int32"), (-1,))
        return ops.one_hot(group, (self.group_robust or {})["groups"], dtype=dtype)


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Add up a loss's terms: `[N]`."""
    return sum(terms.values())


def _weighted_sum(losses: Tensor, weight: Tensor) -> Tensor:
    """Compute Σ wᵢ ℓᵢ over the pairs of weight > 0: padding may hold values that are not finite."""
    return ops.sum(ops.where(weight > 0, weight * losses, 0.0))


def group_means(
    losses: Tensor, weight: Tensor, member: Tensor, all_reduce: AllReduce
) -> tuple[Tensor, Tensor]:
    """Compute each group's mean loss `[G]` and sum of weights `[G]`, over all replicas.

    `member` `[N, G]` is one where a pair belongs to a group. An absent group has a loss of 0. No
    gradient flows.
    """
    kept = ops.where(weight > 0, weight * ops.stop_gradient(losses), 0.0)
    sums = all_reduce(ops.matmul(ops.stack([kept, weight]), member))
    return ops.divide_no_nan(sums[0], sums[1]), sums[1]


@keras.saving.register_keras_serializable("dpo_keras")
class ObjectiveState(keras.layers.Layer):
    """Hold what an objective remembers between steps, as variables of the model.

    Keras saves, restores and replicates them like any other weight.

    Example:
        >>> state = ObjectiveState(groups=4, reward_shift=False)
        >>> print(ops.convert_to_numpy(state.group_weights))
        [0.25 0.25 0.25 0.25]
    """

    def __init__(self, groups: int = 0, reward_shift: bool = False, name: str = "objective_state"):
        super().__init__(name=name, trainable=False, dtype="float32")
        self.groups = groups
        self.keeps_reward_shift = reward_shift
        # Every replica assigns the same value, taken from sums over all replicas.
        shared: dict[str, Any] = {
            "trainable": False,
            "dtype": "float32",
            "aggregation": "only_first_replica",
        }
        if groups:
            self.group_log_weights = self.add_weight(
                shape=(groups,), initializer="zeros", name="group_log_weights", **shared
            )
            self.group_log_weights.assign(ops.full((groups,), -float(ops.log(float(groups)))))
        if reward_shift:
            self.reward_shift = self.add_weight(
                shape=(), initializer="zeros", name="reward_shift", **shared
            )
        self.built = True

    @property
    def group_weights(self) -> Tensor:
        """The groups' weights q `[G]`; they add up to one."""
        return ops.exp(ops.convert_to_tensor(self.group_log_weights))

    def update_group_weights(self, group_losses: Tensor, present: Tensor, eta: float) -> Tensor:
        """Move weight toward the groups that do worst: q_g <- q_g exp(η L_g), normalised.

        Groups that are absent from the step keep their weight, and those present share the rest:
        a loss of zero for an absent group would lower it each time it is not drawn. Weights are
        kept as logarithms, so that none is ever rounded to zero and lost for good.

        Losses and `present` (whether the group has any pair in this step) are `[G]`, over all
        replicas. Returns the new weights q `[G]`.
        """
        log_weights = ops.convert_to_tensor(self.group_log_weights)
        losses = ops.cast(group_losses, "float32")
        moved = ops.where(present, log_weights + eta * losses, -1e30)
        shared = ops.logsumexp(ops.where(present, log_weights, -1e30))
        moved = moved - ops.logsumexp(moved) + shared
        updated = ops.where(present, moved, log_weights)
        updated = updated - ops.logsumexp(updated)
        self.group_log_weights.assign(updated)
        return ops.exp(updated)

    def update_reward_shift(self, mean_reward: Tensor, momentum: float) -> None:
        """Take a step of the running mean: δ <- momentum·δ + (1 - momentum)·mean.

        The mean is that of the step's pairs and both responses, over all replicas.
        """
        current = ops.convert_to_tensor(self.reward_shift)
        mean_reward = ops.cast(mean_reward, "float32")
        self.reward_shift.assign(momentum * current + (1.0 - momentum) * mean_reward)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this layer again."""
        return {
            "groups": self.groups,
            "reward_shift": self.keeps_reward_shift,
            "name": self.name,
        }
