"""What some objectives remember between steps: weights of groups, the running mean of rewards.

The variables live in a layer, so that a model which holds the layer saves, restores and replicates
them like any other weight.
"""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from dpo_keras.losses.numerics import Tensor


@keras.saving.register_keras_serializable("dpo_keras")
class ObjectiveState(keras.layers.Layer):
    """Hold the variables of an objective.

    Args:
        groups: number of groups; 0 for none.
        reward_shift: whether a running mean of the rewards is kept.
        name: name of the layer.

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

        Args:
            group_losses: `[G]`, each group's mean loss in this step, over all replicas.
            present: `[G]` bool, which groups have any pair in this step.
            eta: step size η.

        Returns:
            `[G]`: the groups' new weights q.
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

        It starts at zero, the rewards' own value while the policy equals the reference.

        Args:
            mean_reward: scalar, mean over the step's pairs and both responses, over all replicas.
            momentum: in [0, 1).
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
