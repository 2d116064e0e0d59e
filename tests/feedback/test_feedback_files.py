"""The files of a store: how many are open, what is in them when, whose they are, and copies."""

import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from feedback_rounds import count

from dpo_keras.feedback import Settings, StoreError, database, open_store


def test_the_number_of_open_files_does_not_grow_with_threads(make_store, people, tmp_path):
    """Threads come and go in bursts, as in a server's pool."""
    store = make_store(4)
    (ann,) = people(store, "ann")

    def burst():
        together = threading.Barrier(30)

        def work():
            together.wait(20)
            store.done_by(ann)
            store.next(ann)

        threads = [threading.Thread(target=work) for _ in range(30)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        return open_files()

    def open_files():
        links = Path("/proc/self/fd").iterdir()
        return sum(os.path.realpath(link).startswith(str(tmp_path)) for link in links)

    bursts = [burst() for _ in range(4)]
    assert max(bursts) <= 3 * (database.READERS + 1)
    store.close()
    assert open_files() == 0


def test_every_connection_that_writes_waits_for_the_disk(make_store, monkeypatch):
    """Also with an SQLite that was built to wait for less."""
    connect = sqlite3.connect

    def hasty(*arguments, **options):
        connection = connect(*arguments, **options)
        connection.execute("PRAGMA synchronous=OFF")
        return connection

    monkeypatch.setattr(database.sqlite3, "connect", hasty)
    store = make_store(1)
    with store.database.writing() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 2, "FULL"
    with store.database.writing(durable=False) as connection:
        assert connection.execute("PRAGMA synchronous").fetchone()[0] == 1, "NORMAL"


def test_a_confirmed_judgement_outlives_a_power_failure(tmp_path):
    """In a process of its own: TensorFlow brings another SQLite, with the same symbols."""
    script = Path(__file__).with_name("feedback_power.py")
    subprocess.run([sys.executable, script, tmp_path], check=True)


def test_a_checkpoint_puts_the_whole_round_into_one_file(make_store, people, tmp_path):
    store = make_store(3)
    (ann,) = people(store, "ann")
    store.submit(ann, store.next(ann)[0].id, "left", key="k")
    assert (tmp_path / "feedback.sqlite-wal").stat().st_size > 0
    store.database.checkpoint()
    shutil.copy(tmp_path / "feedback.sqlite", tmp_path / "copy.sqlite")
    copy = open_store(tmp_path / "copy.sqlite")
    assert count(copy) == 1
    copy.close()
    store.submit(ann, store.next(ann)[0].id, "left", key="l")
    store.close()
    assert not (tmp_path / "feedback.sqlite-wal").exists()


def test_a_backup_of_a_store_in_use_is_one_whole_file(make_store, people, tmp_path):
    store = make_store(3)
    (ann,) = people(store, "ann")
    store.submit(ann, store.next(ann)[0].id, "left", key="k")
    with store.database.writing() as connection:
        connection.execute("INSERT INTO meta VALUES ('half', 'done')")
        thread = threading.Thread(target=store.backup, args=(tmp_path / "b" / "copy.sqlite",))
        thread.start()
        thread.join(20)
    assert [path.name for path in (tmp_path / "b").iterdir()] == ["copy.sqlite"]
    assert (tmp_path / "b" / "copy.sqlite").stat().st_mode & 0o777 == 0o600
    copy = open_store(tmp_path / "b" / "copy.sqlite")
    assert count(copy) == 1 and copy.id == store.id
    assert copy.database.rows("SELECT 1 FROM meta WHERE key = 'half'") == []
    copy.close()
    with pytest.raises(StoreError, match="cannot be written"):
        store.backup("/proc/copy.sqlite")


def test_a_store_is_for_its_owner_alone(make_store, tmp_path):
    before = os.umask(0)
    try:
        store = make_store(1)
        files = list(tmp_path.iterdir())
        assert len(files) == 3 and {path.stat().st_mode & 0o777 for path in files} == {0o600}
        store.close()
        (tmp_path / "feedback.sqlite").chmod(0o640)
        make_store(1)
        assert (tmp_path / "feedback.sqlite").stat().st_mode & 0o777 == 0o640, "as people set it"
    finally:
        os.umask(before)


@pytest.mark.parametrize("mode", ["DELETE", "WAL", "WAL, open"])
def test_a_database_of_another_program_is_left_as_it_is(tmp_path, mode):
    path = tmp_path / "other.sqlite"
    other = sqlite3.connect(path)
    other.execute(f"PRAGMA journal_mode={mode.partition(',')[0]}")
    other.execute("CREATE TABLE notes (text)")
    other.commit()
    if "open" not in mode:
        other.close()
    # The index of an open log is its readers' common memory.
    kept = [found for found in tmp_path.iterdir() if not found.name.endswith("-shm")]
    before = [found.read_bytes() for found in kept]
    for create in (False, True):
        with pytest.raises(StoreError, match="not a feedback store.*Nothing was changed"):
            open_store(path, Settings(), create=create)
    assert [found.read_bytes() for found in kept] == before
    assert len(list(tmp_path.iterdir())) == (3 if "open" in mode else 1)
    other.close()
