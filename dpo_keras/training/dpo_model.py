"""Direct Preference Optimization as a `keras.Model`: `DPOModel.train_step` is the method."""

from __future__ import annotations

from collections.abc import Mapping

import keras
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.losses import DPOLoss, Outputs, log_likelihood_ratio, preference_probabilities
from dpo_keras.scoring import lora
from dpo_keras.scoring.auxiliary_loss import keeps_auxiliary_loss
from dpo_keras.scoring.references import FrozenCopy, Reference, make_reference
from dpo_keras.scoring.scorer import compared_tokens, sum_by_response
from dpo_keras.training.default_callbacks import StartsAtReference
from dpo_keras.training.distribution import gather_over_replicas, replica_count, sum_over_replicas
from dpo_keras.training.metrics import (
    MetricSums,
    preference_metric_names,
    preference_sums,
    with_auxiliary_loss,
)
from dpo_keras.training.policy_trainer import PolicyTrainer
from dpo_keras.utils import JSON, Tensor
from dpo_keras.utils.keras_internals import forget_layer


@keras.saving.register_keras_serializable("dpo_keras")
class DPOModel(PolicyTrainer):
    """Train a policy on preference pairs, against a reference.

    For a prompt x with responses y_1 (chosen) and y_2 (rejected), and the probability p that
    people prefer y_1, each step averages over the weights of all pairs in the global batch

        loss = -[p log P(y_1) + (1 - p) log P(y_2)] + penalties
        P    = softmax(S(y_1), S(y_2)),   S(y) = beta (log pi(y | x) - log pi_ref(y | x))

    Args:
        policy: a KerasHub causal language model (with LoRA or without), or any Keras model from
            `{"token_ids", "padding_mask"}` to logits `[batch, length, vocabulary]`.
        reference: `"auto"` (fresh LoRA adapters: the base model under them, at no cost; otherwise
            a frozen copy), `"frozen_copy"`, `"adapters_off"`, `"cached"` (log-probs come with the
            batches, see `dpo_keras.cache_reference`), `"none"` (for losses without reference), or
            a model with the policy's vocabulary. It is state of this model: saved, loaded, and
            never confused with the policy.
        dropout: whether the policy's dropout is active in training. Off by default.
        remat: gradient checkpointing: recompute transformer blocks in the backward pass.
        auxiliary_loss: `"keep"` adds the losses that the policy's own layers add, such as those of
            a mixture of experts' routers, each with its own weight; `"drop"` leaves them out.

    Raises:
        InputError: a policy or a reference that cannot be used.

    Example:
        >>> import keras_hub, dpo_keras
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=64, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> policy = keras_hub.models.GPT2CausalLM(backbone)
        >>> model = DPOModel(policy, reference="auto")
        >>> model.compile(optimizer="adam", loss=dpo_keras.DPOLoss("sigmoid", beta=0.1))
        >>> model.reference.mode
        'frozen_copy'

    References:
        Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7.
    """

    preference_loss: DPOLoss = None  # type: ignore[assignment]  # until it is compiled
    scores_rewards = False
    """Whether the scorer finds rewards in place of log-probs, as a RewardModel's does."""

    def __init__(
        self,
        policy: keras.Model,
        reference: str | keras.Model = "auto",
        dropout: bool = False,
        remat: bool = False,
        auxiliary_loss: str = "keep",
        **kwargs: object,
    ):
        super().__init__(policy, dropout=dropout, remat=remat, **kwargs)
        self.auxiliary_loss = auxiliary_loss
        self.has_auxiliary_loss = keeps_auxiliary_loss(policy, auxiliary_loss)
        self.reference: Reference = make_reference(policy, reference)
        self._may_drop_reference = isinstance(reference, str) and reference == "auto"

    # -- the method ------------------------------------------------------------------------

    def train_step(self, batch: Batch) -> MetricSums:
        """Update the policy on one batch of preference pairs.

        1. Score:                S(y) = beta (log pi(y | x) - log pi_ref(y | x))
        2. Softmax:              P = softmax(S(y_1), S(y_2))
        3. Log-likelihood ratio: LLR = log P(y_1) - log P(y_2) = S(y_1) - S(y_2)
        4. Loss:                 mean over the pairs of BCE(p, P) + penalties (+ routers' losses)
        5. Update:               weights <- optimizer(weights, d loss / d weights)

        The formulas are those of `DPOLoss("sigmoid")`; other losses replace S or the BCE.
        """
        loss = self.preference_loss

        def step_loss() -> tuple[Tensor, MetricSums]:
            outputs = outputs_of(self, batch, training=True, auxiliary=True)  # log pi, log pi_ref
            preference, outputs = pairs_of_step(loss, batch, outputs)
            scores = loss.scores(outputs)  # 1.
            probabilities = preference_probabilities(scores)  # 2.
            llr = log_likelihood_ratio(scores)  # 3.
            terms = loss.terms(preference, outputs)  # 4. BCE and penalties of each pair
            mean = mean_over_pairs(loss, terms, outputs)
            sums = preference_sums(
                loss, batch, outputs, preference, scores, probabilities, llr, terms
            )
            return with_auxiliary_loss(mean, sums, outputs.get("collected"))

        gradients, sums = self.gradients(step_loss)  # 5.
        norm = self.update(gradients, weight=sums["loss"][1])
        return self.report(batch, {**sums, "grad_norm": (norm, 1.0)})

    def test_step(self, batch: Batch) -> MetricSums:
        """Measure one batch: steps 1 to 4 of `train_step`, without dropout."""
        loss = self.preference_loss
        outputs = outputs_of(self, batch, auxiliary=True)
        preference, outputs = pairs_of_step(loss, batch, outputs)
        scores = loss.scores(outputs)
        probabilities = preference_probabilities(scores)
        llr = log_likelihood_ratio(scores)
        terms = loss.terms(preference, outputs)
        sums = preference_sums(loss, batch, outputs, preference, scores, probabilities, llr, terms)
        _, sums = with_auxiliary_loss(0.0, sums, outputs.get("collected"))
        return self.report(batch, sums)

    def call(self, batch: Batch, training: bool = False) -> dict[str, Tensor]:
        """Score a batch: what `predict` returns.

        Returns:
            `probabilities` `[N, 2]`, `llr` `[N]`, `scores` `[N, 2]` (of the default loss before
            `compile`), `policy`, `reference`, `lengths`, and what else the loss needs.
        """
        loss = self.preference_loss
        if loss is not None:
            loss.check_kind("rated" in batch)
        outputs = outputs_of(self, batch, training)
        scores = (loss or DPOLoss()).scores(outputs)
        return {
            "probabilities": preference_probabilities(scores),
            "llr": log_likelihood_ratio(scores),
            "scores": scores,
            **{name: v for name, v in outputs.items() if name not in ("entropy", "weight")},
        }

    def metric_names(self) -> list[str]:
        """Return the names that both steps measure, `loss` first."""
        names = preference_metric_names(self.preference_loss)
        return [*names, "auxiliary_loss"] if self.has_auxiliary_loss else names

    def policy_logps(self, batch: Batch, training: bool = False) -> Tensor:
        """Return log pi(y | x) of each response, `[rows * pairs, 2]` float32."""
        return self.scorer(batch, training=training)["logps"]

    def reference_logps(self, batch: Batch) -> Tensor:
        """Return log pi_ref(y | x), `[rows * pairs, 2]` float32; None without a reference."""
        return self.reference.logps(self.scorer, batch)

    # -- Keras' interface ------------------------------------------------------------------

    def compile(
        self,
        optimizer: str | keras.optimizers.Optimizer = "adamw",
        loss: str | DPOLoss = "sigmoid",
        *,
        jit_compile: bool | str = "auto",
        **kwargs: object,
    ) -> None:
        """Configure training.

        Args:
            optimizer: any Keras optimizer or its name.
            loss: a `DPOLoss`, or the name of one with its defaults.
            jit_compile: XLA; `"auto"` means False.
            **kwargs: `steps_per_execution`, `run_eagerly`, `auto_scale_loss` of `keras.Model`.

        Raises:
            InputError: a loss that is no DPOLoss, or needs a reference where there is none.
        """
        loss = loss_from(loss)
        check_scores(loss, self.scores_rewards)
        if self._may_drop_reference and not loss.needs_reference:
            # The loss shall not pay for the copy that "auto" made. Dropped once and never made
            # again: a copy of weights trained since would be another reference.
            forget_layer(self, self.reference)
            self.reference = make_reference(self.policy, "none")
        self._may_drop_reference = False
        check_has_reference(loss, self.reference.mode)
        if isinstance(self.reference, FrozenCopy):
            self.reference.check(self.policy)
        self.preference_loss = loss
        with self.variable_scope():
            # Held here, so that a loss's own variables are saved with the model.
            self.objective_state = loss.state
        super().compile(optimizer, loss, jit_compile=jit_compile, **kwargs)

    def default_callbacks(self) -> list[keras.callbacks.Callback]:
        """Add a check that the initial loss is that of policy = reference."""
        return [StartsAtReference(), *super().default_callbacks()]

    def get_config(self) -> dict[str, JSON]:
        """Return what the model is rebuilt from: policy, reference, adapters and options."""
        reference: JSON = self.reference.mode
        if reference == "model":
            reference = lora.serialized_policy(self.reference.model)
        further = {"reference": reference, "auxiliary_loss": self.auxiliary_loss}
        return {**super().get_config(), **further}

    @classmethod
    def from_config(cls, config: dict[str, JSON], custom_objects: JSON = None) -> DPOModel:
        """Rebuild the model that `get_config` describes, adapters enabled."""
        config = dict(config)
        if isinstance(config.get("reference"), dict):
            config["reference"] = lora.restored_policy(config["reference"], custom_objects)
        return super().from_config(config, custom_objects)

    def get_compile_config(self) -> dict[str, JSON]:
        """Return optimizer and loss, serialized."""
        if not self.compiled:
            return {}
        return {
            "optimizer": keras.saving.serialize_keras_object(self.optimizer),
            "loss": keras.saving.serialize_keras_object(self.preference_loss),
            "jit_compile": self.jit_compile,
            "steps_per_execution": self.steps_per_execution,
        }

    def compile_from_config(self, config: dict[str, JSON]) -> None:
        """Compile as the saved model was, the optimizer's state included."""
        if config:
            self.compile(**keras.saving.deserialize_keras_object(config))


def outputs_of(
    model: keras.Model, batch: Batch, training: bool = False, auxiliary: bool = False
) -> Outputs:
    """Score a batch under policy and reference: all that the model's loss asks for.

    Args:
        model: a `DPOModel`, of Keras 3 or tf-keras. Uncompiled, it scores policy and reference.
        batch: the batch contract of `dpo_keras.batching`.
        training: whether dropout is active, where `model.dropout` allows it.
        auxiliary: whether to collect what the policy's layers add to the loss, where it counts.

    Returns:
        `policy`, `reference` `[N, 2]` float32 (no `reference` where the loss needs none or the
        model has none), `lengths` `[N, 2]` int32, `entropy` scalar (mean over response tokens),
        `weight` `[N]`, and what else `DPOLoss.needs` names; N = rows * pairs.

    Raises:
        InputError: the pairs lack a column that the loss needs.
    """
    loss = model.preference_loss
    needs = frozenset({"reference"}) if loss is None else loss.needs
    shared, weighted = "policy_shared" in needs, "wpo_log_weight" in needs
    collected: list[Tensor] | None = [] if auxiliary and model.has_auxiliary_loss else None
    batch = model.scorer.prepared(batch)
    under_reference: dict[str, Tensor] = {}
    if "reference" in needs:
        under_reference = model.reference.scored(model.scorer, batch, shared)
    statistics = ("entropy", *(["log_squared_norm"] if weighted else []))
    scored = model.scorer(batch, training and model.dropout, statistics, shared, collected)
    compared = compared_tokens(batch)
    tokens = ops.maximum(ops.sum(ops.cast(compared, "float32")), 1.0)
    outputs: Outputs = {
        "policy": scored["logps"],
        "lengths": scored["lengths"],
        "entropy": ops.sum(ops.where(compared, scored["entropy"][..., None], 0.0)) / tokens,
        "weight": ops.reshape(batch["weight"], (-1,)),
    }
    if collected is not None:
        outputs["collected"] = collected
    if "logps" in under_reference:
        outputs["reference"] = under_reference["logps"]
    if shared:
        outputs["policy_shared"] = scored["shared_logps"]
        outputs["reference_shared"] = under_reference["shared_logps"]
    if weighted:
        outputs["wpo_log_weight"] = wpo_log_weight(batch, scored)
    if "margin" in batch:
        outputs["margin"] = ops.reshape(batch["margin"], (-1,))
    if "group" in batch:
        outputs["group"] = ops.reshape(batch["group"], (-1,))
    missing = sorted({"margin", "group"} & needs - set(outputs))
    if missing:
        raise InputError(
            f"the loss needs {' and '.join(missing)} of every pair, and the pairs have none. "
            "Give the records those columns."
        )
    return outputs


def pairs_of_step(loss: DPOLoss, batch: Batch, outputs: Outputs) -> tuple[Tensor, Outputs]:
    """Return the labels `[N]` and the outputs of the pairs that a replica compares.

    A batchwise loss compares all pairs of the step, so for it every replica gets those of all.
    """
    loss.check_kind("rated" in batch)
    preference = ops.reshape(batch["preference"], (-1,))
    if not loss.batchwise or replica_count() == 1:
        return preference, outputs
    own = {name: v for name, v in outputs.items() if name in ("entropy", "collected")}
    columns = {name: value for name, value in outputs.items() if name not in own}
    gathered = gather_over_replicas({**columns, "preference": preference})
    preference = gathered.pop("preference")
    return preference, {**gathered, **own}  # type: ignore[typeddict-item]


def mean_over_pairs(loss: DPOLoss, terms: Mapping[str, Tensor], outputs: Outputs) -> Tensor:
    """Reduce the terms of a step to this replica's share of the loss; the shares add up to it.

    loss = sum_pairs w (BCE + penalties) / sum_pairs w,   both sums over all replicas
    """
    weight = outputs["weight"]
    if loss.batchwise and replica_count() > 1:  # every replica has the terms of all pairs
        return loss.combine(terms, weight, outputs, training=True) / replica_count()
    return loss.combine(terms, weight, outputs, training=True, all_reduce=sum_over_replicas)


def wpo_log_weight(batch: Batch, scored: Mapping[str, Tensor]) -> Tensor:
    """Return WPO's log-weight, the mean over tokens of log p_t - log sum p^2, `[N, 2]`."""
    values = scored["token_logps"] - scored["log_squared_norm"]
    sums = sum_by_response(values, compared_tokens(batch))
    return ops.stop_gradient(sums / ops.maximum(ops.cast(scored["lengths"], "float32"), 1.0))


def loss_from(loss: str | DPOLoss) -> DPOLoss:
    """Return the loss that `compile(loss=…)` means: a `DPOLoss`, or the name of one."""
    if isinstance(loss, str):
        loss = DPOLoss(loss)
    if not isinstance(loss, DPOLoss):
        raise InputError(InputProblem("loss", "must be a dpo_keras.DPOLoss or its name", loss))
    return loss


def check_scores(loss: DPOLoss, rewards: bool) -> None:
    """Refuse the objective of reward models for policies, and the others for reward models."""
    if loss.of_policies == rewards:
        rule = "must be 'reward', the Bradley-Terry likelihood, for a RewardModel"
        hint = "To train a policy, make a DPOModel."
        if not rewards:
            rule = "'reward' speaks of rewards, and a policy has log-probs"
            hint = "Make a dpo_keras.RewardModel, or choose another objective."
        raise InputError(InputProblem("loss", rule, loss.loss_type, hint))


def check_has_reference(loss: DPOLoss, mode: str) -> None:
    """Refuse a loss that compares with a reference for a model with `reference="none"`."""
    if loss.needs_reference and mode == "none":
        rule = (
            f"{loss.loss_type!r} compares the policy with a reference, and this model has "
            "reference='none' (which reference='auto' becomes where the first loss needs none)"
        )
        hint = "Make DPOModel(policy, reference='frozen_copy'), or use a loss without reference."
        raise InputError(InputProblem("loss", rule, hint=hint))
