"""Pairs that are made while a person waits: they are added to the store and leased at once."""

import sqlite3

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback import assignment
from dpo_keras.feedback.assignment import Presentation, take_place
from dpo_keras.feedback.candidates import (
    Candidates,
    add_candidates,
    prompt_content,
    stored_prompt,
)
from dpo_keras.feedback.database import sha256
from dpo_keras.feedback.store import Store
from dpo_keras.utils import JSON

_PAIR_OF = """
SELECT pairs.id, pairs.taken, pairs.gold, a.content = :left AS first_on_left FROM pairs
JOIN prompts q ON q.id = pairs.prompt
JOIN responses a ON a.id = pairs.first JOIN responses b ON b.id = pairs.second
WHERE q.hash = :prompt AND ((a.content = :left AND b.content = :right)
  OR (a.content = :right AND b.content = :left))
"""


def present(store: Store, annotator: int, candidates: Candidates) -> int | None:
    """Add two responses that a person sees, the left one first, and lease the pair to them.

    Args:
        store: where the pair goes. It is on the disk on return.
        annotator: the id of the person.
        candidates: a prompt and its two responses.

    Returns:
        The presentation, which a judgement names. None where this person has judged the pair, or
        others have as often as it shall be judged.

    Raises:
        InputError: there are not two responses, or they are the same, or empty.

    Example:
        >>> import tempfile
        >>> from dpo_keras.feedback import Response, open_store
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = open_store(f"{folder.name}/feedback.sqlite", create=True)
        >>> ann, token = store.add_annotator("ann")
        >>> pair = Candidates("2 + 2 =", (Response(" 4"), Response(" 5")))
        >>> shown = present(store, ann.id, pair)
        >>> receipt = store.submit(ann.id, shown, "left", key="one")
        >>> chosen(store, ann.id, shown)
        ('2 + 2 =', ' 4')
        >>> store.close(); folder.cleanup()
    """
    texts = [response.text for response in candidates.usable()]
    if len(candidates.responses) != 2 or len(texts) != 2:
        rule = "must be two different ones that are not empty"
        raise InputError(InputProblem("responses", rule))
    left, right = texts
    prompt = sha256(prompt_content(candidates))

    def add(connection: sqlite3.Connection) -> int | None:
        add_candidates(connection, store.chance.random, [candidates])
        return _lease(
            connection, store, annotator, {"prompt": prompt, "left": left, "right": right}
        )

    return store.database.batched(add)


def _lease(
    connection: sqlite3.Connection, store: Store, annotator: int, shown: dict[str, str]
) -> int | None:
    pair = connection.execute(_PAIR_OF, shown).fetchone()
    before = connection.execute(
        "SELECT state FROM presentations WHERE pair = ? AND annotator = ? AND repeat = 0",
        (pair["id"], annotator),
    ).fetchone()
    state = None if before is None else before["state"]
    if state in ("judged", "skipped"):
        return None
    if state != "leased":
        if pair["gold"] is None and pair["taken"] >= store.settings.overlap:
            return None
        take_place(connection, pair["id"], annotator, 1)
    now = store.clock()
    # Nothing was judged yet, so what is on the screen now may have other sides than before.
    found = connection.execute(
        "INSERT INTO presentations (pair, annotator, repeat, first_on_left, state, shown, expires) "
        "VALUES (?, ?, 0, ?, 'leased', ?, ?) ON CONFLICT (pair, annotator, repeat) DO UPDATE SET "
        "state = 'leased', first_on_left = excluded.first_on_left, shown = excluded.shown, "
        "expires = excluded.expires RETURNING id",
        (pair["id"], annotator, pair["first_on_left"], now, now + store.settings.lease_seconds),
    ).fetchone()
    return int(found["id"])


def held(store: Store, annotator: int, count: int = 1) -> list[Presentation]:
    """Renew a person's leases, and return up to `count` of them, the oldest first."""
    return store.database.batched(
        lambda connection: assignment.held(
            connection, store.settings, store.clock(), annotator, count
        )
    )


def chosen(store: Store, annotator: int, presentation: int) -> tuple[JSON, str] | None:
    """Return the prompt and the response that a person preferred; None if there is none.

    Prompts with images count as none: a conversation cannot go on from them.
    """
    rows = store.database.rows(
        "SELECT q.content AS prompt, r.content AS response FROM current c "
        "JOIN presentations p ON p.id = c.presentation JOIN pairs ON pairs.id = p.pair "
        "JOIN prompts q ON q.id = pairs.prompt JOIN responses r ON r.id = c.winner "
        "WHERE c.presentation = ? AND p.annotator = ?",
        (presentation, annotator),
    )
    prompt, images = stored_prompt(rows[0]["prompt"]) if rows else (None, ())
    return (prompt, rows[0]["response"]) if rows and not images else None
