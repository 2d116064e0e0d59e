"""`DPOLoss`: the Keras loss of preference optimization."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import keras
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.losses import penalties as built_in
from dpo_keras.losses.bradley_terry import (
    as_floating,
    log_likelihood_ratio,
    preference_probabilities,
)
from dpo_keras.losses.objectives import Objective
from dpo_keras.losses.options import OBJECTIVES, check_arguments, outputs_read, penalty_name
from dpo_keras.losses.penalties import PENALTIES
from dpo_keras.losses.scores import Outputs
from dpo_keras.losses.step_loss import StepLoss, total
from dpo_keras.utils import Tensor


@keras.saving.register_keras_serializable("dpo_keras")
class DPOLoss(StepLoss):
    """Direct preference optimization: score -> softmax and LLR -> cross-entropy -> penalties.

    For `loss_type="sigmoid"`, with c and r the log-ratios log π/π_ref of chosen and rejected:

        loss = BCE(y, softmax(β·(c, r))) + Σ weight · penalty       (arXiv 2305.18290, eq. 7)

    Args:
        loss_type: a name in `available()`, or a list of names whose losses are added up (MPO).
        beta: β > 0, strength of the tie to the reference; scale of the scores.
        label_smoothing: ε in [0, 0.5), the rate at which labels are taken to be flipped.
        penalties: name in `PENALTIES` (or a function `(preference, scores, outputs) -> [N]`) ->
            weight >= 0; as a mapping or as pairs.
        loss_weights: a weight >= 0 for each name of a list; ones by default.
        reduction: as in `keras.losses.Loss`; None gives `[N]`.
        name: name of the loss.
        **options: options of the objectives, such as `gamma`; `OPTIONS` in options.py lists them.

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
        given = list(penalties.items() if isinstance(penalties, Mapping) else penalties or ())
        given = [(_by_name(penalty), weight) for penalty, weight in given]
        problems = check_arguments(
            loss_type, beta, label_smoothing, given, loss_weights, reduction, options
        )
        if problems:
            raise InputError(problems)
        super().__init__(
            reduction, name, options.get("group_robust"), options.get("shift_momentum")
        )
        self.loss_type = loss_type if isinstance(loss_type, str) else loss_types
        self.beta = float(beta)
        self.label_smoothing = float(label_smoothing)
        self.penalties = [(penalty, float(weight)) for penalty, weight in given]
        self.loss_weights = None if loss_weights is None else [float(w) for w in loss_weights]
        self.options = dict(options)
        settings = {"beta": self.beta, "label_smoothing": self.label_smoothing, **self.options}
        self.objectives: list[Objective] = [
            OBJECTIVES[name].from_settings(settings) for name in loss_types
        ]

    def call(self, preference: Tensor, outputs: Outputs) -> Tensor:
        """Compute the loss of each pair, `[N]`: the sum of `terms`."""
        return total(self.terms(preference, outputs))

    def terms(self, preference: Tensor, outputs: Outputs) -> dict[str, Tensor]:
        """Compute the parts that the loss is the sum of.

        Args:
            preference: `[N]`, y in [0, 1].
            outputs: see `needs`.

        Returns:
            `preference_loss` `[N]`, and `penalty/<name>` `[N]` for each penalty, its weight
            included. A penalty function of your own finds the softmax of the scores and their LLR
            in `outputs["probabilities"]` `[N, 2]` and `outputs["llr"]` `[N]`.

        Raises:
            InputError: an output is missing or has the wrong shape.
        """
        outputs = self._prepared(outputs)
        preference = prepare_preference(preference, outputs)
        if self.unpaired:  # penalties, too, shall leave the mismatched responses alone
            outputs["rated"] = ops.ones_like(preference)
        scores = self._scores(outputs)  # S = β (log π - log π_ref)
        outputs["probabilities"] = preference_probabilities(scores)  # P = softmax(S)
        outputs["llr"] = log_likelihood_ratio(scores)  # LLR = log P₀ - log P₁
        weights = self.loss_weights or [1.0] * len(self.objectives)
        terms = {
            "preference_loss": sum(
                weight * objective.loss(preference, outputs)
                for objective, weight in zip(self.objectives, weights, strict=True)
            )
        }
        for penalty, weight in self.penalties:
            term = PENALTIES[penalty].term if isinstance(penalty, str) else penalty
            terms[f"penalty/{penalty_name(penalty)}"] = weight * term(preference, scores, outputs)
        return terms

    def term_names(self) -> list[str]:
        """Return the names that `terms` returns, without computing anything."""
        return ["preference_loss", *(f"penalty/{penalty_name(p)}" for p, _ in self.penalties)]

    def scores(self, outputs: Outputs) -> Tensor:
        """Compute S `[N, 2]`, in nats: the implicit rewards that the softmax is taken over.

        For a list of losses they are those of the first that is probabilistic.
        """
        return self._scores(self._prepared(outputs))

    def _scores(self, prepared: Outputs) -> Tensor:
        probabilistic = (objective for objective in self.objectives if objective.probabilistic)
        return next(probabilistic, self.objectives[0]).scores(prepared)

    def _prepared(self, outputs: Outputs) -> Outputs:
        if self.shift_momentum is not None:
            outputs = {"reward_shift": ops.convert_to_tensor(self.state.reward_shift), **outputs}
        return prepare_outputs(outputs, self.needs)

    @property
    def needs(self) -> frozenset[str]:
        """Names of the outputs that have to be there.

        `policy`, `reference`, `lengths`; `policy_shared` and `reference_shared` `[N, 2]` (sums over
        each response's first min(n⁺, n⁻) tokens) for `ld_alpha`; `wpo_log_weight` `[N, 2]` (mean
        over response tokens of log p_t - log Σ p²) for `wpo`; `margin` and `group` `[N]`.
        """
        penalties = (penalty for penalty, _ in self.penalties)
        return outputs_read(self.objectives, penalties, self.options)

    @property
    def needs_reference(self) -> bool:
        """Whether the reference's log-probs are read at all."""
        return "reference" in self.needs

    @property
    def batchwise(self) -> bool:
        """Whether a pair's loss depends on the rest of the batch (AOT).

        Such a loss wants the pairs of all replicas, and their `outputs["weight"]` `[N]`.
        """
        return any(objective.batchwise for objective in self.objectives)

    @property
    def unpaired(self) -> bool:
        """Whether the loss takes rated responses, not pairs (KTO)."""
        return any(objective.unpaired for objective in self.objectives)

    def check_kind(self, rated: bool) -> None:
        """Refuse pairs for a loss on rated responses, and rated responses for one on pairs."""
        if self.unpaired and not rated:
            rule = (
                f"{self.loss_type!r} takes rated responses (prompt, response, desirable), got pairs"
            )
            hint = "Preferences.unpaired() makes them of pairs (in a configuration data.unpair)."
            raise InputError(InputProblem("loss_type", rule, hint=hint))
        if rated and not self.unpaired:
            rule = f"{self.loss_type!r} takes pairs, got rated responses"
            raise InputError(InputProblem("loss_type", rule, hint="Use kto for them."))

    def get_config(self) -> dict[str, Any]:
        """Return the arguments that make this loss again, ready for JSON."""
        penalties: Any = dict(self.penalties)
        if not all(isinstance(penalty, str) for penalty in penalties):
            serialize = keras.saving.serialize_keras_object
            penalties = [[p if isinstance(p, str) else serialize(p), w] for p, w in self.penalties]
        return {
            "loss_type": self.loss_type,
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "penalties": penalties,
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
            make = keras.saving.deserialize_keras_object
            config["penalties"] = [
                (make(p) if isinstance(p, dict) else p, w) for p, w in config["penalties"]
            ]
        return cls(**config)


def _by_name(penalty: Any) -> Any:
    """Return the name of a penalty of this package that is given as a function."""
    name = getattr(penalty, "__name__", None)
    return name if name in PENALTIES and getattr(built_in, name) is penalty else penalty


# -- inputs ------------------------------------------------------------------------------------

PER_PAIR = ("margin", "weight", "rated")
"""Outputs with one value for each pair, `[N]`."""

WITHOUT_GRADIENT = ("reference", "reference_shared", "wpo_log_weight")
"""Outputs that no gradient may enter: with `adapters_off` the reference shares the weights."""

PER_RESPONSE = (*WITHOUT_GRADIENT, "policy", "policy_shared", "lengths")
"""Outputs with one column for each response, `[N, 2]`."""

SOURCE_OF = {
    "reference": "this loss compares with a reference policy: give DPOModel one",
    "margin": "margin=True reads it: give the pairs a `margin` column",
    "group": "group_robust reads it: give the pairs a `group` column",
}


def prepare_outputs(outputs: Outputs, needs: Iterable[str]) -> Outputs:
    """Check the scorer's outputs and convert them: to `[N, 2]` or `[N]`, and to one float dtype.

    That is float64 if `policy` is float64, else float32. None counts as absent, and names that the
    losses do not know pass through.
    """
    if not isinstance(outputs, Mapping):
        kind = type(outputs).__name__
        raise InputError(f"outputs must be a mapping with 'policy' [N, 2] and more, got {kind}.")
    prepared: dict[str, Tensor] = {name: v for name, v in outputs.items() if v is not None}
    problems = [
        InputProblem(
            f"outputs[{name!r}]",
            f"is missing; {SOURCE_OF.get(name, 'the scorer has to provide it')}",
        )
        for name in sorted(needs)
        if name not in prepared
    ]
    dtype = as_floating(prepared["policy"]).dtype if "policy" in prepared else None
    for name in prepared.keys() & set(PER_RESPONSE):
        value = as_floating(prepared[name], dtype)
        if len(value.shape) < 1 or value.shape[-1] != 2:
            rule = "must have the shape [N, 2] (chosen, rejected)"
            problems.append(InputProblem(f"outputs[{name!r}]", rule, tuple(value.shape)))
            continue
        prepared[name] = ops.reshape(value, (-1, 2))
    if problems:
        raise InputError(problems)
    for name in prepared.keys() & set(PER_PAIR):
        prepared[name] = ops.reshape(as_floating(prepared[name], dtype), (-1,))
    if "reward_shift" in prepared:
        prepared["reward_shift"] = as_floating(prepared["reward_shift"], dtype)
    if "group" in prepared:
        prepared["group"] = ops.reshape(ops.cast(prepared["group"], "int32"), (-1,))
    for name in prepared.keys() & set(WITHOUT_GRADIENT):
        prepared[name] = ops.stop_gradient(prepared[name])
    return prepared  # type: ignore[return-value]


def prepare_preference(preference: Tensor, outputs: Outputs) -> Tensor:
    """Convert labels to `[N]` in the outputs' dtype; refuse another number than that of pairs."""
    policy = outputs["policy"]
    labels = ops.reshape(as_floating(preference, policy.dtype), (-1,))
    pairs, given = policy.shape[0], labels.shape[0]
    if pairs is not None and given is not None and pairs != given:
        rule = f"must hold one label for each of the {pairs} pairs"
        raise InputError(InputProblem("preference", rule, given))
    return labels
