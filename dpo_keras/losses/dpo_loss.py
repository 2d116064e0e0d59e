"""`DPOLoss`: the Keras loss that applies the table of objectives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.losses.composition import objective_loss, objective_scores
from dpo_keras.losses.numerics import Tensor
from dpo_keras.losses.objectives import OBJECTIVES
from dpo_keras.losses.options import check_arguments, check_loss_weights, check_reduction
from dpo_keras.losses.penalties import PENALTIES, PENALTY_NEEDS, dpo_positive
from dpo_keras.losses.prepare import prepare_outputs, prepare_preference
from dpo_keras.losses.reduction import total
from dpo_keras.losses.steps import StepLoss


@keras.saving.register_keras_serializable("dpo_keras")
class DPOLoss(StepLoss):
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
        problems += check_loss_weights(loss_type, loss_weights) + check_reduction(reduction)
        if problems:
            raise InputError(problems)
        super().__init__(
            reduction, name, options.get("group_robust"), options.get("shift_momentum")
        )
        self.loss_type = loss_type if isinstance(loss_type, str) else loss_types
        self.beta = float(beta)
        self.label_smoothing = float(label_smoothing)
        self.penalties = [(penalty, float(weight)) for penalty, weight in pairs]
        self.loss_weights = None if loss_weights is None else [float(w) for w in loss_weights]
        self.options = dict(options)
        self._settings = {
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            **self.options,
        }
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
        if self.shift_momentum is not None:
            shift = ops.convert_to_tensor(self.state.reward_shift)
            outputs = {"reward_shift": shift, **outputs}
        return prepare_outputs(outputs, self.needs)

    def _scores(self, outputs: Mapping[str, Tensor]) -> Tensor:
        objectives = [objective for objective, _ in self._objectives]
        speaker = next((o for o in objectives if o.probabilistic), objectives[0])
        return objective_scores(speaker, outputs, self._settings)

    def _preference_loss(
        self, preference: Tensor, outputs: Mapping[str, Tensor], shortfall: Tensor | None = None
    ) -> Tensor:
        return sum(
            weight * objective_loss(objective, preference, outputs, self._settings, shortfall)
            for objective, weight in self._objectives
        )


def _penalty_name(penalty: Any) -> str:
    return penalty if isinstance(penalty, str) else getattr(penalty, "__name__", str(penalty))


def _serialize(penalty: Any) -> Any:
    return penalty if isinstance(penalty, str) else keras.saving.serialize_keras_object(penalty)


def _deserialize(penalty: Any) -> Any:
    return keras.saving.deserialize_keras_object(penalty) if isinstance(penalty, dict) else penalty
