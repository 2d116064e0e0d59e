"""Trained policies for other libraries: KerasHub, Hugging Face's `transformers` and `peft`."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
from keras import ops
from safetensors.numpy import save_file

from dpo_keras.batching import ChatTemplate, get_template
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring import dequantized
from dpo_keras.scoring.lora import adapted_layers
from dpo_keras.serving.hugging_face_names import FAMILIES, Family, Weights, family_of
from dpo_keras.serving.hugging_face_tokenizer import write_tokenizer
from dpo_keras.serving.model_card import ModelFacts, facts_of, write_model_card
from dpo_keras.serving.peft_adapters import peft_files
from dpo_keras.utils import JSON
from dpo_keras.utils.atomic_files import replaced
from dpo_keras.utils.keras_hub_exporters import save_preset
from dpo_keras.utils.keras_hub_families import drafts_for_another_model
from dpo_keras.utils.keras_internals import all_layers, raise_failed_writes, unmerged_weights
from dpo_keras.utils.keras_quantization import quantization_mode

FORMATS = ("keras_hub", "transformers", "peft")
"""Formats that `save_pretrained` writes."""
SHARD_BYTES = 5 * 10**9  # as large as Hugging Face's own files


def save_pretrained(
    model: keras.Model,
    directory: str | Path,
    format: str = "transformers",
    *,
    source: str | Path | None = None,
    template: str | Path | ChatTemplate | None = None,
    preprocessor: object | None = None,
    facts: ModelFacts | None = None,
    overwrite: bool = False,
) -> Path:
    """Write a trained policy so that another library loads it, with a model card.

    | format | what is written |
    |---|---|
    | `keras_hub` | a preset, for `keras_hub.models.CausalLM.from_preset(directory)` |
    | `transformers` | safetensors, tokenizer, chat template and generation config |
    | `peft` | the LoRA adapters alone, for `PeftModel.from_pretrained(base, directory)` |

    LoRA is merged into the weights, except for `peft`, and quantized weights are written in
    floating point: both are the same numbers. The model itself does not change. The directory is
    whole or absent.

    Args:
        model: a `DPOModel`, a `SupervisedModel`, or a KerasHub causal language model.
        directory: where to write.
        format: what to write.
        source: where the policy came from. If that is a Hugging Face directory, its tokenizer files
            are copied. Its name is in the model card, and the base model of `peft`.
        template: the chat template that the model was trained with; None keeps that of `source`.
        preprocessor: what tokenizes; by default the policy's own.
        facts: what the model card says of the training; by default what the model tells.
        overwrite: replace what is at `directory`.

    Returns:
        The directory.

    Raises:
        InputError: the format is unknown, `directory` exists, or the policy cannot be written in
            that format, with the reason.
        OSError: the files could not be written; nothing is left at `directory`.

    Example:
        >>> import keras_hub, tempfile
        >>> letters = {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3}
        >>> tokenizer = keras_hub.models.GPT2Tokenizer(letters, merges=["a b"])
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=4, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> policy = keras_hub.models.GPT2CausalLM(
        ...     backbone, keras_hub.models.GPT2CausalLMPreprocessor(tokenizer))
        >>> directory = save_pretrained(policy, tempfile.mkdtemp() + "/model")
        >>> sorted(path.name for path in directory.glob("*.safetensors"))
        ['model.safetensors']
    """
    policy = getattr(model, "policy", model)
    target = Path(directory)
    chat = get_template(template)
    check_directory(target, overwrite)
    family = _check_policy(policy, format)
    preprocessor = preprocessor or getattr(policy, "preprocessor", None)
    origin = None if source is None else Path(source)
    base = None if source is None else str(source)
    with replaced(target) as partial, raise_failed_writes():
        notes = []
        if format == "keras_hub":
            write_preset(policy, partial)
        else:
            assert family is not None
            partial.mkdir()
            ids: dict[str, JSON] = {}
            if preprocessor is None:
                notes.append("The model had no preprocessor: there are no tokenizer files.")
            else:
                ids = write_tokenizer(preprocessor, partial, chat, origin)
            if format == "peft":
                modes = {quantization_mode(layer) for layer in all_layers(policy)} - {None}
                if modes:
                    notes.append(f"They were trained on the base model quantized to {modes.pop()}.")
                _write_adapters(policy, family, base, partial)
            else:
                _write_checkpoint(dequantized(policy), family, ids, partial, origin)
        write_model_card(partial, target, format, base, facts or facts_of(model), notes)
    return target


def check_directory(target: Path, overwrite: bool = False) -> None:
    """Refuse a place that is taken, before any work."""
    if target.is_file():
        rule = f": {target} is a file; a directory is to be made there"
        raise InputError(InputProblem("directory", rule))
    if target.is_dir() and any(target.iterdir()) and not overwrite:
        hint = "Give another directory, or overwrite=True (--force) to replace it."
        raise InputError(InputProblem("directory", f": {target} exists", hint=hint))


def _check_policy(policy: Any, format: str) -> Family | None:
    """Return how to write a policy for Hugging Face; raise InputError where it cannot be."""
    if format not in FORMATS:
        rule = f"must be one of {', '.join(FORMATS)}"
        raise InputError(InputProblem("format", rule, format))
    if not isinstance(policy, keras.Model) or not hasattr(policy, "save_to_preset"):
        rule = f"must be a KerasHub causal language model to be written as {format}"
        raise InputError(InputProblem("model", rule, type(policy).__name__))
    if format == "keras_hub":
        return None
    family = None if drafts_for_another_model(policy) else family_of(policy.backbone)
    if family is None:
        rule = f"is a {type(policy).__name__}, which has no Hugging Face exporter"
        hint = f"These have one: {', '.join(FAMILIES)}. Or use format='keras_hub'."
        raise InputError(InputProblem("model", rule, hint=hint))
    return family


@contextlib.contextmanager
def merged_adapters(policy: keras.Model) -> Iterator[None]:
    """Hold LoRA in the base weights of a policy for a block of code, then restore them bit by bit.

    Keras' own merged kernel has the precision of the layer's computation, not of its weights.
    """
    kept: list[tuple[keras.layers.Layer, keras.Variable, np.ndarray]] = []
    try:
        for layer in adapted_layers(policy):
            weights = unmerged_weights(layer)
            adapters = [weights.pop(name) for name in list(weights) if name.startswith("lora_")]
            (base,) = weights.values()
            kept.append((layer, base, ops.convert_to_numpy(base)))
            change = layer.lora_alpha / layer.lora_rank * ops.matmul(*adapters)
            layer.lora_enabled = False
            base.assign(ops.cast(ops.cast(base, change.dtype) + change, base.dtype))
        yield
    finally:
        for layer, base, value in kept:
            base.assign(value)
            layer.lora_enabled = True


def write_preset(policy: keras.Model, directory: Path) -> None:
    """Write a KerasHub preset in floating point, with LoRA merged."""
    policy = dequantized(policy)
    with merged_adapters(policy):
        save_preset(policy, directory)


def _write_checkpoint(
    policy: keras.Model, family: Family, ids: dict[str, JSON], partial: Path, source: Path | None
) -> None:
    config = family.config(policy.backbone) | {"torch_dtype": _dtype(policy.backbone)}
    text = config.get("text_config", {})
    for name, value in ids.items():
        config[name] = value
        if name in text:
            text[name] = value
    longest = _longest(source)
    if longest is not None:
        (text or config)["max_position_embeddings"] = longest
    _write_json(partial / "config.json", config)
    with merged_adapters(policy):
        weights = family.weights(policy.backbone)
        _check_complete(weights, policy.backbone)
        _write_weights(weights, partial)


def _dtype(backbone: keras.Model) -> str:
    return str(keras.backend.standardize_dtype(backbone.token_embedding.embeddings.dtype))


def _longest(source: Path | None) -> int | None:
    """Return how many positions the checkpoint allows that the policy came from; None: unknown."""
    if source is None or not (source / "config.json").is_file():
        return None
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    found = config.get("text_config", config).get("max_position_embeddings")
    return found if isinstance(found, int) else None


def _check_complete(weights: Weights, backbone: keras.Model) -> None:
    """Require that every number of a backbone is written: an exporter may leave out a layer."""
    written = sum(value.size for value in weights.values())
    left_out = ("lora_", "inv_freq")
    held = sum(int(np.prod(v.shape)) for v in backbone.weights if not v.name.startswith(left_out))
    if written != held:
        raise RuntimeError(
            f"The Hugging Face names of {type(backbone).__name__} cover {written:,} of its "
            f"{held:,} weights. dpo_keras knows another version of KerasHub."
        )


def _write_weights(weights: Weights, partial: Path) -> None:
    """Write safetensors: one file, or several with an index where they are large."""
    shards: list[Weights] = [{}]
    size = 0
    for name, value in weights.items():
        if shards[-1] and size + value.nbytes > SHARD_BYTES:
            shards.append({})
            size = 0
        shards[-1][name] = np.asarray(value, order="C")  # a scalar stays one
        size += value.nbytes
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        place = "model.safetensors"
        if len(shards) > 1:
            place = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, partial / place, metadata={"format": "pt"})
        places |= dict.fromkeys(shard, place)
    if len(shards) > 1:
        total = sum(value.nbytes for value in weights.values())
        index = {"metadata": {"total_size": total}, "weight_map": places}
        _write_json(partial / "model.safetensors.index.json", index)


def _write_adapters(policy: keras.Model, family: Family, base: str | None, partial: Path) -> None:
    config, weights = peft_files(policy, family, base)
    _write_json(partial / "adapter_config.json", config)
    arrays = {name: np.ascontiguousarray(value) for name, value in weights.items()}
    save_file(arrays, partial / "adapter_model.safetensors", metadata={"format": "pt"})


def _write_json(path: Path, content: JSON) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
