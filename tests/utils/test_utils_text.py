"""Suggestions, and texts that are safe to print."""

import unicodedata

import pytest

from dpo_keras.utils.text import did_you_mean, nearest, shortened, visible


def test_the_nearest_name_is_suggested():
    known = ["sigmoid", "hinge", "sigmoid_norm"]
    assert nearest("sigmiod", known) == "sigmoid"
    assert nearest("sigmoid_nrm", iter(known)) == "sigmoid_norm"
    assert did_you_mean("hing", known) == "did you mean 'hinge'?"


@pytest.mark.parametrize("name", ["zzz", "", 3, None])
def test_where_nothing_is_near_nothing_is_suggested(name):
    assert nearest(name, ["sigmoid"]) is None
    assert did_you_mean(name, ["sigmoid"]) == ""
    assert did_you_mean(name, []) == ""


def test_the_cutoff_says_how_alike_names_must_be():
    # "abcd" and "abxy" share 2 of 4 characters on each side: a ratio of 0.5.
    assert nearest("abcd", ["abxy"], cutoff=0.5) == "abxy"
    assert nearest("abcd", ["abxy"], cutoff=0.51) is None


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x00\x7f\x9b", r"\x00\x7f\x9b"),
        ("a\rb", r"a\rb"),
        ("\u202egnp.exe", r"\u202egnp.exe"),
        ("\ud800", r"\ud800"),
        ("\U000e0041", r"\U000e0041"),
        ("café 中文 👍\u00a0", "café 中文 👍\u00a0"),
        ("a\n\tb", "a\n\tb"),
        ("", ""),
    ],
)
def test_control_characters_become_their_escapes(given, expected):
    assert visible(given) == expected


def test_control_characters_that_are_kept_stay():
    assert visible("a\r\n\tb", keep="") == r"a\r\n\tb"
    assert visible("a\u200db", keep="\u200d") == "a\u200db"


def test_no_character_comes_out_that_a_terminal_obeys():
    every = "".join(map(chr, range(0x3000))) + "\ud800\udfff\ufeff\U000e0001"
    found = visible(every)
    assert {c for c in found if unicodedata.category(c) in ("Cc", "Cf", "Cs")} == {"\n", "\t"}
    assert visible(found) == found
    found.encode("utf-8")


def test_long_texts_are_cut_to_the_width():
    assert shortened("a long sentence", 10) == "a long ..."
    assert shortened("x" * 80) == "x" * 80
    assert len(shortened("x" * 81)) == 80
