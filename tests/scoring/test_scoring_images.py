"""Images in pairs: log-probs, gradients, training, and what is refused."""

from functools import cache

import keras
import numpy as np
import pytest
import tensorflow as tf
import vision_tiny

import dpo_keras
from dpo_keras.batching.image_preprocessing import decode
from dpo_keras.errors import InputError
from dpo_keras.preferences import PreferencePair
from dpo_keras.scoring import score_pairs

PROMPT, CHOSEN, REJECTED = "Hello, how are you?", " I am fine", " don't worry."
# What each family's own prompts write for an image.
WRITTEN = {"gemma3": "<start_of_image>", "gemma4": "<|image|>", "pali_gemma": ""}


@cache
def policy(family):
    return getattr(vision_tiny, family)()


def pair(*seeds, prompt="<image>" + PROMPT, **sizes):
    images = [vision_tiny.png(seed, **sizes) for seed in seeds]
    return PreferencePair(prompt, CHOSEN, REJECTED, images=images)


def plain_forward(model, prompt, response, images):
    """Return log pi(response | prompt, images) by the preset's own preprocessor and full logits."""
    pixels = [decode(image).astype("float32") for image in images]
    pixels = np.stack(pixels) if model.preprocessor.__class__.__name__[0] == "P" else [pixels]
    inputs = {"prompts": [prompt], "responses": [response], "images": pixels}
    inputs, targets, mask = model.preprocessor(inputs)
    logits = tf.cast(model(inputs), "float32")
    chosen = tf.gather(tf.nn.log_softmax(logits), targets, batch_dims=2)
    return float(tf.reduce_sum(chosen * tf.cast(mask, "float32")))


@pytest.mark.parametrize("family", WRITTEN)
def test_log_probs_are_those_of_the_presets_own_preprocessor(family):
    model = policy(family)
    # The second picture is not square; the third prompt has none.
    pairs = [pair(1), pair(2, height=12, width=20), PreferencePair(PROMPT, CHOSEN, REJECTED)]
    with_images = pairs if family != "pali_gemma" else pairs[:2]
    tokens = dpo_keras.tokenize_pairs(with_images, model.preprocessor)
    found = score_pairs(model, tokens, batch_size=2)
    prompt = WRITTEN[family] + PROMPT
    for logps, one in zip(found, pairs[:2], strict=False):
        expected = [plain_forward(model, prompt, r, one.images) for r in (CHOSEN, REJECTED)]
        np.testing.assert_allclose(logps, expected, atol=1e-4)
    assert np.abs(found[0] - found[1]).min() > 1e-3
    if family != "pali_gemma":
        alone = dpo_keras.tokenize_pairs(pairs[2:], model.preprocessor)
        np.testing.assert_allclose(found[2], score_pairs(model, alone)[0], atol=1e-4)
