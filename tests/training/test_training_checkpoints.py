"""Checkpoints are whole or absent, whatever the disk does."""

import errno
import json
import pathlib
import resource
import shutil

import h5py
import numpy as np
import pytest
from damage import overwrite
from tiny import gpt2
from unsynced_disk import UnsyncedDisk

from dpo_keras.errors import InputError
from dpo_keras.training import (
    DPOModel,
    latest_checkpoint,
    load_checkpoint,
    save_checkpoint,
    train_preferences,
)


@pytest.fixture(scope="module")
def model():
    """Compiled; its weights are 1, so that others are seen in it."""
    model = DPOModel(gpt2(num_layers=1))
    model.compile("adam")
    return model


def paint(model, value):
    for weight in model.policy.weights:
        weight.assign(np.full(weight.shape, value))


def painted(model):
    return {float(np.unique(weight)[0]) for weight in model.policy.weights}


@pytest.fixture
def two(model, tmp_path):
    """Checkpoints of steps 4 and 8, whose weights are 4 and 8; the model has 0."""
    for step in (4, 8):
        paint(model, step)
        save_checkpoint(model, tmp_path, step)
    paint(model, 0)
    return tmp_path


def load(model, folder):
    notes = []
    return load_checkpoint(model, folder, notes.append), notes


def test_the_newest_checkpoint_is_loaded_without_a_word(model, two):
    assert load(model, two) == (8, []) and painted(model) == {8}


@pytest.mark.parametrize("start", [None, 0], ids=["in the middle", "its header"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_loaded(model, two, start):
    overwrite(two / "step-00000008", start)
    assert latest_checkpoint(two)[0] == 4
    step, (note,) = load(model, two)
    assert step == 4 and painted(model) == {4}
    assert note.startswith("warning: checkpoint step-00000008 is damaged (the SHA-256 checksum of")
    assert note.endswith("the run goes on from step-00000004.")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "cannot be read: No such file"),
        ("{", "is not as it was written"),
        ("[]", "is not as it was written"),
        ('{"step": 9, "bytes": 1}', "is of step 9"),
        ('{"step": 7, "bytes": 1}', "is of step 7"),
        ('{"step": 8, "bytes": 1}', "instead of 1"),
    ],
)
def test_what_describes_a_checkpoint_may_be_damaged_too(model, two, content, words):
    meta = two / "step-00000008" / "checkpoint.json"
    meta.unlink() if content is None else meta.write_text(content)
    step, (note,) = load(model, two)
    assert step == 4 and words in note


def test_where_every_checkpoint_is_damaged_all_are_named_in_one_message(model, two):
    for folder in two.iterdir():
        overwrite(folder)
    with pytest.raises(InputError) as error:
        load(model, two)
    (problem,) = error.value.problems
    assert "step-00000008 is damaged" in problem and "step-00000004 is damaged" in problem
    assert "Restore one from a copy, or remove the directory" in problem


def without_checksum(checkpoint):
    meta = checkpoint / "checkpoint.json"
    content = json.loads(meta.read_text())
    assert len(content.pop("sha256")) == 64
    meta.write_text(json.dumps(content))


def test_a_checkpoint_of_an_earlier_version_has_no_checksum_and_loads(model, two):
    without_checksum(two / "step-00000008")
    assert load(model, two) == (8, []) and painted(model) == {8}


def test_a_checkpoint_of_an_earlier_version_that_hdf5_cannot_read_is_passed_over(model, two):
    without_checksum(two / "step-00000008")
    overwrite(two / "step-00000008", 0)
    step, (note,) = load(model, two)
    assert step == 4 and painted(model) == {4} and "file signature not found" in note


def test_the_last_good_checkpoint_is_not_removed_for_a_damaged_later_one(model, two):
    overwrite(two / "step-00000008")
    for step in (5, 6):
        save_checkpoint(model, two, step, keep=1)
        assert latest_checkpoint(two)[0] == step
    save_checkpoint(model, two, 8, keep=1)
    assert latest_checkpoint(two)[0] == 8
    assert [path.name for path in two.iterdir()] == ["step-00000008"]


def test_a_checkpoint_survives_a_power_failure_and_the_one_before_it_too(
    model, tmp_path, monkeypatch
):
    (tmp_path / "disk").mkdir()
    disk = UnsyncedDisk(tmp_path / "disk", monkeypatch)
    for step in (4, 8):
        paint(model, step)
        save_checkpoint(model, tmp_path / "disk" / "run" / "checkpoints", step)
    disk.restore(tmp_path / "left")
    checkpoints = tmp_path / "left" / "run" / "checkpoints"
    assert load(model, checkpoints) == (8, []) and painted(model) == {8}
    shutil.rmtree(checkpoints / "step-00000008")
    assert load(model, checkpoints) == (4, []) and painted(model) == {4}


@pytest.mark.parametrize("room", [0, 5_000, 50_000])
def test_a_disk_that_fills_while_it_is_written_is_a_message_and_leaves_no_file_open(
    model, two, monkeypatch, room
):
    """HDF5 would crash the process at its end over a file that it could not close.

    The limit on a file's size is a disk that fills after the check of its room.
    """
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large.*last good one is step-00000008"):
            save_checkpoint(model, two, 12)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0
    assert sorted(path.name for path in two.iterdir()) == ["step-00000004", "step-00000008"]


def test_a_disk_that_fills_up_leaves_the_last_good_checkpoint(model, tmp_path, monkeypatch):
    save_checkpoint(model, tmp_path, 4)

    def full(path, *args, **kwargs):
        pathlib.Path(path).write_bytes(b"half a file")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(model, "save_weights", full)
    with pytest.raises(OSError, match=r"No space left.*last good one is step-00000004.*--resume"):
        save_checkpoint(model, tmp_path, 8)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def test_a_disk_without_room_is_noticed_before_anything_is_written(model, tmp_path, monkeypatch):
    size = (save_checkpoint(model, tmp_path, 4) / "state.weights.h5").stat().st_size
    usage = shutil.disk_usage(tmp_path)._replace(free=size - 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(model, "save_weights", lambda path: pytest.fail("tried to write"))
    with pytest.raises(OSError, match=r"No space left on device\); the last good one is step-0*4"):
        save_checkpoint(model, tmp_path, 8)


def test_a_half_written_checkpoint_is_never_loaded(model, tmp_path):
    save_checkpoint(model, tmp_path, 4)
    newer = save_checkpoint(model, tmp_path, 8)
    weights = newer / "state.weights.h5"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert latest_checkpoint(tmp_path)[0] == 4


def test_a_checkpoint_of_another_model_is_refused(model, tokenized, tmp_path):
    save_checkpoint(model, tmp_path, 4)
    other = DPOModel(gpt2(num_layers=2))
    other.compile("adam")
    with pytest.raises(InputError, match="does not fit this model"):
        train_preferences(other, tokenized, checkpoints=tmp_path, resume=True)


def test_ten_megabytes_are_room_enough_for_a_small_model(model, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    save_checkpoint(model, tmp_path, 1)
    assert latest_checkpoint(tmp_path)[0] == 1
