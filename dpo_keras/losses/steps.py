"""The part of `DPOLoss` that knows of steps: reduction over pairs and replicas, and state."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import cached_property
from typing import Any

import keras
from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.losses.numerics import Tensor, as_floating
from dpo_keras.losses.reduction import (
    AllReduce,
    group_mean_of_means,
    group_means,
    total,
    weighted_mean,
    weighted_sum,
)
from dpo_keras.losses.state import ObjectiveState


class _PerPair(keras.losses.Loss):
    """Reduce values that are losses already, as Keras reduces its own."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return y_pred


class StepLoss(keras.losses.Loss):
    """A loss with one value per pair, reduced over a step's pairs and replicas.

    Args:
        reduction: as in `keras.losses.Loss`; None gives `[N]`.
        name: name of the loss.
        group_robust: `{"groups": G, "eta": step size}`, or None.
        shift_momentum: momentum of the rewards' running mean, or None for none.
    """

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
    def scores(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Give the implicit rewards `[N, 2]`."""

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
        self,
        y_true: Tensor,
        y_pred: Mapping[str, Tensor],
        sample_weight: Tensor | None = None,
    ) -> Tensor:
        """Give the reduced loss; Keras's own `__call__` would turn group ids into floats.

        Args:
            y_true: `[N]`, y in [0, 1].
            y_pred: see `needs`.
            sample_weight: `[N]` or None.

        Returns:
            A scalar, or `[N]` with `reduction=None`.

        Raises:
            InputError: `group_robust` is set: a mean over pairs would leave the groups out.
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
        outputs: Mapping[str, Tensor],
        training: bool = False,
        all_reduce: AllReduce | None = None,
    ) -> Tensor:
        """Reduce a step's terms to the loss that is differentiated.

        Without groups: Σ wᵢ ℓᵢ / Σ wᵢ. With `group_robust`: Σ_g q_g L_g, L_g the weighted mean of
        group g, after q_g <- q_g exp(η L_g) in training (arXiv 2405.20304). The divisors count the
        pairs of all replicas, so the replicas' results *add up* to the loss.

        Args:
            terms: what `terms` gave.
            weight: `[N]`, >= 0; 0 for padding.
            outputs: what `terms` was given.
            training: whether the variables in `state` take a step.
            all_reduce: sums a tensor over replicas; None where there is one.

        Returns:
            A scalar: this replica's share of the loss.
        """
        all_reduce = all_reduce or _identity
        losses = total(terms)
        weight = ops.reshape(as_floating(weight, losses.dtype), (-1,))
        if training and self.shift_momentum is not None:
            self._update_reward_shift(weight, outputs, self.shift_momentum, all_reduce)
        if not self.group_robust:
            return weighted_mean(losses, weight, all_reduce)
        member = self._group_members(outputs, losses.dtype)
        means, group_weight = group_means(losses, weight, member, all_reduce)
        if training:
            eta = self.group_robust.get("eta", 0.01)
            share = self.state.update_group_weights(means, group_weight > 0, eta)
        else:
            share = self.state.group_weights
        share = ops.cast(share, losses.dtype)
        return group_mean_of_means(losses, weight, member, share, group_weight)

    def group_losses(
        self,
        terms: Mapping[str, Tensor],
        weight: Tensor,
        outputs: Mapping[str, Tensor],
        all_reduce: AllReduce | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Give each group's mean loss and its weight in the step, over all replicas.

        Args:
            terms: what `terms` gave.
            weight: `[N]`, >= 0.
            outputs: holds `group` `[N]`, ids from 0 to groups - 1.
            all_reduce: sums a tensor over replicas; None where there is one.

        Returns:
            Mean losses `[G]` (0 for an absent group) and sums of weights `[G]`. No gradient.
        """
        losses = total(terms)
        weight = ops.reshape(as_floating(weight, losses.dtype), (-1,))
        member = self._group_members(outputs, losses.dtype)
        return group_means(losses, weight, member, all_reduce or _identity)

    def _update_reward_shift(
        self,
        weight: Tensor,
        outputs: Mapping[str, Tensor],
        momentum: float,
        all_reduce: AllReduce,
    ) -> None:
        rewards = 0.5 * ops.sum(ops.stop_gradient(self.scores(outputs)), axis=-1)
        sums = all_reduce(ops.stack([weighted_sum(rewards, weight), ops.sum(weight)]))
        self.state.update_reward_shift(ops.divide_no_nan(sums[0], sums[1]), momentum)

    def _group_members(self, outputs: Mapping[str, Tensor], dtype: str) -> Tensor:
        group = ops.reshape(ops.cast(outputs["group"], "int32"), (-1,))
        return ops.one_hot(group, (self.group_robust or {})["groups"], dtype=dtype)


def _identity(value: Tensor) -> Tensor:
    return value
