"""Images in pairs: log-probs, gradients, training, and what is refused."""

from functools import cache

import keras
import numpy as np
import pytest
import tensorflow as tf
import vision_tiny

import dpo_keras
from dpo_keras.batching.image_decoding import decode
from dpo_keras.batching.image_families import image_preprocessor
from dpo_keras.batching.image_preprocessing import SLOT
from dpo_keras.errors import InputError
from dpo_keras.preferences import PreferencePair
from dpo_keras.preferences.pair import Message
from dpo_keras.scoring import score_pairs

PROMPT, CHOSEN, REJECTED = "Hello, how are you?", " I am fine", " don't worry."
# What each family's own prompts write for an image.
WRITTEN = {"gemma3": "<start_of_image>", "gemma4": "<|image|>", "pali_gemma": ""}


@cache
def policy(family):
    return getattr(vision_tiny, family)()


def pair(*seeds, prompt=PROMPT + "<image>", **sizes):
    images = [vision_tiny.png(seed, **sizes) for seed in seeds]
    return PreferencePair(prompt, CHOSEN, REJECTED, images=images)


def plain_forward(model, prompt, response, images):
    """Return log pi(response | prompt, images) by the preset's own preprocessor and full logits."""
    pixels = [decode(image) for image in images]
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
    prompt = PROMPT + WRITTEN[family]
    for logps, one in zip(found, pairs[:2], strict=False):
        expected = [plain_forward(model, prompt, r, one.images) for r in (CHOSEN, REJECTED)]
        np.testing.assert_allclose(logps, expected, atol=1e-4)
    assert np.abs(found[0] - found[1]).max() > 1e-3
    logps, _ = dpo_keras.response_log_probs(
        model,
        [one.prompt for one in pairs[:2]],
        [CHOSEN] * 2,
        images=[one.images for one in pairs[:2]],
        batch_size=1,
    )
    np.testing.assert_allclose(logps, found[:2, 0], atol=1e-4)
    if family != "pali_gemma":
        alone = dpo_keras.tokenize_pairs(pairs[2:], model.preprocessor)
        np.testing.assert_allclose(found[2], score_pairs(model, alone)[0], atol=1e-4)


@pytest.mark.parametrize("family", ["gemma3", "gemma4"])
def test_images_stay_in_their_rows_where_there_are_as_many_rows_as_image_tokens(family):
    """KerasHub's addition of rows and places goes wrong there (a fault of `keras.ops.add`)."""
    model = policy(family)
    tokens = dpo_keras.tokenize_pairs([pair(1), pair(2)], model.preprocessor)
    together = score_pairs(model, tokens, batch_size=2)  # 4 sequences, 4 tokens of an image
    np.testing.assert_allclose(together, score_pairs(model, tokens, batch_size=1), atol=1e-4)


def test_training_reaches_the_vision_encoder():
    model = vision_tiny.gemma3()
    encoder = model.backbone.vision_encoder
    before = [np.array(weight) for weight in encoder.trainable_variables]
    dataset = dpo_keras.preference_dataset(
        [
            pair(1),
            pair(2, 3, prompt="<image>" + PROMPT + "<image>"),
            PreferencePair(PROMPT, CHOSEN, REJECTED),
        ],
        model.preprocessor,
        batch_size=3,
        max_length=vision_tiny.LENGTH,
        buckets=1,
        batching="buckets",
        epochs=2,
    )
    dpo = dpo_keras.DPOModel(model, reference="frozen_copy")
    dpo.compile(optimizer=keras.optimizers.SGD(0.1), loss=dpo_keras.DPOLoss(beta=1.0))
    losses = dpo.fit(dataset.take(1), verbose=0).history["loss"]
    np.testing.assert_allclose(losses[0], np.log(2), atol=1e-5)
    moved = [
        np.abs(weight - np.array(now)).max()
        for weight, now in zip(before, encoder.trainable_variables, strict=True)
    ]
    assert max(moved) > 0


def test_a_policy_without_vision_encoder_refuses_images():
    import serving_tiny

    model = serving_tiny.gemma3()
    with pytest.raises(InputError, match="need a preset with a vision encoder"):
        dpo_keras.tokenize_pairs([pair(1)], model.preprocessor)
    tokens = dpo_keras.tokenize_pairs([pair(1)], policy("gemma3").preprocessor)
    with pytest.raises(InputError, match="need a policy with a vision encoder"):
        score_pairs(model, tokens)


def test_packed_rows_refuse_images():
    tokens = dpo_keras.tokenize_pairs([pair(1)], policy("gemma3").preprocessor)
    with pytest.raises(InputError, match="batching must be 'buckets' for pairs with images"):
        dpo_keras.preference_dataset(tokens, batching="packed")


def test_a_pair_is_dropped_rather_than_its_images_cut():
    long = pair(1, prompt=8 * PROMPT + "<image>")
    tokens = dpo_keras.tokenize_pairs(
        [long, pair(2)], policy("gemma3").preprocessor, max_length=vision_tiny.LENGTH
    )
    assert [dropped.rule for dropped in tokens.report.dropped] == ["images_cut"]


def test_a_template_puts_the_image_where_its_part_stands():
    parts = [{"type": "text", "text": "Hello <end_of_turn>"}, {"type": "image"}]
    record = {
        "prompt": [{"role": "user", "content": parts}],
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "images": [vision_tiny.png(1)],
    }
    preprocessor = policy("gemma3").preprocessor
    tokens = dpo_keras.tokenize_pairs([record], preprocessor, template="gemma")
    ids = tokens.prompt[0].tolist()
    lookup = preprocessor.tokenizer.token_to_id
    start, mark, end = (lookup(token) for token in vision_tiny.PIECES["gemma3"])
    first = ids.index(start)
    assert ids[first : first + 6] == [start, mark, mark, mark, mark, end]
    # The user's own words cannot end the turn.
    assert ids.count(lookup("<end_of_turn>")) == 1


@pytest.mark.parametrize("text", ["Look: <image>", "Look"])
def test_tool_calls_stay_where_a_conversation_has_images(text):
    call = Message("assistant", "", '{"tool_calls": [{"function": {"name": "zoom"}}]}')
    family = image_preprocessor(policy("gemma3").preprocessor)
    marked = family.prompt((Message("user", text), call), 1)
    assert marked[1] == call and marked[0].content.count(SLOT) == 1


def test_pairs_on_disk_keep_their_images(tmp_path):
    pairs = [pair(1), PreferencePair(PROMPT, CHOSEN, REJECTED)]
    built = dpo_keras.build_preferences(pairs, tmp_path / "built")
    model = policy("gemma3")
    tokens = dpo_keras.tokenize_pairs(built, model.preprocessor)
    expected = dpo_keras.tokenize_pairs(pairs, model.preprocessor)
    batches = [
        next(iter(dpo_keras.preference_dataset(t, shuffle=False))) for t in (tokens, expected)
    ]
    for name in ("images", "vision_indices", "vision_mask", "token_ids"):
        np.testing.assert_array_equal(batches[0][name], batches[1][name])


def test_another_image_is_another_reference_cache():
    # Loaded once more, a preset is the same one.
    presets = [policy("gemma3"), vision_tiny.gemma3(), policy("gemma3")]
    prints = [
        dpo_keras.tokenize_pairs([pair(seed)], preset.preprocessor).fingerprint
        for seed, preset in zip((1, 1, 2), presets, strict=True)
    ]
    assert prints[0] == prints[1] != prints[2]
