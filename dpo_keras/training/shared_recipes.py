"""What a recipe is, for models of Keras 3 and of tf-keras alike: what it minimises and logs."""

from typing import Any

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError
from dpo_keras.losses import DPOLoss
from dpo_keras.scoring.scorer import ResponseScorer
from dpo_keras.training.measures import (
    Sums,
    metric_names,
    outputs_of,
    predictions,
    worst_group,
)
from dpo_keras.training.steps import preference_step, supervised_step


class Recipe:
    """What `PolicyTrainer` asks of its subclasses; beside a model of either Keras as a base."""

    def metric_names(self) -> list[str]:
        """Names that `measure` returns, in the order they are logged."""
        raise NotImplementedError

    def hidden_names(self) -> list[str]:
        """Further names that `measure` returns, kept out of the logs."""
        return []

    def measure(self, batch: Batch, training: bool) -> tuple[Any, Sums]:
        """The loss to minimise and all that is logged, of this replica's rows.

        Args:
            batch: the batch contract.
            training: whether gradients are taken.

        Returns:
            This replica's share of the loss (the replicas' shares add up to it), and
            `{name: (weighted sum, weight)}`.
        """
        raise NotImplementedError

    def derived_metrics(self, means: dict[str, Any]) -> dict[str, Any]:
        """Figures of the averages themselves, such as the worst of several."""
        return {}


class SupervisedRecipe(Recipe):
    """Fine-tuning on chosen responses: what `SupervisedModel` is in either Keras."""

    scorer: ResponseScorer
    dropout: bool

    def metric_names(self) -> list[str]:
        """`loss` (nats per token) and `chosen_logps` (nats per response)."""
        return ["loss", "chosen_logps"]

    def measure(self, batch: Batch, training: bool) -> tuple[Any, Sums]:
        """The loss and its sums over the chosen responses of this replica."""
        return supervised_step(batch, self.scorer(batch, training and self.dropout))

    def call(self, batch: Batch, training: bool = False) -> dict[str, Any]:
        """Log-probs and lengths of the responses."""
        scored = self.scorer(batch, training and self.dropout)
        return {"policy": scored["logps"], "lengths": scored["lengths"]}


class PreferenceRecipe(Recipe):
    """Training on preference pairs: what `DPOModel` is in either Keras."""

    scorer: ResponseScorer

    @property
    def preference_loss(self) -> DPOLoss | None:
        """The loss that the model was compiled with."""
        raise NotImplementedError

    def policy_logps(self, batch: Batch, training: bool = False) -> Any:
        """Log pi(y | x) of each response, `[rows * pairs, 2]` float32."""
        return self.scorer(batch, training=training)["logps"]

    def loss_outputs(self, batch: Batch, training: bool = False) -> dict[str, Any]:
        """What the loss is computed from, with the policy's entropy beside it.

        Args:
            batch: the batch contract of `dpo_keras.batching`.
            training: True while gradients are taken.

        Returns:
            `policy`, `reference` `[N, 2]` float32 (no `reference` where there is none), `lengths`
            `[N, 2]` int32, `weight` `[N]`, `entropy` scalar (mean over response tokens), and what
            else the loss needs; N = rows * pairs.
        """
        return outputs_of(self, batch, training)

    def call(self, batch: Batch, training: bool = False) -> dict[str, Any]:
        """Scores and preferences of a batch: what `predict` returns.

        Returns:
            `probabilities` `[N, 2]`, `llr` `[N]`, `scores` `[N, 2]`, `policy`, `reference`,
            `lengths`.
        """
        return predictions(self.preference_loss, self.loss_outputs(batch, training))

    def metric_names(self) -> list[str]:
        """The logged names, `loss` first."""
        assert self.preference_loss is not None
        return metric_names(self.preference_loss)

    def hidden_names(self) -> list[str]:
        """Names that are measured and not logged."""
        loss = self.preference_loss
        return ["at_reference"] if loss is not None and loss.needs_reference else []

    def derived_metrics(self, means: dict[str, Any]) -> dict[str, Any]:
        """`worst_group_loss`, where the loss is robust over groups."""
        return worst_group(means)

    def measure(self, batch: Batch, training: bool) -> tuple[Any, Sums]:
        """The loss, its terms and the metrics over this replica's pairs."""
        assert self.preference_loss is not None
        outputs = self.loss_outputs(batch, training)
        return preference_step(self.preference_loss, batch, outputs, training)


def loss_from(loss: Any) -> DPOLoss:
    """The loss that `compile(loss=…)` means.

    Args:
        loss: a `DPOLoss`, or the name of one with its defaults.

    Returns:
        The loss.

    Raises:
        InputError: anything else.

    Example:
        >>> loss_from("ipo").loss_type
        'ipo'
    """
    if isinstance(loss, str):
        loss = DPOLoss(loss)
    if not isinstance(loss, DPOLoss):
        raise InputError(f"loss must be a dpo_keras.DPOLoss or its name, got {loss!r}.")
    return loss


def check_has_reference(loss: DPOLoss, mode: str) -> None:
    """Refuses a loss that compares with a reference where there is none.

    Args:
        loss: what the model is compiled with.
        mode: of the model's reference.

    Raises:
        InputError: `mode` is "none" and the loss needs a reference.

    Example:
        >>> check_has_reference(DPOLoss("simpo"), "none")
    """
    if loss.needs_reference and mode == "none":
        raise InputError(
            f"loss {loss.loss_type!r} compares the policy with a reference, and this model "
            "has reference='none' (which reference='auto' becomes where the first loss needs "
            "none). Make DPOModel(policy, reference='frozen_copy'), or use a loss without "
            "reference."
        )
