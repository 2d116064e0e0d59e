"""The `generate` signature: KerasHub's greedy text, without XLA; sampling; any Keras model."""

import keras
import keras_hub
import numpy as np
import pytest
import serving_tiny
import tensorflow as tf

from dpo_keras.batching import TextEncoder
from dpo_keras.serving.graph_encoder import GraphEncoder
from dpo_keras.serving.signatures import Decoding, ServedModel, continue_prompts, drawn_anew
from dpo_keras.training import generate_responses
from dpo_keras.utils.keras_internals import native_slice_update

PROMPTS = ["Hello", "The quick brown fox jumps over the lazy", "", "It's 12345  o'clock\n"]


def operations(function):
    definition = function.graph.as_graph_def()
    inner = [node.op for f in definition.library.function for node in f.node_def]
    return {*inner, *(node.op for node in definition.node)}


def server(policy, preprocessor=None, **decoding):
    preprocessor = preprocessor or policy.preprocessor
    special = tuple(preprocessor.tokenizer.special_token_ids)
    return ServedModel(policy, GraphEncoder(preprocessor, 48), Decoding(**decoding), special)


def texts(found):
    return [text.decode() for text in found["text"].numpy()]


@pytest.mark.parametrize("family", ["gpt2", "llama", "gemma3"])
def test_greedy_text_is_kerashubs(family, request):
    policy = request.getfixturevalue(family)
    prompts = [prompt for prompt in PROMPTS if prompt]
    policy.compile(sampler="greedy")
    # KerasHub's length counts the prompt in; one prompt at a time gives each the same room.
    expected = []
    for prompt in prompts:
        used = len(TextEncoder(policy.preprocessor).prompts([prompt])[0])
        expected += policy.generate([prompt], max_length=used + 8, strip_prompt=True)
    serving = server(policy, max_new_tokens=8)
    specification = [tf.TensorSpec([None], tf.string)]
    function = tf.function(serving.generate, input_signature=specification, autograph=False)
    concrete = function.get_concrete_function()
    found = texts(concrete(tf.constant(prompts)))
    assert found == expected
    assert len(set(found)) > 1 and all(found)
    assert not [op for op in operations(concrete) if op.startswith("Xla") or "PyFunc" in op]
    # Alone or beside others, a prompt gets the same answer.
    assert texts(concrete(tf.constant(prompts[:1]))) == found[:1]


@pytest.mark.parametrize(
    ("family", "sizes"),
    [
        ("Mistral", {"num_query_heads": 4, "num_key_value_heads": 2, "sliding_window": 6}),
        ("Bloom", {"num_heads": 4}),
        ("Qwen3", {"num_query_heads": 4, "num_key_value_heads": 2, "head_dim": 8}),
    ],
)
def test_other_families_generate_what_a_forward_pass_finds_likeliest(family, sizes):
    keras.utils.set_random_seed(0)
    shape = {"vocabulary_size": 97, "num_layers": 2, "hidden_dim": 32, "intermediate_dim": 64}
    backbone = getattr(keras_hub.models, f"{family}Backbone")(**shape, **sizes)
    for weight in backbone.weights:
        weight.assign(keras.random.normal(weight.shape, stddev=0.25))
    policy = getattr(keras_hub.models, f"{family}CausalLM")(backbone=backbone, preprocessor=None)
    prompts = [[5, 6, 7], [9] * 11, [60]]
    function = tf.function(
        lambda ids: continue_prompts(policy, ids, Decoding(6), stops=[96], pad=0),
        input_signature=[tf.RaggedTensorSpec([None, None], tf.int32)],
        autograph=False,
    ).get_concrete_function()
    assert not [op for op in operations(function) if op.startswith("Xla")]
    for prompt in prompts:
        (new,) = function(tf.ragged.constant([prompt], dtype=tf.int32)).to_list()
        ids = np.array([prompt + new], np.int32)
        logits = policy({"token_ids": ids, "padding_mask": np.ones_like(ids)}, training=False)
        likeliest = np.argmax(logits[0], axis=-1)[len(prompt) - 1 :].tolist()
        assert (new + [96])[: len(likeliest)][:6] == likeliest[:6]
    together = function(tf.ragged.constant(prompts, dtype=tf.int32)).to_list()
    alone = [function(tf.ragged.constant([p], dtype=tf.int32)).to_list()[0] for p in prompts]
    assert together == alone


def test_generation_agrees_with_that_of_evaluation(llama):
    expected = generate_responses(
        llama, PROMPTS, max_new_tokens=8, temperature=0, max_length=48, batch_size=4
    )
    assert texts(server(llama, max_new_tokens=8).generate(tf.constant(PROMPTS))) == expected


def test_an_end_token_that_is_also_the_pad_id_does_not_end_everything_at_once():
    vocabulary, merges = serving_tiny.bpe()
    # KerasHub's GPT-2 pads with id 0, whatever token that is.
    swapped = {**vocabulary, "<|endoftext|>": 0, "<pad>": 1}
    policy = serving_tiny.gpt2(seed=1, vocabulary=(swapped, merges))
    found = texts(server(policy, max_new_tokens=8).generate(tf.constant(PROMPTS)))
    assert any(found)


def test_a_stop_ends_a_response_and_is_left_out(llama):
    ids = server(llama, max_new_tokens=8).prompt_ids(tf.constant(PROMPTS[:2]))
    free = continue_prompts(llama, ids, Decoding(8), stops=[10**6], pad=0).to_list()
    assert [len(row) for row in free] == [8, 8]
    stop = free[0][3]
    stopped = continue_prompts(llama, ids, Decoding(8), stops=[stop], pad=0).to_list()
    assert stopped[0] == free[0][: free[0].index(stop)]
    assert stopped[1] == (free[1][: free[1].index(stop)] if stop in free[1] else free[1])


def test_a_response_says_whether_it_came_to_its_end(llama):
    serving = server(llama, max_new_tokens=8)
    found = serving.generate(tf.constant(PROMPTS))
    tokens, finished = found["tokens"].numpy(), found["finished"].numpy()
    assert finished.tolist() == (tokens < 8).tolist()
    ids = serving.continue_ids(serving.prompt_ids(tf.constant(PROMPTS[:1]))).to_list()[0]
    serving.encoder.stops = [ids[3]]
    found = serving.generate(tf.constant(PROMPTS[:1]))
    assert found["tokens"].numpy().tolist() == [ids.index(ids[3])]
    assert found["finished"].numpy().tolist() == [True]


def test_long_prompts_are_cut_from_the_left_and_keep_their_start(llama):
    graph = GraphEncoder(llama.preprocessor, 20)
    whole = graph.prompts(tf.constant(["word " * 60])).to_list()[0]
    serving = ServedModel(llama, graph, Decoding(8))
    (cut,) = serving.prompt_ids(tf.constant(["word " * 60])).to_list()
    assert cut == [graph.start, *whole[-11:]]


def test_any_keras_model_generates_what_it_finds_likeliest(gpt2):
    preprocessor = gpt2.preprocessor
    policy = serving_tiny.plain(preprocessor.tokenizer.vocabulary_size(), seed=3)
    expected = generate_responses(
        policy,
        PROMPTS,
        max_new_tokens=6,
        temperature=0,
        max_length=48,
        batch_size=4,
        preprocessor=preprocessor,
    )
    serving = server(policy, preprocessor, max_new_tokens=6)
    function = tf.function(
        serving.generate, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False
    )
    assert texts(function(tf.constant(PROMPTS))) == expected


def test_the_policys_own_sampler_stays(llama):
    llama.compile(sampler="top_p")
    sampler = llama.sampler
    server(llama, max_new_tokens=2).generate(tf.constant(["a"]))
    assert llama.sampler is sampler


def test_native_slice_update_is_keras_slice_update():
    inputs = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    updates = -np.ones((2, 1, 2), np.float32)
    original = keras.ops.slice_update
    for start in ([0, 0, 0], [0, 2, 1], [0, 5, 3]):  # the last is clamped, so that it fits
        expected = keras.ops.slice_update(inputs, start, updates)
        with native_slice_update():
            found = keras.ops.slice_update(inputs, start, updates)
        np.testing.assert_array_equal(found, expected)
    with pytest.raises(RuntimeError), native_slice_update():
        raise RuntimeError
    assert keras.ops.slice_update is original


def test_uniform_numbers_of_two_requests_differ():
    first, second = (drawn_anew((20000, 1, 2)).numpy() for _ in range(2))
    assert (first != second).any()
    assert first.min() >= 0 and first.max() < 1
    assert abs(first.mean() - 0.5) < 0.01


def test_each_request_samples_anew_and_low_temperature_is_greedy(llama):
    prompts = tf.constant(["Hello"] * 8)
    serving = server(llama, max_new_tokens=8, temperature=3.0)
    function = tf.function(
        serving.generate, input_signature=[tf.TensorSpec([None], tf.string)], autograph=False
    )
    assert texts(function(prompts)) != texts(function(prompts))
    cold = server(llama, max_new_tokens=8, temperature=1e-3)
    greedy = server(llama, max_new_tokens=8)
    assert texts(cold.generate(prompts[:1])) == texts(greedy.generate(prompts[:1]))
