"""The feedback store: pairs to judge, the annotators, and the log of their judgements."""

import json
import os
import random
import secrets
import sqlite3
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback import assignment, judgements
from dpo_keras.feedback.assignment import Presentation, Progress, Settings
from dpo_keras.feedback.candidates import Candidates, Imported, add_candidates, stored_prompt
from dpo_keras.feedback.database import Database, T, has_lone_surrogate, sha256
from dpo_keras.feedback.judgements import Receipt, Submission
from dpo_keras.preferences import Image

DAY = 86_400.0  # seconds


@dataclass(frozen=True, slots=True)
class Annotator:
    """A person, or a program, that judges."""

    id: int
    name: str  # unique; in reports and exported pairs
    group: str | None = None  # kept in exported pairs
    admin: bool = False  # may see the administrator's page
    judge: bool = False  # a program: see `dpo_keras.feedback.judges`


class Store:
    """A round of feedback in one SQLite file, shared by processes and threads; see `open_store`."""

    def __init__(
        self,
        database: Database,
        settings: Settings | None = None,
        *,
        clock: Callable[[], float] = time.time,
        chance: random.Random | None = None,
    ):
        self.database = database
        self.clock = clock
        self.chance = chance or random.SystemRandom()
        meta = {row["key"]: row["value"] for row in database.rows("SELECT key, value FROM meta")}
        self.id = meta["id"]
        # The settings belong to the round: every program that opens the file uses them.
        stored = Settings(**json.loads(meta["settings"])) if "settings" in meta else None
        self.settings = settings or stored or Settings()
        if settings is not None and settings != stored:
            text = json.dumps(asdict(settings))
            with database.writing() as connection:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('settings', ?)", (text,))

    def add(self, candidates: Iterable[Candidates]) -> Imported:
        """Add every two different responses of a prompt as a pair, or nothing on a StoreError."""
        with self.database.writing() as connection:
            return add_candidates(connection, self.chance, candidates)

    def next(self, annotator: int, count: int = 1) -> list[Presentation]:
        """Return up to `count` pairs to judge: those that the person holds, then new ones."""
        return self._batched(assignment.hand_out, self.chance, annotator, count)

    def _batched(self, work: Callable[..., T], *values: object) -> T:
        return self.database.batched(
            lambda connection: work(connection, self.settings, self.clock(), *values)
        )

    def image(self, annotator: int, presentation: int, number: int) -> Image | None:
        """Return an image of a prompt that a person was shown; None where there is none such."""
        found = self.database.rows(
            "SELECT q.content FROM presentations p JOIN pairs ON pairs.id = p.pair "
            "JOIN prompts q ON q.id = pairs.prompt WHERE p.id = ? AND p.annotator = ?",
            (presentation, annotator),
        )
        _, images = stored_prompt(found[0]["content"]) if found else (None, ())
        return images[number] if 0 <= number < len(images) else None

    def progress(self) -> Progress:
        """Return how far the round is, in judgements of people."""
        # Each count reads one index: the page asks again and again.
        judged, checks, pairs = self.database.rows(
            "SELECT (SELECT count(*) FROM presentations WHERE state = 'judged' AND repeat = 0) "
            "- (SELECT count(*) FROM annotators a JOIN presentations p ON p.annotator = a.id "
            "WHERE a.judge AND p.state = 'judged'), "
            "(SELECT count(*) FROM pairs JOIN presentations p ON p.pair = pairs.id "
            "JOIN annotators a ON a.id = p.annotator AND NOT a.judge "
            "WHERE pairs.gold IS NOT NULL AND p.state = 'judged' AND p.repeat = 0), "
            "(SELECT count(*) FROM pairs WHERE gold IS NULL)"
        )[0]
        return Progress(judged - checks, pairs * self.settings.overlap)

    def done_by(self, annotator: int) -> int:
        """Count the presentations that a person has judged or skipped."""
        return self.database.rows(
            "SELECT count(*) FROM presentations "
            "WHERE annotator = ? AND state IN ('judged', 'skipped')",
            (annotator,),
        )[0][0]

    def may_return(self, annotator: int) -> bool:
        """Return whether pairs that others hold may still come to this person."""
        found = self.database.rows(
            "SELECT 1 FROM presentations p JOIN pairs ON pairs.id = p.pair "
            "JOIN annotators a ON a.id = p.annotator AND NOT a.judge "
            "WHERE p.state = 'leased' AND p.annotator <> ?1 AND p.repeat = 0 "
            "AND pairs.gold IS NULL AND NOT EXISTS (SELECT 1 FROM presentations o "
            "WHERE o.pair = p.pair AND o.annotator = ?1 AND o.repeat = 0 "
            "AND o.state <> 'released') LIMIT 1",
            (annotator,),
        )
        return bool(found)

    def submit(
        self,
        annotator: int,
        presentation: int,
        choice: str,
        *,
        key: str,
        strength: int | None = None,
        reason: str | None = None,
        seconds: float | None = None,
        preference: float | None = None,
    ) -> Receipt:
        """Record a judgement, whose fields `Submission` describes. It is on the disk on return.

        Raises:
            InputError: naming every value that breaks a rule.
            Conflict: (an `InputError`) the pair was judged before, or others have finished it.
        """
        submission = Submission(presentation, choice, key, strength, reason, seconds, preference)
        return self._batched(judgements.submit, annotator, submission)

    def undo(self, annotator: int, presentation: int, *, key: str) -> Receipt:
        """Take a judgement back by an entry in the log, and lease the pair to its annotator again.

        The `key` is unique to this undo. Raises Conflict if there is no judgement to take back.
        """
        return self._batched(judgements.undo, annotator, presentation, key)

    def last_judged(self, annotator: int) -> int | None:
        """Return the presentation that this person would undo; None where there is none."""
        rows = self.database.rows(
            "SELECT id FROM presentations WHERE annotator = ? AND state IN ('judged', 'skipped') "
            "ORDER BY entry DESC LIMIT 1",
            (annotator,),
        )
        return rows[0]["id"] if rows else None

    def add_annotator(
        self,
        name: str,
        group: str | None = None,
        *,
        admin: bool = False,
        days: float = 30.0,
        end_sessions: bool = True,
    ) -> tuple[Annotator, str]:
        """Add a person, or give a known one a new token in place of the old one.

        A judge's name raises InputError.

        Args:
            name: 1 to 100 characters.
            group: None leaves the group as it was.
            admin: the person may see the administrator's page.
            days: how long the token can start sessions.
            end_sessions: sign the person out wherever an older token has signed them in.

        Returns:
            The person, and the token. Only its hash is stored.
        """
        _check_names(name, group)
        token = secrets.token_urlsafe(24)
        with self.database.writing() as connection:
            _check_kind(connection, name, judge=False)
            connection.execute(
                "INSERT INTO annotators (name, grp, admin, token_hash, expires) "
                "VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
                "grp = coalesce(excluded.grp, grp), admin = excluded.admin, "
                "token_hash = excluded.token_hash, expires = excluded.expires",
                # A token has 192 random bits, so one round of SHA-256 is enough.
                (name, group, admin, sha256(token), self.clock() + days * DAY),
            )
            row = connection.execute("SELECT * FROM annotators WHERE name = ?", (name,)).fetchone()
            if end_sessions:
                connection.execute("DELETE FROM sessions WHERE annotator = ?", (row["id"],))
        return _annotator(row), token

    def judge_annotator(self, name: str) -> int:
        """Return the id of the annotator that a judge is, who can never sign in.

        Raises InputError where the name is a person's.
        """
        _check_names(name, None)
        with self.database.writing() as connection:
            _check_kind(connection, name, judge=True)
            connection.execute(
                "INSERT INTO annotators (name, judge, token_hash, expires) VALUES (?, 1, ?, 0) "
                "ON CONFLICT (name) DO NOTHING",
                (name, sha256(secrets.token_urlsafe(24))),
            )
            query = "SELECT id FROM annotators WHERE name = ?"
            return int(connection.execute(query, (name,)).fetchone()["id"])

    def remove_annotator(self, name: str) -> None:
        """End a person's token and sessions, and give the pairs they hold to others.

        Their judgements stay in the store. Raises InputError if there is no such person.
        """
        with self.database.writing() as connection:
            row = connection.execute("SELECT id FROM annotators WHERE name = ?", (name,)).fetchone()
            if row is None:
                raise InputError(InputProblem("name", "must be that of a known annotator", name))
            connection.execute("UPDATE annotators SET expires = 0 WHERE id = ?", (row["id"],))
            connection.execute("DELETE FROM sessions WHERE annotator = ?", (row["id"],))
            assignment.release_all(connection, row["id"])

    def annotators(self) -> list[Annotator]:
        """Return all annotators in the order in which they were added."""
        return list(map(_annotator, self.database.rows("SELECT * FROM annotators ORDER BY id")))

    def names_with_links(self) -> list[str]:
        """Return the names of annotators whose link still works, the administrator's left out."""
        query = "SELECT name FROM annotators WHERE NOT admin AND expires > ? ORDER BY id"
        return [row["name"] for row in self.database.rows(query, (self.clock(),))]

    def start_session(self, token: str, days: float = 30.0) -> tuple[Annotator, str] | None:
        """Start a session with a link's token; None if the token is forged or has expired.

        The second value is the session's secret, of which only a hash is stored.
        """
        return self._batched(_start_session, token, days)

    def session(self, secret: str) -> Annotator | None:
        """Return whose session a secret belongs to; None if it is forged or has ended."""
        rows = self.database.rows(
            "SELECT a.* FROM sessions s JOIN annotators a ON a.id = s.annotator "
            "WHERE s.hash = ? AND s.expires > ?",
            (sha256(secret), self.clock()),
        )
        return _annotator(rows[0]) if rows else None

    def end_session(self, secret: str) -> None:
        """End a session: its secret is worth nothing afterwards."""
        self.database.batched(
            lambda connection: connection.execute(
                "DELETE FROM sessions WHERE hash = ?", (sha256(secret),)
            )
        )

    def backup(self, path: str | os.PathLike[str]) -> None:
        """Copy the store, which may be in use, to a file that holds all of it.

        The copy shows the store at one moment. Raises StoreError if it cannot be written.
        """
        self.database.backup(path)

    def close(self) -> None:
        """Close the file."""
        self.database.close()


def _annotator(row: sqlite3.Row) -> Annotator:
    return Annotator(row["id"], row["name"], row["grp"], bool(row["admin"]), bool(row["judge"]))


def _check_kind(connection: sqlite3.Connection, name: str, *, judge: bool) -> None:
    """Refuse a person's name to a judge, and a judge's to a person."""
    row = connection.execute("SELECT judge FROM annotators WHERE name = ?", (name,)).fetchone()
    if row is not None and bool(row["judge"]) != judge:
        rule = "must not be a person's" if judge else "must not be a judge's"
        hint = "Give the judge another name (judge.name)." if judge else "Give another name."
        raise InputError(InputProblem("name", rule, name, hint))


def _check_names(name: str, group: str | None) -> None:
    problems = []
    if not name.strip() or len(name) > 100:
        problems.append(InputProblem("annotator names", "must have 1 to 100 characters", name))
    for what, text in (("annotator names", name), ("groups of annotators", group or "")):
        if has_lone_surrogate(text):
            problems.append(InputProblem(what, "must be valid text (UTF-8)", text))
    if problems:
        raise InputError(problems)


def _start_session(
    connection: sqlite3.Connection, settings: Settings, now: float, token: str, days: float
) -> tuple[Annotator, str] | None:
    row = connection.execute(
        "SELECT * FROM annotators WHERE token_hash = ? AND expires > ?", (sha256(token), now)
    ).fetchone()
    if row is None:
        return None
    secret = secrets.token_urlsafe(24)
    connection.execute("DELETE FROM sessions WHERE expires < ?", (now,))
    connection.execute(
        "INSERT INTO sessions VALUES (?, ?, ?)", (sha256(secret), row["id"], now + days * DAY)
    )
    return _annotator(row), secret


def open_store(
    path: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    create: bool = False,
    clock: Callable[[], float] = time.time,
    chance: random.Random | None = None,
) -> Store:
    """Open a store.

    Args:
        path: the SQLite file.
        settings: how pairs are handed out; None keeps those of the round.
        create: make the file where there is none.
        clock: seconds since the epoch. Tests pass their own.
        chance: source of sides and order. Tests pass a seeded one.

    Raises:
        StoreError: the file is not a store, or has another version.

    Example:
        >>> import tempfile
        >>> from dpo_keras.feedback import Candidates, Response
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = open_store(f"{folder.name}/feedback.sqlite", create=True)
        >>> store.add([Candidates("2 + 2 =", (Response(" 4"), Response(" 5")))]).pairs
        1
        >>> ann, token = store.add_annotator("ann")
        >>> shown = store.next(ann.id)[0]
        >>> receipt = store.submit(ann.id, shown.id, "left", key="one")
        >>> store.next(ann.id)
        []
        >>> store.close(); folder.cleanup()
    """
    return Store(Database(path, create=create), settings, clock=clock, chance=chance)
