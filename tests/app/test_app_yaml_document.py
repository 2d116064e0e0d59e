"""YAML is read so that types decide, and every key knows its line."""

import pytest

from dpo_keras.app.yaml_document import Plain, guess_types, read_document


def tree(text):
    document = read_document(text, "a.yaml")
    assert document.problems == []
    return document.tree


def test_plain_scalars_stay_text_whatever_yaml_would_make_of_them():
    values = tree("a: 1e-4\nb: on\nc: 012\nd: 2024-01-01\ne: yes")
    assert values == {"a": "1e-4", "b": "on", "c": "012", "d": "2024-01-01", "e": "yes"}
    assert all(isinstance(value, Plain) for value in values.values())


@pytest.mark.parametrize("text", ["a:", "a: ~", "a: null", "a: NULL"])
def test_null_is_none(text):
    assert tree(text) == {"a": None}


def test_quoted_text_is_text_even_where_it_looks_like_null_or_a_number():
    values = tree("a: 'null'\nb: \"1\"\nc: ''\nd: |\n  true\n")
    assert values == {"a": "null", "b": "1", "c": "", "d": "true\n"}
    assert not any(isinstance(value, Plain) for value in values.values())


def test_every_key_and_item_knows_its_line():
    document = read_document("a:\n  b: 1\n  c:\n    - x\n    - {d: 2}\n", "a.yaml")
    lines = {key: document.place(key).line for key in ["a", "a.b", "a.c[1].d"]}
    assert lines == {"a": 1, "a.b": 2, "a.c[1].d": 5}
    assert document.place("a.missing").line == 1, "the nearest key above"
    assert document.place("nowhere").line is None


def test_a_key_given_twice_is_a_problem_with_both_lines():
    (problem,) = read_document("a:\n  b: 1\n  b: 2\n", "x.yaml").problems
    assert problem == "x.yaml, line 3: a.b is given twice; it is at x.yaml, line 2 too."


def test_anchors_and_merges_work_and_own_keys_win():
    text = "base: &b {x: 1, y: 2}\nsame: *b\nmore:\n  <<: *b\n  y: 3\n"
    assert tree(text)["same"] == {"x": "1", "y": "2"}
    assert tree(text)["more"] == {"x": "1", "y": "3"}


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1", 1, "not YAML"),
        ("a: 1\n b: 2", 2, "not YAML"),
        ("- a\n- b", 1, "keys with values"),
        ("a: !!python/object:os.system x", 1, "tag"),
        ("a: &x [*x]", 1, "contains itself"),
        ("a: 1\n---\nb: 2", 2, "not YAML"),
        ("a: 1\nb: {c:2, d: 3}", 2, "'c:2' must have a space after its colon"),
        ("a: 1\nb: " + "{c: " * 30 + "1" + "}" * 30, 2, "nested too deeply"),
        ('a: 1\nb: "x\\ud800"', 2, "b holds half of a character (a surrogate)"),
        ('a: 1\n"\\ud800": 1', 2, "a key holds half of a character"),
    ],
)
def test_what_can_not_be_read_is_said_with_its_line(text, line, words):
    problems = read_document(text, "x.yaml").problems
    assert any(p.startswith(f"x.yaml, line {line}:") and words in p for p in problems), problems


def test_an_override_replaces_whole_values_and_makes_sections():
    document = read_document("a: {b: 1, c: 2}\nd: 3\n", "x.yaml")
    for override in ["a.b=5", "e.f.g=[x, 'y']", "d={h: 1}", "i=", "j=a=b"]:
        document.override(override)
    assert document.problems == []
    assert document.tree == {
        "a": {"b": "5", "c": "2"},
        "d": {"h": "1"},
        "e": {"f": {"g": ["x", "y"]}},
        "i": None,
        "j": "a=b",
    }
    assert str(document.place("a.b")) == "override 'a.b=5'"
    assert str(document.place("d.h")) == "override 'd={h: 1}'"
    assert str(document.place("a.c")) == "x.yaml, line 1"


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("a", "section.key=value"),
        ("=3", "section.key=value"),
        ("a..b=3", "section.key=value"),
        ("a=[1", "not YAML"),
        ("a.b.c=1", "not a section"),
        ("x={k: 1, k: 2}", "given twice"),
        ("x=" + "[" * 3000 + "]" * 3000, "nested too deeply"),
        ("x=" + "[" * 3000, "nested too deeply"),
    ],
)
def test_a_faulty_override_is_named_and_changes_nothing(override, words):
    document = read_document("a: {b: 1}", "x.yaml")
    document.override(override)
    (problem,) = document.problems
    assert words in problem and override in problem
    assert document.tree == {"a": {"b": "1"}}


def test_yaml_that_is_nested_beyond_what_can_be_read_is_one_sentence():
    for text in ("[" * 3000, "a: " + "[" * 3000 + "]" * 3000):
        document = read_document(text, "x.yaml")
        assert document.problems == [
            "x.yaml: is nested too deeply; a configuration has at most four levels."
        ]
        assert not document.readable


def test_bytes_of_the_command_line_that_are_no_text_are_refused():
    document = read_document("a: 1", "x.yaml")
    document.override("a=\udc80")
    (problem,) = document.problems
    assert "half of a character" in problem and document.tree == {"a": "1"}


def test_values_without_a_type_are_guessed_by_the_rules_of_yaml_1_2():
    guessed = guess_types(tree("{a: 3, b: 1e-4, c: true, d: on, e: '3', f: [.5, x], g: 010, h: ~}"))
    assert guessed == {
        "a": 3, "b": 1e-4, "c": True, "d": "on", "e": "3", "f": [0.5, "x"], "g": 10.0, "h": None
    }  # fmt: skip
