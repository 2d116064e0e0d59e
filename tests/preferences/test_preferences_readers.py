import csv
import gzip
import json
import math
import sys

import numpy as np
import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    InvalidPreferences,
    Message,
    PreferencePair,
    Preferences,
    read_preferences,
)

GOOD = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
USER = [{"role": "user", "content": "2 + 2?"}]


def reply(content):
    return [{"role": "assistant", "content": content}]


def numbered(number):
    return {"prompt": f"{number} =", "chosen": f" {number}", "rejected": " no"}


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


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
    assert str(problem) == "records line 2: preference must be in [0, 1], got 1.7."
    assert json.loads(json.dumps(pairs.report.as_dict()))["problems"][0]["value"] == "1.7"


def test_on_error_fail_raises_all_problems_and_prints_the_first_twenty():
    records = [numbered(n) for n in range(5)] + [GOOD | {"chosen": ""}] * 30
    with pytest.raises(InvalidPreferences) as caught:
        read_preferences(records, on_error="fail")
    message = str(caught.value)
    assert message.count("chosen must hold text") == 20
    assert message.endswith("... and 10 more.")
    assert "30 of 35 records are bad" in message
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
    assert "line 1" in pairs.report.warnings[0].message


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


# Files


def test_jsonl_with_bom_blank_lines_and_crlf_keeps_its_line_numbers(tmp_path):
    lines = [json.dumps(GOOD), "", "  ", "{oops", json.dumps(numbered(1))]
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    pairs = read_preferences(path)
    assert len(pairs) == 2
    assert (pairs.report.read, pairs.report.kept, pairs.report.dropped) == (3, 2, 1)
    (problem,) = pairs.report.problems
    assert (problem.line, problem.rule, problem.source) == (4, "not JSON", str(path))


def test_not_json_on_line_17(tmp_path):
    path = jsonl(tmp_path / "x.jsonl", [numbered(n) for n in range(40)])
    lines = path.read_text().splitlines()
    lines[16] = lines[16][:-5]
    path.write_text("\n".join(lines))
    pairs = read_preferences(path)
    assert len(pairs) == 39
    (problem,) = pairs.report.problems
    assert problem.line == 17
    assert problem.message.startswith("not JSON (")


def test_a_line_that_is_not_utf8_costs_that_line_only(tmp_path):
    path = tmp_path / "x.jsonl"
    good = json.dumps(GOOD).encode()
    path.write_bytes(good + b"\n" + good.replace(b"4", b"\xe9") + b"\n" + good)
    pairs = read_preferences(path)
    assert len(pairs) == 2
    assert [(p.line, p.rule) for p in pairs.report.problems] == [(2, "not UTF-8")]


def test_line_separators_inside_strings_do_not_end_lines(tmp_path):
    record = GOOD | {"chosen": "a\u2028b\x85c\x0bd"}
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
    assert read_preferences(path)[0].chosen == "a\u2028b\x85c\x0bd"


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl", "x.JSONL.GZ"])
def test_gzip_is_seen_from_the_content(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(gzip.compress(json.dumps(GOOD).encode()))
    assert list(read_preferences(path)) == [PreferencePair(**GOOD)]


def test_a_gzip_file_cut_off_keeps_the_lines_before(tmp_path):
    rng = np.random.default_rng(0)
    lines = [json.dumps(numbered(int(n))) + "\n" for n in rng.integers(0, 10**9, 20000)]
    whole = gzip.compress("".join(lines).encode())
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(whole[: len(whole) // 2])
    pairs = read_preferences(path)
    assert 1000 < len(pairs) < 20000
    assert "broken file" in {problem.rule for problem in pairs.report.problems}


def test_json_holds_a_list_of_records_or_lines(tmp_path):
    one, lines = tmp_path / "one.json", tmp_path / "lines.json"
    one.write_text("\ufeff" + json.dumps([GOOD, {"prompt": "p"}, numbered(1)], indent=1))
    jsonl(lines, [GOOD, {"prompt": "p"}, numbered(1)])
    assert read_preferences(one) == read_preferences(lines)
    assert read_preferences(one).report.problems[0].line == 2


def write_csv(path, rows):
    with open(path, "w", newline="", encoding="utf-8-sig") as stream:
        csv.writer(stream).writerows(rows)
    return path


def test_csv_reads_text_numbers_messages_and_lines_inside_cells(tmp_path):
    rows = [
        ["prompt", "response_a", "response_b", "preference", "weight", "annotator"],
        ["a\nb,\"c\"", "A", "B", "0.25", "", ""],
        [json.dumps(USER), json.dumps(reply("4")), json.dumps(reply("5")), "1", "2", "ann"],
        ["after", "A", "B", "much", "1", ""],
    ]  # fmt: skip
    pairs = read_preferences(write_csv(tmp_path / "x.csv", rows))
    assert pairs[0] == PreferencePair('a\nb,"c"', "B", "A", 0.75, swapped=True)
    assert pairs[1].prompt == (Message("user", "2 + 2?"),)
    assert (pairs[1].weight, pairs[1].annotator) == (2.0, "ann")
    (problem,) = pairs.report.problems
    # The first row's cell holds a line break, so rows and lines differ.
    assert (problem.line, problem.rule, problem.value) == (5, "wrong type", "much")


def test_csv_names_rows_of_another_width_and_broken_messages(tmp_path):
    rows = [
        ["prompt", "chosen", "rejected"],
        ["p", "a", "b"],
        ["p", "a"],
        ["p", '[{"role": "assistant", "content": "a"', "b"],
        [],
        ["p", "[a list in brackets]", "b"],
    ]
    pairs = read_preferences(write_csv(tmp_path / "x.csv", rows))
    assert [pair.chosen for pair in pairs] == ["a", "[a list in brackets]"]
    assert [(p.line, p.rule) for p in pairs.report.problems] == [
        (3, "wrong number of cells"),
        (4, "not JSON"),
    ]


def test_a_csv_without_a_column_is_one_message(tmp_path):
    path = write_csv(tmp_path / "x.csv", [["prompt", "chosen", "reject"], ["p", "a", "b"]])
    with pytest.raises(InvalidPreferences) as caught:
        read_preferences(path)
    (problem,) = caught.value.report.problems
    assert problem.message == (
        "column 'rejected' is missing, the columns are: prompt, chosen, reject; "
        "did you mean 'reject' by it?"
    )


def test_csv_cells_may_be_longer_than_the_modules_limit(tmp_path):
    limit = csv.field_size_limit()
    long = "word " * 50_000
    path = write_csv(tmp_path / "x.csv", [["prompt", "chosen", "rejected"], ["p", long, "b"]])
    assert read_preferences(path)[0].chosen == long
    assert csv.field_size_limit() == limit


def test_csv_that_is_cut_off_in_quotes_keeps_the_rows_before(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text('prompt,chosen,rejected\np,a,b\np,"a')
    pairs = read_preferences(path)
    assert len(pairs) == 1
    assert [(p.line, p.rule) for p in pairs.report.problems] == [(3, "not CSV")]


def test_parquet_reads_strings_structs_and_nulls(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet as parquet

    rows = [
        {"prompt": USER, "chosen": reply("4"), "rejected": reply("5"), "weight": 2, "extra": 1},
        {
            "prompt": None,
            "chosen": USER + reply("4"),
            "rejected": USER + reply("6"),
            "weight": None,
        },
        {"prompt": USER, "chosen": None, "rejected": reply("5"), "weight": 1},
    ]
    path = tmp_path / "x.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    pairs = read_preferences(path)
    assert [pair.weight for pair in pairs] == [2.0, 1.0]
    assert pairs[0].prompt == pairs[1].prompt == (Message("user", "2 + 2?"),)
    assert [(p.line, p.rule) for p in pairs.report.problems] == [(3, "missing value")]
    assert [w.message for w in pairs.report.warnings] == ["not used: column 'extra' (1)"]


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    path = tmp_path / "x.parquet"
    path.write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"dpo-keras\[parquet\]"):
        read_preferences(path)


@pytest.mark.parametrize("content", [b"", b"not parquet at all", b"PAR1....PAR1"])
def test_a_broken_parquet_file_is_one_message(tmp_path, content):
    pytest.importorskip("pyarrow")
    path = tmp_path / "x.parquet"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a Parquet file"):
        read_preferences(path)


def test_several_files_are_read_as_one_and_problems_name_theirs(tmp_path):
    one = jsonl(tmp_path / "one.jsonl", [GOOD, {"prompt": "p"}])
    two = write_csv(
        tmp_path / "two.csv", [["prompt", "chosen", "rejected"], ["2 + 2 =", " 4", " 5"]]
    )
    pairs = read_preferences([one, str(two)])
    assert len(pairs) == 2
    assert pairs.report.sources == [str(one), str(two)]
    assert {(p.source, p.line) for p in pairs.report.problems} == {(str(one), 2)}
    (warning,) = pairs.report.warnings
    assert (warning.source, warning.line, warning.rule) == (str(two), 2, "duplicate")
    assert f"{one} line 1" in warning.message


def test_limit_stops_after_so_many_good_records(tmp_path):
    records = [numbered(0), {"prompt": "p"}, numbered(1), numbered(2)]
    pairs = read_preferences(jsonl(tmp_path / "x.jsonl", records), limit=2)
    assert (len(pairs), pairs.report.read, pairs.report.dropped) == (2, 3, 1)
    left = iter(records)
    read_preferences(left, limit=2)
    assert next(left) == numbered(2)


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
