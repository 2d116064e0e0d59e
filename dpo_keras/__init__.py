"""Direct Preference Optimization for TensorFlow and Keras.

Preference pairs flow in one direction, and each stage is one subpackage:

    preferences   pairs of responses and which one people prefer: read, validated, split
    batching      tokens, templates, buckets -> tf.data batches
    scoring       log pi(response | prompt) under the policy and under the reference
    losses        S = beta (log pi - log pi_ref) -> softmax -> LLR -> cross-entropy + penalties
    training      DPOModel: a keras.Model whose train_step takes that gradient
    evaluation    held-out accuracy, calibration, samples before and after
    serving       SavedModel: strings in, log-probs, preferences, text out; Hugging Face files
    legacy        the same training for models of tf-keras, and on parameter servers
    feedback      people choose between responses: store, page, quality, pairs for training

The whole of it in ten lines:

    pairs = dpo_keras.read_preferences("pairs.jsonl")
    train, held_out = pairs.split(0.1, seed=0)
    policy = keras_hub.models.CausalLM.from_preset("gemma3_1b")
    dpo_keras.enable_lora(policy, 8)
    dataset = dpo_keras.preference_dataset(train, policy.preprocessor, batch_size=16)
    model = dpo_keras.DPOModel(policy, reference="auto")
    model.compile(keras.optimizers.AdamW(5e-6), loss=dpo_keras.DPOLoss("sigmoid", beta=0.1))
    model.fit(dataset, epochs=1)
    model.evaluate(dpo_keras.preference_dataset(held_out, policy.preprocessor, shuffle=False))
    dpo_keras.export(model, "saved_models/support/1")

The method is that of Rafailov et al. (arXiv 2305.18290). Subpackages are imported when first used.
`cluster` is no stage: it holds together the processes that train one model.
"""

import contextlib
import importlib
import os
from typing import TYPE_CHECKING, Any

from dpo_keras.utils.deferred_imports import quiet_tensorflow
from dpo_keras.version import __version__

_HOME = {
    "InputError": "dpo_keras.errors",
    "PreferencePair": "dpo_keras.preferences",
    "Preferences": "dpo_keras.preferences",
    "StoredPreferences": "dpo_keras.preferences",
    "build_preferences": "dpo_keras.preferences",
    "read_preferences": "dpo_keras.preferences",
    "write_preferences": "dpo_keras.preferences",
    "preference_dataset": "dpo_keras.batching",
    "tokenize_pairs": "dpo_keras.batching",
    "enable_lora": "dpo_keras.scoring",
    "response_log_probs": "dpo_keras.scoring",
    "cache_reference": "dpo_keras.scoring",
    "quantize": "dpo_keras.scoring",
    "DPOLoss": "dpo_keras.losses",
    "DPOModel": "dpo_keras.training",
    "RewardModel": "dpo_keras.training",
    "SupervisedModel": "dpo_keras.training",
    "generate_responses": "dpo_keras.training",
    "load_model": "dpo_keras.app.models",
    "strategy": "dpo_keras.training",
    "distribution": "dpo_keras.training.mesh",
    "export": "dpo_keras.serving",
    "save_pretrained": "dpo_keras.serving",
}
_STAGES = {
    "app",
    "batching",
    "cluster",
    "errors",
    "evaluation",
    "feedback",
    "legacy",
    "losses",
    "preferences",
    "scoring",
    "serving",
    "training",
}

_TENSORFLOW_STAGES = {"scoring", "training", "evaluation", "serving"}

if TYPE_CHECKING:
    from dpo_keras.app.models import load_model
    from dpo_keras.batching import preference_dataset, tokenize_pairs
    from dpo_keras.errors import InputError
    from dpo_keras.losses import DPOLoss
    from dpo_keras.preferences import (
        PreferencePair,
        Preferences,
        StoredPreferences,
        build_preferences,
        read_preferences,
        write_preferences,
    )
    from dpo_keras.scoring import cache_reference, enable_lora, quantize, response_log_probs
    from dpo_keras.serving import export, save_pretrained
    from dpo_keras.training import (
        DPOModel,
        RewardModel,
        SupervisedModel,
        callbacks,
        generate_responses,
        strategy,
    )
    from dpo_keras.training.mesh import distribution

__all__ = [
    "DPOLoss",
    "DPOModel",
    "InputError",
    "PreferencePair",
    "Preferences",
    "RewardModel",
    "StoredPreferences",
    "SupervisedModel",
    "build_preferences",
    "cache_reference",
    "callbacks",
    "distribution",
    "enable_lora",
    "export",
    "generate_responses",
    "load_model",
    "preference_dataset",
    "quantize",
    "read_preferences",
    "response_log_probs",
    "save_pretrained",
    "strategy",
    "tokenize_pairs",
    "write_preferences",
    "__version__",
]


def __getattr__(name: str) -> Any:
    # Lazy, so that reading preferences never waits for TensorFlow and losses run on any backend.
    home = "dpo_keras.training.callbacks" if name == "callbacks" else _HOME.get(name)
    home = f"dpo_keras.{name}" if name in _STAGES else home
    if home is None:
        raise AttributeError(f"module 'dpo_keras' has no attribute {name!r}")
    on_tensorflow = os.environ.get("KERAS_BACKEND", "tensorflow") == "tensorflow"
    quiet = on_tensorflow and home.split(".")[1] in _TENSORFLOW_STAGES
    with quiet_tensorflow() if quiet else contextlib.nullcontext():
        module = importlib.import_module(home)
    return getattr(module, name) if name in _HOME else module


def __dir__() -> list[str]:
    return sorted(set(__all__) | _STAGES)
