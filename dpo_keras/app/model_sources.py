"""What names a model: looked at before anything heavy is loaded."""

from __future__ import annotations

import difflib
import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

# What KerasHub's converters read beside the weights, by the `model_type` of config.json.
_TOKENIZER_FILES = {
    "gpt2": ("vocab.json", "merges.txt"),
    "llama": ("tokenizer.json", "tokenizer_config.json"),
    "qwen2": ("tokenizer.json",),
    "qwen3": ("tokenizer.json",),
    "smollm3": ("tokenizer.json",),
    "gpt_oss": ("tokenizer.json",),
    "gemma": ("tokenizer.model",),
    "gemma2": ("tokenizer.model",),
    "gemma3_text": ("tokenizer.model",),
    "mixtral": ("tokenizer.model",),
}


def source_problems(path: str) -> list[str]:
    """Says why `path` names no model, looking at names and small files only.

    Args:
        path: a preset name or handle, a directory in KerasHub or Hugging Face format, or a
            `.keras` file.

    Returns:
        Sentences that follow the name of the key; none if nothing is wrong so far.

    Example:
        >>> source_problems("./nowhere")
        ['./nowhere does not exist; give a model directory, a .keras file or a preset name.']
    """
    place = Path(path)
    if "://" in path:
        return []
    if place.is_dir():
        return _directory_problems(place)
    if place.is_file():
        if place.suffix == ".keras" and zipfile.is_zipfile(place):
            return []
        return [f"{path} is a file, but no .keras archive; give a model directory."]
    if "/" in path or path.startswith(".") or place.suffix == ".keras":
        return [f"{path} does not exist; give a model directory, a .keras file or a preset name."]
    return _preset_problems(path)


def _preset_problems(name: str) -> list[str]:
    import keras_hub

    presets = keras_hub.models.CausalLM.presets
    if name in presets:
        return []
    close = difflib.get_close_matches(name, presets, n=1)
    hint = f"; did you mean {close[0]}?" if close else "."
    return [f"{name} is neither a directory here nor a KerasHub preset of a language model{hint}"]


def _directory_problems(place: Path) -> list[str]:
    config = place / "config.json"
    present = sorted(item.name for item in place.iterdir())
    found = (
        f"it holds {', '.join(present[:8])}{', ...' if present[8:] else ''}"
        if present
        else ("it is empty")
    )
    if not config.is_file():
        if (place / "config.yaml").is_file() and (place / "policy").is_dir():
            return [f"{place} is a run directory, not a model; give {place / 'policy'}."]
        return [
            f"{place} is not a model directory: config.json was looked for, which both a KerasHub "
            f"preset and a Hugging Face checkpoint have; {found}."
        ]
    try:
        content = json.loads(config.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        return [f"{place} is not a model directory: its config.json can not be read: {error}."]
    if not isinstance(content, dict):
        content = {}
    if "registered_name" in content:
        return _missing(
            place,
            "a KerasHub preset",
            (("model.weights.h5", "model.weights.json"), ("tokenizer.json",)),
            found,
        )
    if "model_type" in content:
        if not content.get("architectures"):
            return [
                f"{place} looks like a Hugging Face checkpoint, but its config.json does not say "
                'its "architectures", for instance ["GPT2LMHeadModel"]; add that.'
            ]
        tokenizer = _TOKENIZER_FILES.get(content["model_type"], ())
        weights = ("model.safetensors", "model.safetensors.index.json")
        return _missing(
            place, "a Hugging Face checkpoint", (weights, *((name,) for name in tokenizer)), found
        )
    return [
        f"{place} is not a model directory: its config.json has neither registered_name (KerasHub "
        f"preset) nor model_type (Hugging Face checkpoint); {found}."
    ]


def _missing(place: Path, kind: str, wanted: Iterable[tuple[str, ...]], found: str) -> list[str]:
    lacking = [
        " or ".join(names) for names in wanted if not any((place / name).exists() for name in names)
    ]
    if not lacking:
        return []
    return [
        f"{place} looks like {kind}, but these were looked for and are not there: "
        f"{', '.join(lacking)}; {found}."
    ]
