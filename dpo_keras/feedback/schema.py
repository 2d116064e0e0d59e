"""The tables of a store: made, upgraded from an earlier version, or shown as if they were."""

import importlib.resources
import secrets
import sqlite3

VERSION = 2
APPLICATION = 0x44504F46  # "DPOF" tells a feedback store apart from another program's database


def _text(name: str) -> str:
    return importlib.resources.files(__package__).joinpath(name).read_text("utf-8")


def _run(connection: sqlite3.Connection, script: str) -> None:
    statement = ""
    for line in script.splitlines(keepends=True):  # executescript() would commit before it begins
        statement += line
        if sqlite3.complete_statement(statement):
            connection.execute(statement)
            statement = ""


def show_as_version_2(connection: sqlite3.Connection) -> None:
    """Let queries find the columns of version 2 in a file of version 1 that cannot be changed."""
    schema = _text("schema.sql")
    view = schema[schema.index("CREATE VIEW current") :]
    for query in (
        "CREATE TEMP VIEW annotators AS SELECT *, 0 AS judge FROM main.annotators",
        "CREATE TEMP VIEW judgements AS SELECT *, NULL AS preference FROM main.judgements",
        view.replace("CREATE VIEW", "CREATE TEMP VIEW"),  # of the judgements above
    ):
        connection.execute(query)


def upgrade_schema(connection: sqlite3.Connection) -> None:
    """Bring a store of version 1 to version 2, in a transaction."""
    if connection.execute("PRAGMA user_version").fetchone()[0] == 1:  # no other process did
        _run(connection, _text("upgrades.sql"))
        connection.execute(f"PRAGMA user_version={VERSION}")


def create_schema(connection: sqlite3.Connection) -> None:
    """Make the tables of an empty file, in a transaction."""
    _run(connection, _text("schema.sql"))
    connection.execute("INSERT INTO meta VALUES ('id', ?)", (secrets.token_hex(6),))
    connection.execute(f"PRAGMA user_version={VERSION}")
    connection.execute(f"PRAGMA application_id={APPLICATION}")
