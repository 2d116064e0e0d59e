"""What a tf-keras policy is compared with."""

from collections.abc import Callable
from typing import Any

import tf_keras
from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.legacy.policy import PolicyCall, copy_of
from dpo_keras.scoring import ResponseScorer, check_same_vocabulary, references


class Reference:
    """No reference, and the base of all.

    Not a layer: the model that trains holds `model` itself, so that tf-keras saves it.

    Attributes:
        mode: the name that `DPOModel(reference=…)` takes.
        model: the reference's model, or None.
        starts_as_policy: whether log-ratios must be 0 before the first update.
    """

    mode = "none"
    model: tf_keras.Model | None = None
    starts_as_policy = False

    def scored(
        self, scorer: ResponseScorer, batch: dict[str, Any], shared: bool = False
    ) -> dict[str, Any]:
        """As `dpo_keras.scoring.Reference.scored`."""
        return {}

    def update_from_policy(self, alpha: float = 1.0) -> None:
        """Refuses: only a copy can follow the policy."""
        raise InputError(f"reference={self.mode!r} cannot move; use 'frozen_copy'.")


class Cached(Reference):
    """Log-probs computed before training, which come with each batch."""

    mode = "cached"

    def scored(
        self, scorer: ResponseScorer, batch: dict[str, Any], shared: bool = False
    ) -> dict[str, Any]:
        """The batch's `reference` column."""
        return references.Cached().scored(scorer, batch, shared)


class OtherModel(Reference):
    """A model of its own as the reference.

    Args:
        model: same inputs and same vocabulary as the policy.
        policy: the policy.

    Raises:
        InputError: the vocabularies differ.
    """

    mode = "model"

    def __init__(self, model: tf_keras.Model, policy: tf_keras.Model):
        check_same_vocabulary(policy, model)
        if model is policy:
            raise InputError("reference is the policy itself; use reference='frozen_copy'.")
        self.model = model
        self.model.trainable = False
        self._scorer = ResponseScorer(PolicyCall(model), plain=True)

    def scored(
        self, scorer: ResponseScorer, batch: dict[str, Any], shared: bool = False
    ) -> dict[str, Any]:
        """What its own scorer finds under the other model."""
        found = self._scorer(batch, shared=shared)
        return {name: ops.stop_gradient(value) for name, value in found.items()}


class FrozenCopy(OtherModel):
    """The policy as it was when this was made: a second model with copies of all its weights.

    Args:
        policy: built.
    """

    mode = "frozen_copy"

    def __init__(self, policy: tf_keras.Model):
        super().__init__(copy_of(policy), policy)
        self.starts_as_policy = True
        self._policy = policy

    def update_from_policy(self, alpha: float = 1.0) -> None:
        """Moves the reference toward the policy: ref <- alpha policy + (1 - alpha) ref.

        Args:
            alpha: in (0, 1]; 1 copies (arXiv 2404.09656, eq. 3 and 4).
        """
        assert self.model is not None
        for source, copy in zip(self._policy.weights, self.model.weights, strict=True):
            if copy.dtype.is_floating:
                copy.assign(alpha * source + (1.0 - alpha) * copy)


REFERENCES: dict[str, Callable[[tf_keras.Model], Reference]] = {
    "auto": FrozenCopy,
    "frozen_copy": FrozenCopy,
    "cached": lambda policy: Cached(),
    "none": lambda policy: Reference(),
}


def make_reference(policy: tf_keras.Model, reference: Any) -> Reference:
    """The reference that `DPOModel(policy, reference=…)` means.

    Args:
        policy: a built model.
        reference: `"auto"` or `"frozen_copy"`, `"cached"`, `"none"`, or a tf-keras model.

    Returns:
        The reference.

    Raises:
        InputError: an unknown name, or a model of Keras 3.

    Example:
        >>> policy = tf_keras.Sequential([tf_keras.Input((2,)), tf_keras.layers.Dense(2)])
        >>> make_reference(policy, "auto").mode
        'frozen_copy'
    """
    if isinstance(reference, tf_keras.Model):
        return OtherModel(reference, policy)
    if not isinstance(reference, str) or reference not in REFERENCES:
        raise InputError(
            f"reference must be one of {', '.join(REFERENCES)}, or a tf_keras.Model (adapters_off "
            f"needs the LoRA of Keras 3); got {reference!r}."
        )
    return REFERENCES[reference](policy)
