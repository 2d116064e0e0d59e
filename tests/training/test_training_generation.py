"""Generation: cached and plain agree, seeds repeat, ends end, prompts keep their ends."""

import numpy as np
import pytest
from tiny import Letters, gpt2, llama

from dpo_keras.errors import InputError
from dpo_keras.training import generate_responses
from dpo_keras.training.generation import _draw, _function, _plain


class Policy:
    """Hides that a model is KerasHub's, so that it goes the plain path."""

    def __init__(self, model):
        self.model, self.backbone = model, model.backbone

    def __call__(self, inputs):
        return self.model(inputs)


PROMPTS = ["a", "bcd", "efghij"]


@pytest.mark.parametrize("make", [gpt2, llama])
def test_greedy_text_is_the_same_with_and_without_the_cache(make):
    model = make()
    options = {"max_new_tokens": 6, "temperature": 0, "preprocessor": Letters(), "batch_size": 3}
    cached = generate_responses(model, PROMPTS, **options)
    plain = generate_responses(Policy(model), PROMPTS, **options)
    assert cached == plain
    rows = [[1, *ids] for ids in Letters().tokenize(PROMPTS)]
    assert generate_responses(model, rows, **options) == cached
    assert all(0 < len(text) <= 6 for text in cached)


def test_a_seed_repeats_its_samples_and_another_does_not():
    model = gpt2()
    options = {"max_new_tokens": 8, "preprocessor": Letters(), "batch_size": 2}
    first = generate_responses(model, PROMPTS, seed=1, **options)
    assert generate_responses(model, PROMPTS, seed=1, **options) == first
    assert generate_responses(model, PROMPTS, seed=2, **options) != first


def test_generation_follows_the_weights_as_they_are_trained():
    model = gpt2()
    options = {"max_new_tokens": 6, "temperature": 0, "preprocessor": Letters()}
    before = generate_responses(model, PROMPTS, **options)
    for variable in model.trainable_variables:
        variable.assign(-variable)
    assert generate_responses(model, PROMPTS, **options) != before


def test_responses_that_end_by_themselves_are_told_apart():
    model = gpt2(num_layers=1)
    embeddings = model.backbone.token_embedding.embeddings
    # The end token's logit is made the largest one everywhere: hidden . hidden > hidden . other.
    model.backbone.layer_norm.gamma.assign(np.zeros(32))
    model.backbone.layer_norm.beta.assign(np.ones(32))
    values = np.zeros(embeddings.shape, np.float32)
    values[Letters.end_token_id] = 1
    embeddings.assign(values)
    responses, ended = generate_responses(
        model, PROMPTS, max_new_tokens=4, temperature=0, preprocessor=Letters(), return_ended=True
    )
    assert responses == ["", "", ""]
    assert ended == [True] * 3


def test_long_prompts_are_cut_from_the_left():
    model = gpt2()
    options = {"max_new_tokens": 4, "temperature": 0, "preprocessor": Letters()}
    (long,) = generate_responses(model, ["x" * 200 + "abc"], max_length=8, **options)
    (short,) = generate_responses(model, ["abc"], max_length=8, **options)
    assert long == short


def test_an_end_token_that_is_also_the_pad_does_not_end_generation_at_once():
    """KerasHub's GPT-2 pads with id 0; a tokenizer may have its end token there."""

    class SamePad(Letters):
        end_token_id = pad_token_id = 0

    responses = generate_responses(
        gpt2(), PROMPTS, max_new_tokens=5, temperature=0, preprocessor=SamePad()
    )
    assert any(responses)


def test_top_p_draws_only_from_the_most_likely():
    logits = np.log(np.tile([[0.5, 0.3, 0.15, 0.05]], (4000, 1)))
    random = np.random.default_rng(0)
    drawn = _draw(logits, 1.0, 0.7, random)
    share = np.bincount(drawn, minlength=4) / 4000
    np.testing.assert_allclose(share, [0.625, 0.375, 0, 0], atol=0.03)
    np.testing.assert_array_equal(_draw(logits, 0, 1.0, random), 0)


def test_no_prompts_give_no_responses():
    assert generate_responses(gpt2(), [], preprocessor=Letters()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -1}, "temperature must be >= 0"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"preprocessor": None}, "preprocessor is needed"),
        ({"max_new_tokens": 500}, "leave room for a prompt in 96 tokens"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        generate_responses(gpt2(), ["a"], **{"preprocessor": Letters(), **options})


def test_paths_are_chosen_by_kind():
    from dpo_keras.batching import TextEncoder

    encoder = TextEncoder(Letters())
    assert _function(gpt2(), encoder, 0, 1.0, 0).__name__ == "run"
    assert callable(_plain)
