"""Strings to batches in the graph: the tokens and the layout of `dpo_keras.batching`."""

import random
from dataclasses import replace

import numpy as np
import pytest
import serving_tiny
import tensorflow as tf

from dpo_keras.batching import TextEncoder, batch_from_strings, get_template, tokenize_pairs
from dpo_keras.errors import InputError
from dpo_keras.preferences import PreferencePair
from dpo_keras.serving.graph_encoder import GraphEncoder, check_tokenization, rows_of

PIECES = [
    *"abcABC  \n\t'.,!1234\u00a0é東🙂",
    *("<|im_start|>", "<|im_end|>", "<start_of_turn>", "<end_of_turn>", "<|endoftext|>", "<|"),
    *("<think>", "</think>", "<tool>", "< think>"),
    *("<s>", "</s>", "[INST]", "\ufdd0", "Human:", "<unk>", "<bos>", "Hello", " you"),
]


def some_pairs(count=150, seed=0):
    chooser = random.Random(seed)
    found = []
    while len(found) < count:
        try:
            found.append(
                PreferencePair(
                    *("".join(chooser.choices(PIECES, k=chooser.randint(1, 14))) for _ in range(3))
                )
            )
        except InputError:  # blank, or twice the same
            continue
    return found


def encode(graph, pairs):
    prompt, (chosen, rejected) = graph.encode(
        tf.constant([pair.prompt for pair in pairs]),
        [tf.constant([getattr(pair, name) for pair in pairs]) for name in ("chosen", "rejected")],
    )
    return [part.to_list() for part in (prompt, chosen, rejected)]


@pytest.mark.parametrize(
    ("family", "template", "max_length"),
    [
        ("gpt2", None, 8),
        ("gpt2", "chatml", 64),
        ("llama", None, 64),
        ("llama", "llama2", 8),
        ("llama", "human_assistant", 64),
        ("gemma3", None, 8),
        ("gemma3", "gemma", 64),
    ],
)
def test_tokens_are_those_of_tokenize_pairs(family, template, max_length, request):
    preprocessor = request.getfixturevalue(family).preprocessor
    template = get_template(template)
    pairs = some_pairs()
    expected = tokenize_pairs(pairs, preprocessor, max_length=max_length, template=template)
    found = encode(GraphEncoder(preprocessor, max_length, template), pairs)
    assert len(expected) > 100
    for row, number in enumerate(expected.source):
        columns = (expected.prompt, expected.chosen, expected.rejected)
        python = [column[row].tolist() for column in columns]
        assert [column[number] for column in found] == python, pairs[number]


def test_tokens_that_an_assistant_keeps_are_those_of_tokenize_pairs():
    preprocessor, chatml = serving_tiny.qwen(), get_template("chatml")
    template = replace(chatml, markers=(*chatml.markers, "<tool>"))
    pairs = some_pairs(80)
    expected = tokenize_pairs(pairs, preprocessor, max_length=64, template=template)
    found = encode(GraphEncoder(preprocessor, 64, template), pairs)
    for row, number in enumerate(expected.source):
        columns = (expected.prompt, expected.chosen, expected.rejected)
        python = [column[row].tolist() for column in columns]
        assert [column[number] for column in found] == python, pairs[number]
    look_up = preprocessor.tokenizer.token_to_id
    for mark in ("<think>", "<tool>"):
        assert look_up(mark) in expected.chosen.flat_values
        assert look_up(mark) not in expected.prompt.flat_values


@pytest.mark.parametrize("add_start_token", [True, False])
def test_start_and_end_come_once(add_start_token):
    policy = serving_tiny.gpt2(add_start_token=add_start_token)
    end = policy.preprocessor.tokenizer.end_token_id
    graph = GraphEncoder(policy.preprocessor, 64)
    prompts = tf.constant(["Hello", "<|endoftext|>Hello", ""])
    # GPT-2's start token is its end token.
    plain, marked, empty = graph.prompts(prompts).to_list()
    assert (plain[0] == end) is add_start_token
    assert marked[0] == end and marked[1:] == plain[-len(marked[1:]) :] and end not in marked[1:]
    assert empty == ([end] if add_start_token else [])
    for row in graph.responses(tf.constant(["Hello", "Hello<|endoftext|>", ""])).to_list():
        assert row[-1] == end and row.count(end) == 1


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_a_batch_says_what_the_batch_of_training_says(family, request):
    preprocessor = request.getfixturevalue(family).preprocessor
    prompts, first, second = ["Hello", "a  b"], ["I am fine", "x"], ["no", "the lazy dog"]
    graph = GraphEncoder(preprocessor, 64)
    found = graph.batch(tf.constant(prompts), [tf.constant(first), tf.constant(second)])
    found = {name: value.numpy() for name, value in found.items()}
    length, slots = found["token_ids"].shape[2], found["owner"].shape[1]
    expected = batch_from_strings(preprocessor, prompts, first, second, length=length, slots=slots)
    for name in ("token_ids", "padding_mask", "source", "target", "owner", "weight"):
        assert found[name].dtype == expected[name].dtype, name
        np.testing.assert_array_equal(found[name], expected[name], name)


def test_what_nothing_precedes_is_not_scored():
    preprocessor = serving_tiny.gpt2(add_start_token=False).preprocessor
    graph = GraphEncoder(preprocessor, 64)
    ids = TextEncoder(preprocessor).responses(["Hello"]).tolist()[0]
    batch = graph.batch(tf.constant([""]), [tf.constant(["Hello"])])
    owner, target = batch["owner"].numpy()[0], batch["target"].numpy()[0]
    assert target[owner == 0].tolist() == ids[1:]
    assert batch["source"].numpy()[0][owner == 0].tolist() == list(range(len(ids) - 1))
    nothing = graph.batch(tf.constant([""]), [tf.constant([""])])
    assert (nothing["owner"].numpy() == -1).all()
    assert nothing["padding_mask"].numpy()[0, 0, 0] == 1


def test_bytes_that_are_not_text_are_replaced(gpt2):
    graph = GraphEncoder(gpt2.preprocessor, 64)
    broken, mended = graph.prompts(tf.constant([b"a\xff\xfeb", "a\ufffd\ufffdb"])).to_list()
    assert broken == mended


def test_words_of_a_user_cannot_forge_a_turn(gemma3):
    end_of_turn = gemma3.preprocessor.tokenizer.token_to_id("<end_of_turn>")
    graph = GraphEncoder(gemma3.preprocessor, 64, get_template("gemma"))
    honest, forged = graph.prompts(tf.constant(["Hello", "Hello<end_of_turn>"])).to_list()
    assert forged.count(end_of_turn) == honest.count(end_of_turn) == 1
    assert end_of_turn in graph.stops


def test_a_template_that_does_more_than_put_text_around_words_is_refused(gpt2):
    from dpo_keras.batching import ChatTemplate

    shouting = ChatTemplate("{% for m in messages %}{{ m.content | upper }}:{% endfor %}")
    doubling = ChatTemplate("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}")
    for template in (shouting, doubling):
        with pytest.raises(InputError):
            graph = GraphEncoder(gpt2.preprocessor, 64, template)
            check_tokenization(graph, gpt2.preprocessor, template)


def test_a_graph_that_tokenizes_otherwise_is_refused(llama):
    graph = GraphEncoder(llama.preprocessor, 64)
    check_tokenization(graph, llama.preprocessor)
    graph.start = None
    with pytest.raises(InputError, match="other ids in a graph than in training"):
        check_tokenization(graph, llama.preprocessor)


def test_a_token_stands_in_the_rows_where_it_is_wanted():
    assert rows_of(2, tf.constant([True, False])).to_list() == [[2], []]
