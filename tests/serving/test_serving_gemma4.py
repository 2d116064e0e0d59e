"""A quantized Gemma 4 with adapters goes all the way: train, evaluate, save, export, serve."""

import keras
import numpy as np
import pytest
import serving_tiny

import dpo_keras

pytestmark = pytest.mark.slow

PAIRS = [
    {"prompt": "Hello, how are you?", "chosen": " I am fine, thanks", "rejected": " lazy dog"},
    {"prompt": "Please reset", "chosen": " my password for account 99-12", "rejected": " No"},
    {"prompt": "The quick brown fox", "chosen": " jumps over", "rejected": " don't worry"},
    {"prompt": "a", "chosen": " naïve café", "rejected": " 12345 o'clock"},
]
PROMPTS = [pair["prompt"] for pair in PAIRS]


def trained():
    policy = serving_tiny.gemma4()
    dpo_keras.quantize(policy, "int4")
    policy.backbone.enable_lora(4)
    dataset = dpo_keras.preference_dataset(
        dpo_keras.read_preferences(PAIRS),
        policy.preprocessor,
        batch_size=2,
        max_length=96,
        batching="packed",
    )
    model = dpo_keras.DPOModel(policy)
    model.compile(optimizer=keras.optimizers.Adam(3e-2), loss=dpo_keras.DPOLoss(beta=0.1))
    return model, dataset


# KerasHub leaves closing a SentencePiece file to the garbage collector.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_quantized_gemma4_with_adapters_is_trained_saved_and_served(tmp_path):
    model, dataset = trained()
    policy = model.policy
    assert model.reference.mode == "adapters_off"
    before = model.evaluate(dataset, verbose=0, return_dict=True)
    np.testing.assert_allclose(before["loss"], np.log(2), atol=1e-4)
    model.fit(dataset, epochs=4, verbose=0)
    after = model.evaluate(dataset, verbose=0, return_dict=True)
    assert after["loss"] < before["loss"] - 0.05
    assert after["reward_accuracy"] == 1.0

    chosen = [pair["chosen"] for pair in PAIRS]
    logps, lengths = dpo_keras.response_log_probs(policy, PROMPTS, chosen)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    again, _ = dpo_keras.response_log_probs(loaded.policy, PROMPTS, chosen)
    np.testing.assert_allclose(again, logps, atol=1e-4)

    examples = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in PAIRS]
    report = dpo_keras.export(
        model, tmp_path / "gemma4" / "1", max_length=48, max_new_tokens=6, examples=examples
    )
    # Every answer, generated text too, is that of the model in Python.
    assert max(report.differences.values()) < 1e-3
    assert {"score.log_prob", "prefer.llr", "generate.text"} <= report.differences.keys()
    np.testing.assert_allclose(report.answers["score"]["log_prob"][:4], logps, atol=1e-3)
    assert min(report.answers["prefer"]["llr"]) > 0
