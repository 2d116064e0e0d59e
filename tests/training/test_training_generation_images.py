"""Generation from prompts with images."""

import numpy as np
import pytest
import vision_tiny
from families import ALL_FAMILIES
from tiny import Letters

import dpo_keras
from dpo_keras.batching.image_decoding import decode
from dpo_keras.errors import InputError
from dpo_keras.preferences import Image, PreferencePair

pytestmark = pytest.mark.slow

NEW = 4
# Prompts of different length, and what each family's own prompts write for an image.
PROMPTS = ["Hello, how are you?<image>", "Hi <image>"]
WRITTEN = {"gemma3": "<start_of_image>", "gemma4": "<|image|>", "pali_gemma": ""}


def greedy_alone(model, prompt, image):
    """Return the ids of a greedy response by the preset's own preprocessor and full logits."""
    pixels = decode(Image.of(image))[None]
    pixels = pixels if "PaliGemma" in type(model).__name__ else [pixels]
    inputs = {"prompts": [prompt], "images": pixels}
    inputs = model.preprocessor.generate_preprocess(inputs, sequence_length=48)
    inputs = {name: np.array(inputs[name]) for name in model.input}
    first = int(inputs["padding_mask"].sum())
    for place in range(first, first + NEW):
        token = np.argmax(model(inputs)[0, place - 1])
        inputs["token_ids"][0, place] = token
        for name in {"padding_mask", "response_mask"} & inputs.keys():
            inputs[name][0, place] = 1
    return inputs["token_ids"][0, first : first + NEW]


@pytest.mark.parametrize("family", WRITTEN)
def test_greedy_text_is_that_of_forward_passes_with_the_images(family):
    model = getattr(vision_tiny, family)()
    for variable in model.backbone.trainable_variables:
        if "kernel" in variable.path and "vi" not in variable.path:  # what is seen decides
            variable.assign(3 * variable)
    images = [vision_tiny.png(1), vision_tiny.png(2, height=12, width=20)]
    options = {"max_new_tokens": NEW, "temperature": 0, "batch_size": 4}

    def generate(images):
        shown = [[image] for image in images]
        return dpo_keras.generate_responses(model, PROMPTS, images=shown, **options)

    found = generate(images)
    written = [prompt.replace("<image>", WRITTEN[family]) for prompt in PROMPTS]
    for response, prompt, image in zip(found, written, images, strict=True):
        expected = greedy_alone(model, prompt, image)
        assert response == model.preprocessor.tokenizer.detokenize([expected.tolist()])[0]
    assert generate(images[::-1]) != found


def test_ids_with_their_images_are_answered_as_their_texts_are():
    model = vision_tiny.gemma3()
    image = vision_tiny.png(1)
    pairs = [PreferencePair(PROMPTS[0], "a", "b", images=[image]), PreferencePair("Hi", "a", "b")]
    tokens = dpo_keras.tokenize_pairs(pairs, model.preprocessor)
    options = {"max_new_tokens": NEW, "temperature": 0, "batch_size": 2}
    found = dpo_keras.generate_responses(model, tokens.prompt, images=tokens.images, **options)
    texts = [PROMPTS[0], "Hi"]
    assert found == dpo_keras.generate_responses(model, texts, images=[[image], []], **options)
    assert found[1:] == dpo_keras.generate_responses(model, ["Hi"], **options)
    with pytest.raises(InputError, match="max_length leaves out tokens of images"):
        dpo_keras.generate_responses(model, texts[:1], images=[[image]], max_length=8, **options)


def test_a_policy_that_does_not_see_images_in_generation_refuses_them():
    model = ALL_FAMILIES["qwen3_5"](num_layers=1, layer_types=["linear_attention"])
    with pytest.raises(InputError, match="images are not read in the generation of Qwen3_5"):
        dpo_keras.generate_responses(
            model, ["a"], images=[[vision_tiny.png(1)]], preprocessor=Letters()
        )
