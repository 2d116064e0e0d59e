"""Preference training for models of tf-keras (Keras 2), and on parameter servers.

Losses, scorer, metrics and batches are those of the main package. tf-keras is imported when one of
these names is first used, and nothing here sets TF_USE_LEGACY_KERAS.
"""

import importlib
from typing import TYPE_CHECKING

from dpo_keras.errors import InputError

if TYPE_CHECKING:
    from dpo_keras.legacy.parameter_server import run_server, worker_batches
    from dpo_keras.legacy.tf_keras_model import DPOModel, SupervisedModel
    from dpo_keras.legacy.tf_keras_policy import PolicyCall

_MODULES = {
    "DPOModel": "tf_keras_model",
    "PolicyCall": "tf_keras_policy",
    "SupervisedModel": "tf_keras_model",
    "run_server": "parameter_server",
    "worker_batches": "parameter_server",
}
__all__ = ["DPOModel", "PolicyCall", "SupervisedModel", "run_server", "worker_batches"]


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'dpo_keras.legacy' has no attribute {name!r}")
    try:
        if name != "run_server":
            importlib.import_module("tf_keras")
        return getattr(importlib.import_module(f"dpo_keras.legacy.{_MODULES[name]}"), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tf_keras":
            raise
        raise InputError(
            f"dpo_keras.legacy.{name} needs tf-keras, of the release of your TensorFlow, and it is "
            'not installed. Run: pip install "dpo-keras[legacy]"'
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
