"""The SQLite file of a round: versions, transactions, and errors that say what to do."""

import contextlib
import hashlib
import os
import queue
import sqlite3
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.schema import (
    APPLICATION,
    VERSION,
    create_schema,
    show_as_version_2,
    upgrade_schema,
)
from dpo_keras.utils.atomic_files import replaced

T = TypeVar("T")

BUSY_SECONDS = 10  # to wait for other processes
READERS = 4  # connections that read; each holds up to three files open

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


class Job:
    """Work that may share its transaction with others, and its outcome.

    Where no job of a transaction is `durable`, nobody waits for the disk, and a power failure (not
    a killed process) may take the transaction back.
    """

    def __init__(self, work: Callable[[sqlite3.Connection], Any], *, durable: bool = True):
        self.work, self.durable = work, durable
        self.result: Any = None
        self.error: BaseException | None = None


class Database:
    """A SQLite database in WAL mode: one connection that writes, and a few that read.

    However many threads use it, the number of open files stays the same. Writers of this process
    wait on a lock, because SQLite waits by sleeping; it does so for other processes, ten seconds at
    most.
    """

    def __init__(self, path: str | os.PathLike[str], *, create: bool = False):
        self.path = Path(path)
        self._inside = threading.local()  # `connection` of the transaction that a thread is in
        self._lock = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        self._readers: queue.LifoQueue[sqlite3.Connection | None] = queue.LifoQueue()
        for _ in range(READERS):
            self._readers.put(None)  # opened when it is needed
        self._old = False  # of version 1, and read-only
        self._check_path(create)
        try:
            if create:
                # Both pragmas and the schema in one transaction: a killed start leaves nothing.
                with self.writing() as connection:
                    if not connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]:
                        create_schema(connection)
            self._check_version()
            self._upgrade()
        except BaseException:
            self.close()
            raise

    def _check_path(self, create: bool) -> None:
        if self.path.exists() and not self.path.is_file():
            what = "a directory" if self.path.is_dir() else "no file"
            raise StoreError(InputProblem("store", f"must name a file; {self.path} is {what}"))
        if not self.path.exists() and not create:
            rule = f"must name an existing file; there is no {self.path}"
            raise StoreError(InputProblem("store", rule, hint="`dpo-keras annotate` makes one."))
        if not self.path.parent.is_dir():
            rule = f"must be in an existing folder; the folder of {self.path} does not exist"
            raise StoreError(InputProblem("store", rule))
        try:
            if not self.path.exists():
                # What people wrote is for the owner's eyes. SQLite gives its log the same mode.
                os.close(os.open(self.path, os.O_CREAT | os.O_WRONLY, 0o600))
            self._check_owner()
        except OSError as error:
            raise StoreError(f"store: {self.path} {_ADVICE['unable to open']}") from error

    def _check_owner(self) -> None:
        """Refuse another program's file by its header, before SQLite opens and changes it."""
        with self.path.open("rb") as file:
            header = file.read(108)
        if header and not header.startswith(b"SQLite format 3\0"):
            raise StoreError(f"store: {self.path} {_ADVICE['not a database']}")
        application, tables = int.from_bytes(header[68:72], "big"), any(header[103:105])
        log = Path(f"{self.path}-wal")
        if application == 0 and log.exists() and log.stat().st_size:
            # What the log says holds.
            with (
                explained_errors(self.path),
                contextlib.closing(self._connect("mode=ro")) as connection,
            ):
                application = connection.execute("PRAGMA application_id").fetchone()[0]
                tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0] > 0
        if application != APPLICATION and (application or tables):
            raise StoreError(
                f"store: {self.path} is a database, but not a feedback store; give another path. "
                "Nothing was changed."
            )

    def _check_version(self) -> None:
        application = self.rows("PRAGMA application_id")[0][0]
        version = self.rows("PRAGMA user_version")[0][0]
        if application != APPLICATION:
            raise StoreError(f"store: {self.path} holds nothing; `dpo-keras annotate` fills it.")
        if version not in (1, VERSION):
            which = "a newer" if version > VERSION else "an older"
            raise StoreError(
                f"store: {self.path} is of version {version}, this dpo_keras reads version "
                f"{VERSION}; use {which} dpo_keras, or start a new store. Nothing was changed."
            )

    def _upgrade(self) -> None:
        """Bring a store of version 1 to version 2; one that can only be read stays as it is."""
        if self.rows("PRAGMA user_version")[0][0] == VERSION:
            return
        try:
            with self.writing() as connection:
                upgrade_schema(connection)
        except StoreError as error:
            if _ADVICE["readonly"] not in str(error):
                raise
            self._old = True
            self._close_readers()

    def _open(self) -> sqlite3.Connection:
        connection = self._connect("mode=rw")
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            # In pages, 80 MB. The server moves the log earlier, while nobody waits for it.
            connection.execute("PRAGMA wal_autocheckpoint=20000")
        except sqlite3.OperationalError as error:
            connection.close()
            # A round on read-only media can still be reported on. SQLite reads a WAL database
            # there only if it is told that nobody writes, which an empty log shows.
            log = Path(f"{self.path}-wal")
            if "readonly" not in str(error) or (log.exists() and log.stat().st_size):
                raise
            connection = self._connect("mode=ro&immutable=1")
        return connection

    def _connect(self, options: str) -> sqlite3.Connection:
        address = f"{self.path.absolute().as_uri()}?{options}"
        # Connections go from thread to thread, one at a time.
        connection = sqlite3.connect(
            address, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False, uri=True
        )
        connection.row_factory = sqlite3.Row
        connection.execute("PRAGMA foreign_keys=ON")
        return connection

    @contextlib.contextmanager
    def _reader(self) -> Iterator[sqlite3.Connection]:
        connection = self._readers.get()  # waits where all are in use
        try:
            if connection is None:
                connection = self._open()
                if self._old:
                    show_as_version_2(connection)
                connection.execute("PRAGMA query_only=ON")
            yield connection
        finally:
            self._readers.put(connection)

    def rows(self, query: str, values: tuple[object, ...] = ()) -> list[sqlite3.Row]:
        """Run a query that reads; raise a StoreError if the file cannot be read.

        Within a transaction of this thread it sees what the transaction has written.
        """
        inside = getattr(self._inside, "connection", None)
        if inside is not None:
            return inside.execute(query, values).fetchall()
        with explained_errors(self.path), self._reader() as connection:
            return connection.execute(query, values).fetchall()

    @contextlib.contextmanager
    def writing(self, *, durable: bool = True) -> Iterator[sqlite3.Connection]:
        """Run a block as one transaction: all of it is on the disk afterwards, or none of it."""
        if self._old:
            raise StoreError(f"store: {self.path} {_ADVICE['readonly']}")
        with explained_errors(self.path), self._lock:
            if self._writer is None:
                self._writer = self._open()
            with _transaction(self._writer, durable):
                self._inside.connection = self._writer
                try:
                    yield self._writer
                finally:
                    self._inside.connection = None

    def batched(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Run work as one transaction, or as a part of the one that this thread is in."""
        inside = getattr(self._inside, "connection", None)
        if inside is not None:
            return work(inside)
        with self.writing() as connection:
            return work(connection)

    def run_together(self, jobs: Sequence[Job]) -> None:
        """Run jobs in one transaction, which the disk confirms once for all of them.

        A job that fails is rolled back alone. An error of the disk is that of every job.
        """
        try:
            with self.writing(durable=any(job.durable for job in jobs)) as connection:
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
        except Exception as error:
            for job in jobs:
                job.error = error

    def checkpoint(self, *, truncate: bool = True) -> None:
        """Move the log into the file, so that a copy of the file alone holds all of it.

        Where others are reading, the rest stays for a later time. Without `truncate` the log's file
        is kept to be written over, which is faster than to let a new one grow.
        """
        with self._reader() as connection:  # most of it, while others write
            _move_log(connection, "PASSIVE")
        with self._lock:
            if self._writer is not None:
                _move_log(self._writer, "TRUNCATE" if truncate else "PASSIVE")

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy a database that may be in use, as it is at one moment, to a file of its own.

        The file is whole or absent. Raises StoreError if it cannot be written.
        """
        try:
            with replaced(path) as partial, explained_errors(path):
                os.close(os.open(partial, os.O_CREAT | os.O_WRONLY, 0o600))
                with contextlib.closing(sqlite3.connect(partial)) as copy:
                    with self._reader() as connection:
                        connection.backup(copy)
                    # A copy in one file, without a log beside it, may be moved as it is.
                    copy.execute("PRAGMA journal_mode=DELETE")
                    found = copy.execute("PRAGMA quick_check").fetchone()[0]
                if found != "ok":
                    raise StoreError(f"store: {self.path} {_ADVICE['malformed']}")
        except OSError as error:
            raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from error

    def close(self) -> None:
        """Move the log into the file and close all connections."""
        self.checkpoint()
        with self._lock:
            if self._writer is not None:
                self._writer.close()
            self._writer = None
        self._close_readers()

    def _close_readers(self) -> None:
        for _ in range(READERS):  # waits for those in use
            connection = self._readers.get()
            if connection is not None:
                connection.close()
        for _ in range(READERS):
            self._readers.put(None)


@contextlib.contextmanager
def explained_errors(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn SQLite's errors into StoreErrors; a broken constraint stays as it is."""
    try:
        yield
    except sqlite3.IntegrityError:
        raise
    except sqlite3.DatabaseError as error:
        text = str(error)
        default = f"cannot be used: {text}."
        advice = next((found for words, found in _ADVICE.items() if words in text), default)
        raise StoreError(f"store: {path} {advice}") from error


@contextlib.contextmanager
def _transaction(connection: sqlite3.Connection, durable: bool) -> Iterator[None]:
    # FULL: the commit waits until the disk has the log.
    connection.execute(f"PRAGMA synchronous={'FULL' if durable else 'NORMAL'}")
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _move_log(connection: sqlite3.Connection, how: str) -> None:
    connection.execute("PRAGMA busy_timeout=100")  # others read for seconds; writers must not wait
    with contextlib.suppress(sqlite3.OperationalError):
        connection.execute(f"PRAGMA wal_checkpoint({how})").fetchall()
    connection.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000}")


def sha256(text: str) -> str:
    """Return the SHA-256 of any text, lone surrogates included, in hexadecimal digits."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def has_lone_surrogate(text: str) -> bool:
    """Return whether a text holds half of a character, which JSON can spell but no file holds."""
    return any("\ud800" <= character <= "\udfff" for character in text)
