"""Records: their layouts, the rules they break, and what is warned about."""

import json
import math
import os

import numpy as np
import pytest
from preferences_samples import GOOD, USER, jsonl, numbered, reply

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    InvalidPreferences,
    Message,
    PreferencePair,
    Preferences,
    build_preferences,
    check_first_records,
    read_preferences,
)
from dpo_keras.preferences.read_report import grouped


def problems_of(records):
    """Rules by line; a good record stands beside, so that something can be kept."""
    pairs = read_preferences([GOOD, *records])
    assert pairs[0] == PreferencePair(**GOOD)
    return {(problem.line, problem.rule, problem.field) for problem in pairs.report.problems}


# Layouts


def test_chosen_and_rejected_with_every_optional_column():
    optional = {"preference": 0.75, "weight": 2, "annotator": "ann", "group": 3, "id": "x"}
    (pair,) = read_preferences([GOOD | optional | {"margin": 0.5}])
    assert pair == PreferencePair("2 + 2 =", " 4", " 5", 0.75, 2.0, "ann", "3", "x", 0.5)
    assert isinstance(pair.weight, float)


@pytest.mark.parametrize(
    ("preference", "chosen", "kept", "swapped"),
    [(1, "A", 1.0, False), (0.75, "A", 0.75, False), (0.5, "A", 0.5, False),
     (0.25, "B", 0.75, True), (0, "B", 1.0, True)],
)  # fmt: skip
def test_a_preference_below_a_half_swaps_the_responses(preference, chosen, kept, swapped):
    record = {"prompt": "p", "response_a": "A", "response_b": "B", "preference": preference}
    pairs = read_preferences([record])
    (pair,) = pairs
    assert (pair.chosen, pair.preference, pair.swapped) == (chosen, kept, swapped)
    assert {pair.chosen, pair.rejected} == {"A", "B"}
    assert pairs.report.layouts == {"response_a/response_b": 1}


BOTH = GOOD | {"response_a": "A", "response_b": "B", "preference": 0.2}


def test_a_record_of_both_formats_is_an_error_that_names_the_keys(tmp_path):
    pairs = read_preferences(jsonl(tmp_path / "x.jsonl", [GOOD, BOTH]))
    assert str(pairs.report.problems[0]) == (
        f"{tmp_path / 'x.jsonl'} line 2: the record has chosen, rejected and also response_a, "
        "response_b, preference: two formats, which may contradict each other. Keep the columns of "
        "one, or choose it by columns, as in columns={'chosen': 'chosen'}."
    )


def test_columns_choose_one_of_two_formats():
    (pair,) = read_preferences([BOTH], columns={"chosen": "chosen", "rejected": "rejected"})
    # The preference compares the columns that are left out.
    assert (pair.chosen, pair.preference, pair.swapped) == (" 4", 1.0, False)
    pairs = read_preferences([BOTH], columns={"response_a": "response_a"})
    assert (pairs[0].chosen, pairs[0].preference, pairs[0].swapped) == ("B", 0.8, True)
    assert "unused chosen" in pairs.report.warnings[0].message


def test_a_table_of_files_of_both_formats_is_read_row_by_row():
    compared = {"prompt": "p", "response_a": "A", "response_b": "B", "preference": 0}
    names = dict.fromkeys([*GOOD, *compared])
    pairs = read_preferences([{**names, **GOOD}, {**names, **compared}])
    assert [pair.chosen for pair in pairs] == [" 4", "B"]
    assert pairs.report.layouts == {"chosen/rejected": 1, "response_a/response_b": 1}


def test_messages_become_tuples_of_message():
    (pair,) = read_preferences([{"prompt": USER, "chosen": reply("4"), "rejected": reply("5")}])
    assert pair.prompt == (Message("user", "2 + 2?"),)
    assert pair.chosen == (Message("assistant", "4"),)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": USER, "chosen": "4", "rejected": "5"},
        {"prompt": "2 + 2?", "chosen": reply("4"), "rejected": reply("5")},
        {"prompt": "2 + 2?", "chosen": USER + reply("4"), "rejected": USER + reply("5")},
        {"prompt": USER, "chosen": USER + reply("4"), "rejected": USER + reply("5")},
        {"chosen": USER + reply("4"), "rejected": USER + reply("5")},
        {"prompt": None, "chosen": USER + reply("4"), "rejected": USER + reply("5")},
    ],
)
def test_text_beside_messages_and_repeated_prompts_come_to_the_same_pair(record):
    (pair,) = read_preferences([record])
    assert pair.prompt == (Message("user", "2 + 2?"),)
    assert pair.chosen == (Message("assistant", "4"),)
    assert pair.rejected == (Message("assistant", "5"),)


def test_bytes_numpy_values_and_missing_numbers_of_pandas_are_read():
    record = {
        "prompt": np.array(USER),
        "chosen": b"four \xe2\x9c\x93",
        "rejected": np.str_("five"),
        "preference": np.float32(0.75),
        "annotator": math.nan,
        "group": np.float64(2.0),
        "id": np.int64(7),
    }
    (pair,) = read_preferences([record])
    assert pair.chosen == (Message("assistant", "four ✓"),)
    assert (pair.preference, pair.annotator, pair.group, pair.id) == (0.75, None, "2", "7")


def test_pairs_are_records_too():
    pairs = [PreferencePair("p", "a", "b", swapped=True, margin=1.0)]
    assert list(read_preferences(iter(pairs))) == pairs


# Broken rules


@pytest.mark.parametrize(
    ("record", "rule", "field"),
    [
        ("text", "wrong type", "the record"),
        ({"chosen": "a", "rejected": "b"}, "missing column", "prompt"),
        ({"prompt": "p", "chosen": "a"}, "missing column", "rejected"),
        (GOOD | {"chosen": None}, "missing value", "chosen"),
        (GOOD | {"chosen": 4}, "wrong type", "chosen"),
        (GOOD | {"chosen": ["4"]}, "wrong type", "chosen: message 1"),
        (GOOD | {"chosen": b"\xff"}, "not UTF-8", "chosen"),
        (GOOD | {"preference": 1.7}, "preference out of range", "preference"),
        (GOOD | {"preference": math.nan}, "preference out of range", "preference"),
        (GOOD | {"preference": -0.1}, "preference out of range", "preference"),
        (GOOD | {"preference": "0.7"}, "wrong type", "preference"),
        (GOOD | {"preference": True}, "wrong type", "preference"),
        (GOOD | {"weight": -1}, "weight out of range", "weight"),
        (GOOD | {"margin": math.inf}, "margin out of range", "margin"),
        (GOOD | {"weight": 1e308}, "weight out of range", "weight"),
        (GOOD | {"margin": 10**300}, "margin out of range", "margin"),
        (GOOD | {"annotator": "\ud83d"}, "not UTF-8", "annotator"),
        (GOOD | {"group": b"\xff"}, "not UTF-8", "group"),
        (GOOD | {"response_a": "A"}, "two formats", "chosen"),
        (
            GOOD | {"response_a": "A", "response_b": "B", "preference": 1},
            "two formats",
            "chosen",
        ),
        (GOOD | {"annotator": ["a"]}, "wrong type", "annotator"),
        (GOOD | {"id": 1.5}, "wrong type", "id"),
        (GOOD | {"swapped": "yes"}, "wrong type", "swapped"),
        (GOOD | {"prompt": " "}, "empty prompt", "prompt"),
        (GOOD | {"prompt": []}, "empty prompt", "prompt"),
        (GOOD | {"chosen": ""}, "empty response", "chosen"),
        (GOOD | {"rejected": "\n"}, "empty response", "rejected"),
        (GOOD | {"rejected": " 4"}, "identical responses", "chosen"),
        (GOOD | {"rejected": " 4", "preference": 0.5}, "identical responses", "chosen"),
        (GOOD | {"prompt": [{"role": "human", "content": "x"}]}, "unknown role", "prompt"),
        (GOOD | {"prompt": [{"role": "user"}]}, "wrong type", "prompt: message 1: content"),
        (GOOD | {"prompt": [{"content": "x"}]}, "wrong type", "prompt: message 1: role"),
        (GOOD | {"chosen": reply("4")}, "mixed forms", "chosen"),
        (
            {"prompt": "p", "response_a": "A", "response_b": "B"},
            "missing column",
            "preference",
        ),
        (
            {"prompt": "p", "response_a": "A", "response_b": " ", "preference": 0.1},
            "empty response",
            "response_b",
        ),
    ],
)
def test_a_bad_record_is_one_problem_with_its_line_rule_and_column(record, rule, field):
    assert problems_of([record]) == {(2, rule, field)}


def test_every_problem_of_a_record_is_told():
    record = {"prompt": "", "chosen": "a", "rejected": "a ", "preference": 2, "weight": "x"}
    assert {rule for _, rule, _ in problems_of([record])} == {
        "empty prompt",
        "preference out of range",
        "wrong type",
    }


def test_problems_carry_the_value():
    pairs = read_preferences([GOOD, GOOD | {"preference": 1.7}])
    (problem,) = pairs.report.problems
    assert (problem.source, problem.line, problem.value) == ("records", 2, 1.7)
    assert str(problem) == "record 2: preference must be in [0, 1], got 1.7."
    assert json.loads(json.dumps(pairs.report.as_dict()))["problems"][0]["value"] == "1.7"


def test_on_error_fail_raises_all_problems_and_groups_those_that_are_alike():
    records = [numbered(n) for n in range(5)] + [GOOD | {"chosen": ""}] * 30
    with pytest.raises(InvalidPreferences) as caught:
        read_preferences(records, on_error="fail")
    headline, *groups = str(caught.value).splitlines()
    assert "30 of 35 records are bad" in headline
    assert groups == ["records 6, 7, 8 and 27 more: chosen must hold text, got ''."]
    assert [problem.line for problem in caught.value.report.problems] == list(range(6, 36))


def test_records_that_are_all_bad_raise_whatever_on_error_is():
    with pytest.raises(InputError, match="no preference pair could be read, all 2 records are bad"):
        read_preferences([GOOD | {"chosen": ""}, {"prompt": "p"}])


def test_nothing_to_read_is_an_error(tmp_path):
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n \n")
    for source in (empty, [], iter([])):
        with pytest.raises(InputError, match="there are no records"):
            read_preferences(source)


def test_a_column_missing_everywhere_is_one_message_not_two_thousand(tmp_path):
    records = [{"prompt": str(n), "choosen": "a", "rejected": "b"} for n in range(2000)]
    with pytest.raises(InvalidPreferences) as caught:
        read_preferences(jsonl(tmp_path / "x.jsonl", records))
    (problem,) = caught.value.report.problems
    assert problem.line is None
    assert "in all 2,000 records column 'chosen' is missing" in str(caught.value)
    assert "did you mean 'choosen'" in str(caught.value)


def test_a_column_missing_in_some_lines_is_told_for_each():
    found = problems_of([{"prompt": "p", "chosen": "a"}] * 2)
    assert found == {(2, "missing column", "rejected"), (3, "missing column", "rejected")}


def labelled(label, number):
    return {"prompt": f"{number}", "response_a": "a", "response_b": "b", "preference": label}


def test_bad_records_are_grouped_with_the_range_of_their_values(tmp_path):
    labels = [1.5, 0.25, *[0.5 + n / 10 for n in range(4)], 1.25, 1.2]
    path = jsonl(tmp_path / "x.jsonl", [labelled(label, n) for n, label in enumerate(labels)])
    with pytest.raises(InvalidPreferences) as caught:
        read_preferences(path, on_error="fail")
    assert str(caught.value).splitlines()[1] == (
        f"{path} lines 1, 7, 8: preference must be in [0, 1], got 1.2 … 1.5. "
        "For labels 1 (the first is better) and 2, give 2 - label."
    )
    groups = grouped(caught.value.report.problems)
    assert [(group.places, group.field) for group in groups] == [("lines 1, 7, 8", "preference")]


@pytest.mark.parametrize(
    ("labels", "hint"),
    [
        ([1, 2], "give 2 - label"),
        ([1, -1], r"give \(label \+ 1\) / 2"),
        ([0, 70], "divided by 100"),
    ],
)
def test_labels_on_another_scale_are_refused_as_a_whole(labels, hint):
    records = [labelled(labels[n % 2], n) for n in range(40)]
    with pytest.raises(InvalidPreferences, match=hint) as caught:
        read_preferences(records)
    assert "20 of 40 records have a preference out of range" in str(caught.value)


def test_a_few_preferences_out_of_range_are_left_out():
    records = [labelled(2 if n < 9 else 1, n) for n in range(40)]
    assert read_preferences(records).report.dropped == 9


def test_values_of_other_types_and_messages_of_other_kinds_are_grouped_too():
    bad = [GOOD | {"weight": value} for value in ("x", "y", None, "z", "x", "w", "v")]
    (group,) = grouped(read_preferences([GOOD, *bad]).report.problems)
    assert str(group) == (
        "records 2, 3, 5 and 3 more: weight must be a number, "
        "got 'x', 'y', 'z' and 2 other values (str)."
    )
    bad = [GOOD | {"chosen": 4}, GOOD | {"chosen": 5.5}]
    (group,) = grouped(read_preferences([GOOD, *bad]).report.problems)
    assert group.message.endswith("got 4 (int). (that is record 2; the others are alike)")


def test_reports_of_text_and_files_that_are_not_utf8_can_be_written(tmp_path):
    path = tmp_path / os.fsdecode(b"\xff.jsonl")
    jsonl(path, [GOOD, GOOD | {"annotator": "\ud83d", "\ud83d": 1}])
    report = read_preferences(path).report
    with pytest.raises(InputError) as caught:
        read_preferences([{"prompt": "p", "chos\ud83den": "a", "rejected": "b"}])
    str(caught.value).encode()
    for text in (
        json.dumps(report.as_dict(), ensure_ascii=False),
        *map(str, grouped(report.problems)),
    ):
        assert "\ud83d" not in text
    json.dumps(report.as_dict(), ensure_ascii=False).encode()
    assert [problem.rule for problem in report.problems] == ["not UTF-8"]


def test_pairs_that_all_weigh_nothing_are_refused():
    records = [numbered(n) | {"weight": 0} for n in range(3)]
    with pytest.raises(InputError, match="the weight of all 3 pairs is 0"):
        read_preferences(records)
    with pytest.raises(InputError, match="the weight of all 3 pairs is 0"):
        read_preferences([record | {"weight": 1e-50} for record in records])
    assert len(read_preferences([*records, GOOD])) == 4
    assert check_first_records([*records, GOOD], first=3).kept == 3


# Warnings


def test_duplicates_and_contradictions_are_kept_and_named():
    flipped = GOOD | {"chosen": " 5", "rejected": " 4"}
    pairs = read_preferences([GOOD, GOOD, flipped, GOOD | {"preference": 0}])
    assert len(pairs) == 4
    assert [(w.line, w.rule) for w in pairs.report.warnings] == [
        (2, "duplicate"),
        (3, "contradiction"),
        (4, "duplicate"),
        (4, "contradiction"),
    ]
    assert "record 1" in pairs.report.warnings[0].message


def test_unused_columns_and_message_keys_are_named():
    chosen = [{"role": "assistant", "content": "4", "name": "bot", "tool_calls": None}]
    record = {"prompt": USER, "chosen": chosen, "rejected": reply("5"), "anotator": "x"}
    (warning,) = read_preferences([record, GOOD | {"anotator": "y"}]).report.warnings
    assert warning.rule == "unused"
    assert warning.message == "not used: column 'anotator' (2), message key 'name' (1)"


def test_responses_that_repeat_a_prompt_are_warned_about():
    prompt = "Question: how much is two and two?"
    record = {"prompt": prompt, "chosen": prompt + " 4", "rejected": prompt + " 5"}
    assert [w.rule for w in read_preferences([record]).report.warnings] == [
        "response repeats prompt"
    ]
    assert read_preferences([GOOD]).report.warnings == []


# Arguments


def test_paths_that_cannot_be_read_are_told_together(tmp_path):
    jsonl(tmp_path / "inside.jsonl", [GOOD])
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(InputError) as caught:
        read_preferences([tmp_path / "none.jsonl", tmp_path, tmp_path / "notes.txt"])
    missing, directory, suffix = caught.value.problems
    assert missing.endswith("none.jsonl: no such file.")
    assert "is a directory" in directory and "inside.jsonl" in directory
    assert "unknown suffix '.txt'" in suffix and ".jsonl" in suffix


def test_format_overrides_the_suffix(tmp_path):
    path = jsonl(tmp_path / "pairs.txt", [GOOD])
    assert len(read_preferences(path, format="jsonl")) == 1


def test_utf16_is_named(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps(GOOD).encode("utf-16"))
    with pytest.raises(InputError, match="UTF-16"):
        read_preferences(path)


def test_wrong_arguments_are_told_together():
    with pytest.raises(InputError) as caught:
        read_preferences([GOOD], format="xml", on_error="ignore", limit=0)
    assert [problem.split()[0] for problem in caught.value.problems] == [
        "format",
        "on_error",
        "limit",
    ]


@pytest.mark.parametrize("source", [GOOD, 3, b"x.jsonl", None])
def test_a_source_that_is_neither_paths_nor_records_is_refused(source):
    with pytest.raises(InputError, match="source must be"):
        read_preferences(source)


def test_an_unknown_builtin_names_the_known_ones():
    with pytest.raises(InputError, match="builtin:support"):
        read_preferences("builtin:other")


def test_preferences_are_a_sequence_with_the_report():
    pairs = read_preferences([numbered(n) for n in range(5)] + [{"prompt": "p"}])
    assert isinstance(pairs[1:3], Preferences)
    assert [pair.chosen for pair in pairs[1:3]] == [" 1", " 2"]
    assert pairs[-1].chosen == " 4"
    assert repr(pairs) == "Preferences(5 pairs, 1 dropped)"
    assert pairs[0] in pairs
    assert "1 dropped" in pairs.report.summary()
    with pytest.raises(InputError, match="item 0 is a dict"):
        Preferences([GOOD])


# The first records


def test_the_first_records_are_checked_without_reading_the_rest(tmp_path):
    read = []

    def endless():
        while True:
            read.append(len(read))
            yield numbered(len(read))

    assert check_first_records(endless(), first=7).kept == 7
    assert len(read) == 7
    paths = [jsonl(tmp_path / name, [GOOD | {"weight": -1}] * 3 + [GOOD]) for name in "ab"]
    with pytest.raises(InvalidPreferences, match="all 6 records are bad"):
        check_first_records(paths, first=3, format="jsonl")
    with pytest.raises(InvalidPreferences, match="6 of 8"):
        check_first_records(paths, first=4, format="jsonl", on_error="fail")
    with pytest.raises(InputError, match="first must be"):
        check_first_records(paths, first=0)


def test_checking_the_first_records_opens_built_directories_but_prepares_no_data_set(tmp_path):
    built = build_preferences([numbered(n) for n in range(3)], tmp_path / "built").path
    names = [str(built), "tfds:no_such_data_set:train"]
    assert check_first_records(names).sources == names
    next(built.glob("*tfrecord*")).unlink()
    with pytest.raises(InputError, match="is missing"):
        check_first_records(built)
    with pytest.raises(InputError, match="tfds:NAME"):
        check_first_records("tfds:?")
