"""Markdown of responses as a tree of a few harmless elements, never as HTML text.

The page builds elements from the tree one by one, so that nothing a model wrote is ever parsed as
HTML: a `<script>` in a response is text.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any, TypeAlias

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

from dpo_keras.feedback.annotators import Annotator
from dpo_keras.feedback.assignment import Presentation
from dpo_keras.feedback.store import Store

Node: TypeAlias = "str | list[Any]"  # text, or [tag, attributes, children]

LONGEST = 30_000  # characters; longer texts are shown as they stand, at once
DEEPEST = 60

_PARSER = MarkdownIt("commonmark", {"html": False, "maxNesting": 2 * DEEPEST})
_PARSER.enable(["table", "strikethrough"]).disable("image")
# Overrides of direction make readers see other letters than the model wrote.
_OVERRIDES = {0x202D: "\ufffd", 0x202E: "\ufffd"}
_TAGS = {
    "paragraph": "p",
    "bullet_list": "ul",
    "ordered_list": "ol",
    "list_item": "li",
    "blockquote": "blockquote",
    "em": "em",
    "strong": "strong",
    "s": "s",
    "hr": "hr",
    "table": "table",
    "thead": "thead",
    "tbody": "tbody",
    "tr": "tr",
    "th": "th",
    "td": "td",
}


@lru_cache(maxsize=256)
def render(text: str) -> tuple[Node, ...]:
    """Parses Markdown.

    Args:
        text: a response, or a turn of a prompt.

    Returns:
        Nodes: texts, and `[tag, attributes, children]` of known tags.

    Example:
        >>> render("**Hi** <script>")
        (['p', {}, [['strong', {}, ['Hi']], ' <script>']],)
        >>> render("[here](javascript:alert(1))")
        (['p', {}, ['[here](javascript:alert(1))']],)
        >>> render("- one")
        (['ul', {}, [['li', {}, ['one']]]],)
    """
    text = text.translate(_OVERRIDES)
    if len(text) > LONGEST:
        return (_plain(text),)
    tokens = _PARSER.parse(text)
    if any(token.level >= DEEPEST for token in tokens) or _deep_inline(tokens):
        # The parser leaves out what is nested too deep; people must see all of it.
        return (_plain(text),)
    found: list[Node] = []
    for child in SyntaxTreeNode(tokens).children:
        found += _nodes(child)
    return tuple(found)


def _plain(text: str) -> Node:
    return ["div", {"class": "plain"}, [text]]


def _deep_inline(tokens: list[Any]) -> bool:
    return any(child.level >= DEEPEST for token in tokens for child in token.children or ())


def _nodes(node: SyntaxTreeNode) -> list[Node]:
    kind = node.type
    if kind == "text":
        return [node.content] if node.content else []
    if kind in ("softbreak", "hardbreak"):
        return [["br", {}, []]]  # people see lines where the model wrote lines
    if kind == "code_inline":
        return [["code", {}, [node.content]]]
    if kind in ("fence", "code_block"):
        return [["pre", {}, [["code", {}, [node.content]]]]]
    children = [made for child in node.children for made in _nodes(child)]
    if kind == "paragraph" and node.hidden:  # an item of a tight list
        return children
    if kind == "heading":
        # The page has headings of its own above these.
        return [[f"h{min(6, int(node.tag[1]) + 3)}", {}, children]]
    if kind == "link":
        target = str(node.attrs.get("href", ""))
        if target.startswith(("https://", "http://")):
            return [["a", {"href": target}, children]]
        return children
    if kind == "ordered_list" and "start" in node.attrs:
        return [["ol", {"start": str(node.attrs["start"])}, children]]
    if kind in _TAGS:
        return [[_TAGS[kind], {}, children]]
    return children or ([node.content] if node.type not in ("inline", "root") else [])


@dataclass(frozen=True, slots=True)
class Page:
    """A whole page.

    Args:
        body: HTML with its style and script in it.
        hashes: CSP sources of its style and script.
    """

    body: bytes
    hashes: dict[str, str]


@cache
def page(name: str) -> Page:
    """Puts a page's style and script into its HTML.

    Args:
        name: "annotate" or "admin".

    Example:
        >>> len(page("annotate").body) < 100_000
        True
    """
    folder = importlib.resources.files(__package__) / "page"
    document = (folder / f"{name}.html").read_text("utf-8")
    style = (folder / "style.css").read_text("utf-8")
    script = (folder / "common.js").read_text("utf-8") + (folder / f"{name}.js").read_text("utf-8")
    hashes = {"style": _source(style), "script": _source(script)}
    document = document.replace("/*style*/", style).replace("/*script*/", script)
    return Page(document.encode(), hashes)


def policy() -> str:
    """The Content-Security-Policy of everything served: nothing from elsewhere, nothing unknown."""
    pages = [page(name) for name in ("annotate", "admin")]
    styles = " ".join(one.hashes["style"] for one in pages[:1])
    scripts = " ".join(one.hashes["script"] for one in pages)
    return (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )


def _source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


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
