"""The arena: people's queries wait, policies answer several at a time, and texts grow meanwhile.

Each policy writes in a thread of its own, so that nobody waits for a slow one but those who asked.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.candidates import Candidates, Response, maker_label
from dpo_keras.feedback.live_pairs import present
from dpo_keras.feedback.request_guard import Refused
from dpo_keras.feedback.store import Store
from dpo_keras.preferences import Message
from dpo_keras.utils import JSON

MAX_UNFINISHED = 64  # queries; further ones are refused
TOGETHER = 8  # responses that a policy writes at once
REDRAWS = 3  # of a response that is empty or the same as the other

_UNFINISHED = ("waiting", "writing", "storing")

Prompt: TypeAlias = str | tuple[Message, ...]

logger = logging.getLogger(__name__)


class Responder(ABC):
    """A policy that answers.

    Args:
        setting: what is known of how it answers: `policy`, `temperature`, …
        streams: whether it shows texts before they are complete.
        varies: whether another seed may give another response.
    """

    def __init__(self, setting: Mapping[str, JSON], *, streams: bool, varies: bool):
        self.setting, self.streams, self.varies = dict(setting), streams, varies

    @abstractmethod
    def prepare(self, prompt: Prompt) -> JSON:
        """Make of a prompt what `respond` takes.

        Raises:
            InputError: this policy cannot read the prompt. The person is told.
        """

    @abstractmethod
    def respond(
        self, prepared: Sequence[JSON], seeds: Sequence[int]
    ) -> Generator[tuple[int, str, bool], None, None]:
        """Answer prompts together; yield number, text so far, and whether that is all of it."""


class Snapshot(NamedTuple):
    """What a person sees of their query."""

    phase: str  # "waiting", "writing", "storing", "done" or "failed"
    prompt: Prompt
    texts: tuple[str, str]  # left, right
    position: int  # in the queue, 1 the next; 0 where it is not waiting
    message: str  # why it failed


@dataclass(eq=False)
class _Side:
    """One of the two responses."""

    query: _Query
    responder: Responder
    seed: int
    text: str = ""  # all that there is of it
    ended: bool = False
    draws: int = 1

    def response(self) -> Response:
        setting = {**self.responder.setting, "seed": self.seed}
        return Response(self.text, maker_label(setting), setting)

    @property
    def empty(self) -> bool:
        return not self.text.strip()


@dataclass(eq=False)
class _Query:
    annotator: int
    prompt: Prompt
    number: int
    phase: str = "waiting"
    message: str = ""
    shown: tuple[str, str] = ("", "")
    sides: list[_Side] = field(default_factory=list)  # left, right

    def fail(self, message: str) -> None:
        self.phase, self.message = "failed", message


class Arena:
    """Queries on their way to pairs of the store.

    Args:
        store: where pairs go, leased to whoever asked.
        responders: one policy, which answers twice, or several, of which two are drawn.
        max_unfinished: queries that wait or are being answered; further ones are refused.

    Raises:
        InputError: there is no way to two different responses.
    """

    def __init__(
        self, store: Store, responders: Sequence[Responder], max_unfinished: int = MAX_UNFINISHED
    ):
        if len(responders) == 1 and not responders[0].varies:
            rule = "must be > 0 with one policy: at 0 both responses are the same"
            raise InputError(InputProblem("temperature", rule))
        self.store, self.responders, self.max_unfinished = store, responders, max_unfinished
        self._queries: dict[int, _Query] = {}  # the last one of each person
        self._waiting: dict[Responder, deque[_Side]] = {one: deque() for one in responders}
        self._changed = threading.Condition()
        self._numbers = itertools.count()
        self._closed = False
        self._threads = [
            threading.Thread(target=self._work, args=(one,), name="arena", daemon=True)
            for one in responders
        ]
        for thread in self._threads:
            thread.start()

    def ask(self, annotator: int, prompt: Prompt) -> None:
        """Put a person's query into the queue; raise Refused where it cannot be now."""
        chance = self.store.chance
        with self._changed:
            before = self._queries.get(annotator)
            if before is not None and before.phase in _UNFINISHED:
                raise Refused(409, "your last query is still being answered; wait for it.")
            if self.unfinished() >= self.max_unfinished:
                sentence = f"{self.max_unfinished} queries are waiting already; ask in a minute."
                raise Refused(503, sentence, retry_after=30)
            # Which policy is on which side, and which begins, is left to chance.
            makers = chance.sample(self.responders, min(2, len(self.responders)))
            query = _Query(annotator, prompt, next(self._numbers))
            query.sides = [
                _Side(query, maker, chance.getrandbits(31)) for maker in (makers[0], makers[-1])
            ]
            self._queries[annotator] = query
            for side in query.sides:
                self._waiting[side.responder].append(side)
            self._changed.notify_all()

    def unfinished(self) -> int:
        """Count the queries that wait or are being answered."""
        return sum(query.phase in _UNFINISHED for query in self._queries.values())

    def snapshot(self, annotator: int) -> Snapshot | None:
        """Return what a person sees of their last query; None where there is none."""
        with self._changed:
            query = self._queries.get(annotator)
            if query is None:
                return None
            # A text that comes as a whole would tell which policy wrote it. Nobody sees all of both
            # before the store has them.
            if query.phase == "writing" and all(side.responder.streams for side in query.sides):
                query.shown = (query.sides[0].text, query.sides[1].text)
            position = 0
            if query.phase == "waiting":
                ahead = (
                    one.phase == "waiting" and one.number <= query.number
                    for one in self._queries.values()
                )
                position = sum(ahead)
            return Snapshot(query.phase, query.prompt, query.shown, position, query.message)

    def close(self) -> None:
        """End the threads. What is being answered is given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for thread in self._threads:
            thread.join()

    def _work(self, responder: Responder) -> None:
        waiting = self._waiting[responder]
        while True:
            with self._changed:
                self._changed.wait_for(lambda: waiting or self._closed)
                if self._closed:
                    return
                sides = [waiting.popleft() for _ in range(min(TOGETHER, len(waiting)))]
            try:
                self._answer(responder, sides)
            except Exception:
                logger.exception("A policy of the arena failed.")
                with self._changed:
                    for side in sides:
                        # The other policy may still be writing its side of those that ended.
                        stuck = not side.ended or side.query.phase == "storing"
                        if stuck and side.query.phase in _UNFINISHED:
                            side.query.fail("the policy failed; whoever runs this page sees why.")

    def _answer(self, responder: Responder, sides: Sequence[_Side]) -> None:
        prepared, ready = [], []
        for side in sides:
            try:
                found = responder.prepare(side.query.prompt)
            except InputError as error:
                with self._changed:
                    side.query.fail(str(error))
            else:
                prepared.append(found)
                ready.append(side)
        with self._changed:
            for side in ready:
                if side.query.phase == "waiting":
                    side.query.phase = "writing"
        answers = responder.respond(prepared, [side.seed for side in ready])
        with contextlib.closing(answers):
            for number, text, ended in answers:
                if self._closed:
                    return
                self._hear(ready[number], text, ended)

    def _hear(self, side: _Side, text: str, ended: bool) -> None:
        query = side.query
        with self._changed:
            if query.phase != "writing":
                return
            side.text, side.ended = text, ended
            complete = all(one.ended for one in query.sides)
            if complete:
                query.phase = "storing"
        if complete:
            self._store(query)

    def _store(self, query: _Query) -> None:
        """Lease the pair to whoever asked, or draw a response again."""
        left, right = query.sides
        fault = None
        if left.empty or right.empty:
            fault = "a response was empty"
        elif left.text.strip() == right.text.strip():
            fault = "both responses were the same"
        else:
            pair = Candidates(query.prompt, (left.response(), right.response()))
            try:
                if present(self.store, query.annotator, pair) is None:
                    fault = "these two responses to this query were judged before"
            except InputError as error:  # such as a full disk
                with self._changed:
                    query.fail(str(error))
                return
        with self._changed:
            if fault is None:
                query.phase = "done"
            elif not self._redraw(query):
                query.fail(f"{fault}; ask something else, or in other words.")

    def _redraw(self, query: _Query) -> bool:
        """Let a response be written again, an empty one first; return whether that can be."""
        able = [one for one in query.sides if one.responder.varies and one.draws <= REDRAWS]
        if any(side.empty for side in query.sides):
            able = [side for side in able if side.empty]
        if not able:
            return False
        side = able[-1]
        side.text, side.ended, side.draws = "", False, side.draws + 1
        side.seed = self.store.chance.getrandbits(31)
        query.phase = "writing"
        self._waiting[side.responder].appendleft(side)
        self._changed.notify_all()
        return True
