"""One process holds a lock; a lock whose holder is gone holds nobody up."""

import errno
import fcntl
import json
import os
import re
import socket
import subprocess
import sys
import time

import pytest

from dpo_keras.utils import file_lock
from dpo_keras.utils.file_lock import FileLock, LockedError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run.lock"


@pytest.fixture
def without_system_locks(monkeypatch):
    """A file system that has no locks, as some on networks."""

    def flock(handle, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)


def left_behind(path, age=0.0, **changes):
    """The text of a holder that is not here to hold the lock."""
    holder = {"host": socket.gethostname(), "process": os.getpid(), "started": "long ago"}
    path.write_text(json.dumps({**holder, "since": "2026-01-02 03:04:05", **changes}))
    os.utime(path, (time.time() - age,) * 2)


def taken(path):
    lock = FileLock(path)
    lock.acquire()
    lock.release()
    return not path.exists()


def test_the_second_one_is_refused_with_the_name_of_the_first(path):
    lock = FileLock(path)
    lock.acquire()
    with pytest.raises(LockedError) as error:
        FileLock(path).acquire()
    words = rf"process {os.getpid()} on {re.escape(socket.gethostname())} since \d{{4}}-.*"
    assert re.fullmatch(words, str(error.value)) and not error.value.hint
    lock.release()
    assert taken(path)


def test_a_killed_process_leaves_its_file_and_holds_nobody_up(path):
    code = (
        "import os, signal, sys\n"
        "from dpo_keras.utils.file_lock import FileLock\n"
        "FileLock(sys.argv[1]).acquire()\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    process = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert process.returncode < 0 and json.loads(path.read_text())["process"]
    assert taken(path)


def test_without_locks_of_the_system_a_running_process_of_this_machine_is_respected(
    path, without_system_locks
):
    lock = FileLock(path)
    lock.acquire()
    with pytest.raises(LockedError, match=f"process {os.getpid()} on"):
        FileLock(path).acquire()
    lock.release()
    assert taken(path)


def test_without_them_the_number_of_a_process_that_another_has_by_now_is_seen(
    path, without_system_locks
):
    left_behind(path, started="another boot 12345")
    assert taken(path)
    left_behind(path, process=2**22 + 1)  # more than there are
    assert taken(path)


@pytest.mark.parametrize("locks", [True, False], ids=["locks", "no locks"])
def test_a_process_of_another_machine_counts_as_gone_once_it_is_silent(path, locks, request):
    if not locks:
        request.getfixturevalue("without_system_locks")
    left_behind(path, age=20, host="node7")
    with pytest.raises(LockedError, match="on node7 since 2026-01-02") as error:
        FileLock(path).acquire()
    assert re.match(r"It gave a sign of life 2\d seconds ago; if .* remove /", error.value.hint)
    assert path.exists(), "it is not ours"
    left_behind(path, age=500, host="node7")
    assert taken(path)


def test_the_holder_gives_signs_of_life(path, monkeypatch):
    monkeypatch.setattr(file_lock, "_BEAT", 0.01)
    lock = FileLock(path)
    lock.acquire()
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 10
    while path.stat().st_mtime == 0 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert time.time() - path.stat().st_mtime < 60
    lock.release()


def test_a_lock_that_was_removed_and_taken_again_stays_its_new_holders(path):
    first, second = FileLock(path), FileLock(path)
    first.acquire()
    path.unlink()  # by hand, as the hint says
    second.acquire()
    first.release()
    with pytest.raises(LockedError):
        FileLock(path).acquire()
    second.release()


def test_a_file_that_its_holder_removes_at_the_last_moment_is_made_again(path, monkeypatch):
    flock, removed = fcntl.flock, []

    def removed_first(handle, operation):
        if not removed:
            removed.append(path.unlink())
        flock(handle, operation)

    monkeypatch.setattr(fcntl, "flock", removed_first)
    lock = FileLock(path)
    lock.acquire()
    assert path.exists()
    lock.release()


@pytest.mark.parametrize("content", ["", "{", "[1]", "{}"])
def test_a_file_without_a_holder_is_free(path, content):
    path.write_text(content)
    assert taken(path)


def test_a_disk_that_is_full_takes_no_lock(path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    with pytest.raises(OSError, match="No space"):
        FileLock(path).acquire()
    monkeypatch.undo()
    assert taken(path)
