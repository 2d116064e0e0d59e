"""A tf-keras policy as the scorer wants it, and a copy of one."""

from typing import Any

import tensorflow as tf
import tf_keras

from dpo_keras.errors import InputError

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
