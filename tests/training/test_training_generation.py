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
from dpo_keras.scoring import enable_lora
from dpo_keras.scoring.model_inputs import TextRows, full_logits
from dpo_keras.training import generate_responses, generation
from dpo_keras.training.continuous_batching import decode_continuously
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


@pytest.mark.parametrize("family", ["gemma4", "gpt_neo_x", "qwen3_5", "rwkv7", "pali_gemma"])
def test_greedy_text_is_that_of_forward_passes_over_each_text_alone(family):
    """A state counts twice what it reads twice; PaliGemma's prompts see themselves as a whole."""
    policy = ALL_FAMILIES[family](seed=1)
    if family in {"pali_gemma", "gpt_neo_x"}:  # what a token sees must decide the next one
        for variable in policy.backbone.trainable_variables:
            if "kernel" in variable.path and "vit" not in variable.path:
                variable.assign(3 * variable)
    rows = [[1, 40, 41, 42, 43, 44, 45], [1, 60], [1, 50, 51, 52, 53]]
    ids = tf.ragged.constant(rows).to_tensor(0, shape=(3, 16))
    mask = tf.sequence_mask([len(row) for row in rows], 16)
    greedy = token_choice(0.0, 1.0)
    run = functools.partial(
        decode, policy, stops=[2], choose=greedy, uniforms=tf.zeros((len(rows), 3))
    )
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


def test_several_seeds_give_the_responses_that_each_gives_alone():
    model = llama()
    options = {"max_new_tokens": 8, "preprocessor": Letters(), "temperature": 2.0}
    alone = [generate_responses(model, PROMPTS, seed=seed, **options) for seed in (4, 5, 6)]
    responses, ended = generate_responses(
        model, PROMPTS, seed=[4, 5, 6], return_ended=True, batch_size=2, **options
    )
    assert responses == [list(three) for three in zip(*alone, strict=True)]
    assert [len(three) for three in ended] == [3, 3, 3]
    assert len({text for three in responses for text in three}) == 9
    columns = generate_responses(Policy(model), PROMPTS, seed=[4, 5, 6], **options)
    assert columns == responses


@pytest.mark.parametrize("family", ["gpt2", "gemma4_moe", "bloom", "smollm3"])
def test_slots_that_are_refilled_give_the_tokens_of_forward_passes_over_each_text(family):
    """Learned and rotary positions, ALiBi, a table; windows, shared keys, fewer heads of keys."""
    policy = ALL_FAMILIES[family](seed=1)
    rows = [[1, 40, 41, 42, 43, 44, 45], [1, 60], [1, 50, 51, 52, 53], [1, *range(3, 13)], [1, 33]]
    uniforms = tf.zeros((len(rows), 2, 6))

    @tf.function(autograph=False)
    def run(slots):
        prompts = tf.ragged.constant(rows, dtype=tf.int32)
        return decode_continuously(
            policy, prompts, uniforms, stops=[2], choose=token_choice(0.0, 1.0), slots=slots
        )

    found = run(tf.constant(3)).to_list()
    assert found[::2] == found[1::2]
    for row, prompt in zip(found[::2], rows, strict=True):
        text = tf.constant([[*prompt, *row]])
        logits = full_logits(policy, TextRows(text, tf.ones_like(text)))
        likeliest = np.argmax(logits[0, len(prompt) - 1 :], axis=-1).tolist()
        assert (row + [2])[:6] == likeliest[:6]


def test_each_sequence_ends_by_its_own_draws_however_slots_are_refilled():
    policy, prompts, longest = gpt2(num_layers=1), tf.ragged.constant([[5] * 3] * 30, tf.int32), 40
    uniforms = np.random.default_rng(0).random((30, 2, longest), np.float32)
    uniforms[::3] = 0.5  # never end

    def choose(logits, drawn):
        return tf.where(drawn < 0.05, 2, 3 + tf.cast(50 * drawn, tf.int32))

    @tf.function(autograph=False)
    def run(slots):
        return decode_continuously(
            policy, prompts, tf.constant(uniforms), stops=[2], choose=choose, slots=slots
        )

    for slots in (2, 7, 60):
        found = run(tf.constant(slots)).to_list()
        for row, drawn in zip(found, uniforms.reshape(60, longest), strict=True):
            ends = np.flatnonzero(drawn < 0.05)
            tokens = 3 + (50 * drawn[: ends[0] if len(ends) else longest]).astype(int)
            assert row == tokens.tolist()


def test_prompts_of_all_lengths_share_one_trace():
    model = gpt2(num_layers=1)
    options = {"max_new_tokens": 2, "preprocessor": Letters(), "temperature": 0}
    generate_responses(model, ["a"], **options)
    (known,) = generation._compiled_functions[model].values()
    generate_responses(model, ["a" * 70, "b"], batch_size=3, **options)
    assert known.experimental_get_tracing_count() == 1
    assert len(generation._compiled_functions[model]) == 1


def test_generation_follows_the_weights_as_they_are_trained():
    model = gpt2()
    options = {"max_new_tokens": 6, "temperature": 0, "preprocessor": Letters()}
    before = generate_responses(model, PROMPTS, **options)
    for variable in model.trainable_variables:
        variable.assign(-variable)
    assert generate_responses(model, PROMPTS, **options) != before


def test_generation_follows_adapters_that_the_policy_gets_later():
    policy = gpt2()
    options = {"max_new_tokens": 6, "temperature": 0, "preprocessor": Letters()}
    before = generate_responses(policy, PROMPTS, **options)
    enable_lora(policy, 2)
    assert generate_responses(policy, PROMPTS, **options) == before
    for weight in policy.trainable_weights:
        weight.assign(np.random.default_rng(1).normal(size=weight.shape))
    assert generate_responses(policy, PROMPTS, **options) != before


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


@pytest.mark.parametrize("size", [4, 600])  # 600: more than one block, and than a nucleus
def test_tokens_are_drawn_by_their_probabilities_within_the_nucleus(size):
    rows = 4000
    likely = np.log([0.5, 0.3, 0.15, 0.05])
    logits = np.full((rows, size), -1e9 if size > 4 else 0, np.float32)
    places = [0, 130, 131, 599] if size > 4 else [0, 1, 2, 3]
    logits[:, places] = likely
    uniforms = tf.constant((np.arange(rows) + 0.5) / rows, tf.float32)

    def shares(temperature, top_p):
        drawn = token_choice(temperature, top_p)(tf.constant(logits), uniforms).numpy()
        return np.bincount(drawn, minlength=size)[places] / rows

    near = functools.partial(np.testing.assert_allclose, atol=1e-3)
    near(shares(1.0, 1.0), [0.5, 0.3, 0.15, 0.05])
    # The smallest set that reaches 0.6 or 0.7 holds two tokens.
    for top_p in (0.6, 0.7):
        near(shares(1.0, top_p), [0.625, 0.375, 0, 0])
    np.testing.assert_array_equal(shares(0.0, 1.0), [1, 0, 0, 0])
    # A temperature of 1/2 squares the probabilities.
    squares = np.square([0.5, 0.3, 0.15, 0.05])
    near(shares(0.5, 1.0), squares / squares.sum())


def test_a_nucleus_of_almost_all_tokens_leaves_out_the_least_likely_ones():
    probabilities = np.arange(1, 601) / np.arange(1, 601).sum()
    logits = tf.constant(np.log(probabilities)[None].repeat(2000, axis=0), tf.float32)
    uniforms = tf.constant(np.arange(2000) / 2000, tf.float32)
    drawn = token_choice(1.0, 0.95)(logits, uniforms).numpy()
    left_out = np.cumsum(probabilities) <= 0.05
    assert not left_out[drawn].any()
    assert drawn.min() == left_out.sum()


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
        choose, uniforms = token_choice(0.0, 1.0), tf.zeros((len(rows), 6))
        found = decode(wrap(model), ids, mask, stops=stops, choose=choose, uniforms=uniforms)
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
