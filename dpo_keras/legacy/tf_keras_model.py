"""Direct Preference Optimization as a `tf_keras.Model`."""

from __future__ import annotations

from pathlib import Path

import keras
import tf_keras

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.legacy.tf_keras_policy import make_reference
from dpo_keras.legacy.tf_keras_trainer import Callback, PolicyTrainer, serialized
from dpo_keras.losses import DPOLoss
from dpo_keras.training import dpo_model, supervised_model
from dpo_keras.training.default_callbacks import StartsAtReference
from dpo_keras.utils import JSON, Tensor


@tf_keras.saving.register_keras_serializable("dpo_keras")
class DPOModel(PolicyTrainer):
    """`dpo_keras.DPOModel` for policies of tf-keras: the same loss, metrics and batches.

        loss = -[p log P(y_1) + (1 - p) log P(y_2)] + penalties,  P = softmax(beta log(pi / pi_ref))

    Logits of the whole batch are computed: the chunked head is for KerasHub's models.

    Args:
        policy: a tf-keras model from `{"token_ids", "padding_mask"}`, or from token ids alone, to
            logits `[batch, length, vocabulary]`; functional, sequential, or subclassed (with
            `get_config`, where it is copied or saved).
        reference: `"auto"` or `"frozen_copy"` (a second model with copies of all weights),
            `"cached"` (see `dpo_keras.cache_reference`), `"none"`, or a tf-keras model. It is saved
            with the model.
        dropout: whether the policy's dropout is active in training. Off by default.

    Raises:
        InputError: the policy or the reference cannot be used.

    Example:
        >>> import dpo_keras
        >>> policy = tf_keras.Sequential(
        ...     [tf_keras.Input((None,), dtype="int32"), tf_keras.layers.Embedding(9, 9)])
        >>> model = DPOModel(policy)
        >>> model.compile(tf_keras.optimizers.AdamW(5e-6), dpo_keras.DPOLoss("sigmoid", beta=0.1))
        >>> model.reference.mode, model.metrics_names[:3]
        ('frozen_copy', ['loss', 'preference_loss', 'reward_accuracy'])

    References:
        Rafailov et al., Direct Preference Optimization, arXiv 2305.18290, equation 7.
    """

    def __init__(
        self,
        policy: tf_keras.Model,
        reference: str | tf_keras.Model = "auto",
        dropout: bool = False,
        **options: object,
    ):
        super().__init__(policy, dropout=dropout, **options)
        with self.distribute_strategy.scope():
            self.reference = make_reference(policy, reference)
        self._may_drop_reference = isinstance(reference, str) and reference == "auto"
        # An attribute of this name, because tf-keras saves and restores by attributes.
        self.reference_model = self.reference.model
        self.preference_loss: DPOLoss | None = None

    # The steps of Keras 3's model, on `gradients`, `update` and `report` of tf-keras.
    train_step = dpo_model.DPOModel.train_step
    test_step = dpo_model.DPOModel.test_step
    call = dpo_model.DPOModel.call
    policy_logps = dpo_model.DPOModel.policy_logps
    metric_names = dpo_model.DPOModel.metric_names

    def reference_logps(self, batch: Batch) -> Tensor | None:
        """Return log pi_ref(y | x), `[rows * pairs, 2]` float32; None without a reference."""
        return self.reference.scored(self.scorer, batch).get("logps")

    def compile(
        self,
        optimizer: str | tf_keras.optimizers.Optimizer = "adamw",
        loss: str | DPOLoss = "sigmoid",
        **options: object,
    ) -> None:
        """Configure training as `dpo_keras.DPOModel.compile` does, with an optimizer of tf-keras.

        Raises:
            InputError: as there; or the loss keeps state of its own on parameter servers.
        """
        loss = dpo_model.loss_from(loss)
        stateful = bool(loss.group_robust) or loss.shift_momentum is not None
        if stateful and self._on_parameter_servers():
            rule = (
                f"{loss.loss_type!r} keeps state (group_robust, or the running mean of rewards), "
                "and on parameter servers there is no step that all pairs share"
            )
            hint = "Use another strategy, or another loss."
            raise InputError(InputProblem("loss", rule, hint=hint))
        if self._may_drop_reference and not loss.needs_reference:
            # As in Keras 3: a loss without reference does not pay for the copy that "auto" made.
            self.reference = make_reference(self.policy, "none")
            self.reference_model = None
        self._may_drop_reference = False
        dpo_model.check_has_reference(loss, self.reference.mode)
        self.preference_loss = loss
        with self.distribute_strategy.scope():
            # Variables of Keras 3 in the loss; tf-keras saves them as this model's own.
            variables = [] if loss.state is None else [v.value for v in loss.state.variables]
        self.objective_variables = variables
        super().compile(optimizer, **options)

    def default_callbacks(self) -> list[Callback]:
        """Add a check that the initial loss is that of policy = reference."""
        return [StartsAtReference(), *super().default_callbacks()]

    def get_config(self) -> dict[str, JSON]:
        """Return what the model is rebuilt from: policy, reference and dropout."""
        mode = self.reference.mode
        reference = serialized(self.reference_model) if mode == "model" else mode
        return {**super().get_config(), "reference": reference}

    def get_compile_config(self) -> dict[str, JSON]:
        """Return optimizer and loss, each serialized by its own Keras."""
        if self.preference_loss is None:
            return {}
        return {
            "optimizer": tf_keras.saving.serialize_keras_object(self.optimizer),
            "loss": keras.saving.serialize_keras_object(self.preference_loss),
            "steps_per_execution": self.steps_per_execution,
        }

    def compile_from_config(self, config: dict[str, JSON]) -> None:
        """Compile as the saved model was, the optimizer's state included."""
        if config:
            loss = keras.saving.deserialize_keras_object(config["loss"])
            optimizer = tf_keras.saving.deserialize_keras_object(config["optimizer"])
            self.compile(optimizer, loss, steps_per_execution=config["steps_per_execution"])

    def load_own_variables(self, store: JSON) -> None:
        """Load weights; the policy may have been trained, so it need not equal the reference."""
        super().load_own_variables(store)
        self.reference.starts_as_policy = False

    def load_weights(self, filepath: str | Path, **options: object) -> object:
        """Load weights as `tf_keras.Model.load_weights` does."""
        self.reference.starts_as_policy = False
        return super().load_weights(filepath, **options)


@tf_keras.saving.register_keras_serializable("dpo_keras")
class SupervisedModel(PolicyTrainer):
    """`dpo_keras.SupervisedModel` for tf-keras: the same loss, metrics and batches.

    Args:
        policy: a tf-keras model from token ids (and mask) to logits.
        dropout: whether the policy's dropout is active. On by default, as usual in fine-tuning.

    Example:
        >>> policy = tf_keras.Sequential(
        ...     [tf_keras.Input((None,), dtype="int32"), tf_keras.layers.Embedding(9, 9)])
        >>> model = SupervisedModel(policy)
        >>> model.compile("adam")
        >>> model.metrics_names
        ['loss', 'chosen_logps']
    """

    # The steps of Keras 3's model, on `gradients`, `update` and `report` of tf-keras.
    train_step = supervised_model.SupervisedModel.train_step
    test_step = supervised_model.SupervisedModel.test_step
    call = supervised_model.SupervisedModel.call
    metric_names = supervised_model.SupervisedModel.metric_names

    def __init__(self, policy: tf_keras.Model, dropout: bool = True, **options: object):
        super().__init__(policy, dropout=dropout, **options)
