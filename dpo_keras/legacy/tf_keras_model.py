"""Direct Preference Optimization as a `tf_keras.Model`."""

from typing import Any

import keras
import tf_keras

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError
from dpo_keras.legacy.tf_keras_policy import Reference, make_reference
from dpo_keras.legacy.tf_keras_trainer import PolicyTrainer
from dpo_keras.losses import DPOLoss
from dpo_keras.training import dpo_model, supervised_model
from dpo_keras.training.default_callbacks import StartsAtReference
from dpo_keras.training.metrics import preference_metric_names


@tf_keras.saving.register_keras_serializable("dpo_keras")
class DPOModel(PolicyTrainer):
    """`dpo_keras.DPOModel` for policies of tf-keras: the same loss, metrics and batches.

        loss = -[p log P(y_1) + (1 - p) log P(y_2)] + penalties,  P = softmax(beta log(pi / pi_ref))

    Logits of the whole batch are computed (the chunked head is for KerasHub's models).

    Args:
        policy: a tf-keras model from `{"token_ids", "padding_mask"}`, or from token ids alone, to
            logits `[batch, length, vocabulary]`; functional, sequential, or subclassed (with
            `get_config` where a copy or a saved file is wanted).
        reference: `"auto"` or `"frozen_copy"` (a second model with copies of all weights),
            `"cached"` (see `dpo_keras.cache_reference`), `"none"`, or a tf-keras model. Saved
            with the model.
        dropout: whether the policy's dropout is active in training. Off by default.

    Raises:
        InputError: a policy or a reference that cannot be used.

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
        self, policy: tf_keras.Model, reference: Any = "auto", dropout: bool = False, **options: Any
    ):
        super().__init__(policy, dropout=dropout, **options)
        with self.distribute_strategy.scope():
            self._held.reference = make_reference(policy, reference)
        self._may_drop_reference = isinstance(reference, str) and reference == "auto"
        # An attribute of this name, because tf-keras saves and restores by attributes.
        self.reference_model = self.reference.model
        self._held.loss = None

    @property
    def reference(self) -> Reference:
        """What the policy is compared with."""
        return self._held.reference

    @property
    def preference_loss(self) -> DPOLoss | None:
        """The loss that the model was compiled with."""
        return self._held.loss

    # -- the method ------------------------------------------------------------------------

    # The steps of Keras 3's model, on `gradients`, `update` and `report` of tf-keras.
    train_step = dpo_model.DPOModel.train_step
    test_step = dpo_model.DPOModel.test_step
    call = dpo_model.DPOModel.call
    policy_logps = dpo_model.DPOModel.policy_logps

    def metric_names(self) -> list[str]:
        """Return the names that both steps measure, `loss` first."""
        assert self.preference_loss is not None
        return preference_metric_names(self.preference_loss)

    def reference_logps(self, batch: Batch) -> Any:
        """Log pi_ref(y | x) of each response, `[rows * pairs, 2]` float32; None without one."""
        return self.reference.scored(self.scorer, batch).get("logps")

    # -- the loss --------------------------------------------------------------------------

    def compile(self, optimizer: Any = "adamw", loss: Any = "sigmoid", **options: Any) -> None:
        """Configures training.

        Args:
            optimizer: any tf-keras optimizer or its name.
            loss: a `dpo_keras.DPOLoss`, or the name of one with its defaults.
            **options: as `tf_keras.Model.compile`: `steps_per_execution`, `run_eagerly`,
                `jit_compile`.

        Raises:
            InputError: a loss that is no DPOLoss, needs a reference where there is none, or keeps
                state of its own on parameter servers.
        """
        loss = dpo_model.loss_from(loss)
        stateful = bool(loss.group_robust) or loss.shift_momentum is not None
        if stateful and self._on_parameter_servers():
            raise InputError(
                f"loss {loss.loss_type!r} keeps figures of all pairs from step to step "
                "(group_robust, or the running mean of rewards), and on parameter servers there "
                "is no step that all pairs share. Use another strategy, or another loss."
            )
        if self._may_drop_reference and not loss.needs_reference:
            # As in Keras 3: a loss without reference does not pay for the copy that "auto" made.
            self._held.reference = make_reference(self.policy, "none")
            self.reference_model = None
        self._may_drop_reference = False
        dpo_model.check_has_reference(loss, self.reference.mode)
        self._held.loss = loss
        with self.distribute_strategy.scope():
            # Keras 3 holds them; tf-keras saves them as this model's own.
            variables = [] if loss.state is None else [v.value for v in loss.state.variables]
        self.objective_variables = variables
        super().compile(optimizer, **options)

    def default_callbacks(self) -> list[Any]:
        """As every trainer's, and the check that the first loss is that of an equal reference."""
        return [StartsAtReference(), *super().default_callbacks()]

    # -- saving ----------------------------------------------------------------------------

    def get_config(self) -> dict[str, Any]:
        """Policy, reference and dropout: all that a saved model is rebuilt from."""
        reference: Any = self.reference.mode
        if reference == "model":
            reference = tf_keras.saving.serialize_keras_object(self.reference_model)
            reference.pop("compile_config", None)
        return {**super().get_config(), "reference": reference}

    @classmethod
    def from_config(cls, config: dict[str, Any], custom_objects: Any = None) -> "DPOModel":
        """Rebuilds the model."""
        config = dict(config)
        if isinstance(config.get("reference"), dict):
            config["reference"] = tf_keras.saving.deserialize_keras_object(
                config["reference"], custom_objects
            )
        return super().from_config(config, custom_objects)

    def get_compile_config(self) -> dict[str, Any]:
        """Optimizer and loss, each serialized by its own Keras."""
        if self.preference_loss is None:
            return {}
        return {
            "optimizer": tf_keras.saving.serialize_keras_object(self.optimizer),
            "loss": keras.saving.serialize_keras_object(self.preference_loss),
            "steps_per_execution": self.steps_per_execution,
        }

    def compile_from_config(self, config: dict[str, Any]) -> None:
        """Compiles as the saved model was, the optimizer's state included."""
        if config:
            config = dict(config)
            loss = keras.saving.deserialize_keras_object(config.pop("loss"))
            optimizer = tf_keras.saving.deserialize_keras_object(config.pop("optimizer"))
            self.compile(optimizer, loss, **config)

    def load_own_variables(self, store: Any) -> None:
        """Loads; the policy that comes with it may have been trained since."""
        super().load_own_variables(store)
        self.reference.starts_as_policy = False

    def load_weights(self, filepath: Any, **options: Any) -> Any:
        """As `tf_keras.Model.load_weights`."""
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

    def __init__(self, policy: tf_keras.Model, dropout: bool = True, **options: Any):
        super().__init__(policy, dropout=dropout, **options)

    def metric_names(self) -> list[str]:
        """Return `loss`, in nats per token, and `chosen_logps`, in nats per response."""
        return ["loss", "chosen_logps"]
