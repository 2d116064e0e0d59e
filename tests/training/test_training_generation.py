"""Generation: cached and plain agree, seeds repeat, ends end, prompts keep their ends."""

import functools
import gc
import weakref

import keras
import numpy as np
import pytest
import tensorflow as tf
from families import ALL_FAMILIES
from tiny import Letters, gpt2, llama

from dpo_keras.errors import InputError
from dpo_keras.scoring.model_inputs import TextRows, full_logits
from dpo_keras.training import generate_responses
from dpo_keras.training.decoding import decode, new_tokens, token_choice


class Policy:
    """Hides that a model is KerasHub's, so that it goes the plain path."""

    def __init__(self, model):
        self.model, self.backbone = model, model.backbone

    def __call__(self, inputs, training=False):
        return self.model(inputs, training=training)


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


@pytest.mark.parametrize("family", ["gemma4", "qwen3_5", "rwkv7", "pali_gemma"])
def test_greedy_text_is_that_of_forward_passes_over_each_text_alone(family):
    """A state counts twice what it reads twice; PaliGemma's prompts see themselves as a whole."""
    policy = ALL_FAMILIES[family](seed=1)
    if family == "pali_gemma":  # weights so large that what a token sees decides the next one
        for variable in policy.backbone.trainable_variables:
            if "kernel" in variable.path and "vit" not in variable.path:
                variable.assign(3 * variable)
    rows = [[1, 40, 41, 42, 43, 44, 45], [1, 60], [1, 50, 51, 52, 53]]
    ids = tf.ragged.constant(rows).to_tensor(0, shape=(3, 16))
    mask = tf.sequence_mask([len(row) for row in rows], 16)
    greedy = token_choice(0.0, 1.0, draw=None)
    run = functools.partial(decode, policy, stops=[2], choose=greedy, max_new_tokens=3)
    found = tf.function(run, autograph=False)(ids, mask)
    for row, prompt in zip(found.numpy(), rows, strict=True):
        text = list(prompt)
        while len(text) < len(prompt) + 3 and 2 not in text[len(prompt) :]:
            response = tf.constant([[0] * len(prompt) + [1] * (len(text) - len(prompt))])
            seen = TextRows(tf.constant([text]), tf.ones((1, len(text)), tf.int32), None, response)
            text.append(int(np.argmax(full_logits(policy, seen)[0, -1])))
        assert row[: len(text)].tolist() == text


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


def seeded(log_probs):
    return keras.random.categorical(log_probs, 1, dtype="int32", seed=3)[:, 0]


def test_tokens_are_drawn_by_their_probabilities_within_the_nucleus():
    logits = tf.constant(np.log([[0.5, 0.3, 0.15, 0.05]] * 20000), tf.float32)

    def shares(temperature, top_p):
        drawn = token_choice(temperature, top_p, seeded)(logits).numpy()
        return np.bincount(drawn, minlength=4) / len(drawn)

    np.testing.assert_allclose(shares(1.0, 1.0), [0.5, 0.3, 0.15, 0.05], atol=0.015)
    # The smallest set that reaches 0.6 or 0.7 holds two tokens.
    for top_p in (0.6, 0.7):
        np.testing.assert_allclose(shares(1.0, top_p), [0.625, 0.375, 0, 0], atol=0.015)
    np.testing.assert_array_equal(shares(0.0, 1.0), [1, 0, 0, 0])
    # A temperature of 1/2 squares the probabilities.
    squares = np.square([0.5, 0.3, 0.15, 0.05])
    np.testing.assert_allclose(shares(0.5, 1.0), squares / squares.sum(), atol=0.015)


@pytest.mark.parametrize("wrap", [lambda model: model, Policy], ids=["cache", "no cache"])
def test_a_row_of_a_batch_gets_the_tokens_that_it_gets_alone(wrap):
    model = llama()
    for weight in model.backbone.weights:
        weight.assign(keras.random.normal(weight.shape, stddev=0.3, seed=len(weight.path)))
    prompts = [[1, 5, 6], [1, 9, 8, 7, 6, 5, 4, 3], [1, 60]]

    def greedy(rows, stops):
        lengths = [len(row) for row in rows]
        mask = tf.sequence_mask(lengths, max(lengths) + 6)
        ids = tf.ragged.constant(rows, dtype=tf.int32).to_tensor(shape=mask.shape)
        choose = token_choice(0.0, 1.0, seeded)
        found = decode(wrap(model), ids, mask, stops=stops, choose=choose, max_new_tokens=6)
        return new_tokens(found, lengths, stops, 6).to_list()

    together = greedy(prompts, [96])
    assert [len(row) for row in together] == [6, 6, 6]
    assert len(set(map(tuple, together))) == 3
    assert together == [greedy([row], [96])[0] for row in prompts]
    # The first stop ends a response, and is left out.
    stop = together[1][3]
    assert greedy(prompts, [stop]) == [
        row[: row.index(stop)] if stop in row else row for row in together
    ]


def test_the_policys_own_sampler_stays():
    model = gpt2()
    sampler = model.sampler
    generate_responses(model, ["a"], max_new_tokens=2, preprocessor=Letters())
    assert model.sampler is sampler


def test_compiled_functions_do_not_keep_a_policy_alive():
    model = gpt2(num_layers=1)
    generate_responses(model, ["a"], max_new_tokens=2, preprocessor=Letters())
    watched = weakref.ref(model)
    del model
    gc.collect()
    assert watched() is None


def test_no_prompts_give_no_responses():
    assert generate_responses(gpt2(), [], preprocessor=Letters()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1, got 0"),
        ({"temperature": -1}, "temperature must be >= 0, got -1"),
        ({"top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
        ({"preprocessor": None}, "preprocessor is needed"),
        ({"max_new_tokens": 500}, "leave room for a prompt in 96 tokens"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(InputError, match=message):
        generate_responses(gpt2(), ["a"], **{"preprocessor": Letters(), **options})
