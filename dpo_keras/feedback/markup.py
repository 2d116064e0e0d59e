"""Markdown of responses as a tree of a few harmless elements, never as HTML text.

The page builds elements from the tree one by one, so that nothing a model wrote is ever parsed as
HTML: a `<script>` in a response is text.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

from markdown_it import MarkdownIt
from markdown_it.tree import SyntaxTreeNode

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
