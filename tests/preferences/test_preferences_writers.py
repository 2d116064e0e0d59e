import sys

import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    Message,
    PreferencePair,
    read_preferences,
    support_pairs,
    write_preferences,
)

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


def test_wrong_arguments_are_told_together(tmp_path):
    with pytest.raises(InputError) as caught:
        write_preferences([], tmp_path / "none" / "pairs.txt")
    suffix, pairs, folder = caught.value.problems
    assert ".parquet" in suffix and "pairs.txt" in suffix
    assert "at least one pair" in pairs
    assert "does not exist" in folder
    with pytest.raises(InputError, match="is a directory"):
        write_preferences(TEXT, tmp_path)


def test_parquet_without_pyarrow_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"dpo-keras\[parquet\]"):
        write_preferences(TEXT, tmp_path / "x.parquet")
    assert list(tmp_path.iterdir()) == []
