"""Files of preferences: JSON Lines, JSON, CSV and Parquet, whole and broken."""

import bz2
import csv
import gzip
import json
import lzma
import sys
import tracemalloc

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
    text_formats,
    write_preferences,
)
from dpo_keras.preferences.read_report import ReadReport


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


def random_lines(count):
    rng = np.random.default_rng(0)
    return [json.dumps(numbered(int(n))) + "\n" for n in rng.integers(0, 10**9, count)]


def flipped(content, place):
    changed = bytearray(content)
    changed[place] ^= 255
    return bytes(changed)


@pytest.mark.parametrize("how", ["cut off", "damaged", "wrong checksum", "text behind it"])
def test_a_broken_gzip_file_is_an_error_unless_that_is_allowed(tmp_path, how):
    whole = gzip.compress("".join(random_lines(1500)).encode())
    content = {
        "cut off": whole[: len(whole) // 2],
        "damaged": flipped(whole, len(whole) // 2),
        "wrong checksum": flipped(whole, -6),
        "text behind it": whole + b"more",
    }[how]
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(content)
    other = jsonl(tmp_path / "other.jsonl", [GOOD])
    for source in (path, [other, path]):
        with pytest.raises(
            InputError, match=r"x.jsonl.gz is cut off or damaged after line"
        ) as error:
            read_preferences(source, on_error="report")
    assert "allow_truncated=True" in str(error.value)
    # Damage is noticed some lines later, and those are bad.
    on_error = "report" if how == "damaged" else "fail"
    pairs = read_preferences(path, allow_truncated=True, on_error=on_error)
    assert 300 < len(pairs) <= 1500
    (warning,) = (w for w in pairs.report.warnings if w.rule == "broken file")
    assert warning.source == str(path)
    assert "records were read from it, the rest is lost" in warning.message


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("x.jsonl", '{good}\n{good}\n{good}\n{"prompt": "p", "cho', "line 4 ends in the middle"),
        ("x.json", '[{good}, {good}, {good}, {"prompt": "p"', "not JSON"),
        ("x.json", "[{good}, {good}, {good}", "after record 3 .* got ''"),
        ("x.json", "[{good}, {good}, {good},", "the list has no end"),
        ("x.json", "[{good}, {good}, {good} {good}]", "followed by a comma"),
        ("x.json", "[{good}, {good}, {good}] [{good}]", "more text after the list"),
        ("x.csv", 'prompt,chosen,rejected\n{row}{row}{row}p,"a\n{row}', "that open in line 5"),
        ("x.csv", "prompt,chosen,rejected\n{row}{row}{row}p,a", "line 5 ends in the middle"),
    ],
)  # fmt: skip
def test_a_text_file_that_is_cut_off_is_an_error_unless_that_is_allowed(
    tmp_path, name, content, reason
):
    path = tmp_path / name
    path.write_text(content.replace("{good}", json.dumps(GOOD)).replace("{row}", "p,a,b\n"))
    with pytest.raises(InputError, match=reason):
        read_preferences(path)
    pairs = read_preferences(path, allow_truncated=True)
    assert len(pairs) == 3 and "broken file" in {w.rule for w in pairs.report.warnings}


@pytest.mark.parametrize("content", ["", "[]", " [ ] ", "\ufeff"])
def test_an_empty_json_file_holds_no_records(tmp_path, content):
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(InputError, match=r"data\.json: there are no records in it"):
        read_preferences(path)


def test_files_that_are_packed_otherwise_are_named(tmp_path):
    path = tmp_path / "x.jsonl"
    for content, kind in ((bz2.compress(b"{}"), "bzip2"), (lzma.compress(b"{}"), "xz"),
                          (b"\x28\xb5\x2f\xfd..", "zstd"), (b"PK\x03\x04..", "zip")):  # fmt: skip
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"is compressed by {kind}; unpack it first"):
            read_preferences(path)


def test_a_line_of_gigabytes_costs_that_line_only_and_little_memory(tmp_path):
    path = tmp_path / "x.jsonl.gz"
    good = json.dumps(GOOD).encode()
    with gzip.open(path, "wb", compresslevel=1) as stream:
        stream.write(good + b'\n{"prompt": "')
        for _ in range(60):
            stream.write(b"a" * 10**6)
        stream.write(b'"}\n' + good + b"\n")
    tracemalloc.start()
    pairs = read_preferences(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 45e6  # three times the limit at most, of a line six times as long
    assert len(pairs) == 2
    (problem,) = pairs.report.problems
    assert (problem.line, problem.message) == (2, "the record is longer than 10,000,000 bytes.")


def test_the_limit_of_a_record_holds_for_every_text_format(tmp_path, monkeypatch):
    monkeypatch.setattr(text_formats, "LONGEST", 100)
    long = GOOD | {"chosen": "a" * 101}
    lines = jsonl(tmp_path / "x.jsonl", [GOOD, long, GOOD])
    assert [problem.line for problem in read_preferences(lines).report.problems] == [2]
    head, one, last = ["prompt", "chosen", "rejected"], ["p", "a", "b"], ["p", "c", "d"]
    for text in ('"' * 60, 'a"\n' * 40, "a" * 101):
        path = write_csv(tmp_path / "x.csv", [head, one, ["p", text, "b"], last])
        table = read_preferences(path)
        assert [pair.chosen for pair in table] == ["a", "c"]
        assert [(p.line, p.rule) for p in table.report.problems] == [(3, "too long")]
    array = tmp_path / "x.json"
    array.write_text(json.dumps([GOOD, long, GOOD]))
    monkeypatch.setattr(text_formats, "CHUNK", 16)
    with pytest.raises(
        InputError, match="after record 1 .the next record is longer than 100 bytes"
    ):
        read_preferences(array)


def test_a_json_list_is_read_in_pieces_of_any_size(tmp_path, monkeypatch):
    records = [numbered(n) | {"group": "é🙂\n"} for n in range(20)]
    path = tmp_path / "x.json"
    path.write_text("\ufeff \n[" + " ,\n".join(json.dumps(r, indent=1) for r in records) + "\n]\n")
    whole = read_preferences(path)
    assert [pair.prompt for pair in whole] == [record["prompt"] for record in records]
    for size in (1, 7, 100):
        monkeypatch.setattr(text_formats, "CHUNK", size)
        assert read_preferences(path) == whole


def test_keys_that_occur_twice_are_an_error_of_the_record(tmp_path):
    good = json.dumps(GOOD)
    twice = good[:-1] + ', "chosen": " 6"}'
    inside = '{"prompt": "p", "chosen": [{"role": "assistant", "content": "a", "content": "b"}]}'
    path = tmp_path / "x.jsonl"
    path.write_text("\n".join([good, twice, inside, good]))
    array = tmp_path / "x.json"
    array.write_text("[" + ",".join([good, twice, inside, good]) + "]")
    for source, unit in ((path, "line"), (array, "record")):
        pairs = read_preferences(source)
        assert len(pairs) == 2
        assert [(p.line, p.unit, p.rule) for p in pairs.report.problems] == [
            (2, unit, "repeated key"), (3, unit, "repeated key")
        ]  # fmt: skip
        assert "the key 'chosen' more than once" in pairs.report.problems[0].message


def test_a_csv_header_with_a_name_twice_or_other_separators_is_an_error(tmp_path):
    twice = write_csv(
        tmp_path / "x.csv", [["prompt", "chosen", "rejected", "chosen"], list("pabc")]
    )
    with pytest.raises(InputError, match="column 'chosen' occurs more than once"):
        read_preferences(twice)
    unnamed = [["prompt", "chosen", "rejected", "", ""], ["p", "a", "b", "", ""]]
    assert len(read_preferences(write_csv(tmp_path / "y.csv", unnamed))) == 1
    path = tmp_path / "z.csv"
    for separator in (";", "\t", "|"):
        path.write_text(f"prompt{separator}chosen{separator}rejected\np{separator}a{separator}b\n")
        with pytest.raises(InputError, match="separated by .*save the file with commas"):
            read_preferences(path)


def test_a_file_without_a_column_is_an_error_beside_good_files(tmp_path):
    good = write_csv(tmp_path / "x.csv", [["prompt", "chosen", "rejected"], ["p", "a", "b"]])
    bad = write_csv(tmp_path / "y.csv", [["prompt", "chosen", "worse"], ["p", "a", "b"]])
    with pytest.raises(InvalidPreferences, match=r"y\.csv: column 'rejected' is missing"):
        read_preferences([good, bad])


def test_problems_of_lists_and_tables_name_records_and_those_of_text_files_lines(tmp_path):
    array = tmp_path / "x.json"
    array.write_text(json.dumps([GOOD, GOOD, {"prompt": "p"}], indent=1))
    report = read_preferences(array).report
    assert [str(problem).split(":")[0] for problem in report.problems] == [f"{array} record 3"] * 2
    assert "says the same as record 1" in report.warnings[0].message
    assert "missing column: 2 (records 3, 3)" in report.summary()
    assert (
        ReadReport.from_dict(json.loads(json.dumps(report.as_dict()))).problems[0].unit == "record"
    )
    lines = jsonl(tmp_path / "lines.json", [GOOD, {"prompt": "p"}])
    assert read_preferences(lines).report.problems[0].unit == "line"


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
        "column 'rejected' is missing, the columns are: prompt, chosen, reject; did you mean "
        "'reject' by it? Then give columns={'rejected': 'reject'} (in a configuration "
        "data.columns, on the command line --column rejected=reject)."
    )


def test_csv_cells_may_be_longer_than_the_modules_limit(tmp_path):
    limit = csv.field_size_limit()
    long = "word " * 50_000
    path = write_csv(tmp_path / "x.csv", [["prompt", "chosen", "rejected"], ["p", long, "b"]])
    assert read_preferences(path)[0].chosen == long
    assert csv.field_size_limit() == limit


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


def test_text_that_is_not_utf8_costs_that_record_of_a_table_only(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    def strings(*values):
        binary = pyarrow.array([value.encode("latin-1") for value in values], pyarrow.binary())
        return pyarrow.Array.from_buffers(pyarrow.string(), len(values), binary.buffers())

    rejected = strings("5", "5", "\xe9", "5")
    messages = pyarrow.StructArray.from_arrays(
        [strings(*["assistant"] * 4), strings("4", "\xe9", "4", "4")], ["role", "content"]
    )
    chosen = pyarrow.ListArray.from_arrays(list(range(5)), messages)
    prompts = pyarrow.array([USER] * 4)
    table = pyarrow.table({"prompt": prompts, "chosen": chosen, "rejected": rejected})
    parquet.write_table(table, tmp_path / "x.parquet")
    for source in (table, tmp_path / "x.parquet"):
        pairs = read_preferences(source)
        assert len(pairs) == 2
        assert [(p.line, p.rule, p.field) for p in pairs.report.problems] == [
            (2, "not UTF-8", "chosen"), (3, "not UTF-8", "rejected")
        ]  # fmt: skip
        assert "byte 1 is 0xe9" in pairs.report.problems[0].message


def test_a_parquet_file_with_damaged_pages_is_an_error_unless_that_is_allowed(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "x.parquet"
    rows = [json.loads(line) for line in random_lines(12000)]
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=4096)
    content = path.read_bytes()
    place = len(content) // 2
    path.write_bytes(content[:place] + bytes(8000) + content[place + 8000 :])
    with pytest.raises(InputError, match="is cut off or damaged after record 4,096"):
        read_preferences([path])
    pairs = read_preferences(path, allow_truncated=True)
    assert len(pairs) == 4096 and pairs.report.warnings[-1].rule == "broken file"


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
