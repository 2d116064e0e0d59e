"""A tf-keras policy as the scorer calls it, and what it is compared with."""

from __future__ import annotations

import tensorflow as tf
import tf_keras
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring import ResponseScorer, check_same_vocabulary, references
from dpo_keras.scoring.scorer import Scores
from dpo_keras.utils import Tensor

_INPUTS = ("token_ids", "padding_mask")
_CONTRACT = (
    "must map a dict of 'token_ids' and 'padding_mask' (or of 'token_ids' alone), or one tensor of "
    "token ids, to logits [batch, length, vocabulary]"
)


def _call(model: tf_keras.Model, inputs: Tensor | dict[str, Tensor], training: bool) -> Tensor:
    return model(inputs, training=training)


# A layer of tf-keras may have a Python `if` on a tensor in its call, as long as autograph
# translates the caller. This package traces its own graphs without autograph.
_with_autograph = tf.autograph.to_graph(_call)


class PolicyCall:
    """A tf-keras policy that is called with `{"token_ids", "padding_mask"}`, whatever it takes.

    Pass it to `dpo_keras.response_log_probs` and `cache_reference` where a policy takes token ids
    alone. A policy without mask must be causal: padding stands at the end, so no response token
    sees it.

    Args:
        policy: a functional or sequential model, or a subclassed one. A subclassed one that was
            never called is called with the dict of both. If it takes something else, call it once
            yourself.

    Raises:
        InputError: this is not a tf-keras model, or it takes other inputs.

    Example:
        >>> policy = tf_keras.Sequential(
        ...     [tf_keras.Input((None,), dtype="int32"), tf_keras.layers.Embedding(9, 9)])
        >>> ids = tf.constant([[1, 2, 3]])
        >>> PolicyCall(policy)({"token_ids": ids, "padding_mask": tf.ones_like(ids)}).shape
        TensorShape([1, 3, 9])
    """

    def __init__(self, policy: tf_keras.Model):
        if not isinstance(policy, tf_keras.Model):
            kind = type(policy)
            rule = f"must be a tf_keras.Model, got {kind.__module__}.{kind.__name__}"
            hint = "For a model of Keras 3 use dpo_keras.DPOModel."
            raise InputError(InputProblem("policy", rule, hint=hint))
        self.model = policy
        self._names = _input_names(policy)

    @property
    def weights(self) -> list[tf.Variable]:
        """The policy's weights."""
        return self.model.weights

    @property
    def compute_dtype(self) -> str:
        """The dtype that the policy computes in."""
        return self.model.compute_dtype

    def __call__(self, inputs: dict[str, Tensor], training: bool = False) -> Tensor:
        """Return logits `[batch, length, vocabulary]` of `token_ids` and `padding_mask`."""
        taken = inputs["token_ids"] if self._names is None else {n: inputs[n] for n in self._names}
        return _with_autograph(self.model, taken, training)


def _input_names(policy: tf_keras.Model) -> tuple[str, ...] | None:
    """Return the names of a policy's inputs; None for one nameless tensor of token ids."""
    structure = _inputs(policy)
    if isinstance(structure, dict):
        if "token_ids" in structure and set(structure) <= set(_INPUTS):
            return tuple(structure)
        names = sorted(structure)
    elif isinstance(structure, list | tuple):
        names = [getattr(value, "name", "?") for value in tf.nest.flatten(structure)]
    else:
        return None
    rule = f"{_CONTRACT}; this {type(policy).__name__} takes {names}"
    hint = "Wrap it in a tf_keras.Model with that dict of inputs."
    raise InputError(InputProblem("policy", rule, hint=hint))


def _inputs(policy: tf_keras.Model) -> Tensor | dict[str, Tensor] | list[Tensor]:
    if policy.save_spec() is not None:
        return policy.save_spec()[0][0]
    both = {name: tf.ones((1, 2), tf.int32) for name in _INPUTS}
    try:
        policy(both)
    except Exception as error:
        rule = f"{_CONTRACT}; this {type(policy).__name__} failed on both ({_first_line(error)})"
        hint = "Call it once on what it takes, or wrap it in a tf_keras.Model with that dict."
        raise InputError(InputProblem("policy", rule, hint=hint)) from error
    return both


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0]}"


class Reference:
    """What a tf-keras policy is compared with.

    It is no layer: the model that trains holds `model` itself, so that tf-keras saves it.

    Attributes:
        mode: the name that `DPOModel(reference=…)` takes, or "model".
        model: the reference's model; None where the mode has none.
        starts_as_policy: whether log-ratios must be 0 before the first update.
    """

    def __init__(self, mode: str, policy: tf_keras.Model, model: tf_keras.Model | None = None):
        self.mode = mode
        self.model = model
        self.starts_as_policy = mode == "frozen_copy"
        self._policy = policy
        if model is not None:
            model.trainable = False
            self._scorer = ResponseScorer(PolicyCall(model), plain=True)

    def scored(self, scorer: ResponseScorer, batch: Batch, shared: bool = False) -> Scores:
        """Score a batch as `dpo_keras.scoring.Reference.scored` does, without gradient."""
        if self.mode == "cached":
            return references.Cached().scored(scorer, batch, shared)
        found = {} if self.model is None else self._scorer(batch, shared=shared)
        return {name: ops.stop_gradient(value) for name, value in found.items()}

    def update_from_policy(self, alpha: float = 1.0) -> None:
        """Move a copy: ref <- alpha policy + (1 - alpha) ref (arXiv 2404.09656, eq. 3 and 4)."""
        if self.mode != "frozen_copy" or self.model is None:
            rule = f"{self.mode!r} cannot move; use 'frozen_copy'"
            raise InputError(InputProblem("reference", rule))
        for source, copy in zip(self._policy.weights, self.model.weights, strict=True):
            if copy.dtype.is_floating:
                copy.assign(alpha * source + (1.0 - alpha) * copy)


def make_reference(policy: tf_keras.Model, reference: str | tf_keras.Model) -> Reference:
    """Return the reference that `DPOModel(policy, reference=…)` means."""
    if isinstance(reference, tf_keras.Model):
        check_same_vocabulary(policy, reference)
        if reference is policy:
            rule = "is the policy itself; use reference='frozen_copy'"
            raise InputError(InputProblem("reference", rule))
        return Reference("model", policy, reference)
    if reference in ("auto", "frozen_copy"):
        return Reference("frozen_copy", policy, _copy_of(policy))
    if reference in ("cached", "none"):
        return Reference(reference, policy)
    rule = (
        "must be one of auto, frozen_copy, cached, none, or a tf_keras.Model (adapters_off needs "
        "the LoRA of Keras 3)"
    )
    raise InputError(InputProblem("reference", rule, reference))


def _copy_of(policy: tf_keras.Model) -> tf_keras.Model:
    """Return a second model with the policy's layers and values."""
    try:
        copy = tf_keras.models.clone_model(policy)
        if not copy.built:
            PolicyCall(copy)
        shapes = [[tuple(w.shape) for w in model.weights] for model in (policy, copy)]
        if shapes[0] != shapes[1]:
            raise ValueError("its weights have other shapes")
    except Exception as error:
        rule = f"cannot be a copy of this {type(policy).__name__} ({_first_line(error)})"
        hint = "Give the class get_config, or pass a second instance with the same weights."
        raise InputError(InputProblem("reference", rule, hint=hint)) from error
    for source, target in zip(policy.weights, copy.weights, strict=True):
        target.assign(source)
    return copy
