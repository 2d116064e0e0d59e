"""The server of the arena's page: that of the annotation page, and answers that are streamed."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping

import anyio.to_thread
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.annotation_api import MAX_AT_ONCE, MAX_HELD, Api, rendered_prompt
from dpo_keras.feedback.annotation_server import Sessions, make_app
from dpo_keras.feedback.arena import Arena, Prompt, Snapshot
from dpo_keras.feedback.database import has_lone_surrogate
from dpo_keras.feedback.live_pairs import chosen, held
from dpo_keras.feedback.markdown_rendering import render
from dpo_keras.feedback.request_guard import Address, Refused
from dpo_keras.feedback.store import Annotator, Store
from dpo_keras.preferences import Message
from dpo_keras.utils import JSON

MAX_QUERY = 8_000  # characters
STREAM_SECONDS = 60.0  # after which the page asks again; less than the guard's `ANSWER_SECONDS`
LOOK_SECONDS = 0.1  # between two looks at how far texts are
QUERY = "{query}"


class Turns:
    r"""How queries become prompts, and how a conversation goes on.

    Args:
        messages: the policies read messages, through their chat templates.
        form: text with "{query}" in it: what stands around a query in the data of policies without
            a template. With it a conversation goes on as one text. None: queries as they are.

    Raises:
        InputError: the form holds no "{query}", or the policies read messages.

    Example:
        >>> turns = Turns(form="\n\nHuman: {query}\n\nAssistant:")
        >>> turns.prompt("2 + 2?", after=("\n\nHuman: Hi\n\nAssistant:", " Hello!"))
        '\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: 2 + 2?\n\nAssistant:'
    """

    def __init__(self, *, messages: bool = False, form: str | None = None):
        if form is not None and form.count(QUERY) != 1:
            raise InputError(InputProblem("form", f"must hold {QUERY} once", form))
        if form is not None and messages:
            rule = "is for policies without a chat template; these have one"
            raise InputError(InputProblem("form", rule, hint="Leave it out."))
        self.messages, self.form = messages, form

    @property
    def go_on(self) -> bool:
        """Return whether a conversation can go on."""
        return self.messages or self.form is not None

    def prompt(self, query: str, after: tuple[JSON, str] | None = None) -> Prompt:
        """Return the prompt of a query, which may follow a prompt and its response."""
        asked = query if self.form is None else self.form.replace(QUERY, query)
        if after is None:
            return asked
        before, response = after
        if self.form is not None:
            if not isinstance(before, str):
                raise Refused(409, "this conversation is of messages; begin a new one.")
            return before + response + asked
        if not self.messages:
            raise Refused(
                409,
                "this policy reads one text and knows no turns, so the conversation cannot go on; "
                "begin a new one.",
            )
        turns = [{"role": "user", "content": before}] if isinstance(before, str) else before
        said = (Message("assistant", response), Message("user", query))
        return (*map(Message.from_dict, turns), *said)


class ArenaApi(Api):
    """The annotation page's answers, for pairs that people have asked for themselves."""

    def __init__(
        self,
        arena: Arena,
        turns: Turns,
        guidelines: str = "",
        assess: Callable[[Store], Mapping[str, JSON]] | None = None,
    ):
        super().__init__(arena.store, guidelines, assess)
        self.arena, self.turns = arena, turns

    def next(self, annotator: Annotator, query: Mapping[str, str]) -> dict[str, JSON]:
        """Return the pairs that the person holds; nobody is given another's."""
        return {
            "presentations": held(self.store, annotator.id, MAX_HELD),
            "waiting": False,
            "own": self.store.done_by(annotator.id),
            **self._state(annotator),
        }

    def conversation(self, annotator: Annotator, query: Mapping[str, str]) -> dict[str, JSON]:
        """Return what can be asked: whether a query is being answered, and what it may follow."""
        snapshot = self.arena.snapshot(annotator.id)
        last = self.store.last_judged(annotator.id)
        before = None if last is None else chosen(self.store, annotator.id, last)
        turns: list[dict[str, JSON]] = []
        if before is not None and self.turns.go_on:
            prompt, response = before
            turns = rendered_prompt(prompt)
            if self.turns.form is None:  # else the text tells who speaks
                turns[0]["role"] = turns[0]["role"] or "Person"
            turns.append({"role": "Assistant", "body": render(response)})
        return {
            "phase": None if snapshot is None else snapshot.phase,
            "message": "" if snapshot is None else snapshot.message,
            "after": last if turns else None,
            "turns": turns,
            "go_on": self.turns.go_on,
            "longest": MAX_QUERY,
        }

    def ask(self, annotator: Annotator, body: JSON) -> dict[str, JSON]:
        """Take a query."""
        query, after = body.get("query"), body.get("after")
        if not isinstance(query, str) or not query.strip() or has_lone_surrogate(query):
            raise Refused(400, "query must be text, and not empty.")
        if len(query) > MAX_QUERY:
            sentence = f"query must have {MAX_QUERY:,} characters at most, got {len(query):,}."
            raise Refused(413, sentence)
        if after is not None and (isinstance(after, bool) or not isinstance(after, int)):
            raise Refused(400, "after must be a whole number.")
        if held(self.store, annotator.id):
            raise Refused(409, "a pair is waiting for your choice (in another tab?); choose first.")
        before = None
        if after is not None:
            before = chosen(self.store, annotator.id, after) if 0 <= after < 2**63 else None
            if before is None:
                raise Refused(409, "the response that you chose was taken back; ask anew.")
        self.arena.ask(annotator.id, self.turns.prompt(query, before))
        return {}

    async def lines(self, annotator: Annotator) -> AsyncIterator[bytes]:
        """Yield what there is of a person's responses, a JSON object a line, until they are done.

        Each line holds all of it, so that a page that lost some begins where the next one is.
        """
        ends = time.monotonic() + STREAM_SECONDS
        before: Snapshot | None = None
        while True:
            found = self.arena.snapshot(annotator.id)
            began = time.monotonic()
            if found is None:
                yield b'{"phase": null}\n'
                return
            if found != before:
                long = len(str(found.prompt)) + sum(map(len, found.texts)) > MAX_AT_ONCE
                drawn = await anyio.to_thread.run_sync(_line, found) if long else _line(found)
                yield drawn
            if found.phase in ("done", "failed") or began > ends:
                return
            before = found
            # Drawing long texts again and again takes at most a twentieth of the time.
            await asyncio.sleep(max(LOOK_SECONDS, 20 * (time.monotonic() - began)))


def _line(found: Snapshot) -> bytes:
    prompt = found.prompt
    turns: JSON = prompt if isinstance(prompt, str) else [turn.as_dict() for turn in prompt]
    # What grows is not worth a place among the texts that `render` remembers.
    left, right = (render.__wrapped__(text) for text in found.texts)
    content = {
        "phase": found.phase,
        "position": found.position,
        "message": found.message,
        "prompt": rendered_prompt(turns),
        "left": left,
        "right": right,
    }
    return json.dumps(content).encode() + b"\n"


def make_arena_app(
    arena: Arena,
    turns: Turns,
    *,
    guidelines: str = "",
    assess: Callable[[Store], Mapping[str, JSON]] | None = None,
    address: Address = Address(),  # noqa: B008  # it cannot be changed
) -> Starlette:
    """Make the arena's application; see `make_app`."""
    api = ArenaApi(arena, turns, guidelines, assess)

    def further(sessions: Sessions) -> list[Route]:
        async def stream(request: Request) -> Response:
            _, annotator = sessions.signed_in(request)
            # Proxies pass lines on as they come.
            headers = {"X-Accel-Buffering": "no"}
            lines = api.lines(annotator)
            return StreamingResponse(lines, headers=headers, media_type="application/x-ndjson")

        return [
            Route("/api/conversation", sessions.endpoint(api.conversation)),
            Route("/api/query", sessions.endpoint(api.ask), methods=["POST"]),
            Route("/api/stream", stream),
        ]

    return make_app(arena.store, address=address, api=api, name="arena", further=further)
