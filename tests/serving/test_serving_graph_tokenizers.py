"""Byte-pair encoding in the graph is that of the tokenizers library, to the id."""

import random

import keras_hub
import pytest
import serving_tiny
import tensorflow as tf
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from dpo_keras.batching import TextEncoder
from dpo_keras.errors import InputError
from dpo_keras.serving.graph_tokenizers import BytePairGraph, graph_tokenizer
from dpo_keras.utils.keras_hub_tokenizers import GPT2, LLAMA3, QWEN

# The word pattern of Mistral's Tekken.
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PIECES = [
    *"aAbsStTeE'’,.!?(\"-0123456789   \t\n\r\u00a0\u2003\u3000\u0085\x0b\x0c\u2028",
    *"éßñ東京🙂²½ſ\u0301_/$",
    *(
        "<|endoftext|>",
        "<|x|>",
        "<|x|>a",
        "<｜é｜>",
        "'s",
        "'LL",
        "  ",
        "\n\n",
        "\r\n",
        "İ",
        "\x00",
        "\ufeff",
    ),
    *("the", " the", "Hello", "don't", "\u200b"),
]


def texts(count, seed=0):
    chooser = random.Random(seed)
    some = ["".join(chooser.choices(PIECES, k=chooser.randint(0, 25))) for _ in range(count)]
    return [*some, "", " ", "a" * 3000, "aA" * 500, "   ", "<|endoftext|>", *serving_tiny.CORPUS]


def backend(pattern=None, prefix_space=False, merges=None, special=("<|endoftext|>",)):
    vocabulary, trained = serving_tiny.bpe()
    pairs = [tuple(merge.split(" ")) for merge in (merges or trained)]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=pairs))
    tokenizer.add_special_tokens(list(special))
    steps = [pre_tokenizers.ByteLevel(add_prefix_space=prefix_space, use_regex=False)]
    if pattern:
        steps.insert(0, pre_tokenizers.Split(Regex(pattern), "isolated"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"special": ("<|endoftext|>", "<|x|>", "<|x|>a", "<｜é｜>")},
        {"prefix_space": True},
        {"pattern": GPT2},
        {"pattern": LLAMA3},
        {"pattern": QWEN},
        {"pattern": TEKKEN},
        {"pattern": LLAMA3, "prefix_space": True},
    ],
    ids=["plain", "specials", "prefix", "gpt2", "llama3", "qwen", "tekken", "llama3+prefix"],
)
def test_ids_are_those_of_the_tokenizers_library(settings):
    tokenizer = backend(**settings)
    given = texts(1500)
    found = BytePairGraph(tokenizer).tokenize(tf.constant(given)).to_list()
    for text, ids, encoding in zip(given, found, tokenizer.encode_batch(given), strict=True):
        assert ids == encoding.ids, text


@pytest.mark.slow
def test_ids_are_those_of_training_where_kerashubs_own_graph_path_differs(gpt2):
    tokenizer = gpt2.preprocessor.tokenizer
    given = [*texts(300, seed=1), "a 's", "No.\u00a0 Killing"]
    expected = TextEncoder(gpt2.preprocessor).tokenize(given)
    found = graph_tokenizer(tokenizer).tokenize(tf.constant(given)).to_list()
    assert found == expected
    theirs = tf.function(tokenizer.tokenize)(tf.constant(given)).to_list()
    assert theirs != found


def test_merges_that_use_a_token_before_the_rule_that_makes_it_are_applied_one_at_a_time():
    vocabulary, merges = serving_tiny.bpe()
    shuffled = merges[:]
    random.Random(0).shuffle(shuffled)
    tokenizer = backend(merges=shuffled)
    graph = BytePairGraph(tokenizer)
    assert not graph.ordered
    assert BytePairGraph(backend()).ordered
    given = texts(800, seed=2)
    assert graph.tokenize(tf.constant(given)).to_list() == [
        encoding.ids for encoding in tokenizer.encode_batch(given)
    ]


def test_detokenizing_gives_the_text_back_and_replaces_broken_characters():
    tokenizer = backend()
    graph = BytePairGraph(tokenizer)
    given = texts(500, seed=3)
    ids = graph.tokenize(tf.constant(given))
    assert [text.decode() for text in graph.detokenize(ids).numpy()] == given
    chooser = random.Random(4)
    rows = [chooser.choices(range(graph.size), k=chooser.randint(1, 12)) for _ in range(500)]
    found = graph.detokenize(tf.ragged.constant(rows, dtype=tf.int32)).numpy()
    expected = tokenizer.decode_batch(rows, skip_special_tokens=False)
    assert [text.decode() for text in found] == expected


def test_no_table_grows_with_the_words_it_meets(gpt2):
    graph = graph_tokenizer(gpt2.preprocessor.tokenizer)
    before = int(graph.ranks.size())
    graph.tokenize(tf.constant([f"word{number} never{number} seen" for number in range(200)]))
    assert int(graph.ranks.size()) == before
    traced = tf.function(graph.tokenize, input_signature=[tf.TensorSpec([None], tf.string)])
    definition = traced.get_concrete_function().graph.as_graph_def()
    functions = [node.op for f in definition.library.function for node in f.node_def]
    operations = {*functions, *(node.op for node in definition.node)}
    assert not [op for op in operations if "Insert" in op or "Mutable" in op]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()), "not byte-level"),
        (
            lambda t: setattr(
                t,
                "pre_tokenizer",
                pre_tokenizers.Sequence(
                    [
                        pre_tokenizers.Split(Regex(r"\w+(?=x)"), "isolated"),
                        pre_tokenizers.ByteLevel(use_regex=False),
                    ]
                ),
            ),
            "RE2 has no equal",
        ),
        (lambda t: setattr(t.model, "dropout", 0.1), "dropout"),
    ],
)
def test_a_tokenizer_that_cannot_be_reproduced_is_refused(change, says):
    tokenizer = backend()
    change(tokenizer)
    with pytest.raises(InputError, match=says):
        BytePairGraph(tokenizer)


def test_a_tokenizer_that_would_fall_back_to_the_growing_cache_is_refused():
    vocabulary, merges = serving_tiny.bpe()
    tokenizer = keras_hub.models.GPT2Tokenizer(vocabulary, merges, _allow_python_workflow=False)
    with pytest.raises(InputError, match="cache that grows"):
        graph_tokenizer(tokenizer)


def test_a_tokenizer_that_is_only_python_is_refused():
    class Letters:
        start_token_id, end_token_id, pad_token_id = 1, 2, 0

    with pytest.raises(InputError, match="Letters"):
        graph_tokenizer(Letters())


def test_any_other_tokenizer_of_kerashub_is_traced():
    graph = graph_tokenizer(keras_hub.tokenizers.ByteTokenizer())
    assert graph.tokenize(tf.constant(["ab", ""])).to_list() == [[97, 98], []]


def test_pairs_of_lowest_rank_are_merged_first():
    vocabulary = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4}
    tokenizer = Tokenizer(models.BPE(vocabulary, [("a", "b"), ("ab", "c")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(False, use_regex=False)
    found = BytePairGraph(tokenizer).tokenize(tf.constant(["abcab", "", "ba"])).to_list()
    assert found == [[4, 3], [], [1, 0]]
