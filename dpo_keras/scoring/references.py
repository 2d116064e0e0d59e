"""What the policy is compared with: log pi_ref, five ways.

A reference here is the same network with other weights, so it needs no second model: while the
reference pass is traced, `keras.StatelessScope` puts the weights it should see in place of the
policy's own. What is copied is only what training can change. After `enable_lora` that is a few
adapters, and the reference is nearly free.
"""

from typing import Any, Protocol, runtime_checkable

import keras
from keras import ops

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.lora import (
    adapted_layers,
    adapter_variables,
    adapters_are_fresh,
)
from dpo_keras.scoring.scorer import ResponseScorer

Pairs = list[tuple[Any, Any]]


class _Untracked:
    """Holds variables that belong to another layer, out of sight of Keras' attribute tracking."""

    def __init__(self, variables: list[Any]):
        self.variables = variables


def _without_gradient(scored: dict[str, Any]) -> dict[str, Any]:
    return {name: ops.stop_gradient(value) for name, value in scored.items()}


@keras.saving.register_keras_serializable("dpo_keras")
class Reference(keras.layers.Layer):
    """Base of all references.

    Attributes:
        mode: the name that `DPOModel(reference=…)` takes.
        starts_as_policy: whether log-ratios must be 0 before the first update.
    """

    mode = "none"

    def __init__(self, starts_as_policy: bool = False, **kwargs: Any):
        super().__init__(trainable=False, **kwargs)
        self.starts_as_policy = starts_as_policy
        self.built = True

    def logps(self, scorer: ResponseScorer, batch: dict[str, Any]) -> Any:
        """Reference log-probs `[rows * pairs, 2]` float32, or None where there is no reference."""
        return self.scored(scorer, batch).get("logps")

    def scored(
        self, scorer: ResponseScorer, batch: dict[str, Any], shared: bool = False
    ) -> dict[str, Any]:
        """What the scorer finds under the reference, without gradient.

        Args:
            scorer: the policy's.
            batch: the batch contract.
            shared: as `ResponseScorer` takes.

        Returns:
            `logps` (and `shared_logps`), or nothing where there is no reference.
        """
        return {}

    def load_own_variables(self, store: Any) -> None:
        """Loads; the policy that comes with it may have been trained since."""
        super().load_own_variables(store)
        self.starts_as_policy = False


@keras.saving.register_keras_serializable("dpo_keras")
class FrozenCopy(Reference):
    """The policy as it was when this was made: a copy of every trainable weight.

    Args:
        policy: the model to copy from, built.

    Raises:
        InputError: nothing in `policy` is trainable.
    """

    mode = "frozen_copy"

    def __init__(self, policy: keras.Model, **kwargs: Any):
        super().__init__(starts_as_policy=True, **kwargs)
        self._copy(self._to_copy(policy))

    def _to_copy(self, policy: keras.Model) -> list[Any]:
        if not policy.trainable_variables:
            raise InputError("policy has no trainable weights, so there is nothing to train.")
        return list(policy.trainable_variables)

    def _copy(self, sources: list[Any]) -> None:
        self._sources = _Untracked(sources)
        self.copies = []
        for number, source in enumerate(sources):
            copy = self.add_weight(
                name=f"copy_{number}",
                shape=source.shape,
                dtype=source.dtype,
                initializer="zeros",
                trainable=False,
                autocast=False,
            )
            copy.assign(source.value)
            self.copies.append(copy)

    def weights_in_place(self) -> Pairs:
        """Which of the policy's variables take which values during the reference pass."""
        return [
            (source, copy.value)
            for source, copy in zip(self._sources.variables, self.copies, strict=True)
        ]

    def check(self, policy: keras.Model) -> None:
        """Refuses a policy in which something is trainable that was not copied.

        Args:
            policy: the policy as it is about to be trained.

        Raises:
            InputError: naming the weights that would drift in both policy and reference.
        """
        known = {id(variable) for variable in self._sources.variables}
        known |= {id(v) for v in adapter_variables(adapted_layers(policy))}
        moved = [v.path for v in policy.trainable_variables if id(v) not in known]
        if moved:
            raise InputError(
                f"{len(moved)} weights became trainable after the reference was made (first: "
                f"{moved[0]}), so the reference would change with the policy. Set `trainable` and "
                "LoRA before DPOModel(policy, …)."
            )

    def scored(
        self, scorer: ResponseScorer, batch: dict[str, Any], shared: bool = False
    ) -> dict[str, Any]:
        """What the scorer finds under the copied weights."""
        with keras.StatelessScope(state_mapping=self.weights_in_place()):
            return _without_gradient(scorer(batch, shared=shared))

    def update_from_policy(self, alpha: float = 1.0) -> None:
        """Moves the reference toward the policy: ref <- alpha policy + (1 - alpha) ref.

        Args:
            alpha: in (0, 1]; 1 copies (arXiv 2404.09656, eq. 3 and 4).
        """
        for source, copy in zip(self._sources.variables, self.copies, strict=True):
            copy.assign(alpha * ops.cast(source, copy.dtype) + (1.0 - alpha) * copy)


@keras.saving.register_keras_serializable("dpo_keras")
class AdaptersOff(FrozenCopy):
    """The base model under the adapters: LoRA switched off while the reference pass is traced.

    KerasHub's `enable_lora` leaves the biases of adapted layers trainable. They are copied, so
    that the reference is exact however far they move.

    Args:
        policy: a model with LoRA enabled.

    Raises:
        InputError: no layer of `policy` has LoRA.
    """

    mode = "adapters_off"

    def __init__(self, policy: keras.Model, **kwargs: Any):
        super().__init__(policy, **kwargs)
        self.starts_as_policy = adapters_are_fresh(policy)

    def _to_copy(self, policy: keras.Model) -> list[Any]:
        layers = adapted_layers(policy)
        if not layers:
            raise InputError(
                "reference='adapters_off' needs LoRA, and no layer of the policy has it. Call "
                "policy.backbone.enable_lora(8) first, or use reference='frozen_copy'."
            )
        self._adapted = _Untracked(layers)
        adapters = {id(variable) for variable in adapter_variables(layers)}
        return [v for v in policy.trainable_variables if id(v) not in adapters]

    def update_from_policy(self, alpha: float = 1.0) -> None:
        """Refuses: what lies under the adapters does not move."""
        raise InputError(
            "reference='adapters_off' is the base model, which cannot move toward the policy. Use "
            "reference='frozen_copy' with a synchronised reference."
        )

    def scored(
        self, scorer: ResponseScorer, batch: dict[str, Any], shared: bool = False
    ) -> dict[str, Any]:
        """What the scorer finds without the adapters."""
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

    def scored(
        self, scorer: ResponseScorer, batch: dict[str, Any], shared: bool = False
    ) -> dict[str, Any]:
        """The batch's `reference` column."""
        if shared:
            raise InputError(
                "ld_alpha needs the reference's log-probs token by token, which a cache of sums "
                "does not have. Use another reference than 'cached'."
            )
        if "reference" not in batch:
            raise InputError(
                "reference='cached' needs batches with reference log-probs: make the dataset from "
                "dpo_keras.cache_reference(policy, tokenized, …)."
            )
        return {"logps": ops.cast(ops.reshape(batch["reference"], (-1, 2)), "float32")}


@runtime_checkable
class _Tokenizer(Protocol):
    def vocabulary_size(self) -> int | None: ...

    def id_to_token(self, id: int) -> str: ...


def vocabulary_size(model: object) -> int | None:
    """Return the number of logits of a model; None where only a call would tell.

    Example:
        >>> vocabulary_size(keras.Sequential([keras.Input((2,)), keras.layers.Dense(7)]))
        7
    """
    shape = getattr(model, "output_shape", None)
    return shape[-1] if isinstance(shape, tuple) else None


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
    difference = _token_difference(_tokens(policy), _tokens(reference))
    ours, theirs = vocabulary_size(policy), vocabulary_size(reference)
    if difference is None and ours != theirs and None not in (ours, theirs):
        difference = f"{theirs} tokens, the policy has {ours}"
    if difference is not None:
        rule = f"has another vocabulary than the policy ({difference})"
        raise InputError(
            InputProblem(
                "reference",
                f"{name} {rule}" if name else rule,
                hint="Log-probs of different tokens cannot be compared: use the model that the "
                "policy started from, or one with the same tokenizer.",
            )
        )


def _token_difference(ours: list[str] | None, theirs: list[str] | None) -> str | None:
    if ours is None or theirs is None or ours == theirs:
        return None
    if len(ours) != len(theirs):
        return f"{len(theirs)} tokens, the policy has {len(ours)}"
    at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
    return f"token {at} is {theirs[at]!r}, the policy's is {ours[at]!r}"


def _tokens(model: object) -> list[str] | None:
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    if not isinstance(tokenizer, _Tokenizer):
        return None
    try:
        # In the order of the ids: get_vocabulary() returns them in whatever order the file has.
        return [tokenizer.id_to_token(i) for i in range(tokenizer.vocabulary_size() or 0)] or None
    except (NotImplementedError, ValueError):  # KerasHub: no such method, no vocabulary loaded
        return None


@keras.saving.register_keras_serializable("dpo_keras")
class OtherModel(Reference):
    """A model of its own as the reference.

    Args:
        model: same inputs and same vocabulary as the policy.
        policy: the policy, to compare with; None skips the check.

    Raises:
        InputError: the vocabularies differ.
    """

    mode = "model"

    def __init__(self, model: keras.Model, policy: keras.Model | None = None, **kwargs: Any):
        super().__init__(**kwargs)
        if policy is not None:
            check_same_vocabulary(policy, model)
        self.model = model
        self.model.trainable = False
        self.scorer = ResponseScorer(model)

    def scored(
        self, scorer: ResponseScorer, batch: dict[str, Any], shared: bool = False
    ) -> dict[str, Any]:
        """What its own scorer finds under the other model."""
        return _without_gradient(self.scorer(batch, shared=shared))


REFERENCES: dict[str, type[Reference]] = {
    reference.mode: reference for reference in (FrozenCopy, AdaptersOff, Cached, Reference)
}


def make_reference(policy: keras.Model, reference: str | keras.Model) -> Reference:
    """The reference that `DPOModel(policy, reference=…)` means.

    Args:
        policy: a built model.
        reference: `"frozen_copy"`, `"adapters_off"`, `"cached"`, `"none"`, `"auto"` (fresh
            adapters: switched off; otherwise a frozen copy), or a model.

    Returns:
        The reference layer.

    Raises:
        InputError: an unknown name.

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
        names = ", ".join(["auto", *REFERENCES])
        raise InputError(f"reference must be one of {names}, or a model; got {reference!r}.")
    kind = REFERENCES[reference]
    return kind(policy) if issubclass(kind, FrozenCopy) else kind()
