"""The SQLite file: opening, versions, transactions, and errors that people can act on."""

from __future__ import annotations

import importlib.resources
import os
import secrets
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from dpo_keras.errors import InputError

T = TypeVar("T")

VERSION = 1
APPLICATION = 0x44504F46  # "DPOF", so that another program's database is told apart


class StoreError(InputError):
    """The feedback store cannot be read or written; the message says what to do."""


class _Job:
    """Work that waits to be written, and what came of it."""

    def __init__(self, work: Callable[[sqlite3.Connection], Any], durable: bool):
        self.work, self.durable = work, durable
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Database:
    """A SQLite database in WAL mode, with one connection per thread.

    Writers of this process wait for one another on a lock rather than in SQLite, whose waiting
    goes by sleeping; other processes are waited for by SQLite, ten seconds at most. A transaction
    that has returned is on the disk (`synchronous=FULL`).

    Args:
        path: the file; its folder must exist.
        create: make a new store where there is none.

    Raises:
        StoreError: if there is no such file, it is not a store, or of another version.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False):
        self.path = Path(path)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._jobs: deque[_Job] = deque()
        self._opened: list[sqlite3.Connection] = []
        if self.path.is_dir():
            raise StoreError(f"store must name a file, {self.path} is a directory.")
        if not self.path.exists():
            if not create:
                raise StoreError(
                    f"store: there is no {self.path}; `dpo-keras annotate` makes a store."
                )
            if not self.path.parent.is_dir():
                raise StoreError(
                    f"store: the folder of {self.path} does not exist; create it first."
                )
        with self._explained():
            connection = self._connection()
            if create:
                # Both pragmas and the schema in one transaction: a killed start leaves nothing.
                connection.execute("BEGIN IMMEDIATE")
                try:
                    if not _tables(connection):
                        self._create(connection)
                    connection.execute("COMMIT")
                except BaseException:
                    connection.execute("ROLLBACK")
                    raise
        self._check()

    def _create(self, connection: sqlite3.Connection) -> None:
        schema = importlib.resources.files(__package__).joinpath("schema.sql").read_text("utf-8")
        for statement in _statements(schema):
            connection.execute(statement)
        connection.execute("INSERT INTO meta VALUES ('id', ?)", (secrets.token_hex(6),))
        connection.execute(f"PRAGMA user_version={VERSION}")
        connection.execute(f"PRAGMA application_id={APPLICATION}")

    def _check(self) -> None:
        with self._explained():
            connection = self._connection()
            application = connection.execute("PRAGMA application_id").fetchone()[0]
            version = connection.execute("PRAGMA user_version").fetchone()[0]
        if application != APPLICATION:
            raise StoreError(
                f"store: {self.path} is a database, but not a feedback store; give another path."
            )
        if version != VERSION:
            which = "a newer" if version > VERSION else "an older"
            raise StoreError(
                f"store: {self.path} is of version {version}, this dpo_keras reads version "
                f"{VERSION}; use {which} dpo_keras, or start a new store. Nothing was changed."
            )

    def _connection(self) -> sqlite3.Connection:
        connection = getattr(self._local, "connection", None)
        if connection is None:
            try:
                connection = self._connect(str(self.path))
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
            except sqlite3.OperationalError as error:
                # A round on read-only media can still be reported on. SQLite reads a WAL database
                # there only where it is told that nobody writes, which an empty log shows.
                log = Path(f"{self.path}-wal")
                if "readonly" not in str(error) or (log.exists() and log.stat().st_size):
                    raise
                place = self.path.resolve().as_uri()
                connection = self._connect(f"{place}?mode=ro&immutable=1", uri=True)
            self._local.connection = connection
            self._opened.append(connection)  # atomic; the lock may be held here
        return connection

    def _connect(self, place: str, **options: Any) -> sqlite3.Connection:
        # Threads of a pool end without a word; close() may run in another thread.
        connection = sqlite3.connect(
            place, timeout=10, isolation_level=None, check_same_thread=False, **options
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def rows(self, query: str, values: Any = ()) -> list[sqlite3.Row]:
        """Runs a query.

        Args:
            query: SQL that reads.
            values: for its placeholders.

        Raises:
            StoreError: the file cannot be read.
        """
        with self._explained():
            return self._connection().execute(query, values).fetchall()

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One transaction: all of it is on the disk on leaving, or none of it.

        Yields:
            The connection.

        Raises:
            StoreError: the disk is full, the file read-only, or another process writes too long.
        """
        with self._explained():
            connection = self._connection()
            with self._lock:
                connection.execute("PRAGMA synchronous=FULL")
                connection.execute("BEGIN IMMEDIATE")
                try:
                    yield connection
                    connection.execute("COMMIT")
                except BaseException:
                    if connection.in_transaction:
                        connection.execute("ROLLBACK")
                    raise

    def batched(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = True) -> T:
        """Runs work in a transaction that it may share with what other threads wait to write.

        A disk takes milliseconds to confirm; twenty who judge at once wait for it once, together.
        Work that fails is taken back alone.

        Args:
            work: called with the connection, once.
            durable: wait for the disk; without, a power failure (not a killed process) may take
                the transaction back, whole.

        Returns:
            What the work returned; it is on the disk.

        Raises:
            StoreError: as in `writing`.
        """
        job = _Job(work, durable)
        self._jobs.append(job)
        while not job.done.is_set():
            # Whoever gets the lock writes for all who wait.
            if self._lock.acquire(blocking=False):
                try:
                    self._run_jobs()
                finally:
                    self._lock.release()
            else:
                job.done.wait(0.002)
        if job.error is not None:
            raise job.error
        return job.result

    def _run_jobs(self) -> None:
        jobs: list[_Job] = []
        while self._jobs and len(jobs) < 64:
            jobs.append(self._jobs.popleft())
        if not jobs:
            return
        try:
            with self._explained():
                self._run_together(jobs)
        except BaseException as error:
            for job in jobs:
                job.error = error
        for job in jobs:
            job.done.set()

    def _run_together(self, jobs: list[_Job]) -> None:
        connection = self._connection()
        durable = any(job.durable for job in jobs)
        connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
        connection.execute("BEGIN IMMEDIATE")
        try:
            for job in jobs:
                connection.execute("SAVEPOINT job")
                try:
                    job.result = job.work(connection)
                except sqlite3.OperationalError:
                    raise  # a full disk and the like: the transaction is gone for all
                except Exception as error:
                    connection.execute("ROLLBACK TO job")
                    job.error = error
                connection.execute("RELEASE job")
            connection.execute("COMMIT")
        except BaseException:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            raise

    def close(self) -> None:
        """Closes the connections of all threads."""
        with self._lock:
            for connection in self._opened:
                connection.close()
            self._opened.clear()
        self._local = threading.local()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            raise StoreError(_explanation(self.path, error)) from error


def _explanation(path: Path, error: sqlite3.DatabaseError) -> str:
    text = str(error)
    for words, advice in _ADVICE.items():
        if words in text:
            return f"store: {path} {advice}"
    return f"store: {path} cannot be used: {text}."


_ADVICE = {
    "readonly": "is read-only: nothing was saved. Give the user who runs this the right to write "
    "the file and its folder.",
    "is full": "could not grow, the disk is full: nothing was saved. Make room and send it again.",
    "disk I/O": "could not be written (disk I/O error): nothing was saved. Look at the disk and "
    "send it again.",
    "is locked": "is in use by another process that did not finish: nothing was saved. End that "
    "process, or send it again.",
    "not a database": "is not a feedback store, but some other file; give another path.",
    "malformed": "is damaged; take a copy of it, then try `sqlite3 FILE .recover`.",
    "unable to open": "cannot be opened; look at the rights of the file and its folder.",
}


def _tables(connection: sqlite3.Connection) -> int:
    return connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]


def _statements(script: str) -> Iterator[str]:
    # executescript() would commit before it begins.
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""
