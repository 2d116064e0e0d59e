"""Word patterns of the tokenizers library, rewritten for RE2."""

import tensorflow as tf

from dpo_keras.serving.word_patterns import WordPattern, literal, split, split_at


def test_the_last_of_several_spaces_goes_with_the_word_behind_it():
    pattern = WordPattern.read({"Regex": r"\s?\p{L}+|\s+(?!\S)|\s+"})
    assert pattern.split(tf.constant(["a   b"])).to_list() == [[b"a", b"  ", b" b"]]


def test_a_pattern_that_means_something_else_in_re2_is_refused():
    assert WordPattern.read({"Regex": r" ?\w+|\s+(?!\S)|\s+"}) is None


def test_texts_are_cut_into_matches_and_what_lies_between():
    assert split(tf.constant(["a1b"]), "[0-9]").to_list() == [[b"a", b"1", b"b"]]
    assert split_at(tf.constant(["a b", ""]), b" ").to_list() == [[b"a", b"b"], []]


def test_a_literal_matches_itself_alone():
    assert literal("<|end|>") == r"\<\|end\|\>"
    text = "a.b*c?(d) é\n"
    assert tf.strings.regex_full_match([text, "axb*c?(d) é\n"], literal(text)).numpy().tolist() == [
        True,
        False,
    ]
