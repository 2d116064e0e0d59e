"""Gemma 4 with adapters goes all the way: train, evaluate, sample, save, export, serve strings."""

import keras
import numpy as np
import pytest
import serving_tiny
import tensorflow as tf

import dpo_keras
from dpo_keras.training import generate_responses

PAIRS = [
    {"prompt": "Hello, how are you?", "chosen": " I am fine, thanks", "rejected": " lazy dog"},
    {"prompt": "Please reset", "chosen": " my password for account 99-12", "rejected": " No"},
    {"prompt": "The quick brown fox", "chosen": " jumps over", "rejected": " don't worry"},
    {"prompt": "a", "chosen": " naïve café", "rejected": " 12345 o'clock"},
]
PROMPTS = [pair["prompt"] for pair in PAIRS]


def trained(quantization=None):
    policy = serving_tiny.gemma4()
    if quantization is not None:
        dpo_keras.quantize(policy, quantization)
    policy.backbone.enable_lora(4)
    dataset = dpo_keras.preference_dataset(
        dpo_keras.read_preferences(PAIRS), policy.preprocessor, batch_size=2, max_length=48
    )
    model = dpo_keras.DPOModel(policy)
    model.compile(optimizer=keras.optimizers.Adam(3e-2), loss=dpo_keras.DPOLoss(beta=0.1))
    return model, dataset


@pytest.mark.parametrize("quantization", [None])
def test_gemma4_with_adapters_is_trained_saved_and_served(quantization, tmp_path):
    model, dataset = trained(quantization)
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

    options = {"max_new_tokens": 6, "temperature": 0.0}
    report = dpo_keras.export(
        model, tmp_path / "gemma4" / "1", max_length=48, max_new_tokens=6, verify=False
    )
    served = tf.saved_model.load(str(report.path)).signatures
    prompts, responses = tf.constant(PROMPTS), tf.constant(chosen)
    scored = served["score"](prompt=prompts, response=responses)
    np.testing.assert_allclose(scored["log_prob"], logps, atol=1e-3)
    np.testing.assert_array_equal(scored["tokens"], lengths)
    assert (scored["reward"].numpy() > 0).any()
    texts = served["generate"](prompt=prompts)["text"].numpy()
    expected = generate_responses(policy, PROMPTS, max_length=48, **options)
    assert [text.decode() for text in texts] == expected
