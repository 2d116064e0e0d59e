"""A model gets the inputs that it declares: those of its own preprocessor, or a useful error."""

import keras
import keras_hub
import numpy as np
import pytest
import serving_tiny
import tensorflow as tf
import tiny
from families import ALL_FAMILIES, IMAGE_SIZE, PATCH_SIZE
from scoring_samples import random_pairs

from dpo_keras.batching import collate
from dpo_keras.errors import InputError
from dpo_keras.scoring import ResponseScorer
from dpo_keras.scoring.layer_overrides import overridden_methods
from dpo_keras.scoring.model_inputs import (
    TextRows,
    full_logits,
    model_inputs,
    response_mask,
    text_overrides,
)

LENGTHS = [(9, 4, 6), (1, 1, 1), (5, 1, 3)]


@pytest.fixture(scope="module")
def batch():
    return {k: tf.constant(v) for k, v in collate(random_pairs(LENGTHS), [0, 1, 2]).items()}


def places(ids):
    return tf.broadcast_to(tf.range(ids.shape[1]), ids.shape)


def no_image(ids):
    """What the preprocessors of Gemma 3 and Gemma 4 make of a text without images."""
    return {"vision_indices": tf.ones((len(ids), 0), tf.int32), "vision_mask": tf.zeros_like(ids)}


def no_patches(ids):
    return {
        "pixel_values": tf.ones((len(ids), 0, 1, 3 * PATCH_SIZE**2)),
        "pixel_position_ids": tf.zeros((len(ids), 0, 1, 2), tf.int32),
    }


def images(ids, *count):
    return {"images": tf.zeros((len(ids), *count, IMAGE_SIZE, IMAGE_SIZE, 3))}


FURTHER = {
    "gemma4": lambda ids: {"position_ids": places(ids)},
    "gemma4_moe": lambda ids: {"position_ids": places(ids)},
    "gemma4_vision": lambda ids: {"position_ids": places(ids), **no_image(ids), **no_patches(ids)},
    "gemma3_vision": lambda ids: {**no_image(ids), **images(ids, 0)},
    "qwen3_5_vision": lambda ids: {},  # its backbone adds them itself
    "pali_gemma": lambda ids: {**images(ids), "response_mask": tf.constant(RESPONSES)},
    "blip2": lambda ids: {},
}
# Prompts of 9, 1 and 5 tokens with responses of 4, 6, 1, 1, 1 and 3, in rows of 16.
RESPONSES = np.zeros((6, 16), np.int32)
for row, (begin, end) in enumerate([(9, 13), (9, 15), (1, 2), (1, 2), (5, 6), (5, 8)]):
    RESPONSES[row, begin:end] = 1


# KerasHub's encoder, which runs here for the comparison, warns of no images.
@pytest.mark.filterwarnings("ignore:.*softmax over axis:UserWarning")
@pytest.mark.parametrize("family", FURTHER)
def test_log_probs_are_those_of_the_models_own_inputs(family, batch):
    policy = ALL_FAMILIES[family]()
    scorer = ResponseScorer(policy)
    assert scorer.parts is not None, "the head is applied in chunks"
    # Inference of KerasHub's own backbone, which adds empty images to Qwen 3.5's inputs.
    model = Whole(policy) if family == "qwen3_5_vision" else policy
    expected = tiny.full_logits_log_probs(model, batch, FURTHER[family])
    np.testing.assert_allclose(scorer(batch)["logps"], expected, atol=1e-4)


class Whole:
    def __init__(self, policy):
        self.policy = policy

    def __call__(self, inputs, training):
        states = self.policy.backbone(inputs, training=training)
        return self.policy.backbone.token_embedding(states, reverse=True)


def _preprocessors():
    gemma3, gemma4 = (
        getattr(keras_hub.models, f"{family}Tokenizer")(serving_tiny.sentencepiece(pieces))
        for family, pieces in (("Gemma3", "gemma"), ("Gemma4", "gemma4"))
    )
    settings = {"max_images_per_prompt": 1, "num_vision_tokens_per_image": 4}
    settings["sequence_length"] = 12
    resized = keras_hub.layers.Gemma3ImageConverter(image_size=(IMAGE_SIZE, IMAGE_SIZE))
    patches = keras_hub.layers.Gemma4ImageConverter(
        patch_size=PATCH_SIZE, max_soft_tokens=4, pooling_kernel_size=2
    )
    return {
        "gemma3_vision": keras_hub.models.Gemma3CausalLMPreprocessor(gemma3, resized, **settings),
        "gemma4_vision": keras_hub.models.Gemma4CausalLMPreprocessor(gemma4, patches, **settings),
    }


def test_inputs_are_those_of_the_familys_own_preprocessor():
    for family, preprocessor in _preprocessors().items():
        policy = ALL_FAMILIES[family]()
        texts = {"prompts": ["Hello", "a"], "responses": [" you", "!"]}
        wanted = preprocessor(texts)[0]
        rows = TextRows(wanted["token_ids"], wanted["padding_mask"])
        found = model_inputs(policy, rows)
        assert found.keys() == policy.input.keys() <= wanted.keys()
        for name, value in found.items():
            assert len(value.shape) == len(wanted[name].shape), name
            # No image has any patches or places, whatever size they would be.
            if name not in ("pixel_values", "pixel_position_ids", "images", "vision_indices"):
                np.testing.assert_array_equal(value, tf.cast(wanted[name], value.dtype))
            else:
                assert value.shape[:2] == (2, 0), name


def test_text_leaves_the_vision_encoder_alone(batch):
    policy = ALL_FAMILIES["gemma3_vision"]()
    encoder = policy.backbone.vision_encoder
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(ResponseScorer(policy)(batch)["logps"])
    gradients = tape.gradient(loss, policy.trainable_variables)
    ours = {id(variable) for variable in encoder.trainable_variables}
    assert ours
    for gradient, variable in zip(gradients, policy.trainable_variables, strict=True):
        assert (gradient is None) == (id(variable) in ours), variable.path
    # With an image in the batch it runs.
    assert not text_overrides(policy, {"images": tf.zeros((1, 1, IMAGE_SIZE, IMAGE_SIZE, 3))})


def test_positions_of_the_batch_reach_a_model_that_takes_them():
    policy = ALL_FAMILIES["gemma4"]()
    ids = tf.constant([[5, 6, 7, 8]])
    positions = tf.constant([[0, 1, 1, 2]])
    rows = TextRows(ids, tf.ones_like(ids), positions=positions)
    np.testing.assert_array_equal(model_inputs(policy, rows)["position_ids"], positions)
    rows = TextRows(ids, tf.ones_like(ids))
    np.testing.assert_array_equal(model_inputs(policy, rows)["position_ids"], [[0, 1, 2, 3]])


def test_inputs_that_are_given_take_the_place_of_empty_ones():
    policy = ALL_FAMILIES["gemma3_vision"]()
    ids = tf.constant([[5, 6]])
    pictures = tf.ones((1, 2, IMAGE_SIZE, IMAGE_SIZE, 3))
    given = {"images": pictures, "answers": 1}
    found = model_inputs(policy, TextRows(ids, ids), given)
    assert found["images"] is pictures and "answers" not in found


def test_the_tokens_of_responses_are_marked(batch):
    found = response_mask(batch["source"], batch["owner"], batch["padding_mask"])
    np.testing.assert_array_equal(found, RESPONSES)


def test_an_assistant_model_is_refused_with_the_reason():
    with pytest.raises(InputError, match="drafts tokens.*Train the model that it drafts for"):
        ResponseScorer(ALL_FAMILIES["gemma4_assistant"]())


def test_an_unknown_input_is_named_and_the_advice_works(batch):
    ids, mask = (keras.Input((None,), dtype="int32", name=n) for n in ("token_ids", "padding_mask"))
    kinds = keras.Input((None,), dtype="int32", name="token_type_ids")
    states = keras.layers.Embedding(tiny.VOCABULARY, 8)(ids) + keras.layers.Embedding(2, 8)(kinds)
    inputs = {"token_ids": ids, "padding_mask": mask, "token_type_ids": kinds}
    policy = keras.Model(inputs, keras.layers.Dense(tiny.VOCABULARY)(states))
    with pytest.raises(InputError, match=r"cannot make 'token_type_ids'.*keras\.Model\("):
        ResponseScorer(policy)
    # The advice, as it stands in the message.
    ids, mask = (keras.Input((None,), dtype="int32", name=n) for n in ("token_ids", "padding_mask"))
    further = {"token_type_ids": keras.ops.zeros_like(ids)}
    inputs = {"token_ids": ids, "padding_mask": mask}
    wrapped = keras.Model(inputs, policy({**inputs, **further}))
    expected = tiny.full_logits_log_probs(
        policy, batch, lambda ids: {"token_type_ids": tf.zeros_like(ids)}
    )
    np.testing.assert_allclose(ResponseScorer(wrapped)(batch)["logps"], expected, atol=1e-4)


def test_the_encoders_come_back_after_a_text():
    policy = ALL_FAMILIES["gemma3_vision"]()
    encoder = policy.backbone.vision_encoder
    with overridden_methods(text_overrides(policy)):
        assert "call" in encoder.__dict__
    assert "call" not in encoder.__dict__


def test_gemma3n_is_scored_by_its_embeddings_as_they_are(batch, tmp_path):
    """KerasHub's functional model has a head of its own: the embeddings that it was built with."""
    policy = ALL_FAMILIES["gemma3n"]()
    scorer = ResponseScorer(policy)
    before = scorer(batch)["logps"].numpy()
    with tf.GradientTape() as tape:
        loss = -tf.reduce_sum(scorer(batch)["logps"])
    embeddings = policy.backbone.language_model.embed_tokens.embedding.embeddings
    assert np.abs(tape.gradient(loss, embeddings.value)).max() > 0.1
    policy.save(tmp_path / "gemma3n.keras")
    loaded = keras.saving.load_model(tmp_path / "gemma3n.keras", compile=False)
    np.testing.assert_allclose(ResponseScorer(loaded)(batch)["logps"], before, atol=1e-5)
    # The same logits as in KerasHub's own decoding.
    ids = tf.constant([[5, 6, 7, 8]])
    logits = full_logits(policy, TextRows(ids, tf.ones_like(ids)))
    cache = tf.zeros((1, 2, 2, 2, 4, 16))
    mask = tf.ones_like(ids, tf.bool)
    cached = policy.call_with_cache(ids, cache, 0, padding_mask=mask)[0]
    np.testing.assert_allclose(logits, cached, atol=1e-4)
