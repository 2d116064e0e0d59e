"""Policies and references from presets, directories, files, or from scratch."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_keras.app.model_sources import source_problems
from dpo_keras.app.new_models import build_policy
from dpo_keras.errors import InputError

if TYPE_CHECKING:
    from dpo_keras.app.config_sections import Model


def load_model(path: str, dtype: str = "float32") -> Any:
    """Loads a language model.

    Args:
        path: as for `source_problems`.
        dtype: Keras dtype policy; a `.keras` file keeps its own.

    Returns:
        A `keras_hub.models.CausalLM` with its preprocessor.

    Raises:
        InputError: if it is no model, or not a language model with its tokenizer.
    """
    problems = source_problems(path)
    if problems:
        raise InputError(problems)
    import keras_hub

    local = Path(path).exists()
    try:
        if Path(path).is_file():
            model = _from_archive(path)
        else:
            with warnings.catch_warnings():
                # KerasHub leaves closing a SentencePiece file to the garbage collector.
                warnings.simplefilter("ignore", ResourceWarning)
                model = keras_hub.models.CausalLM.from_preset(path, dtype=dtype)
    except InputError:
        raise
    except Exception as error:
        if not local:  # the network, or the hub's terms: not the configuration's fault
            raise RuntimeError(f"the preset {path} could not be fetched: {error}") from error
        raise InputError(f"{path} could not be loaded as a model: {_reason(error)}") from error
    _check_language_model(model, path)
    return model


def _from_archive(path: str) -> Any:
    import keras

    import dpo_keras.training  # noqa: F401 (registers DPOModel for loading)

    with warnings.catch_warnings():
        # Keras tells of containers that hold the layers a second time, under another name.
        warnings.filterwarnings("ignore", message="Skipping nested container")
        model = keras.saving.load_model(path, compile=False)
    return getattr(model, "policy", model)


def _reason(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    return text if len(text) < 300 else text[:297] + "..."


def _check_language_model(model: Any, path: str) -> None:
    preprocessor = getattr(model, "preprocessor", None)
    if preprocessor is None or not hasattr(model, "backbone"):
        raise InputError(
            f"{path} must be a KerasHub CausalLM with its preprocessor, got "
            f"{type(model).__name__}; save it with model.save_to_preset(DIRECTORY)."
        )
    tokens = preprocessor.tokenizer.vocabulary_size()
    rows = getattr(model.backbone, "vocabulary_size", tokens)
    if tokens > rows:
        raise InputError(
            f"{path}: the tokenizer has {tokens} tokens, but the model has embeddings for {rows}; "
            "they do not belong together."
        )


def load_policy(model: Model, training_texts: Iterable[str] | None = None) -> Any:
    """Loads or builds the policy that a configuration describes.

    Args:
        model: the configuration's section.
        training_texts: for `scratch`: what its tokenizer learns from.

    Returns:
        A `keras_hub.models.CausalLM`, with LoRA enabled where the section says so.

    Raises:
        InputError: if the model can not be had, or has no layers for LoRA.
    """
    if model.scratch is not None:
        policy = build_policy(model.scratch, training_texts or (), model.dtype)
    else:
        policy = load_model(str(model.path), model.dtype)
    if model.lora_rank is not None:
        enable_lora(policy, model.lora_rank)
    return policy


def enable_lora(policy: Any, rank: int) -> None:
    """Adds low-rank adapters to the policy's attention layers and freezes the rest.

    Args:
        policy: a KerasHub CausalLM.
        rank: of the adapters.

    Raises:
        InputError: if no layer of the model takes adapters.
    """
    try:
        policy.backbone.enable_lora(rank)
    except (AttributeError, ValueError, NotImplementedError) as error:
        raise InputError(
            f"model.lora_rank: {type(policy.backbone).__name__} does not take LoRA: "
            f"{_reason(error)}"
        ) from error
    if not policy.backbone.trainable_variables:
        raise InputError(
            f"model.lora_rank: no layer of {type(policy.backbone).__name__} took LoRA; set it to "
            "null."
        )


def check_same_vocabulary(policy: Any, reference: Any, name: str) -> None:
    """Refuses a reference whose tokens are not the policy's: its log-probs would mean nothing.

    Args:
        policy: a CausalLM.
        reference: another.
        name: what the user called the reference.

    Raises:
        InputError: naming both sizes, and the first token that differs.
    """
    ours, theirs = (_tokens(model.preprocessor.tokenizer) for model in (policy, reference))
    if ours == theirs:
        return
    message = f"reference: {name} has another vocabulary than the policy"
    if len(ours) != len(theirs):
        message += f" ({len(theirs)} tokens, the policy has {len(ours)})"
    else:
        at = next(i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b)
        message += f" (token {at} is {theirs[at]!r}, the policy's is {ours[at]!r})"
    raise InputError(f"{message}; take the model that the policy started from.")


def _tokens(tokenizer: Any) -> list[str]:
    # In the order of the ids: get_vocabulary() returns them in whatever order the file has.
    return [tokenizer.id_to_token(i) for i in range(tokenizer.vocabulary_size())]


def save_policy(policy: Any, directory: Path) -> None:
    """Writes a policy as a KerasHub preset directory, LoRA merged into the weights.

    Args:
        policy: a CausalLM.
        directory: where to; what is there is overwritten.
    """
    policy.save_to_preset(str(directory))
    # Llama's get_config (keras-hub 0.32) leaves this out, so a tied model would not load again.
    tied = getattr(policy.backbone, "tie_word_embeddings", None)
    if tied is None or "tie_word_embeddings" in policy.backbone.get_config():
        return
    for name, keys in (("config.json", ()), ("task.json", ("config", "backbone"))):
        content = json.loads((directory / name).read_text(encoding="utf-8"))
        part = content
        for key in keys:
            part = part[key]
        part["config"]["tie_word_embeddings"] = tied
        (directory / name).write_text(json.dumps(content, indent=4), encoding="utf-8")


def load_reference(path: str, policy: Any, dtype: str = "float32") -> Any:
    """Loads a reference model and checks that it speaks the policy's tokens.

    Args:
        path: as `model.path`.
        policy: the policy.
        dtype: Keras dtype policy.

    Raises:
        InputError: if it is no model, or has another vocabulary.
    """
    reference = load_model(path, dtype)
    check_same_vocabulary(policy, reference, path)
    return reference


def check_length(policy: Any, max_length: int) -> None:
    """Refuses lengths beyond the policy's positions.

    Args:
        policy: a CausalLM.
        max_length: the longest text in tokens.

    Raises:
        InputError: if the policy has a table of positions that is shorter.
    """
    positions = getattr(policy.backbone, "max_sequence_length", None)
    if positions is not None and max_length > positions:
        raise InputError(
            f"data.max_length must be <= {positions}, the positions that the model has, got "
            f"{max_length}."
        )
