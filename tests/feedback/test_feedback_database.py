"""The store under threads, processes, kill -9, full disks, and files that are not stores."""

import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from feedback_rounds import candidates, check_books, judge_all, prefers, store_of_version_1

from dpo_keras.feedback import Settings, StoreError, database, open_store, schema

WORKER = Path(__file__).with_name("feedback_worker.py")


def test_threads_share_a_store_without_a_double_or_a_loss(make_store, people):
    store = make_store(60, overlap=2)
    who = people(store, *(f"person {n}" for n in range(8)))
    failures = []

    def work(person):
        try:
            judge_all(store, person, prefers("one"), count=2)
        except Exception as error:  # reported by the test itself
            failures.append(error)

    threads = [threading.Thread(target=work, args=(person,)) for person in who]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert failures == []
    counts = store.database.rows("SELECT count(*) FROM current JOIN presentations p "
                                 "ON p.id = presentation GROUP BY pair")  # fmt: skip
    assert [row[0] for row in counts] == [2] * 60
    check_books(store)


def start_worker(path, name, log):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.Popen(
        [sys.executable, str(WORKER), str(path), name, str(log)], env=environment
    )


def test_processes_share_a_store(make_store, people, tmp_path):
    store = make_store(40, overlap=2)
    people(store, "ann", "bob", "eve")
    workers = [
        start_worker(tmp_path / "feedback.sqlite", name, tmp_path / name)
        for name in ("ann", "bob", "eve")
    ]
    assert [worker.wait(60) for worker in workers] == [0, 0, 0]
    counts = store.database.rows("SELECT count(*) FROM current JOIN presentations p "
                                 "ON p.id = presentation GROUP BY pair")  # fmt: skip
    assert [row[0] for row in counts] == [2] * 40
    check_books(store)


def test_every_confirmed_judgement_is_there_after_kill_9(make_store, people, tmp_path):
    """A worker writes a line after each judgement that was confirmed; then it is killed."""
    store = make_store(3000, overlap=1)
    people(store, "ann")
    path, log = tmp_path / "feedback.sqlite", tmp_path / "confirmed"
    chance = random.Random(0)
    for _ in range(3):
        lines = len(log.read_text().splitlines()) if log.exists() else 0
        worker = start_worker(path, "ann", log)
        deadline = time.monotonic() + 30
        while not log.exists() or len(log.read_text().splitlines()) < lines + 20:
            assert time.monotonic() < deadline and worker.poll() is None
            time.sleep(0.01)
        time.sleep(chance.random() * 0.05)
        worker.send_signal(signal.SIGKILL)
        worker.wait(10)
        confirmed = [int(line) for line in log.read_text().split("\n")[:-1]]
        there = {row[0] for row in store.database.rows("SELECT id FROM judgements")}
        assert len(set(confirmed)) == len(confirmed) > lines
        assert set(confirmed) <= there
        assert len(there) <= len(confirmed) + 3, "at most one unconfirmed per kill"
        check_books(store)


def test_a_killed_start_leaves_no_half_made_store(tmp_path):
    path = tmp_path / "feedback.sqlite"
    sqlite3.connect(path).close()
    path.touch()
    store = open_store(path, create=True)
    assert store.add(candidates(1)).pairs == 1
    store.close()


def test_a_full_disk_is_said_and_nothing_is_half_done(make_store, people):
    store = make_store(4)
    (ann,) = people(store, "ann")
    shown = store.next(ann)[0]
    store.submit(ann, shown.id, "left", key="kept")
    second = store.next(ann)[0]
    pages = store.database.rows("PRAGMA page_count")[0][0]
    with store.database.writing() as connection:
        connection.execute(f"PRAGMA max_page_count = {pages}")
    reason = "x" * 2000
    with pytest.raises(StoreError, match="disk is full"):
        # A few pages may still be free.
        for turn in range(20):
            store.submit(ann, second.id, "left", key=f"k{turn}", reason=reason)
            store.undo(ann, second.id, key=f"u{turn}")
    check_books(store)
    with store.database.writing() as connection:
        connection.execute("PRAGMA max_page_count = 1000000")
    kept = store.database.rows("SELECT count(*) FROM judgements")[0][0]
    store.submit(ann, store.next(ann)[0].id, "left", key="after", reason=reason)
    assert store.database.rows("SELECT count(*) FROM judgements")[0][0] == kept + 1
    check_books(store)


def test_work_that_fails_is_taken_back_alone(make_store):
    """Many write in one transaction; every third one fails after it has written something."""
    store = make_store(1)

    def job(number):
        def write(connection):
            connection.execute("INSERT INTO meta VALUES (?, 'x')", (f"test {number}",))
            assert store.database.rows("SELECT 1 FROM meta WHERE key = ?", (f"test {number}",))
            if number % 3 == 0:
                raise KeyError(number)
            return store.database.batched(lambda inner: number if inner is connection else None)

        return database.Job(write)

    jobs = [job(number) for number in range(30)]
    store.database.run_together(jobs)
    assert [job.result for job in jobs] == [n if n % 3 else None for n in range(30)]
    assert [job.error is None for job in jobs] == [n % 3 > 0 for n in range(30)]
    there = {row[0] for row in store.database.rows("SELECT key FROM meta WHERE value = 'x'")}
    assert there == {f"test {n}" for n in range(30) if n % 3}


def test_an_error_of_the_disk_is_that_of_everybody_who_shared_the_transaction(make_store):
    store = make_store(1)

    def full(connection):
        raise sqlite3.OperationalError("database or disk is full")

    def write(connection):
        connection.execute("INSERT INTO meta VALUES ('test', 'x')")

    jobs = [database.Job(write), database.Job(full)]
    store.database.run_together(jobs)
    assert all(isinstance(job.error, StoreError) and "is full" in str(job.error) for job in jobs)
    assert store.database.rows("SELECT 1 FROM meta WHERE key = 'test'") == []
    assert store.add(candidates(2)).pairs == 1, "it goes on"


READ_ONLY = """
import os, sys
from dpo_keras.feedback import StoreError, open_store
if os.geteuid() == 0:
    os.setuid(65534)
store = open_store(sys.argv[1])
print(store.database.rows("SELECT count(*) FROM pairs")[0][0])
try:
    store.next(1)
except StoreError as error:
    print(error)
"""


def test_a_read_only_file_can_be_read_and_writing_says_why_not(make_store, people, tmp_path):
    store = make_store(2)
    people(store, "ann")
    store.close()
    printed = in_read_only_folder(READ_ONLY, tmp_path / "feedback.sqlite")
    assert printed.startswith("2\n") and "read-only" in printed


def in_read_only_folder(program, path):
    """What a program prints that gets a file which it cannot write, nor the folder."""
    path.chmod(0o444)
    tmp_path = path.parent
    for folder in (tmp_path, *tmp_path.parents):
        if folder.stat().st_uid == os.getuid() and "pytest" in str(folder):
            folder.chmod(0o555)
    try:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(
            [sys.executable, "-c", program, str(path)],
            capture_output=True, text=True, timeout=60, env=environment, check=False,
        )  # fmt: skip
    finally:
        for folder in (tmp_path, *tmp_path.parents):
            if folder.stat().st_uid == os.getuid() and "pytest" in str(folder):
                folder.chmod(0o755)
    assert done.stderr == "", done.stderr
    return done.stdout


REPORT = """
import importlib.readers  # while root's Python can be read
import os, sys
from dpo_keras.feedback import StoreError, assess, open_store, to_pairs
if os.geteuid() == 0:
    os.setuid(65534)
store = open_store(sys.argv[1])
print(assess(store, resamples=5).counts["judgements"], to_pairs(store).pairs[0].preference)
print(store.progress().judged, [one.name for one in store.annotators()])
print(store.database.rows("PRAGMA user_version")[0][0])
try:
    store.judge_annotator("robot")
except StoreError as error:
    print(error)
"""


def test_a_read_only_store_of_version_1_is_reported_on_as_it_is(tmp_path):
    path = store_of_version_1(tmp_path / "feedback.sqlite")
    sqlite3.connect(path).execute("PRAGMA journal_mode = WAL").connection.close()
    before = path.read_bytes()
    printed = in_read_only_folder(REPORT, path)
    assert printed.startswith("4 0.75\n4 ['ann', 'bob']\n1\n") and "read-only" in printed
    path.chmod(0o644)
    assert path.read_bytes() == before


def tables(path):
    """Columns by table, and all triggers, indexes and views."""
    connection = sqlite3.connect(path)
    names = connection.execute("SELECT type, name FROM sqlite_master ORDER BY name").fetchall()
    columns = {
        name: sorted(row[1:] for row in connection.execute(f"PRAGMA table_xinfo({name})"))
        for kind, name in names
        if kind == "table"
    }
    connection.close()
    without_numbers = {t: [c[:4] for c in found] for t, found in columns.items()}
    return sorted(names), without_numbers


def test_an_upgraded_store_has_the_tables_of_a_new_one(make_store, tmp_path):
    make_store(1).close()
    path = store_of_version_1(tmp_path / "old.sqlite")
    with sqlite3.connect(path) as connection:
        before = connection.execute("SELECT * FROM judgements").fetchall()
    connection.close()
    store = open_store(path)
    robot = store.judge_annotator("robot")
    shown = store.next(robot, 1)[0]
    store.submit(robot, shown.id, "left", key="k", preference=0.75)
    with pytest.raises(sqlite3.IntegrityError, match="never changed"):
        store.database.batched(lambda c: c.execute("UPDATE judgements SET preference = 1"))
    check_books(store)
    store.close()
    assert tables(path) == tables(tmp_path / "feedback.sqlite")
    with sqlite3.connect(path) as connection:
        after = connection.execute("SELECT * FROM judgements").fetchall()
        assert connection.execute("PRAGMA user_version").fetchone()[0] == 2
    connection.close()
    assert after[:-1] == [(*row, None) for row in before] and after[-1][-1] == 0.75


def test_an_upgrade_that_fails_changes_nothing(tmp_path, monkeypatch):
    path = store_of_version_1(tmp_path / "feedback.sqlite")
    before = tables(path)
    half = "ALTER TABLE annotators ADD COLUMN judge INTEGER;\nCREATE TABLE judgements (x);\n"
    monkeypatch.setattr(schema, "_text", lambda name: half)
    with pytest.raises(StoreError, match="already exists"):
        open_store(path)
    monkeypatch.undo()
    assert tables(path) == before
    open_store(path).close()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("PRAGMA user_version = 99", "version 99.*newer dpo_keras"),
        ("PRAGMA user_version = 0", "version 0.*older dpo_keras"),
        ("PRAGMA application_id = 7", "not a feedback store"),
    ],
)
def test_a_store_of_another_version_is_left_alone(make_store, tmp_path, change, words):
    make_store(2).close()
    path = tmp_path / "feedback.sqlite"
    with sqlite3.connect(path) as connection:
        connection.execute(change)
    connection.close()
    before = path.read_bytes()
    for create in (False, True):
        with pytest.raises(StoreError, match=words):
            open_store(path, Settings(overlap=5), create=create)
    assert path.read_bytes() == before


def test_paths_that_are_no_store(tmp_path):
    with pytest.raises(StoreError, match="there is no"):
        open_store(tmp_path / "missing.sqlite")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(StoreError, match="must name a file"):
            open_store(tmp_path / "pipe")
    with pytest.raises(StoreError, match="folder of"):
        open_store(tmp_path / "no" / "feedback.sqlite", create=True)
    with pytest.raises(StoreError, match="is a directory"):
        open_store(tmp_path, create=True)
    (tmp_path / "text").write_text("not a database, but a text of some length\n" * 100)
    with pytest.raises(StoreError, match="not a feedback store"):
        open_store(tmp_path / "text", create=True)
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE notes (text)")
    other.close()
    with pytest.raises(StoreError, match="not a feedback store"):
        open_store(tmp_path / "other.sqlite", create=True)


def test_a_store_that_another_process_holds_is_said_to_be_in_use(make_store, people, tmp_path):
    store = make_store(2)
    (ann,) = people(store, "ann")
    other = sqlite3.connect(tmp_path / "feedback.sqlite", isolation_level=None)
    with store.database.writing() as connection:
        connection.execute("PRAGMA busy_timeout = 100")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="in use by another process"):
        store.next(ann)
    other.execute("ROLLBACK")
    other.close()
    assert store.next(ann)
