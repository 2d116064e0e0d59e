"""What the page asks for, as functions of the store: no HTTP here."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from dpo_keras.feedback.annotators import Annotator
from dpo_keras.feedback.assignment import Presentation
from dpo_keras.feedback.markup import render
from dpo_keras.feedback.store import Store

AHEAD = 3  # presentations that a page may hold at once

_ROLES = {"system": "Instructions", "user": "Person", "assistant": "Assistant", "tool": "Tool"}


class Api:
    """Answers of the server, ready for JSON.

    Args:
        store: the round.
        guidelines: Markdown that the page shows to annotators.
        assess: makes the administrator's figures of agreement.
    """

    def __init__(
        self,
        store: Store,
        guidelines: str = "",
        assess: Callable[[Store], Mapping[str, Any]] | None = None,
    ):
        self.store = store
        self.guidelines = guidelines
        self.assess = assess
        self._progress: tuple[float, int, int] = (0.0, 0, 0)
        self._agreement: tuple[Any, Mapping[str, Any]] = (None, {})
        self._assessing = threading.Lock()

    def me(self, person: Annotator) -> dict[str, Any]:
        """Who is signed in, and what the round asks for."""
        return {
            "name": person.name,
            "admin": person.admin,
            "guidelines": render(self.guidelines),
        }

    def next(self, person: Annotator, count: int, known: frozenset[int]) -> dict[str, Any]:
        """Presentations for a person; those that the page knows come without their texts."""
        shown = self.store.next(person.id, max(1, min(AHEAD, count)))
        return {
            "presentations": [
                {"id": one.id} if one.id in known else presentation(one) for one in shown
            ],
            "waiting": not shown and self.store.may_return(person.id),
            "own": self.store.done_by(person.id),
            **self._state(person),
        }

    def submit(self, person: Annotator, body: Mapping[str, Any]) -> dict[str, Any]:
        """Records a judgement."""
        receipt = self.store.submit(
            person.id,
            body.get("presentation"),  # type: ignore[arg-type]  # the store checks every type
            body.get("choice"),  # type: ignore[arg-type]
            key=body.get("key"),  # type: ignore[arg-type]
            strength=body.get("strength"),
            reason=body.get("reason"),
            seconds=body.get("seconds"),
        )
        return {"judgement": receipt.judgement, "again": receipt.again, **self._state(person)}

    def undo(self, person: Annotator, body: Mapping[str, Any]) -> dict[str, Any]:
        """Takes a judgement back."""
        receipt = self.store.undo(
            person.id,
            body.get("presentation"),  # type: ignore[arg-type]
            key=body.get("key"),  # type: ignore[arg-type]
        )
        return {"judgement": receipt.judgement, **self._state(person)}

    def overview(self) -> dict[str, Any]:
        """What the administrator sees."""
        rows = self.store.database.rows
        progress = self.store.progress()
        last = rows("SELECT max(id) FROM judgements")[0][0]
        people = rows(
            "SELECT a.name, a.grp AS 'group', sum(p.state = 'judged') AS judged, "
            "sum(p.state = 'skipped') AS skipped, sum(p.state = 'leased') AS held "
            "FROM annotators a LEFT JOIN presentations p ON p.annotator = a.id "
            "GROUP BY a.id HAVING NOT a.admin OR judged > 0 ORDER BY a.id"
        )
        hours = rows(
            "SELECT CAST(at / 3600 AS INTEGER) AS hour, count(*) FROM current "
            "WHERE at > ? GROUP BY hour ORDER BY hour",
            (self.store.clock() - 48 * 3600,),
        )
        return {
            "judged": progress.judged,
            "wanted": progress.wanted,
            "now": self.store.clock(),
            "people": [{key: row[key] or 0 if key != "group" else row[key] for key in row.keys()}  # noqa: SIM118
                       for row in people],
            "hours": [[row[0] * 3600, row[1]] for row in hours],
            "agreement": self._agreed(last),
        }  # fmt: skip

    def _agreed(self, last: int | None) -> Mapping[str, Any]:
        # One computation at a time: the page asks again and again.
        if self.assess is None or last is None:
            return {}
        with self._assessing:
            if self._agreement[0] != last:
                self._agreement = (last, self.assess(self.store))
            return self._agreement[1]

    def _state(self, person: Annotator) -> dict[str, Any]:
        until, judged, wanted = self._progress
        began = time.monotonic()
        if began >= until:
            whole = self.store.progress()
            judged, wanted = whole.judged, whole.wanted
            # Counting a large round takes a while: at most a twentieth of the time goes there.
            now = time.monotonic()
            self._progress = (now + 20 * (now - began), judged, wanted)
        undoable = self.store.last_judged(person.id)
        return {"judged": judged, "wanted": wanted, "undoable": undoable}


def presentation(one: Presentation) -> dict[str, Any]:
    """A presentation as the page draws it.

    Args:
        one: from the store.
    """
    turns = [{"role": "user", "content": one.prompt}] if isinstance(one.prompt, str) else one.prompt
    return {
        "id": one.id,
        "prompt": [
            {
                "role": _ROLES.get(turn["role"], turn["role"]) if len(turns) > 1 else None,
                "body": render(turn["content"]),
            }
            for turn in turns
        ],
        "left": render(one.left),
        "right": render(one.right),
    }


def caller(secret: str) -> str:
    """A short name for a session, for counting its requests.

    Args:
        secret: of the session.
    """
    return hashlib.sha256(secret.encode()).hexdigest()[:16]
