"""Files of preferences: JSON Lines, JSON, CSV and Parquet, whole and broken."""

import csv
import gzip
import json
import sys

import numpy as np
import pytest
from preferences_samples import GOOD, USER, jsonl, numbered, reply

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    InvalidPreferences,
    Message,
    PreferencePair,
    read_preferences,
    support_pairs,
    write_preferences,
)


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
    with path.open("w", newline="", encoding="utf-8-sig") as stream:
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
    from pyarrow import parquet

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


TEXT = [
    PreferencePair("p", " 4 ✓", " 5"),
    PreferencePair('a "b", c\r\nd\ne', "\u2028x\ty ", ",", 0.75, 0.1 + 0.2, "ann", "g", "7", 0.3),
    PreferencePair("p", "[not a list]", '"', 0.5, 0.0, swapped=True),
]
MESSAGES = [
    PreferencePair(
        (Message("system", ""), Message("user", 'say "hi"\n')),
        (Message("assistant", "hi"),),
        (Message("assistant", "no"), Message("tool", "{}"), Message("assistant", "ho")),
        annotator="x",
    )
]
SUFFIXES = [".jsonl", ".jsonl.gz", ".csv", ".csv.gz", ".parquet"]


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("pairs", [TEXT, MESSAGES], ids=["text", "messages"])
def test_what_is_written_is_read_back(tmp_path, suffix, pairs):
    if suffix == ".parquet":
        pytest.importorskip("pyarrow")
    path = tmp_path / f"pairs{suffix}"
    write_preferences(pairs, path)
    back = read_preferences(path, on_error="fail")
    assert list(back) == pairs
    assert [w for w in back.report.warnings if w.rule == "unused"] == []
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", [".jsonl.gz", ".csv.gz"])
def test_the_same_pairs_give_the_same_bytes(tmp_path, suffix):
    pairs = support_pairs(20)
    for name in ("one", "two"):
        write_preferences(pairs, tmp_path / f"{name}{suffix}")
    one, two = (tmp_path / f"{name}{suffix}" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def test_text_and_messages_share_jsonl_and_csv_but_not_parquet(tmp_path):
    pytest.importorskip("pyarrow")
    for suffix in (".jsonl", ".csv"):
        write_preferences(TEXT + MESSAGES, tmp_path / f"x{suffix}")
        assert list(read_preferences(tmp_path / f"x{suffix}")) == TEXT + MESSAGES
    with pytest.raises(InputError, match="write .jsonl"):
        write_preferences(TEXT + MESSAGES, tmp_path / "x.parquet")


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "x.jsonl"
    write_preferences(TEXT, path)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="No space left"):
        write_preferences(MESSAGES, path)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.jsonl"]


def test_wrong_arguments_of_writing_are_told_together(tmp_path):
    with pytest.raises(InputError) as caught:
        write_preferences([], tmp_path / "none" / "pairs.txt")
    suffix, pairs, folder = caught.value.problems
    assert ".parquet" in suffix and "pairs.txt" in suffix
    assert "at least one pair" in pairs
    assert "does not exist" in folder
    assert [p.argument for p in caught.value.problems] == ["path", "pairs", "path"]
    with pytest.raises(InputError, match="is a directory"):
        write_preferences(TEXT, tmp_path)


def test_writing_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"dpo-keras\[parquet\]"):
        write_preferences(TEXT, tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "'", "'="])
def test_no_cell_of_a_written_csv_is_a_formula_and_every_text_comes_back(tmp_path, start):
    path = tmp_path / "pairs.csv"
    pairs = [
        PreferencePair("Hi", f"{start}HYPERLINK(1)", "- no", annotator=f"{start}ann"),
        PreferencePair("'=so it was", "plain", "'- quoted by its author"),
    ]
    write_preferences(pairs, path)
    with path.open(newline="", encoding="utf-8") as file:
        cells = [cell for row in csv.reader(file) for cell in row]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert list(read_preferences(path)) == pairs


def test_quotes_of_other_csv_files_stay(tmp_path):
    path = tmp_path / "pairs.csv"
    path.write_text("prompt,chosen,rejected\nHi,'=1,'-2\n")
    assert read_preferences(path)[0].chosen == "'=1"
