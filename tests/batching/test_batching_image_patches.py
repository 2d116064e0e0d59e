"""Images of any size in batches: their tokens, their patches, and the room that a batch has."""

from functools import cache

import numpy as np
import pytest
import tensorflow as tf
import vision_tiny

import dpo_keras
from dpo_keras.batching.image_decoding import decode, pixel_size
from dpo_keras.batching.image_families import image_preprocessor
from dpo_keras.errors import InputError
from dpo_keras.preferences import Image, PreferencePair

CHOSEN, REJECTED = " I am fine", " don't worry."
START, END, MARK, _ = vision_tiny.QWEN_MARKS


@cache
def preprocessor():
    return vision_tiny.qwen3_5().preprocessor


def pair(*sizes, prompt="Hello<image>"):
    images = [vision_tiny.png(place, *size) for place, size in enumerate(sizes)]
    return PreferencePair(prompt, CHOSEN, REJECTED, images=images)


def tokenized(*pairs, **options):
    return dpo_keras.tokenize_pairs(pairs, preprocessor(), **options)


def words_of(ids):
    return [preprocessor().tokenizer.id_to_token(token) for token in ids]


def test_the_grid_of_an_image_is_known_before_it_is_converted():
    family, converter = image_preprocessor(preprocessor()), preprocessor().image_converter
    random = np.random.default_rng(0)
    for height, width in [*random.integers(1, 80, (40, 2)).tolist(), (12, 20), (1, 80), (4, 4)]:
        made = converter(np.zeros((height, width, 3), np.float32))["grid_thw"]
        assert family.grid(height, width) == tuple(np.asarray(made)[1:]), (height, width)


@pytest.mark.parametrize("encode", [tf.io.encode_png, tf.io.encode_jpeg])
def test_a_header_says_the_size_of_the_pixels(encode):
    image = Image.of(encode(np.zeros((9, 14, 3), np.uint8)).numpy())
    assert pixel_size(image) == decode(image).shape[:2] == (9, 14)


def test_patches_follow_each_other_square_by_square():
    pixels = np.zeros((16, 24, 3), np.uint8)
    for row in range(4):
        for column in range(6):
            pixels[4 * row : 4 * row + 4, 4 * column : 4 * column + 4] = 10 * row + column
    family = image_preprocessor(preprocessor())
    # Without a limit of 256 pixels the picture keeps its size.
    family.converter.max_pixels, before = 1000, family.converter.max_pixels
    try:
        one = PreferencePair("Hello", CHOSEN, REJECTED, images=[tf.io.encode_png(pixels).numpy()])
        (batch,) = dpo_keras.preference_dataset([one], preprocessor(), batch_size=1)
    finally:
        family.converter.max_pixels = before
    values = np.rint((batch["pixel_values"][0, :, 1, 0, 0, 0] + 1) * 127.5)
    squares = [[0, 1, 10, 11], [2, 3, 12, 13], [4, 5, 14, 15]]
    below = [[20, 21, 30, 31], [22, 23, 32, 33], [24, 25, 34, 35]]
    np.testing.assert_array_equal(values, np.ravel([squares, below]))
    np.testing.assert_array_equal(batch["image_grid_thw"], [[[1, 4, 6]]])


def test_an_image_has_as_many_tokens_as_squares_between_its_marks():
    texts = tokenized(pair((8, 24), (16, 16), prompt="<image>a<image>"))
    three, four = [START, *[MARK] * 3, END], [START, *[MARK] * 4, END]
    assert words_of(texts.prompt[0]) == [*three, "a", *four]


@pytest.mark.parametrize("written", [START + MARK + END, MARK])
def test_the_familys_own_mark_stands_for_an_image(written):
    found = tokenized(pair((8, 8), prompt=f"a{written}b"))
    assert words_of(found.prompt[0]) == ["a", START, MARK, END, "b"]


def test_a_template_leaves_the_tokens_of_an_image_whole():
    record = {
        "prompt": [
            {
                "role": "user",
                "content": [{"type": "image"}, {"type": "text", "text": f"a{START}"}],
            }
        ],
        "chosen": CHOSEN,
        "rejected": REJECTED,
        "images": [vision_tiny.png(1, 8, 16)],
    }
    words = words_of(tokenized(record, template="chatml").prompt[0])
    first = words.index(START)
    assert words[first : first + 4] == [START, MARK, MARK, END]
    assert words.count(START) == 1, "a user's own words are no mark"


def test_a_bucket_has_patches_for_its_own_length_at_most():
    short, long = pair((8, 8), prompt="<image>a"), PreferencePair(20 * "a b ", CHOSEN, REJECTED)
    many = pair(*[(16, 16)] * 6, prompt=6 * "<image>")
    options = {"batch_size": 1, "buckets": [16, 80], "shuffle": False}
    dataset = dpo_keras.preference_dataset(tokenized(short, long, many), **options)
    # Four patches to a token of an image: 16 of these at most, or the 24 of the most images.
    assert [batch["pixel_values"].shape[1] for batch in dataset] == [64, 96, 96]


def test_pairs_on_disk_have_the_same_batches(tmp_path):
    two = pair((8, 8), (8, 24), prompt="<image>Hello<image>")
    pairs = [pair((16, 16)), PreferencePair("Hello", CHOSEN, REJECTED), two]
    built = dpo_keras.build_preferences(pairs, tmp_path / "built")
    batches = [
        next(iter(dpo_keras.preference_dataset(tokens, batch_size=3, shuffle=False)))
        for tokens in (dpo_keras.tokenize_pairs(built, preprocessor()), tokenized(*pairs))
    ]
    assert batches[0].keys() == batches[1].keys() >= {"pixel_values", "image_grid_thw"}
    for name, value in batches[0].items():
        np.testing.assert_array_equal(value, batches[1][name], err_msg=name)


def test_a_prompt_that_writes_more_places_than_it_has_images_is_refused():
    with pytest.raises(InputError, match="itself writes tokens of images"):
        tokenized(pair((8, 8), prompt=f"<image>{MARK}"))


def test_a_tokenizer_that_cuts_image_tokens_is_refused():
    own = preprocessor()
    words = {"vocabulary": own.tokenizer.vocabulary, "merges": own.tokenizer.merges}
    plain = type(own.tokenizer)(**words)
    other = type(own)(plain, own.image_converter)
    with pytest.raises(InputError, match="0 of 1 image tokens are left"):
        dpo_keras.tokenize_pairs([pair((8, 8))], other)
    blind = type(own.tokenizer)(has_vision_tokens=False, **words)
    with pytest.raises(InputError, match="need a tokenizer with image tokens"):
        dpo_keras.tokenize_pairs([pair((8, 8))], type(own)(blind, own.image_converter))
