"""The reference log-probs log pi_ref that a policy is compared with, in five ways.

Most references are the policy's own network with other weights, so they need no second model:
while the reference pass is traced, `ValuesInPlace` puts the reference's weights in place of
the policy's. Only what training can change is copied. After `enable_lora` that is a few adapters,
and the reference is nearly free.
"""

from typing import Any

import keras
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.lora import adapted_layers, adapter_variables, adapters_are_fresh
from dpo_keras.scoring.scorer import ResponseScorer, Scores
from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import ValuesInPlace
from dpo_keras.utils.keras_internals import add_weight_like


class _Untracked:
    """Hold variables or layers of another layer out of sight of Keras' attribute tracking."""

    def __init__(self, variables: list[keras.Variable]):
        self.variables = variables


@keras.saving.register_keras_serializable("dpo_keras")
class Reference(keras.layers.Layer):
    """No reference, and the base of all references.

    Attributes:
        mode: the name that `DPOModel(reference=…)` takes.
        starts_as_policy: whether log-ratios must be 0 before the first update.
    """

    mode = "none"

    def __init__(self, starts_as_policy: bool = False, **kwargs: object):
        super().__init__(trainable=False, **kwargs)
        self.starts_as_policy = starts_as_policy
        self.built = True

    def logps(self, scorer: ResponseScorer, batch: Batch) -> Tensor | None:
        """Compute reference log-probs `[rows * pairs, 2]` float32; None without a reference."""
        return self.scored(scorer, batch).get("logps")

    def scored(self, scorer: ResponseScorer, batch: Batch, shared: bool = False) -> Scores:
        """Find `logps` (and `shared_logps` with `shared`) without gradient; {} for no reference."""
        return {}

    def load_own_variables(self, store: object) -> None:
        """Load the weights. The policy that comes with them may have been trained since."""
        super().load_own_variables(store)
        self.starts_as_policy = False


@keras.saving.register_keras_serializable("dpo_keras")
class FrozenCopy(Reference):
    """The policy as it was when this was made: a copy of every trainable weight."""

    mode = "frozen_copy"

    def __init__(self, policy: keras.Model, **kwargs: object):
        super().__init__(starts_as_policy=True, **kwargs)
        sources = self._to_copy(policy)
        self._sources = _Untracked(sources)
        self.copies = [self._copy(number, source) for number, source in enumerate(sources)]

    def _to_copy(self, policy: keras.Model) -> list[keras.Variable]:
        if not policy.trainable_variables:
            rule = "has no trainable weights, so there is nothing to train"
            raise InputError(InputProblem("policy", rule))
        return list(policy.trainable_variables)

    def _copy(self, number: int, source: keras.Variable) -> keras.Variable:
        copy = add_weight_like(self, source, f"copy_{number}")
        # On JAX an assigned value is not copied, and a step takes both for itself.
        copy.assign(ops.copy(source.value))
        return copy

    def check(self, policy: keras.Model) -> None:
        """Raise InputError where a weight of the policy is trainable that was not copied."""
        known = {id(variable) for variable in self._sources.variables}
        known |= {id(v) for v in adapter_variables(adapted_layers(policy))}
        moved = [v.path for v in policy.trainable_variables if id(v) not in known]
        if moved:
            rule = (
                f"has {len(moved)} weights that became trainable after the reference was made "
                f"(first: {moved[0]}), so the reference would change with the policy"
            )
            hint = "Set `trainable` and LoRA before DPOModel(policy, …)."
            raise InputError(InputProblem("policy", rule, hint=hint))

    def scored(self, scorer: ResponseScorer, batch: Batch, shared: bool = False) -> Scores:
        """Score a batch under the copied weights."""
        pairs = zip(self._sources.variables, self.copies, strict=True)
        with ValuesInPlace((source, copy.value) for source, copy in pairs):
            return _without_gradient(scorer(batch, shared=shared))

    def update_from_policy(self, alpha: float = 1.0) -> None:
        """Set ref <- alpha policy + (1 - alpha) ref, 0 < alpha <= 1 (arXiv 2404.09656, eq. 3-4)."""
        for source, copy in zip(self._sources.variables, self.copies, strict=True):
            copy.assign(alpha * ops.cast(source, copy.dtype) + (1.0 - alpha) * copy)


@keras.saving.register_keras_serializable("dpo_keras")
class AdaptersOff(FrozenCopy):
    """The base model under the adapters: LoRA is off while the reference pass is traced."""

    mode = "adapters_off"

    def __init__(self, policy: keras.Model, **kwargs: object):
        super().__init__(policy, **kwargs)
        self.starts_as_policy = adapters_are_fresh(policy)

    def _to_copy(self, policy: keras.Model) -> list[keras.Variable]:
        layers = adapted_layers(policy)
        if not layers:
            rule = "'adapters_off' needs LoRA, and no layer of the policy has it"
            hint = "Call dpo_keras.enable_lora(policy, 8) first, or use 'frozen_copy'."
            raise InputError(InputProblem("reference", rule, hint=hint))
        self._adapted = _Untracked(layers)
        # KerasHub's `enable_lora` leaves the biases of adapted layers trainable: they are copied.
        adapters = {id(variable) for variable in adapter_variables(layers)}
        return [v for v in policy.trainable_variables if id(v) not in adapters]

    def update_from_policy(self, alpha: float = 1.0) -> None:
        """Raise InputError: the base model under the adapters does not move."""
        rule = "'adapters_off' is the base model, which cannot move toward the policy"
        hint = "Use reference='frozen_copy' with a synchronised reference."
        raise InputError(InputProblem("reference", rule, hint=hint))

    def scored(self, scorer: ResponseScorer, batch: Batch, shared: bool = False) -> Scores:
        """Score a batch without the adapters."""
        # `lora_enabled` is a Python attribute: it selects what is traced, not what is run.
        try:
            for layer in self._adapted.variables:
                layer.lora_enabled = False
            return super().scored(scorer, batch, shared)
        finally:
            for layer in self._adapted.variables:
                layer.lora_enabled = True


@keras.saving.register_keras_serializable("dpo_keras")
class Cached(Reference):
    """Log-probs computed before training, which come with each batch."""

    mode = "cached"

    def scored(self, scorer: ResponseScorer, batch: Batch, shared: bool = False) -> Scores:
        """Return the batch's `reference` column."""
        if shared:
            rule = "needs the reference's log-probs of tokens, and the cache holds sums"
            hint = "Use another reference than 'cached'."
            raise InputError(InputProblem("ld_alpha", rule, hint=hint))
        if "reference" not in batch:
            raise InputError(
                "reference='cached' needs batches with reference log-probs: make the dataset from "
                "dpo_keras.cache_reference(policy, tokenized, …)."
            )
        columns = batch["reference"].shape[-1]
        return {"logps": ops.cast(ops.reshape(batch["reference"], (-1, columns)), "float32")}


@keras.saving.register_keras_serializable("dpo_keras")
class OtherModel(Reference):
    """Another model with the policy's inputs and vocabulary; `policy=None` skips that check."""

    mode = "model"

    def __init__(self, model: keras.Model, policy: keras.Model | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if policy is not None:
            check_same_vocabulary(policy, model)
        self.model = model
        self.model.trainable = False
        self.scorer = ResponseScorer(model)

    def scored(self, scorer: ResponseScorer, batch: Batch, shared: bool = False) -> Scores:
        """Score a batch under the other model, by the model's own scorer."""
        return _without_gradient(self.scorer(batch, shared=shared))


def _without_gradient(scored: Scores) -> Scores:
    return {name: ops.stop_gradient(value) for name, value in scored.items()}


REFERENCES: dict[str, type[Reference]] = {
    reference.mode: reference for reference in (FrozenCopy, AdaptersOff, Cached, Reference)
}


def make_reference(policy: keras.Model, reference: str | keras.Model) -> Reference:
    """Make the reference that `DPOModel(policy, reference=…)` means.

    Args:
        policy: a built model.
        reference: `"frozen_copy"`, `"adapters_off"`, `"cached"`, `"none"`, `"auto"` (fresh
            adapters: switched off; otherwise a frozen copy), or a model.

    Returns:
        The reference layer.

    Raises:
        InputError: an unknown name, or a reference that this policy cannot have.

    Example:
        >>> policy = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        >>> make_reference(policy, "auto").mode
        'frozen_copy'
    """
    if isinstance(reference, keras.Model):
        return OtherModel(reference, policy)
    if reference == "auto":
        reference = "adapters_off" if adapters_are_fresh(policy) else "frozen_copy"
    if reference not in REFERENCES:
        rule = f"must be one of {', '.join(['auto', *REFERENCES])}, or a model"
        raise InputError(InputProblem("reference", rule, reference))
    kind = REFERENCES[reference]
    return kind(policy) if issubclass(kind, FrozenCopy) else kind()


def check_same_vocabulary(policy: object, reference: object, name: str = "") -> None:
    """Check that a reference has the policy's vocabulary, as far as the models tell.

    Compare the tokens of the two tokenizers, where both models have one
    (`model.preprocessor.tokenizer`), and the number of logits, where both models state it.

    Args:
        policy: a model of Keras 3 or of tf-keras.
        reference: another.
        name: what the user calls the reference, such as a path; part of the message.

    Raises:
        InputError: the vocabularies differ. The problem's argument is `reference`.

    Example:
        >>> policy, other = (
        ...     keras.Sequential([keras.Input((2,)), keras.layers.Dense(size)]) for size in (7, 8))
        >>> check_same_vocabulary(policy, policy)
        >>> check_same_vocabulary(policy, other)
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: reference has another vocabulary than the policy (8 tokens, ...
    """
    difference = _vocabulary_difference(policy, reference)
    if difference is not None:
        rule = f"{name} has another vocabulary than the policy ({difference})".lstrip()
        hint = "Use the model that the policy started from, or one with the same tokenizer."
        raise InputError(InputProblem("reference", rule, hint=hint))


def _vocabulary_difference(policy: object, reference: object) -> str | None:
    ours, theirs = _tokens(policy), _tokens(reference)
    sizes = [(_logits(policy), _logits(reference))]
    if ours is not None and theirs is not None:
        sizes.insert(0, (len(ours), len(theirs)))
    for one, other in sizes:
        if one != other and None not in (one, other):
            return f"{other} tokens, the policy has {one}"
    for number, (token, its) in enumerate(zip(ours or (), theirs or (), strict=False)):
        if token != its:
            return f"token {number} is {its!r}, the policy's is {token!r}"
    return None


def _logits(model: object) -> int | None:
    shape = getattr(model, "output_shape", None)
    return shape[-1] if isinstance(shape, tuple) else None


def _tokens(model: object) -> list[str] | None:
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if tokenizer is None or not hasattr(tokenizer, "id_to_token"):
        return None
    try:
        # In the order of the ids: get_vocabulary() returns them in whatever order the file has.
        return [tokenizer.id_to_token(i) for i in range(tokenizer.vocabulary_size() or 0)] or None
    except (NotImplementedError, ValueError):  # KerasHub: none, or not loaded from its file yet
        return None
