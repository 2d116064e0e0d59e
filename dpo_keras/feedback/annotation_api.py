"""What the annotation page asks for: its JSON answers and its HTML."""

import base64
import hashlib
import html
import importlib.resources
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from typing import NamedTuple

import anyio.to_thread

from dpo_keras.errors import InputError
from dpo_keras.feedback.assignment import Presentation
from dpo_keras.feedback.markdown_rendering import render
from dpo_keras.feedback.request_guard import Refused
from dpo_keras.feedback.store import Annotator, Store
from dpo_keras.preferences import Message
from dpo_keras.utils import JSON

MAX_AT_ONCE = 8_000  # characters that are rendered while others wait
MAX_HELD = 3  # presentations that a page may hold at once
_ROLES = {"system": "Instructions", "user": "Person", "assistant": "Assistant", "tool": "Tool"}


class Api:
    """The server's answers, ready for JSON."""

    def __init__(
        self,
        store: Store,
        guidelines: str = "",  # Markdown
        assess: Callable[[Store], Mapping[str, JSON]] | None = None,  # for the administrator
    ):
        self.store, self.guidelines, self.assess = store, guidelines, assess
        self._progress, self._progress_expires = {"judged": 0, "wanted": 0}, 0.0
        self._agreement: tuple[int | None, Mapping[str, JSON]] = (None, {})
        self._assessing = threading.Lock()

    def me(self, annotator: Annotator) -> dict[str, JSON]:
        """Tell who is signed in, and the guidelines of the round."""
        guidelines = render(self.guidelines)
        return {"name": annotator.name, "admin": annotator.admin, "guidelines": guidelines}

    def next(self, annotator: Annotator, query: Mapping[str, str]) -> dict[str, JSON]:
        """Return presentations; those that the page knows come without their texts.

        `with_texts` makes the texts of the others ready for the page.
        """
        numbers = [query.get("count", "1"), *query.get("known", "").split(",")]
        if any(len(n) > 18 or not (n.isascii() and n.isdigit() or n == "") for n in numbers):
            raise Refused(400, "count and known must be whole numbers.")
        count = max(1, min(MAX_HELD, int(numbers[0] or 1)))
        known = {int(number) for number in numbers[1:11] if number}
        shown = self.store.next(annotator.id, count)
        return {
            "presentations": [{"id": p.id} if p.id in known else p for p in shown],
            "waiting": not shown and self.store.may_return(annotator.id),
            "own": self.store.done_by(annotator.id),
            **self._state(annotator),
        }

    async def with_texts(self, content: dict[str, JSON]) -> None:
        """Put rendered texts in place of presentations. Long ones take a while, so in a thread."""
        for place, shown in enumerate(content["presentations"]):
            if isinstance(shown, Presentation):
                length = sum(map(len, shown.responses)) + len(str(shown.prompt))
                long = length > MAX_AT_ONCE
                rendered = await anyio.to_thread.run_sync(_shown, shown) if long else _shown(shown)
                content["presentations"][place] = rendered

    def image(self, annotator: Annotator, query: Mapping[str, str]) -> bytes:
        """Return an encoded image of a prompt that the person was shown.

        A request names a presentation and a number, never a file.
        """
        numbers = [query.get("presentation", ""), query.get("number", "")]
        if any(len(n) > 18 or not (n.isascii() and n.isdigit()) for n in numbers):
            raise Refused(400, "presentation and number must be whole numbers.")
        image = self.store.image(annotator.id, int(numbers[0]), int(numbers[1]))
        if image is None:
            raise Refused(404, "there is no such image.")
        try:
            return image.read()
        except InputError as error:
            # Where files lie on the server is nothing for annotators.
            raise Refused(404, "the image is gone; tell whoever runs this round.") from error

    def submit(self, annotator: Annotator, body: JSON) -> dict[str, JSON]:
        """Record a judgement; the store checks the type of every value."""
        names = ("presentation", "choice", "key", "strength", "reason", "seconds")
        receipt = self.store.submit(annotator.id, **{name: body.get(name) for name in names})
        return {"judgement": receipt.judgement, "again": receipt.again, **self._state(annotator)}

    def submit_ranking(self, annotator: Annotator, body: JSON) -> dict[str, JSON]:
        """Record a ranking; the store checks the type of every value."""
        names = ("presentation", "ranks", "key", "choice", "reason", "seconds")
        receipt = self.store.submit_ranking(annotator.id, **{n: body.get(n) for n in names})
        return {"judgement": receipt.judgement, "again": receipt.again, **self._state(annotator)}

    def undo(self, annotator: Annotator, body: JSON) -> dict[str, JSON]:
        """Take a judgement back."""
        receipt = self.store.undo(annotator.id, body.get("presentation"), key=body.get("key"))
        return {"judgement": receipt.judgement, **self._state(annotator)}

    def overview(self, annotator: Annotator) -> dict[str, JSON]:
        """Return what the administrator sees."""
        if not annotator.admin:
            raise Refused(403, "this page is the administrator's; open the administrator's link.")
        rows = self.store.database.rows
        now = self.store.clock()
        people = rows(
            "SELECT a.name, a.grp AS 'group', "
            "coalesce(sum(p.state = 'judged' AND q.gold IS NULL AND NOT p.repeat), 0) AS judged, "
            "coalesce(sum(p.state = 'judged' AND q.gold IS NOT NULL), 0) AS checks, "
            "coalesce(sum(p.state = 'judged' AND p.repeat), 0) AS repeats, "
            "coalesce(sum(p.state = 'skipped'), 0) AS skipped, "
            "coalesce(sum(p.state = 'leased'), 0) AS held "
            "FROM annotators a LEFT JOIN presentations p ON p.annotator = a.id "
            "LEFT JOIN pairs q ON q.id = p.pair "
            "GROUP BY a.id HAVING NOT a.admin OR judged + checks > 0 ORDER BY a.id"
        )
        hours = rows(
            # The same judgements as the progress counts: no judges, checks, repeats and skips.
            "SELECT CAST(j.at / 3600 AS INTEGER) AS hour, count(*) FROM current j "
            "JOIN presentations p ON p.id = j.presentation JOIN pairs q ON q.id = p.pair "
            "JOIN annotators a ON a.id = p.annotator AND NOT a.judge "
            "WHERE j.at > ? AND j.verdict <> 'skip' AND q.gold IS NULL AND NOT p.repeat "
            "GROUP BY hour ORDER BY hour",
            (now - 48 * 3600,),
        )
        return {
            **asdict(self.store.progress()),
            "now": now,
            "people": [dict(row) for row in people],
            "hours": [[row[0] * 3600, row[1]] for row in hours],
            "agreement": self._assessed(rows("SELECT max(id) FROM judgements")[0][0]),
        }

    def _assessed(self, last_judgement: int | None) -> Mapping[str, JSON]:
        if self.assess is None or last_judgement is None:
            return {}
        with self._assessing:  # one computation at a time: the page asks again and again
            if self._agreement[0] != last_judgement:
                self._agreement = (last_judgement, self.assess(self.store))
            return self._agreement[1]

    def _state(self, annotator: Annotator) -> dict[str, JSON]:
        began = time.monotonic()
        if began >= self._progress_expires:
            self._progress = asdict(self.store.progress())
            # Counting a large round takes a while: spend at most a twentieth of the time on it.
            now = time.monotonic()
            self._progress_expires = now + 20 * (now - began)
        return {**self._progress, "undoable": self.store.last_judged(annotator.id)}


def rendered_prompt(prompt: JSON) -> list[dict[str, JSON]]:
    """Return the turns of a prompt, ready for the page."""
    turns = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    rendered = [
        {
            "role": _ROLES.get(turn["role"], turn["role"]),
            "body": render(Message.from_dict(turn).words),
        }
        for turn in turns
    ]
    if len(rendered) == 1:
        rendered[0]["role"] = None
    return rendered


def _shown(presentation: Presentation) -> dict[str, JSON]:
    prompt = rendered_prompt(presentation.prompt)
    content: dict[str, JSON] = {"id": presentation.id, "prompt": prompt}
    if presentation.images:
        content["images"] = len(presentation.images)
    if presentation.further:
        return {**content, "responses": list(map(render, presentation.responses))}
    return {**content, "left": render(presentation.left), "right": render(presentation.right)}


class Page(NamedTuple):
    """A whole page: HTML with style and script in it, and the CSP sources of both."""

    body: bytes
    style_source: str
    script_source: str


@cache
def page(name: str) -> Page:
    """Put the style and script of the page "annotate", "arena" or "admin" into its HTML.

    The arena is the page "annotate" with a place to ask.
    """
    folder = importlib.resources.files(__package__) / "page"
    style = (folder / "style.css").read_text("utf-8")
    if name == "arena":
        document = (folder / "annotate.html").read_text("utf-8")
        document = document.replace("<!--arena-->", (folder / "arena.html").read_text("utf-8"))
        scripts = ["common", "annotate", "arena"]
    else:
        document = (folder / f"{name}.html").read_text("utf-8")
        scripts = ["common", name]
    script = "".join((folder / f"{one}.js").read_text("utf-8") for one in scripts)
    document = document.replace("/*style*/", style).replace("/*script*/", script)
    return Page(document.encode(), _csp_source(style), _csp_source(script))


def closed_page(sentence: str) -> bytes:
    """Return a page that shows one sentence, for addresses at which there is nothing to do."""
    folder = importlib.resources.files(__package__) / "page"
    style = (folder / "style.css").read_text("utf-8")
    document = (folder / "closed.html").read_text("utf-8").replace("/*style*/", style)
    return document.replace("/*sentence*/", html.escape(sentence)).encode()


def _csp_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def content_security_policy() -> str:
    """Return the policy of every answer: nothing from elsewhere, no unknown script or style."""
    pages = [page(name) for name in ("annotate", "arena", "admin")]  # they share one style
    scripts = " ".join(one.script_source for one in pages)
    return (
        f"default-src 'none'; script-src {scripts}; "
        f"style-src {pages[0].style_source}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
