"""A tf-keras policy as the scorer wants it, and a copy of one."""

from collections.abc import Callable
from typing import Any

import tensorflow as tf
import tf_keras
from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.scoring import ResponseScorer, check_same_vocabulary, references

_INPUTS = ("token_ids", "padding_mask")
_CONTRACT = (
    "policy must map a dict of 'token_ids' and 'padding_mask' (or of 'token_ids' alone), or one "
    "tensor of token ids, to logits [batch, length, vocabulary]"
)


def _call(model: Any, inputs: Any, training: bool) -> Any:
    return model(inputs, training=training)


# tf-keras lets a layer's call have a Python `if` on a tensor, as long as what calls it is
# translated by autograph; this package's own graphs are traced without it.
_with_autograph = tf.autograph.to_graph(_call)


class PolicyCall:
    """A tf-keras policy that is called with `{"token_ids", "padding_mask"}`, whatever it takes.

    What `dpo_keras.response_log_probs`, `cache_reference` and the exported signatures call, where
    a policy takes token ids alone. A policy without mask must be causal: padding stands at the
    end, so no response token sees it.

    Args:
        policy: a functional or sequential model, or a subclassed one. A subclassed one that was
            never called is called with the dict of both; call it once yourself where it takes
            something else.

    Raises:
        InputError: not a tf-keras model, or one that takes other inputs.

    Example:
        >>> policy = tf_keras.Sequential(
        ...     [tf_keras.Input((None,), dtype="int32"), tf_keras.layers.Embedding(9, 9)])
        >>> ids = tf.constant([[1, 2, 3]])
        >>> PolicyCall(policy)({"token_ids": ids, "padding_mask": tf.ones_like(ids)}).shape
        TensorShape([1, 3, 9])
    """

    def __init__(self, policy: Any):
        if not isinstance(policy, tf_keras.Model):
            raise InputError(
                f"policy must be a tf_keras.Model, got {type(policy).__module__}."
                f"{type(policy).__name__}. For a model of Keras 3 use dpo_keras.DPOModel."
            )
        self.model = policy
        self._names = _taken(policy)

    @property
    def weights(self) -> list[Any]:
        """The policy's weights."""
        return self.model.weights

    @property
    def compute_dtype(self) -> str:
        """The dtype that the policy computes in."""
        return self.model.compute_dtype

    def __call__(self, inputs: dict[str, Any], training: bool = False) -> Any:
        """Logits `[batch, length, vocabulary]`.

        Args:
            inputs: `token_ids`, `padding_mask` `[batch, length]` int32.
            training: whether layers such as dropout are active.
        """
        taken = inputs["token_ids"] if self._names is None else {n: inputs[n] for n in self._names}
        return _with_autograph(self.model, taken, training)


def _taken(policy: tf_keras.Model) -> tuple[str, ...] | None:
    """The names of a policy's inputs, or None for one nameless tensor of token ids."""
    structure = _structure(policy)
    if isinstance(structure, dict):
        if "token_ids" in structure and set(structure) <= set(_INPUTS):
            return tuple(structure)
    elif not isinstance(structure, list | tuple):
        return None
    names = [getattr(value, "name", "?") for value in tf.nest.flatten(structure)]
    names = sorted(structure) if isinstance(structure, dict) else names
    raise InputError(
        f"{_CONTRACT}; this {type(policy).__name__} takes {names}. Wrap it in a tf_keras.Model "
        "with that dict of inputs."
    )


def _structure(policy: tf_keras.Model) -> Any:
    if policy.save_spec() is None:
        both = {name: tf.ones((1, 2), tf.int32) for name in _INPUTS}
        try:
            policy(both)
        except Exception as error:
            raise InputError(
                f"{_CONTRACT}; called with the dict of both, this {type(policy).__name__} failed "
                f"({type(error).__name__}: {str(error).splitlines()[0]}). Call it once on what it "
                "takes, or wrap it in a tf_keras.Model with that dict of inputs."
            ) from error
        return both
    return policy.save_spec()[0][0]


def copy_of(policy: tf_keras.Model) -> tf_keras.Model:
    """A second model with the policy's layers and values, not trainable.

    Args:
        policy: built.

    Returns:
        A model that shares no weight with `policy`.

    Raises:
        InputError: the policy cannot be made again from its configuration.

    Example:
        >>> policy = tf_keras.Sequential([tf_keras.Input((2,)), tf_keras.layers.Dense(3)])
        >>> copy = copy_of(policy)
        >>> bool(tf.reduce_all(copy.weights[0] == policy.weights[0])), copy.trainable_weights
        (True, [])
    """
    try:
        copy = tf_keras.models.clone_model(policy)
        if not copy.built:
            PolicyCall(copy)
        shapes = [[tuple(w.shape) for w in model.weights] for model in (policy, copy)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"{len(shapes[1])} weights in the copy, {len(shapes[0])} in the policy"
            )
    except Exception as error:
        raise InputError(
            f"reference: no copy can be made of this {type(policy).__name__} "
            f"({type(error).__name__}: {str(error).splitlines()[0]}). Give the class get_config, "
            "or pass a second instance with the same weights as the reference."
        ) from error
    for source, target in zip(policy.weights, copy.weights, strict=True):
        target.assign(source)
    copy.trainable = False
    return copy


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
