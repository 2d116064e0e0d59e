"""Records on disk: exact, checked, whole or not there, and split without loading them."""

import fcntl
import os
import shutil

import numpy as np
import pytest
from preferences_samples import every_kind, hh_lines, random_pairs, write_jsonl

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    StoredPreferences,
    build_preferences,
    is_built,
    read_preferences,
    write_preferences,
)


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """200 pairs on 80 prompts in several shards."""
    folder = tmp_path_factory.mktemp("built") / "pairs"
    return build_preferences(random_pairs(200, prompts=80), folder, shard_bytes=4000)


@pytest.fixture
def copy(built, tmp_path):
    return shutil.copytree(built.path, tmp_path / "copy")


def test_every_kind_of_pair_comes_back_exactly(tmp_path):
    stored = build_preferences(every_kind(), tmp_path / "out")
    assert list(stored) == every_kind()
    assert [stored[row] for row in range(len(stored))] == every_kind()
    assert stored[-1] == every_kind()[-1] and list(stored[1:3]) == every_kind()[1:3]
    assert list(read_preferences(tmp_path / "out")) == every_kind()
    with pytest.raises(IndexError):
        stored[6]


def test_shards_hold_all_pairs_in_order_and_can_be_read_from_any_place(built):
    pairs = random_pairs(200, prompts=80)
    assert len(built.shards) > 3 and sum(shard.pairs for shard in built.shards) == 200
    assert list(built.read(start=137)) == pairs[137:]
    assert list(built.select(np.array([3, 150]))) == [pairs[3], pairs[150]]
    assert list(built.first(5)) == pairs[:5] and built.first(5).extent == 5
    built.verify()


def test_the_same_files_give_the_same_records_and_keep_the_report(tmp_path):
    path = write_jsonl(tmp_path / "hh.jsonl.gz", hh_lines())
    one, other = (build_preferences(path, tmp_path / name) for name in ("one", "other"))
    assert one.checksum == other.checksum
    assert list(one) == list(read_preferences(path))
    assert one.report.summary() == read_preferences(path).report.summary()
    assert one.report.dropped == 1


def test_tensorflow_datasets_reads_a_built_directory_by_itself(built):
    tfds = pytest.importorskip("tensorflow_datasets")
    dataset = tfds.builder_from_directory(built.path).as_dataset(split="train")
    records = list(tfds.as_numpy(dataset.take(200)))
    assert [record["id"].decode() for record in records] == [str(n) for n in range(200)]
    assert records[0]["preference"] == 1.0 and np.isnan(records[0]["margin"])


def test_a_directory_that_holds_something_is_refused(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("precious")
    with pytest.raises(InputError, match="must be a new or an empty directory"):
        build_preferences(random_pairs(2), tmp_path / "out")
    with pytest.raises(InputError) as error:
        build_preferences([], tmp_path / "no" / "out", shard_bytes=0)
    assert len(error.value.problems) == 2
    assert (tmp_path / "out" / "mine.txt").read_text() == "precious"


def test_a_build_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield from random_pairs(3)
        raise OSError("no such device")

    with pytest.raises(OSError):
        build_preferences(broken(), tmp_path / "out")
    bad = write_jsonl(tmp_path / "bad.jsonl", hh_lines())
    with pytest.raises(InputError, match="1 of 6 records are bad"):
        build_preferences(bad, tmp_path / "out", on_error="fail")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["bad.jsonl"]


def test_what_a_killed_build_has_left_is_written_anew(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "shard-7").write_bytes(b"half a shard")
    (tmp_path / "out").mkdir()
    assert len(build_preferences(random_pairs(3), tmp_path / "out")) == 3
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]
    assert not (tmp_path / "out" / "shard-7").exists()


def test_two_builds_of_one_directory_do_not_mix(tmp_path):
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(InputError, match="another build"):
        build_preferences(random_pairs(3), tmp_path / "out")
    os.close(handle)


def damage(path, how):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    {"cut off": lambda: os.truncate(path, len(content) - 1),
     "missing": path.unlink,
     "damaged": lambda: path.write_bytes(content)}[how]()  # fmt: skip


@pytest.mark.parametrize("how", ["cut off", "missing", "damaged"])
@pytest.mark.parametrize("part", ["00002-of", "index.bin"])
def test_damage_is_named_with_the_file_and_what_to_do(copy, part, how):
    path = next(entry for entry in copy.iterdir() if part in entry.name)
    damage(path, how)
    with pytest.raises(InputError) as error:
        StoredPreferences.open(copy).verify()
    (problem,) = error.value.problems
    assert path.name in problem and how in problem and "again" in problem


def test_a_damaged_index_is_refused_before_it_can_change_a_split(copy):
    damage(copy / "index.bin", "damaged")
    with pytest.raises(InputError, match="index.bin is damaged"):
        StoredPreferences.open(copy)


def test_reading_stops_at_a_damaged_shard_before_any_of_its_pairs(copy):
    damage(next(entry for entry in copy.iterdir() if "00001-of" in entry.name), "damaged")
    stored = StoredPreferences.open(copy)
    read = []
    with pytest.raises(InputError, match="00001-of.*SHA-256"):
        read.extend(stored)
    assert read == [] or len(read) <= stored.shards[0].pairs


def test_a_damaged_manifest_and_a_folder_of_something_else_are_named(copy, tmp_path):
    assert is_built(copy) and not is_built(tmp_path)
    with pytest.raises(InputError, match="dpo-keras data build"):
        StoredPreferences.open(tmp_path)
    for text in ("{", "[]", '{"format": "dpo_keras preference pairs 1"}'):
        (copy / "manifest.json").write_text(text)
        with pytest.raises(InputError, match="manifest.json"):
            StoredPreferences.open(copy)


def test_a_split_never_has_a_prompt_on_both_sides_and_follows_the_seed(built):
    train, held_out = built.split(0.25, seed=3)
    assert len(train) + len(held_out) == 200 and 20 < len(held_out) < 80
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}
    assert list(built.split(0.25, seed=3)[1]) == list(held_out)
    assert list(built.split(0.25, seed=4)[1]) != list(held_out)


def test_more_data_move_no_prompt_to_the_other_side(built, tmp_path):
    more = build_preferences(random_pairs(200, 1, 99) + list(built), tmp_path / "more")
    before = {pair.prompt for pair in built.split(0.2)[1]}
    after = {pair.prompt for pair in more.split(0.2)[1]}
    assert before == after & {pair.prompt for pair in built}


def test_a_split_that_cannot_be_is_refused(built):
    with pytest.raises(InputError) as error:
        built.split(1.5, by="topic")
    assert len(error.value.problems) == 2
    with pytest.raises(InputError, match="200 of 200 have none"):
        built.split(0.2, by="group")


def test_a_source_can_be_a_built_directory_beside_files(built, tmp_path):
    write_preferences(random_pairs(4, seed=9), tmp_path / "a.jsonl")
    pairs = read_preferences([built.path, tmp_path / "a.jsonl"])
    assert len(pairs) == 204 and list(pairs)[200:] == random_pairs(4, seed=9)
