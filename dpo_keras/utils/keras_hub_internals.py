"""Private API of KerasHub, written for KerasHub 0.32: each use is one function.

Nothing here imports Keras or TensorFlow at the top: checks of a configuration read this module.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import keras


class Library(NamedTuple):
    """A library and the release whose private API this package was written for."""

    name: str
    package: str
    written_for: str


KERAS = Library("Keras", "keras", "3.15")
KERAS_HUB = Library("KerasHub", "keras-hub", "0.32")
TENSORFLOW = Library("TensorFlow", "tensorflow", "2.21")
TF_KERAS = Library("tf-keras", "tf-keras", "2.21")


def private(owner: object, name: str, library: Library) -> Any:
    """Return an attribute that a library does not promise to keep.

    A RuntimeError names the library, its release and the attribute where it is gone.
    """
    try:
        return getattr(owner, name)
    except AttributeError as error:
        kind = getattr(owner, "__name__", type(owner).__name__)
        found = importlib.metadata.version(library.package)
        raise RuntimeError(
            f"{library.name} {found} has no {kind}.{name}, which dpo_keras uses. Install "
            f"{library.package} {library.written_for}, which dpo_keras was written for, or change "
            "dpo_keras.utils to the new name."
        ) from error


# -- blocks, norms and embeddings (written for KerasHub 0.32) ------------------------------

_NORMS = (
    "GptOssLayerNormalization",
    "LayerNormalization",
    "LlamaLayerNorm",
    "MistralLayerNormalization",
    "MixtralLayerNormalization",
    "Phi3LayerNorm",
    "Qwen3LayerNorm",
    "Qwen3MoeLayerNorm",
    "QwenLayerNorm",
    "QwenMoeLayerNorm",
    "RMSNormalization",
)


def transformer_blocks(model: keras.Model) -> list[keras.layers.Layer]:
    """Return the blocks of a backbone or of a model around one, in order; empty without any."""
    backbone = getattr(model, "backbone", model)
    owner = getattr(backbone, "language_model", backbone)  # Gemma 3n, BLIP-2
    blocks = getattr(owner, "transformer_layers", None) or getattr(owner, "rwkv_layers", None)
    return list(blocks or ())


def norm_settings(layer: keras.layers.Layer) -> dict[str, object] | None:
    """Return a norm's settings, as some have no `get_config`; None for another kind of layer."""
    if type(layer).__name__ not in _NORMS:
        return None
    optional = {name: getattr(layer, name, None) for name in ("axis", "rms_scaling")}
    return {"epsilon": private(layer, "epsilon", KERAS_HUB), **optional}


def expert_kernels(backbone: keras.Model) -> list[str]:
    """Return `layer/weight` for the kernels that hold all experts of a mixture, which have no LoRA.

    KerasHub 0.32 writes them as weights `[experts, inputs, outputs]` of a layer of its own.
    """
    layers = private(backbone, "_flatten_layers", KERAS)()
    owners = [layer for layer in layers if re.search("Experts$|MoEBlock$", type(layer).__name__)]
    names = [
        f"{owner.name}/{weight.name}"
        for owner in owners
        for weight in private(owner, "_trainable_variables", KERAS)
        if len(weight.shape) == 3
    ]
    return list(dict.fromkeys(names))


def remember_adapters(backbone: keras.Model, layers: list[keras.layers.Layer], rank: int) -> None:
    """Tell a KerasHub backbone which layers have LoRA, for its `save_lora_weights`."""
    if not hasattr(backbone, "save_lora_weights"):
        return
    flat = private(backbone, "_flatten_layers", KERAS)(include_self=False)
    adapted = {id(layer) for layer in layers}
    places = [
        place for place, layer in enumerate(x for x in flat if x.weights) if id(layer) in adapted
    ]
    backbone._lora_enabled_layers, backbone._lora_rank = places, rank


class RouterSettings(NamedTuple):
    """How a mixture of experts weighs the loss that balances its experts."""

    experts: int
    top_k: int  # experts of each token
    coefficient: float


# Blocks whose `call` returns (states, router logits), and the name of the coefficient. GPT-OSS and
# Gemma 4 have no such loss.
_ROUTERS = {
    "MixtralSparseMoeBlock": "router_aux_loss_coef",
    "QwenSparseMoeBlock": "router_aux_loss_coefficient",
    "Qwen3SparseMoeBlock": "router_aux_loss_coefficient",
    "Qwen3_5MoeSparseMoeBlock": "router_aux_loss_coefficient",
}


ROUTERS = re.compile(r"sparse_feedforward_gate_dense|router|shared_expert_gate")
"""Matches the paths of the layers that send tokens to experts."""


def router_settings(layer: keras.layers.Layer) -> RouterSettings | None:
    """Read the settings off a mixture of experts that balances them by a loss; None for others."""
    name = _ROUTERS.get(type(layer).__name__)
    if name is None:
        return None
    names = ("num_experts", "top_k", name)
    return RouterSettings(*(private(layer, name, KERAS_HUB) for name in names))


class ReversibleSettings(NamedTuple):
    """How a `ReversibleEmbedding` projects hidden states to logits."""

    tied: bool  # by the transposed embeddings
    soft_cap: float | None  # the c of c tanh(z / c) on the logits
    dtype: str | None  # of the product; None for the layer's compute dtype


def reversible_settings(layer: keras.layers.Layer) -> ReversibleSettings:
    """Read the settings off a `ReversibleEmbedding`."""
    names = ("tie_weights", "logit_soft_cap", "reverse_dtype")
    return ReversibleSettings(*(private(layer, name, KERAS) for name in names))


def ties_embeddings(backbone: keras.Model | None) -> bool | None:
    """Tell whether a backbone's head is its token embedding; None where it does not show it."""
    return getattr(getattr(backbone, "token_embedding", None), "tie_weights", None)


# -- presets (written for KerasHub 0.32) ---------------------------------------------------

# What KerasHub 0.32's converters of Hugging Face checkpoints read beside the weights, by the
# `model_type` of config.json.
TOKENIZER_FILES = {
    "gpt2": ("vocab.json", "merges.txt"),
    "llama": ("tokenizer.json", "tokenizer_config.json"),
    **dict.fromkeys(("qwen2", "qwen3", "smollm3", "gpt_oss"), ("tokenizer.json",)),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text", "mixtral"), ("tokenizer.model",)),
}


def listed_presets() -> frozenset[str]:
    """Return preset names of causal language models from KerasHub's sources, without importing it.

    The import takes seconds. Models that also have an encoder are left out, and a release that
    keeps its presets elsewhere has none: only a name that is found here says something.
    """
    spec = importlib.util.find_spec("keras_hub")
    folder = Path((spec and spec.submodule_search_locations or [""])[0]) / "src" / "models"
    found: set[str] = set()
    for file in folder.glob("*/*_presets.py"):
        if any(file.parent.glob("*_causal_lm.py")):
            text = file.read_text(encoding="utf-8")
            found.update(re.findall(r'^    "([^"]+)": \{', text, re.MULTILINE))
    return frozenset(found)


def preset_file(preset: str, name: str) -> Path:
    """Return where a file of a preset lies, and fetch it where it must be; FileNotFoundError."""
    from keras_hub.src.utils import preset_utils

    return Path(private(preset_utils, "get_file", KERAS_HUB)(preset, name))
