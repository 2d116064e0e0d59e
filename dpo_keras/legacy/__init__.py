"""Preference training for models of tf-keras (Keras 2), and on parameter servers.

    policy = tf_keras.Model(…)         # {"token_ids", "padding_mask"}, or token ids alone -> logits
    dataset = dpo_keras.preference_dataset(train, preprocessor, batch_size=16)
    model = dpo_keras.legacy.DPOModel(policy)
    model.compile(tf_keras.optimizers.AdamW(5e-6), loss=dpo_keras.DPOLoss("sigmoid", beta=0.1))
    model.fit(dataset, callbacks=[tf_keras.callbacks.TensorBoard("logs")])
    dpo_keras.export(model, "saved_models/support/1", preprocessor=preprocessor)

Losses, scorer, metrics and batches are those of the main package. tf-keras is imported when one of
these names is first used, and nothing here sets TF_USE_LEGACY_KERAS.
"""

import importlib
from typing import TYPE_CHECKING, Any

from dpo_keras.errors import InputError

_HOME = {
    "DPOModel": "dpo_keras.legacy.tf_keras_model",
    "PolicyCall": "dpo_keras.legacy.tf_keras_policy",
    "SupervisedModel": "dpo_keras.legacy.tf_keras_model",
    "run_server": "dpo_keras.legacy.parameter_server",
    "worker_batches": "dpo_keras.legacy.worker_datasets",
}

if TYPE_CHECKING:
    from dpo_keras.legacy.parameter_server import run_server
    from dpo_keras.legacy.tf_keras_model import DPOModel, SupervisedModel
    from dpo_keras.legacy.tf_keras_policy import PolicyCall
    from dpo_keras.legacy.worker_datasets import worker_batches

__all__ = ["DPOModel", "PolicyCall", "SupervisedModel", "run_server", "worker_batches"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'dpo_keras.legacy' has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(_HOME[name]), name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "tf_keras":
            raise
        raise InputError(
            f"dpo_keras.legacy.{name} needs tf-keras, of the release of your TensorFlow, and it is "
            'not installed. Run: pip install "dpo-keras[legacy]"'
        ) from error


def __dir__() -> list[str]:
    return sorted(__all__)
