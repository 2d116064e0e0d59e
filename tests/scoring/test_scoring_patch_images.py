"""Images of Qwen 3.5: encoder, places and positions are those of KerasHub's own eager methods."""

import dataclasses
from functools import cache

import keras
import numpy as np
import tensorflow as tf
import vision_tiny

import dpo_keras
from dpo_keras.batching import collate
from dpo_keras.batching.image_decoding import decode
from dpo_keras.preferences import PreferencePair
from dpo_keras.scoring import ResponseScorer

PROMPT, CHOSEN, REJECTED = "Hello, how are you?", " I am fine", " don't worry."
TEXT = PreferencePair(PROMPT, CHOSEN, REJECTED)


def pair(*sizes, seed=1, prompt=PROMPT + "<image>"):
    images = [vision_tiny.png(seed + place, *size) for place, size in enumerate(sizes)]
    return PreferencePair(prompt, CHOSEN, REJECTED, images=images)


# Of 2 x 2, 1 x 3, none, 3 x 1 and 1 x 1, and 2 x 2 tokens.
PAIRS = [
    pair((16, 16)),
    pair((8, 24)),
    TEXT,
    pair((24, 8), (8, 8), prompt="<image>Hello <image>you"),
    pair((16, 16), seed=5),
]


@cache
def policy(moe=False):
    return vision_tiny.qwen3_5(moe)


def plain_log_prob(model, prompt, response, images, rows=False, positions=True):
    """Compute log pi(response | prompt, images) of one sequence by KerasHub's `score`.

    Args:
        model: The policy.
        prompt: Ids of the prompt.
        response: Ids of the response.
        images: The images of the prompt.
        rows: Whether to leave patches row by row, as KerasHub's converter writes them.
        positions: Whether the tokens of images have their positions in the image.
    """
    family = model.preprocessor
    made = [family.image_converter(decode(image)) for image in images]
    grid = np.stack([one["grid_thw"] for one in made])
    patches = [np.asarray(one["patches"]) for one in made]
    if not rows:  # square by square
        for place, (_, down, across) in enumerate(grid):
            squares = patches[place].reshape(down // 2, 2, across // 2, 2, 2, 4, 4, 3)
            patches[place] = np.moveaxis(squares, 2, 1).reshape(patches[place].shape)
    ids = np.concatenate([prompt, response])[None]
    logits = model.score(
        {
            "token_ids": tf.constant(ids),
            "padding_mask": tf.ones_like(ids),
            "pixel_values": tf.constant(np.concatenate(patches)),
            "image_grid_thw": tf.constant(grid),
            "vision_indices": family._compute_vision_indices(ids),
            "position_ids": family._compute_position_ids(ids, grid, None) if positions else None,
        }
    )
    log_probs = tf.nn.log_softmax(logits[0, len(prompt) - 1 : -1])
    return tf.reduce_sum(tf.gather(log_probs, response, batch_dims=1))


def plain_log_probs(model, tokens, number, **options):
    responses, images = (tokens.chosen[number], tokens.rejected[number]), PAIRS[number].images
    return [plain_log_prob(model, tokens.prompt[number], r, images, **options) for r in responses]


def test_log_probs_are_those_of_one_sequence_at_a_time():
    model = policy()
    tokens = dpo_keras.tokenize_pairs(PAIRS, model.preprocessor)
    found = ResponseScorer(model)(collate(tokens, range(len(PAIRS))))["logps"].numpy()
    for number in (0, 1):
        expected = plain_log_probs(model, tokens, number)
        np.testing.assert_allclose(found[number], expected, atol=1e-4)
    # It would be seen if tokens of images had the positions of text, or patches another order.
    for options in ({"positions": False}, {"rows": True}):
        other = plain_log_probs(model, tokens, 0, **options)
        assert np.abs(found[0] - other).max() > 1e-2, options
    assert np.abs(found[0] - found[4]).max() > 1e-2, "another image, another score"
    alone = dpo_keras.tokenize_pairs([TEXT], model.preprocessor)
    plain = ResponseScorer(model)(collate(alone, [0]))["logps"]
    np.testing.assert_allclose(found[2], plain[0], atol=1e-4)


def test_a_mixture_scores_single_responses_with_images():
    model, pairs = policy(moe=True), PAIRS[:3]
    found, _ = dpo_keras.response_log_probs(
        model,
        [one.prompt for one in pairs],
        [CHOSEN] * len(pairs),
        images=[one.images for one in pairs],
        batch_size=2,
    )
    tokens = dpo_keras.tokenize_pairs(pairs, model.preprocessor)
    for number in (0, 1):
        inputs = tokens.prompt[number], tokens.chosen[number], pairs[number].images
        np.testing.assert_allclose(found[number], plain_log_prob(model, *inputs), atol=1e-4)


def test_gradients_of_a_graph_are_those_of_kerashub_whatever_the_padding():
    model = policy()
    tokens = dpo_keras.tokenize_pairs(PAIRS, model.preprocessor)
    # Room for three more tokens of images, and for another image.
    padded = dataclasses.replace(tokens.images, room=tokens.images.room + 3, most=3)
    batch = collate(dataclasses.replace(tokens, images=padded), [3], batch_size=2)
    variables = model.trainable_variables
    scorer = ResponseScorer(model)

    @tf.function
    def of_a_graph():
        with tf.GradientTape() as tape:
            logps = scorer(batch)["logps"][0]
            total = logps[0] - 2 * logps[1]
        return logps, tape.gradient(total, variables)

    logps, found = of_a_graph()
    with tf.GradientTape() as tape:
        plain = plain_log_probs(model, tokens, 3)
        total = plain[0] - 2 * plain[1]
    expected = tape.gradient(total, variables)
    np.testing.assert_allclose(logps, plain, atol=1e-5)
    seen = {id(variable) for variable in model.backbone.vision_encoder.trainable_variables}
    dense = [[tf.convert_to_tensor(one) for one in part] for part in (found, expected)]
    for variable, ours, theirs in zip(variables, *dense, strict=True):
        scale = max(np.abs(theirs).max(), 1.0)
        np.testing.assert_allclose(ours, theirs, atol=1e-5 * scale, err_msg=variable.path)
        # Keys have no gradient from a bias that is the same for all of them.
        assert id(variable) not in seen or np.abs(theirs).max() > 0, variable.path


def test_training_in_a_graph_begins_at_log_2_and_is_that_of_eager_steps():
    weights = []
    for run_eagerly in (False, True):
        model = vision_tiny.qwen3_5()
        before = [np.array(v) for v in model.backbone.vision_encoder.trainable_variables]
        dataset = dpo_keras.preference_dataset(
            PAIRS,
            model.preprocessor,
            batch_size=len(PAIRS),
            max_length=vision_tiny.LENGTH,
            shuffle=False,
            buckets=1,
            batching="buckets",
        )
        dpo = dpo_keras.DPOModel(model)
        dpo.compile(keras.optimizers.SGD(0.1), run_eagerly=run_eagerly)
        (loss,) = dpo.fit(dataset, verbose=0).history["loss"]
        np.testing.assert_allclose(loss, np.log(2), atol=1e-5)
        after = [np.array(v) for v in model.backbone.vision_encoder.trainable_variables]
        moved = [np.abs(a - b).max() for a, b in zip(before, after, strict=True)]
        assert min(moved) > 0, "every weight of the encoder is trained"
        weights.append([np.array(v) for v in model.trainable_variables])
    for graph, eager in zip(*weights, strict=True):
        np.testing.assert_allclose(graph, eager, atol=1e-5)


def test_text_alone_leaves_the_encoder_alone():
    tokens = dpo_keras.tokenize_pairs([TEXT], policy().preprocessor)
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(ResponseScorer(policy())(collate(tokens, [0]))["logps"])
    variables = policy().backbone.vision_encoder.trainable_variables
    assert variables and tape.gradient(loss, variables) == [None] * len(variables)
