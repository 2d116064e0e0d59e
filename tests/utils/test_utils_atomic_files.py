"""Files and directories that are whole or absent, whatever fails in between."""

import os
from pathlib import Path

import pytest
from unsynced_disk import UnsyncedDisk

from dpo_keras.utils import atomic_files
from dpo_keras.utils.atomic_files import flush_to_disk, replaced, write_text


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_only_once_the_block_has_ended(tmp_path):
    with replaced(tmp_path / "new" / "log.json") as partial:
        partial.write_text("{}")
        assert partial.parent == tmp_path / "new"
        assert partial.suffix == ".json"
        assert not (tmp_path / "new" / "log.json").exists()
    assert (tmp_path / "new" / "log.json").read_text() == "{}"
    assert names(tmp_path / "new") == ["log.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_error_in_the_block_keeps_the_old_file_and_leaves_nothing_else(tmp_path, error):
    path = tmp_path / "log.json"
    path.write_text("old")
    with pytest.raises(error), replaced(path) as partial:
        partial.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert names(tmp_path) == ["log.json"]


def test_an_error_in_the_block_keeps_the_old_directory(tmp_path):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "a").write_text("old")
    with pytest.raises(ValueError), replaced(folder) as partial:
        partial.mkdir()
        (partial / "a").write_text("half")
        raise ValueError
    assert (folder / "a").read_text() == "old"
    assert names(tmp_path) == ["store"]


def test_a_directory_replaces_one_that_holds_files_and_takes_nothing_over(tmp_path):
    folder = tmp_path / "store"
    (folder / "deep").mkdir(parents=True)
    (folder / "deep" / "old").write_text("old")
    with replaced(folder) as partial:
        partial.mkdir()
        (partial / "new").write_text("new")
        assert (folder / "deep" / "old").exists()
    assert names(folder) == ["new"]
    assert names(tmp_path) == ["store"]


def test_a_file_replaces_a_directory_and_a_directory_a_file(tmp_path):
    path = tmp_path / "either"
    path.mkdir()
    write_text(path, "a file")
    assert path.read_text() == "a file"
    path.unlink()
    with replaced(path) as partial:
        partial.mkdir()
    assert path.is_dir()


def test_a_block_that_wrote_nothing_is_an_error_and_keeps_the_old_file(tmp_path):
    path = tmp_path / "log.json"
    path.write_text("old")
    with pytest.raises(FileNotFoundError), replaced(path):
        pass
    assert path.read_text() == "old"
    assert names(tmp_path) == ["log.json"]


def test_what_a_killed_process_left_does_not_get_into_the_new_directory(tmp_path):
    left = tmp_path / f".store.{os.getpid()}.partial"
    left.mkdir()
    (left / "half").write_text("half")
    with replaced(tmp_path / "store") as partial:
        assert partial == left
        partial.mkdir()
        (partial / "whole").write_text("whole")
    assert names(tmp_path / "store") == ["whole"]


def test_a_power_failure_at_any_moment_leaves_the_old_file_or_the_new_one(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("old")
    disk = UnsyncedDisk(tmp_path, monkeypatch)
    write_text(tmp_path / "a.txt", "new")
    assert {moment["a.txt"] for moment in disk.moments} == {b"old", b"new"}
    assert disk.after_power_failure() == {"a.txt": b"new"}


def test_a_directory_survives_a_power_failure_with_all_folders_in_it_and_above(
    tmp_path, monkeypatch
):
    disk = UnsyncedDisk(tmp_path, monkeypatch)
    with replaced(tmp_path / "new" / "run" / "policy") as partial:
        (partial / "assets").mkdir(parents=True)
        (partial / "assets" / "vocabulary").write_text("words")
        (partial / "weights").write_text("numbers")
    left = disk.after_power_failure()
    assert left["new/run/policy/assets/vocabulary"] == b"words"
    assert left["new/run/policy/weights"] == b"numbers"


def test_another_file_of_the_folder_is_not_flushed(tmp_path, monkeypatch):
    """It may be large, or vanish meanwhile."""
    disk = UnsyncedDisk(tmp_path, monkeypatch)
    (tmp_path / "other.bin").write_text("large")
    write_text(tmp_path / "a.txt", "text")
    assert disk.after_power_failure() == {"a.txt": b"text", "other.bin": b""}


def test_a_disk_that_is_full_at_the_end_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def full(path):
        raise OSError("no space")

    monkeypatch.setattr(atomic_files, "flush_to_disk", full)
    with pytest.raises(OSError, match="no space"):
        write_text(path, "new")
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_a_directory_that_cannot_be_moved_in_brings_the_old_one_back(tmp_path, monkeypatch):
    folder = tmp_path / "store"
    folder.mkdir()
    (folder / "a").write_text("old")
    replace = Path.replace

    def moved(source, target):
        if ".partial" in str(source):
            raise OSError("busy")
        replace(source, target)

    monkeypatch.setattr(Path, "replace", moved)
    with pytest.raises(OSError, match="busy"), replaced(folder) as partial:
        partial.mkdir()
    assert (folder / "a").read_text() == "old"
    assert names(tmp_path) == ["store"]


def test_text_is_utf_8(tmp_path):
    write_text(tmp_path / "a.txt", "größe ½")
    assert (tmp_path / "a.txt").read_bytes() == "größe ½".encode()


def test_every_file_and_folder_of_a_directory_is_flushed(tmp_path, monkeypatch):
    (tmp_path / "deep").mkdir()
    for name in ("a", "deep/b"):
        (tmp_path / name).write_text("")
    flushed = []
    monkeypatch.setattr(atomic_files, "_flush", flushed.append)
    flush_to_disk(tmp_path)
    assert {path.relative_to(tmp_path).as_posix() for path in flushed} == {
        "a",
        "deep",
        "deep/b",
        ".",
    }
