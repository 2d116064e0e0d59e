"""The SQLite file of a round: versions, transactions, and errors that say what to do."""

import contextlib
import hashlib
import importlib.resources
import os
import secrets
import sqlite3
import threading
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from dpo_keras.errors import InputError, InputProblem

T = TypeVar("T")

VERSION = 1
APPLICATION = 0x44504F46  # "DPOF" tells a feedback store apart from another program's database
MAX_JOBS = 64  # jobs that share one transaction

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


class StoreError(InputError):
    """The feedback store cannot be read or written; the message says what to do."""


class _Job:
    """A write that waits for its transaction, and its outcome."""

    def __init__(self, work: Callable[[sqlite3.Connection], object], durable: bool):
        self.work, self.durable = work, durable
        self.done = threading.Event()
        self.result: Any = None
        self.error: BaseException | None = None


class Database:
    """A SQLite database in WAL mode, with one connection per thread.

    Writers of this process wait on a lock, because SQLite waits by sleeping; it does so for other
    processes, ten seconds at most.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False):
        self.path = Path(path)
        self._local = threading.local()
        self._lock = threading.Lock()
        self._jobs: deque[_Job] = deque()
        self._opened: list[sqlite3.Connection] = []
        self._check_path(create)
        if create:
            # Both pragmas and the schema in one transaction: a killed start leaves nothing.
            with self.writing() as connection:
                if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                    _create(connection)
        self._check_version()

    def _check_path(self, create: bool) -> None:
        if self.path.is_dir():
            raise StoreError(InputProblem("store", f"must name a file; {self.path} is a directory"))
        if not self.path.exists() and not create:
            rule = f"must name an existing file; there is no {self.path}"
            raise StoreError(InputProblem("store", rule, hint="`dpo-keras annotate` makes one."))
        if not self.path.parent.is_dir():
            rule = f"must be in an existing folder; the folder of {self.path} does not exist"
            raise StoreError(InputProblem("store", rule))

    def _check_version(self) -> None:
        application = self.rows("PRAGMA application_id")[0][0]
        version = self.rows("PRAGMA user_version")[0][0]
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
        """Return this thread's connection; open it on first use."""
        connection = getattr(self._local, "connection", None)
        if connection is None:
            try:
                connection = self._connect(str(self.path))
                connection.execute("PRAGMA journal_mode=WAL")
                connection.execute("PRAGMA synchronous=FULL")
            except sqlite3.OperationalError as error:
                # A round on read-only media can still be reported on. SQLite reads a WAL database
                # there only if it is told that nobody writes, which an empty log shows.
                log = Path(f"{self.path}-wal")
                if "readonly" not in str(error) or (log.exists() and log.stat().st_size):
                    raise
                address = self.path.resolve().as_uri()
                connection = self._connect(f"{address}?mode=ro&immutable=1", uri=True)
            self._local.connection = connection
            self._opened.append(connection)  # atomic; the lock may be held here
        return connection

    def _connect(self, address: str, uri: bool = False) -> sqlite3.Connection:
        # Pool threads end without notice, so close() may run in another thread.
        connection = sqlite3.connect(
            address, timeout=10, isolation_level=None, check_same_thread=False, uri=uri
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    def rows(self, query: str, values: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        """Run a query that reads; raise a StoreError if the file cannot be read."""
        with self._explained_errors():
            return self._connection().execute(query, values).fetchall()

    @contextlib.contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """Run a block as one transaction: all of it is on the disk afterwards, or none of it."""
        with self._explained_errors():
            connection = self._connection()
            with self._lock, _transaction(connection, durable=True):
                yield connection

    def batched(self, work: Callable[[sqlite3.Connection], T], *, durable: bool = True) -> T:
        """Run work in a transaction that it may share with the waiting work of other threads.

        A disk takes milliseconds to confirm; twenty people who judge at once wait for it together.
        Work that fails is rolled back alone. Without `durable` nobody waits for the disk, and a
        power failure (not a killed process) may take the whole transaction back.
        """
        job = _Job(work, durable)
        self._jobs.append(job)
        while not job.done.is_set():
            # The thread that gets the lock writes for all that wait.
            if self._lock.acquire(blocking=False):
                try:
                    self._run_waiting_jobs()
                finally:
                    self._lock.release()
            else:
                job.done.wait(0.002)
        if job.error is not None:
            raise job.error
        return job.result

    def _run_waiting_jobs(self) -> None:
        jobs: list[_Job] = []
        while self._jobs and len(jobs) < MAX_JOBS:
            jobs.append(self._jobs.popleft())
        if not jobs:
            return
        try:
            with self._explained_errors():
                self._run_together(jobs)
        except BaseException as error:
            for job in jobs:
                job.error = error
        for job in jobs:
            job.done.set()

    def _run_together(self, jobs: list[_Job]) -> None:
        connection = self._connection()
        with _transaction(connection, durable=any(job.durable for job in jobs)):
            for job in jobs:
                connection.execute("SAVEPOINT job")
                try:
                    job.result = job.work(connection)
                except sqlite3.OperationalError:
                    raise  # such as a full disk: the transaction is lost for all jobs
                except Exception as error:
                    connection.execute("ROLLBACK TO job")
                    job.error = error
                connection.execute("RELEASE job")

    def close(self) -> None:
        """Close the connections of all threads."""
        with self._lock:
            for connection in self._opened:
                connection.close()
            self._opened.clear()
        self._local = threading.local()

    @contextlib.contextmanager
    def _explained_errors(self) -> Iterator[None]:
        """Turn SQLite's errors into StoreErrors; a broken constraint stays as it is."""
        try:
            yield
        except sqlite3.IntegrityError:
            raise
        except sqlite3.DatabaseError as error:
            text = str(error)
            default = f"cannot be used: {text}."
            advice = next((found for words, found in _ADVICE.items() if words in text), default)
            raise StoreError(f"store: {self.path} {advice}") from error


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, durable: bool) -> Iterator[None]:
    connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _create(connection: sqlite3.Connection) -> None:
    schema = importlib.resources.files(__package__).joinpath("schema.sql").read_text("utf-8")
    statement = ""
    for line in schema.splitlines(keepends=True):  # executescript() would commit before it begins
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""
    connection.execute("INSERT INTO meta VALUES ('id', ?)", (secrets.token_hex(6),))
    connection.execute(f"PRAGMA user_version={VERSION}")
    connection.execute(f"PRAGMA application_id={APPLICATION}")


def sha256(text: str) -> str:
    """Return the SHA-256 of a text in hexadecimal digits."""
    return hashlib.sha256(text.encode()).hexdigest()


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text holds half of a character, which JSON can spell but no file holds."""
    return any("\ud800" <= character <= "\udfff" for character in text)
