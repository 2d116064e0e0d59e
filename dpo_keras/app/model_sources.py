"""What is wrong with a directory or a name that a model is to be loaded from."""

from __future__ import annotations

import contextlib
import json
import zipfile
from pathlib import Path

from dpo_keras.utils.keras_hub_internals import TOKENIZER_FILES, listed_presets, preset_file
from dpo_keras.utils.keras_hub_tokenizers import RULES_FILE
from dpo_keras.utils.text import nearest, shortened


def source_problem(path: str) -> str | None:
    """Say why `path` names no model, from names and small files only; None where it may."""
    place = Path(path)
    if "://" in path:
        return None
    if place.is_dir():
        try:
            return _directory_problem(place)
        except OSError as error:
            return f"{error.filename or place} can not be read: {error.strerror}."
    if place.is_file():
        archive = place.suffix == ".keras" and zipfile.is_zipfile(place)
        return None if archive else f"{path} is not a .keras archive; give a model directory."
    if "/" in path or path.startswith(".") or place.suffix == ".keras":
        return f"{path} does not exist; give a model directory, a .keras file or a preset name."
    return _preset_problem(path)


def local_directory(path: str) -> Path | None:
    """Return where the tokenizer's files of a directory or a repository lie; None without any.

    KerasHub keeps the files of a repository of Hugging Face in one folder. For families with a
    SentencePiece model it does not fetch the tokenizer.json.
    """
    if Path(path).is_dir():
        return Path(path)
    if not path.startswith("hf://"):
        return None
    found = None
    for name in (RULES_FILE, "tokenizer.json"):
        with contextlib.suppress(FileNotFoundError):
            found = preset_file(path, name).parent
    return found


def _preset_problem(name: str) -> str | None:
    if name in listed_presets():
        return None
    import keras_hub

    presets = keras_hub.models.CausalLM.presets
    if name in presets:
        return None
    near = nearest(name, presets)
    hint = f"; did you mean {near}?" if near else "."
    return f"{name} is neither a directory here nor a KerasHub preset of a language model{hint}"


def _directory_problem(place: Path) -> str | None:
    present = sorted(item.name for item in place.iterdir())
    found = f"it holds {', '.join(present[:8])}{', ...' if present[8:] else ''}"
    found = f"{found if present else 'it is empty'}."
    if "config.json" not in present:
        if (place / "config.yaml").is_file() and (place / "policy").is_dir():
            return f"{place} is a run directory, not a model; give {place / 'policy'}."
        return (
            f"{place} is not a model directory: config.json was looked for, which both a KerasHub "
            f"preset and a Hugging Face checkpoint have; {found}"
        )
    try:
        content = json.loads((place / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        return f"{place} is not a model directory: its config.json can not be read: {error}."
    content = content if isinstance(content, dict) else {}
    if "registered_name" in content:
        kind = "a KerasHub preset"
        wanted = [("model.weights.h5", "model.weights.json"), ("tokenizer.json",)]
    elif "model_type" in content:
        kind = "a Hugging Face checkpoint"
        wanted = [("model.safetensors", "model.safetensors.index.json")]
        wanted += [(name,) for name in TOKENIZER_FILES.get(content["model_type"], ())]
    else:
        return (
            f"{place} is not a model directory: its config.json has neither registered_name "
            f"(KerasHub preset) nor model_type (Hugging Face checkpoint); {found}"
        )
    if kind == "a Hugging Face checkpoint" and not content.get("architectures"):
        found = 'add it, for instance ["GPT2LMHeadModel"].'
        missing = ['"architectures" in its config.json']
    else:
        missing = [" or ".join(names) for names in wanted if not set(names) & set(present)]
    if missing:
        return f"{place} looks like {kind}, but these are missing: {', '.join(missing)}; {found}"
    return _weights_problem(place)


def _weights_problem(place: Path) -> str | None:
    """Say which file of a model directory is damaged, from headers and sizes alone."""
    again = "copy or download it again."
    index = place / "model.safetensors.index.json"
    if index.is_file() and not (place / "model.safetensors").is_file():
        try:
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            absent = sorted({name for name in names if not (place / name).is_file()})
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError) as error:
            return f"{index} is damaged: it must be JSON with a weight_map ({error}); {again}"
        if absent:
            return f"{place}: {shortened(', '.join(absent))} of {index.name} is missing."
    for path in sorted(place.glob("*.safetensors")):
        if problem := _safetensors_problem(path):
            return f"{path} is damaged: {problem}; {again}"
    for path in sorted(place.glob("*.h5")):
        if problem := _hdf5_problem(path):
            return f"{path} is damaged: {problem}; {again}"
    return None


def _safetensors_problem(path: Path) -> str | None:
    """Compare a file's size with its header: its length in 8 bytes, JSON, then the tensors."""
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(size - 8, 100_000_000):  # the format's own bound
            return f"it is cut off within its header, at {size:,} bytes"
        try:
            entries = json.loads(file.read(length))
            entries.pop("__metadata__", None)
            ends = [entry["data_offsets"][1] for entry in entries.values()]
            whole = 8 + length + max(ends, default=0)
        except (ValueError, RecursionError, KeyError, IndexError, TypeError, AttributeError):
            return "its header is not that of a safetensors file"
    return None if size == whole else f"it has {size:,} bytes of {whole:,}"


def _hdf5_problem(path: Path) -> str | None:
    import h5py

    try:
        with h5py.File(path, "r"):
            return None
    except OSError as error:
        return f"it cannot be opened as HDF5 ({error})"
