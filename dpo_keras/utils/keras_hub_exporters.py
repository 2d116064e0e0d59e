"""KerasHub's own writers of presets and of Hugging Face checkpoints. For KerasHub 0.32.

Like `keras_hub_internals`, this reads private names of KerasHub, each use in one function.
"""

from __future__ import annotations

import functools
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dpo_keras.utils.keras_hub_internals import KERAS_HUB, private
from dpo_keras.utils.keras_hub_tokenizers import (
    RULES_FILE,
    complete_tokenizer_config,
    write_rules,
)

if TYPE_CHECKING:
    import keras

    from dpo_keras.utils import JSON, Tensor

_EXPORTERS = "keras_hub.src.utils.transformers.export.hf_exporter"


def layer_at(owner: object, path: str) -> Any:
    """Return what stands at a dotted path of attributes, such as `attention.query_dense`."""
    return functools.reduce(
        lambda part, name: private(part, name, KERAS_HUB), path.split("."), owner
    )


def has_layer_at(owner: object, path: str) -> bool:
    """Tell whether there is a layer at a dotted path: not every block of a family has all."""
    found: object | None = owner
    for name in path.split("."):
        found = getattr(found, name, None)
    return found is not None


def exporter_config(backbone: keras.Model) -> dict[str, JSON]:
    """Return the config.json that KerasHub's exporter writes for a backbone."""
    return dict(_exporter(backbone, "MODEL_CONFIGS")(backbone))


def exporter_weights(backbone: keras.Model) -> dict[str, Tensor]:
    """Return the weights that KerasHub's exporter writes for a language model, by their names."""
    return dict(_exporter(backbone, "MODEL_EXPORTERS")(backbone, include_lm_head=True))


def _exporter(backbone: keras.Model, table: str) -> Any:
    exporters = private(importlib.import_module(_EXPORTERS), table, KERAS_HUB)
    return exporters[type(backbone).__name__]


def save_preset(model: Any, directory: Path) -> None:
    """Write a preset directory that loads again.

    KerasHub 0.32 leaves `tie_word_embeddings`, without which no tied model loads, out of Llama's,
    and knows nothing of a checkpoint's rules for cutting text.
    """
    model.save_to_preset(str(directory))
    write_rules(model, directory)
    tokenizer = getattr(getattr(model, "preprocessor", None), "tokenizer", None)
    tied = getattr(model.backbone, "tie_word_embeddings", None)
    if "tie_word_embeddings" in model.backbone.get_config():
        tied = None
    for path in directory.glob("*.json"):
        if path.name == RULES_FILE:
            continue
        content = json.loads(path.read_text(encoding="utf-8"))
        changed = complete_tokenizer_config(content, tokenizer)
        if tied is not None and path.name in ("config.json", "task.json"):
            backbone = content if path.name == "config.json" else content["config"]["backbone"]
            backbone["config"]["tie_word_embeddings"] = tied
            changed = True
        if changed:
            path.write_text(json.dumps(content, indent=4), encoding="utf-8")
