"""Who judges: annotators, their link tokens and browser sessions, of which only hashes are kept."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
from dataclasses import dataclass

from dpo_keras.errors import InputError
from dpo_keras.feedback.database import Database

DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Annotator:
    """A person with a token.

    Args:
        id: the row.
        name: as reports and exported pairs call them.
        group: kept in exported pairs.
        admin: may see the administrator's page.
    """

    id: int
    name: str
    group: str | None = None
    admin: bool = False


def token_hash(token: str) -> str:
    """What is stored of a token; with 192 random bits in it, one round of SHA-256 is enough.

    Args:
        token: the secret.
    """
    return hashlib.sha256(token.encode()).hexdigest()


def add_annotator(
    database: Database, now: float, name: str, group: str | None, admin: bool, days: float
) -> tuple[Annotator, str]:
    """Adds a person, or gives one a new token. See `Store.add_annotator`."""
    if not name.strip() or len(name) > 100:
        raise InputError(f"annotator names must have 1 to 100 characters, got {name!r}.")
    token = secrets.token_urlsafe(24)
    with database.writing() as connection:
        connection.execute(
            "INSERT INTO annotators (name, grp, admin, token_hash, expires) "
            "VALUES (?, ?, ?, ?, ?) ON CONFLICT (name) DO UPDATE SET "
            "grp = coalesce(excluded.grp, grp), admin = excluded.admin, "
            "token_hash = excluded.token_hash, expires = excluded.expires",
            (name, group, admin, token_hash(token), now + days * DAY),
        )
        row = connection.execute("SELECT * FROM annotators WHERE name = ?", (name,)).fetchone()
    return annotator(row), token


def start_session(
    database: Database, now: float, token: str, days: float
) -> tuple[Annotator, str] | None:
    """Turns a link's token into a session. See `Store.start_session`."""
    rows = database.rows(
        "SELECT * FROM annotators WHERE token_hash = ? AND expires > ?", (token_hash(token), now)
    )
    if not rows:
        return None
    secret = secrets.token_urlsafe(24)
    with database.writing() as connection:
        connection.execute("DELETE FROM sessions WHERE expires < ?", (now,))
        connection.execute(
            "INSERT INTO sessions VALUES (?, ?, ?)",
            (token_hash(secret), rows[0]["id"], now + days * DAY),
        )
    return annotator(rows[0]), secret


def session(database: Database, now: float, secret: str) -> Annotator | None:
    """Who a session belongs to. See `Store.session`."""
    rows = database.rows(
        "SELECT a.* FROM sessions s JOIN annotators a ON a.id = s.annotator "
        "WHERE s.hash = ? AND s.expires > ?",
        (token_hash(secret), now),
    )
    return annotator(rows[0]) if rows else None


def annotator(row: sqlite3.Row) -> Annotator:
    """A row of the table as an object."""
    return Annotator(row["id"], row["name"], row["grp"], bool(row["admin"]))
