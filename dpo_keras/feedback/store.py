"""The feedback store: pairs to judge, who was shown what, and an append-only log of judgements."""

from __future__ import annotations

import json
import os
import random
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import Any

from dpo_keras.feedback import annotators as people
from dpo_keras.feedback import assignment, candidate_import, judgements
from dpo_keras.feedback.annotators import Annotator
from dpo_keras.feedback.assignment import Presentation, Progress, Settings
from dpo_keras.feedback.candidate_files import Candidates
from dpo_keras.feedback.candidate_import import Imported
from dpo_keras.feedback.database import Database
from dpo_keras.feedback.judgements import Receipt

__all__ = ["Imported", "Store", "open_store"]


class Store:
    """A round of feedback in one SQLite file.

    Several processes and threads may use one file at once.

    Args:
        database: the open file.
        settings: how pairs are handed out.
        clock: seconds since the epoch; tests have their own.
        chance: source of sides and order; tests seed it.

    Example:
        >>> import tempfile
        >>> from dpo_keras.feedback import Candidates, Response
        >>> folder = tempfile.TemporaryDirectory()
        >>> store = open_store(f"{folder.name}/feedback.sqlite", create=True)
        >>> round = [Candidates("2 + 2 =", (Response(" 4"), Response(" 5")))]
        >>> store.add(round).pairs
        1
        >>> ann, token = store.add_annotator("ann")
        >>> shown = store.next(ann.id)[0]
        >>> side = "left" if shown.left == " 4" else "right"
        >>> receipt = store.submit(ann.id, shown.id, side, key="one")
        >>> store.next(ann.id)
        []
        >>> store.close(); folder.cleanup()
    """

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
        kept = {row["key"]: row["value"] for row in database.rows("SELECT key, value FROM meta")}
        self.id = kept["id"]
        # They belong to the round: whoever opens the file goes on by them.
        stored = Settings(**json.loads(kept["settings"])) if "settings" in kept else None
        self.settings = settings or stored or Settings()
        if settings is not None and settings != stored:
            text = json.dumps(asdict(settings))
            with database.writing() as connection:
                connection.execute("INSERT OR REPLACE INTO meta VALUES ('settings', ?)", (text,))

    def add(self, candidates: Iterable[Candidates]) -> Imported:
        """Adds pairs to be judged; those already there are left as they are.

        Args:
            candidates: every two different responses of a prompt become a pair.

        Raises:
            StoreError: nothing was added.
        """
        with self.database.writing() as connection:
            return candidate_import.add(connection, self.chance, candidates)

    def next(self, annotator: int, count: int = 1) -> list[Presentation]:
        """What a person is to judge now: what they were given and have not judged, then new pairs.

        Args:
            annotator: their id.
            count: how many to hold at once; more than one lets a page fetch ahead.

        Returns:
            At most `count`; fewer where nothing is left, or others hold it.
        """
        # A lease that a power failure takes back is given anew.
        return self.database.batched(
            lambda connection: assignment.hand_out(
                connection, self.settings, self.clock(), self.chance, annotator, count
            ),
            durable=False,
        )

    def progress(self) -> Progress:
        """How far the round is."""
        return assignment.progress(self.database, self.settings)

    def done_by(self, annotator: int) -> int:
        """How many presentations a person has judged or skipped.

        Args:
            annotator: their id.
        """
        return assignment.done_by(self.database, annotator)

    def may_return(self, annotator: int) -> bool:
        """Whether pairs that others hold may come to this person, if those do not judge them.

        Args:
            annotator: their id.
        """
        return assignment.may_return(self.database, annotator)

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
    ) -> Receipt:
        """Records a judgement. Once this returns, it is on the disk.

        Args:
            annotator: who judges.
            presentation: what was shown to them.
            choice: "left", "right", "tie", "both_bad" or "skip".
            key: unique to this judgement; sent again, the first answer comes back.
            strength: 1 (slightly) to 3 (much better), for "left" and "right".
            reason: in words, 2,000 characters at most.
            seconds: time the person took.

        Raises:
            InputError: naming every value that breaks a rule.
            Conflict: (an `InputError`) the pair was judged before, or others have finished it.
        """
        given = judgements.Given(presentation, choice, key, strength, reason, seconds)
        return self.database.batched(
            lambda connection: judgements.submit(
                connection, self.settings, self.clock(), annotator, given
            )
        )

    def undo(self, annotator: int, presentation: int, *, key: str) -> Receipt:
        """Takes a judgement back by a further entry in the log; the pair is theirs again.

        Args:
            annotator: who judged.
            presentation: what they judged.
            key: unique to this undoing.

        Raises:
            Conflict: (an `InputError`) there is no judgement to take back.
        """
        return self.database.batched(
            lambda connection: judgements.undo(
                connection, self.settings, self.clock(), annotator, presentation, key
            )
        )

    def last_judged(self, annotator: int) -> int | None:
        """The presentation that an undo of this person would take back; None where there is none.

        Args:
            annotator: their id.
        """
        return judgements.last_judged(self.database, annotator)

    def add_annotator(
        self, name: str, group: str | None = None, *, admin: bool = False, days: float = 30.0
    ) -> tuple[Annotator, str]:
        """Adds a person, or gives one a new token: the old one ends, sessions go on.

        Args:
            name: 1 to 100 characters; no two people share one.
            group: what the person belongs to; None leaves it as it was.
            admin: may see the administrator's page.
            days: until the token ends.

        Returns:
            The annotator, and the token, which is not stored.

        Raises:
            InputError: the name is empty or too long.
        """
        return people.add_annotator(self.database, self.clock(), name, group, admin, days)

    def annotators(self) -> list[Annotator]:
        """Everybody, in the order they came."""
        rows = self.database.rows("SELECT * FROM annotators ORDER BY id")
        return [people.annotator(row) for row in rows]

    def start_session(self, token: str, days: float = 30.0) -> tuple[Annotator, str] | None:
        """Turns a link's token into a session.

        Args:
            token: from the link.
            days: until the session ends.

        Returns:
            The annotator and the session's secret, which is not stored; None if the token is
            forged or has expired.
        """
        return people.start_session(self.database, self.clock(), token, days)

    def session(self, secret: str) -> Annotator | None:
        """Who a session belongs to; None if it is forged or has expired.

        Args:
            secret: from the cookie.
        """
        return people.session(self.database, self.clock(), secret)

    def close(self) -> None:
        """Closes the file."""
        self.database.close()


def open_store(
    path: str | os.PathLike[str],
    settings: Settings | None = None,
    *,
    create: bool = False,
    **options: Any,
) -> Store:
    """Opens a store.

    Args:
        path: the SQLite file.
        settings: how pairs are handed out; None: as they were.
        create: make the file where there is none.
        **options: `clock` and `chance` of `Store`.

    Raises:
        StoreError: if the file is no store, or one of another version.
    """
    return Store(Database(path, create=create), settings, **options)
