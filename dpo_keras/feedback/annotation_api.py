"""What the annotation page asks for: its JSON answers, Markdown as harmless elements, its HTML."""

import base64
import hashlib
import importlib.resources
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache, lru_cache
from typing import NamedTuple, TypeAlias

import anyio.to_thread
from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode

from dpo_keras.feedback.assignment import Presentation
from dpo_keras.feedback.request_guard import Refused
from dpo_keras.feedback.store import Annotator, Store
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
                long = len(shown.left) + len(shown.right) + len(str(shown.prompt)) > MAX_AT_ONCE
                rendered = await anyio.to_thread.run_sync(_shown, shown) if long else _shown(shown)
                content["presentations"][place] = rendered

    def submit(self, annotator: Annotator, body: JSON) -> dict[str, JSON]:
        """Record a judgement; the store checks the type of every value."""
        names = ("presentation", "choice", "key", "strength", "reason", "seconds")
        receipt = self.store.submit(annotator.id, **{name: body.get(name) for name in names})
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
            "SELECT a.name, a.grp AS 'group', coalesce(sum(p.state = 'judged'), 0) AS judged, "
            "coalesce(sum(p.state = 'skipped'), 0) AS skipped, "
            "coalesce(sum(p.state = 'leased'), 0) AS held "
            "FROM annotators a LEFT JOIN presentations p ON p.annotator = a.id "
            "GROUP BY a.id HAVING NOT a.admin OR judged > 0 ORDER BY a.id"
        )
        hours = rows(
            "SELECT CAST(at / 3600 AS INTEGER) AS hour, count(*) FROM current "
            "WHERE at > ? GROUP BY hour ORDER BY hour",
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


def _shown(presentation: Presentation) -> dict[str, JSON]:
    turns = presentation.prompt
    if isinstance(turns, str):
        turns = [{"role": "user", "content": turns}]
    prompt = [
        {"role": _ROLES.get(turn["role"], turn["role"]), "body": render(turn["content"])}
        for turn in turns
    ]
    if len(prompt) == 1:
        prompt[0]["role"] = None
    sides = {"left": render(presentation.left), "right": render(presentation.right)}
    return {"id": presentation.id, "prompt": prompt, **sides}


# Markdown becomes a tree of a few harmless elements, which the page builds one by one. No text of a
# model is ever parsed as HTML: a `<script>` in a response is text.
Node: TypeAlias = "str | list[JSON]"  # text, or [tag, attributes, children]

MAX_RENDERED = 30_000  # characters; longer texts are shown as they stand, at once
MAX_DEPTH = 60

_PARSER = MarkdownIt("commonmark", {"html": False, "maxNesting": 2 * MAX_DEPTH})
_PARSER.enable(["table", "strikethrough"]).disable("image")
# Overrides of direction make readers see other letters than the model wrote.
_OVERRIDES = {0x202D: "\ufffd", 0x202E: "\ufffd"}
_SAME_NAME = ("blockquote", "em", "strong", "s", "hr", "table", "thead", "tbody", "tr", "th", "td")
_TAGS = {tag: tag for tag in _SAME_NAME}
_TAGS |= {"paragraph": "p", "bullet_list": "ul", "ordered_list": "ol", "list_item": "li"}
_LEAVES: dict[str, Callable[[str], list[Node]]] = {
    "text": lambda content: [content] if content else [],
    # People see a line break where the model wrote one.
    "softbreak": lambda _: [["br", {}, []]],
    "hardbreak": lambda _: [["br", {}, []]],
    "code_inline": lambda content: [["code", {}, [content]]],
    "code_block": lambda content: [["pre", {}, [["code", {}, [content]]]]],
    "fence": lambda content: [["pre", {}, [["code", {}, [content]]]]],
}


@lru_cache(maxsize=4096)  # the texts that a hundred people hold, and will hold next
def render(text: str) -> tuple[Node, ...]:
    """Parse Markdown into texts and `[tag, attributes, children]` of known tags."""
    text = text.translate(_OVERRIDES)
    tokens = _PARSER.parse(text) if len(text) <= MAX_RENDERED else None
    if tokens is None or _too_deep(tokens):
        # The parser leaves out what is nested too deep; people must see all of it.
        return (["div", {"class": "plain"}, [text]],)
    return tuple(node for child in SyntaxTreeNode(tokens).children for node in _nodes(child))


def _too_deep(tokens: list[Token]) -> bool:
    inline = (child for token in tokens for child in token.children or ())
    return any(token.level >= MAX_DEPTH for token in (*tokens, *inline))


def _nodes(node: SyntaxTreeNode) -> list[Node]:
    if node.type in _LEAVES:
        return _LEAVES[node.type](node.content)
    children = [found for child in node.children for found in _nodes(child)]
    tag, attributes = _element(node)
    if tag is not None:
        return [[tag, attributes, children]]
    return children or ([node.content] if node.content and node.type != "inline" else [])


def _element(node: SyntaxTreeNode) -> tuple[str | None, dict[str, str]]:
    """Return the tag and attributes of a node; no tag where only its children are shown."""
    if node.type == "heading":
        # The page has headings of its own above these.
        return f"h{min(6, int(node.tag[1]) + 3)}", {}
    if node.type == "link":
        target = str(node.attrs.get("href", ""))
        return ("a", {"href": target}) if target.startswith(("https://", "http://")) else (None, {})
    if node.type == "ordered_list" and "start" in node.attrs:
        return "ol", {"start": str(node.attrs["start"])}
    if node.type == "paragraph" and node.hidden:  # an item of a tight list
        return None, {}
    return _TAGS.get(node.type), {}


class Page(NamedTuple):
    """A whole page: HTML with style and script in it, and the CSP sources of both."""

    body: bytes
    style_source: str
    script_source: str


@cache
def page(name: str) -> Page:
    """Put the style and script of the page "annotate" or "admin" into its HTML."""
    folder = importlib.resources.files(__package__) / "page"
    document = (folder / f"{name}.html").read_text("utf-8")
    style = (folder / "style.css").read_text("utf-8")
    script = (folder / "common.js").read_text("utf-8") + (folder / f"{name}.js").read_text("utf-8")
    document = document.replace("/*style*/", style).replace("/*script*/", script)
    return Page(document.encode(), _csp_source(style), _csp_source(script))


def _csp_source(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def content_security_policy() -> str:
    """Return the policy of every answer: nothing from elsewhere, no unknown script or style."""
    annotate, admin = page("annotate"), page("admin")  # they share one style
    return (
        f"default-src 'none'; script-src {annotate.script_source} {admin.script_source}; "
        f"style-src {annotate.style_source}; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
