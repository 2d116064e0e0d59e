"""KerasHub's own writers of Hugging Face checkpoints, and layers by path. For KerasHub 0.32.

Like `keras_hub_internals`, this reads private names of KerasHub, each use in one function.
"""

from __future__ import annotations

import functools
import importlib
from typing import TYPE_CHECKING, Any

from dpo_keras.utils.keras_hub_internals import KERAS_HUB, private

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
