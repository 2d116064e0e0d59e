"""`DPOLoss`: the Keras loss that applies the table of objectives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any

import keras
from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.losses.numerics import Tensor, as_floating
from dpo_keras.losses.objectives import OBJECTIVES, Objective, keyword_only
from dpo_keras.losses.options import check_arguments, is_number
from dpo_keras.losses.penalties import PENALTIES, PENALTY_NEEDS, dpo_positive, nll
from dpo_keras.losses.prepare import prepare_outputs, prepare_preference
from dpo_keras.losses.state import ObjectiveState

AllReduce = Callable[[Tensor], Tensor]


def total(terms: Mapping[str, Tensor]) -> Tensor:
    """Add up a loss's terms: `[N]`."""
    return sum(terms.values())


class _PerPair(keras.losses.Loss):
    """Reduce values that are losses already, as Keras reduces its own."""

    def call(self, y_true: Tensor, y_pred: Tensor) -> Tensor:
        return y_pred


@keras.saving.register_keras_serializable("dpo_keras")
class DPOLoss(keras.losses.Loss):
    """Direct preference optimization: score -> log-likelihood ratio -> loss -> penalties.

    For `loss_type="sigmoid"`, with c and r the log-ratios log π/π_ref of chosen and rejected:

        loss = BCE(y, softmax(β·(c, r))) + Σ weight · penalty       (arXiv 2305.18290, eq. 7)

    Args:
        loss_type: a name in `available()`, or a list of names whose losses are added up (MPO).
        beta: β > 0, strength of the tie to the reference; scale of the scores.
        label_smoothing: ε in [0, 0.5), the rate at which labels are taken to be flipped.
        penalties: name in `PENALTIES` (or a function `(preference, scores, outputs) -> [N]`) ->
            weight >= 0; as a mapping or as pairs. `dpo_positive` takes its λ as weight.
        loss_weights: a weight >= 0 for each name of a list; ones by default.
        reduction: as in `keras.losses.Loss`; None gives `[N]`.
        name: name of the loss.
        **options: options of the objectives, see `losses/options.py`: `length_normalize`, `gamma`,
            `discopop_tau`, `cpo_alpha`, `alphapo_alpha`, `divergence`, `divergence_alpha`,
            `ld_alpha`, `margin`, `wpo`, `wpo_max_weight`, `shift_momentum`, `group_robust`.

    Raises:
        InputError: unknown names, values out of range, options and penalties that would have no
            effect; all of them together.

    Example:
        >>> from keras import ops
        >>> loss = DPOLoss("sigmoid", beta=0.1, penalties={"insufficient_confidence": 0.5})
        >>> outputs = {"policy": ops.zeros((2, 2)), "reference": ops.zeros((2, 2)),
        ...            "lengths": ops.ones((2, 2))}
        >>> round(float(loss(ops.ones(2), outputs)), 4)  # 1.5 log 2
        1.0397
        >>> DPOLoss("hing", beta=-1)
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: Unknown loss_type 'hing'; did you mean 'hinge'? ...
        beta must be a number > 0, got -1.
    """

    def __init__(
        self,
        loss_type: str | Sequence[str] = "sigmoid",
        beta: float = 0.1,
        label_smoothing: float = 0.0,
        penalties: Mapping[Any, float] | Sequence[tuple[Any, float]] | None = None,
        loss_weights: Sequence[float] | None = None,
        reduction: str | None = "sum_over_batch_size",
        name: str = "dpo_loss",
        **options: Any,
    ):
        loss_types = [loss_type] if isinstance(loss_type, str) else list(loss_type)
        pairs = list(penalties.items() if isinstance(penalties, Mapping) else penalties or ())
        problems = check_arguments(loss_types, beta, label_smoothing, pairs, options)
        problems += _check_loss_weights(loss_type, loss_weights)
        if problems:
            raise InputError(problems)
        super().__init__(name=name, reduction=reduction)
        self.loss_type = loss_type if isinstance(loss_type, str) else loss_types
        self.beta = float(beta)
        self.label_smoothing = float(label_smoothing)
        self.penalties = [(penalty, float(weight)) for penalty, weight in pairs]
        self.loss_weights = None if loss_weights is None else [float(w) for w in loss_weights]
        self.options = dict(options)
        self._objectives = list(
            zip(
                [OBJECTIVES[name] for name in loss_types],
                self.loss_weights or [1.0] * len(loss_types),
                strict=True,
            )
        )

    # What the loss needs from outside

    @property
    def needs(self) -> frozenset[str]:
        """Names of the outputs that have to be there.

        `policy`, `reference`, `lengths`; `policy_shared` and `reference_shared` `[N, 2]` (sums over
        each response's first min(n⁺, n⁻) tokens) for `ld_alpha`; `wpo_log_weight` `[N, 2]` (mean
        over response tokens of log p_t - log Σ p²) for `wpo`; `margin` and `group` `[N]`.
        """
        needs = set().union(*(objective.needs for objective, _ in self._objectives))
        for penalty, _ in self.penalties:
            needs |= PENALTY_NEEDS.get(penalty, set()) if isinstance(penalty, str) else set()
            needs |= set(getattr(penalty, "needs", ()))
        if self.options.get("ld_alpha") is not None:
            needs |= {"policy_shared", "reference_shared"}
        if self.options.get("wpo"):
            needs |= {"wpo_log_weight"}
        if self.options.get("margin"):
            needs |= {"margin"}
        if self.options.get("group_robust"):
            needs |= {"group"}
        return frozenset(needs)

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs are read at all."""
        return "reference" in self.needs

    @property
    def batchwise(self) -> bool:
        """Whether a pair's loss depends on the rest of the batch (AOT).

        Such a loss wants the pairs of all replicas at once, and `outputs["weight"]` `[N]` where
        some rows are padding.
        """
        return any(objective.batchwise for objective, _ in self._objectives)

    def term_names(self) -> list[str]:
        """Name the terms of the loss, as `terms` and the logs do: `preference_loss` first."""
        return ["preference_loss", *(f"penalty/{_penalty_name(p)}" for p, _ in self.penalties)]

    @cached_property
    def state(self) -> ObjectiveState | Any:
        """The layer that holds the objective's variables, or None if it has none.

        The first read makes the variables: read it in the scope of the strategy that trains.
        """
        groups = (self.options.get("group_robust") or {}).get("groups", 0)
        keeps_shift = self.options.get("shift_momentum") is not None
        if not groups and not keeps_shift:
            return None
        return ObjectiveState(groups=groups, reward_shift=keeps_shift)

    # The loss of each pair

    def scores(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Give what softmax is taken over: the implicit rewards.

        Args:
            outputs: see `needs`.

        Returns:
            `[N, 2]`, in nats; for a list of losses those of the first that is probabilistic.
        """
        return self._scores(self._prepare(outputs))

    def terms(self, preference: Tensor, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Give the parts that the loss is the sum of.

        Args:
            preference: `[N]`, y in [0, 1].
            outputs: see `needs`.

        Returns:
            `preference_loss` `[N]`, and `penalty/<name>` `[N]` for each penalty, its weight
            included.

        Raises:
            InputError: an output is missing or has the wrong shape.
        """
        outputs = self._prepare(outputs)
        preference = prepare_preference(preference, outputs)
        scores = self._scores(outputs)
        result = {"preference_loss": self._preference_loss(preference, outputs)}
        for penalty, weight in self.penalties:
            if penalty == "dpo_positive":
                shortfall = self.beta * weight * dpo_positive(preference, scores, outputs)
                with_it = self._preference_loss(preference, outputs, shortfall)
                value = with_it - result["preference_loss"]
            else:
                function = PENALTIES[penalty] if isinstance(penalty, str) else penalty
                value = weight * function(preference, scores, outputs)
            result[f"penalty/{_penalty_name(penalty)}"] = value
        return result

    def term_names(self) -> list[str]:
        """Give the names that `terms` returns, without computing anything."""
        return ["preference_loss", *(f"penalty/{_penalty_name(p)}" for p, _ in self.penalties)]

    def call(self, preference: Tensor, outputs: Mapping[str, Tensor]) -> Tensor:
        """Give the loss of each pair, `[N]`: the sum of `terms`."""
        return total(self.terms(preference, outputs))

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
        if self.options.get("group_robust") and self.reduction not in (None, "none"):
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

    # The loss of a step

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
        if training and self.state is not None and self.state.keeps_reward_shift:
            self._update_reward_shift(weight, outputs, all_reduce)
        if not self.options.get("group_robust"):
            weight_sum = all_reduce(ops.sum(weight))
            return ops.sum(ops.divide_no_nan(weight, weight_sum) * losses)
        group_losses, group_weight = self.group_losses(terms, weight, outputs, all_reduce)
        if training:
            eta = self.options["group_robust"].get("eta", 0.01)
            self.state.update_group_weights(group_losses, group_weight > 0, eta)
        q = ops.cast(ops.exp(ops.convert_to_tensor(self.state.group_log_weights)), losses.dtype)
        share = ops.divide_no_nan(q, group_weight)
        member = self._group_members(outputs, losses.dtype)
        return ops.sum(ops.matmul(member, share) * weight * losses)

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
        losses = ops.stop_gradient(total(terms))
        weight = ops.reshape(as_floating(weight, losses.dtype), (-1,))
        member = self._group_members(outputs, losses.dtype)
        sums = (all_reduce or _identity)(ops.matmul(ops.stack([weight * losses, weight]), member))
        return ops.divide_no_nan(sums[0], sums[1]), sums[1]

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again, ready for JSON."""
        named = all(isinstance(penalty, str) for penalty, _ in self.penalties)
        return {
            "loss_type": self.loss_type,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "penalties": dict(self.penalties)
            if named
            else [[_serialize(penalty), weight] for penalty, weight in self.penalties],
            "loss_weights": self.loss_weights,
            "reduction": self.reduction,
            "name": self.name,
            **self.options,
        }

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> DPOLoss:
        """Make a loss from what `get_config` returned."""
        config = dict(config)
        if isinstance(config.get("penalties"), list | tuple):
            config["penalties"] = [(_deserialize(p), weight) for p, weight in config["penalties"]]
        return cls(**config)

    # Steps of the above

    def _prepare(self, outputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        if self.state is not None and self.state.keeps_reward_shift:
            shift = ops.convert_to_tensor(self.state.reward_shift)
            outputs = {"reward_shift": shift, **outputs}
        return prepare_outputs(outputs, self.needs)

    def _arguments(self, function: Callable[..., Any]) -> dict[str, Any]:
        """Pick what a function takes; what was not given keeps the function's own default."""
        given = {"beta": self.beta, "label_smoothing": self.label_smoothing, **self.options}
        return {name: given[name] for name in keyword_only(function) if name in given}

    def _scores(self, outputs: Mapping[str, Tensor]) -> Tensor:
        objectives = [objective for objective, _ in self._objectives]
        speaker = next((o for o in objectives if o.probabilistic), objectives[0])
        return speaker.score(outputs, **self._arguments(speaker.score))

    def _preference_loss(
        self, preference: Tensor, outputs: Mapping[str, Tensor], shortfall: Tensor | None = None
    ) -> Tensor:
        return sum(
            weight * self._objective_loss(objective, preference, outputs, shortfall)
            for objective, weight in self._objectives
        )

    def _objective_loss(
        self,
        objective: Objective,
        preference: Tensor,
        outputs: Mapping[str, Tensor],
        shortfall: Tensor | None,
    ) -> Tensor:
        scores = objective.score(outputs, **self._arguments(objective.score))
        offset = ops.zeros_like(scores)
        if self.options.get("margin"):
            offset = offset + outputs["margin"][:, None]
        if shortfall is not None and objective.takes_penalty("dpo_positive"):
            offset = offset + shortfall
        value = objective.form(
            objective.loss, preference, scores, outputs, offset, self._arguments(objective.loss)
        )
        if self.options.get("wpo") and "wpo" in objective.options:
            value = value * self._wpo_weight(outputs)
        if objective.nll:
            weight = objective.nll
            weight = self.options.get(weight, 1.0) if isinstance(weight, str) else weight
            value = value + weight * nll(preference, scores, outputs)
        return value

    def _wpo_weight(self, outputs: Mapping[str, Tensor]) -> Tensor:
        """Give w⁺w⁻ (arXiv 2406.11827)."""
        log_weight = ops.sum(outputs["wpo_log_weight"], axis=-1)
        # log p - log Σ p² is below log of the vocabulary: only faulty input comes near the bound.
        weight = ops.exp(ops.minimum(log_weight, 60.0))
        return ops.minimum(weight, self.options.get("wpo_max_weight", float("inf")))

    def _update_reward_shift(
        self, weight: Tensor, outputs: Mapping[str, Tensor], all_reduce: AllReduce
    ) -> None:
        rewards = ops.mean(ops.stop_gradient(self.scores(outputs)), axis=-1)
        rewards, pairs = all_reduce(ops.stack([ops.sum(weight * rewards), ops.sum(weight)]))
        self.state.update_reward_shift(
            ops.divide_no_nan(rewards, pairs), self.options["shift_momentum"]
        )

    def _group_members(self, outputs: Mapping[str, Tensor], dtype: str) -> Tensor:
        group = ops.reshape(ops.cast(outputs["group"], "int32"), (-1,))
        return ops.one_hot(group, self.options["group_robust"]["groups"], dtype=dtype)


def _identity(value: Tensor) -> Tensor:
    return value


def _penalty_name(penalty: Any) -> str:
    return penalty if isinstance(penalty, str) else getattr(penalty, "__name__", str(penalty))


def _serialize(penalty: Any) -> Any:
    return penalty if isinstance(penalty, str) else keras.saving.serialize_keras_object(penalty)


def _deserialize(penalty: Any) -> Any:
    return keras.saving.deserialize_keras_object(penalty) if isinstance(penalty, dict) else penalty


def _check_loss_weights(loss_type: Any, loss_weights: Any) -> list[str]:
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
