"""Markdown as a tree of a few harmless elements, in which nothing that a model wrote is hidden.

The page builds the tree element by element. No text of a model is ever parsed as HTML: a `<script>`
in a response is text. What other renderers leave out is shown: targets and titles of links, link
definitions, languages of code blocks, entities as they were typed, cells beyond a table's columns.
Characters that cannot be seen, such as overrides of direction, are shown as `U+202E`.
"""

from __future__ import annotations

import re
import string
import unicodedata
from collections.abc import Callable
from functools import lru_cache
from typing import TypeAlias

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, link
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode

from dpo_keras.utils import JSON

Node: TypeAlias = "str | list[JSON]"  # text, or [tag, attributes, children]

MAX_RENDERED = 30_000  # characters; longer texts are shown as they stand, at once
MAX_DEPTH = 60


@lru_cache(maxsize=4096)  # the texts that a hundred people hold, and will hold next
def render(text: str) -> tuple[Node, ...]:
    """Parse Markdown into texts and `[tag, attributes, children]` of known tags.

    A block of which the parser leaves a letter out is shown as it was typed.
    """
    text = text.replace("\r\n", "\n").replace("\r", "\n").translate(_CONTROL_PICTURES)
    tokens = _PARSER.parse(text) if len(text) <= MAX_RENDERED else None
    if tokens is None or _too_deep(tokens):
        return (_plain(text),)
    lines, shown_up_to = text.split("\n"), 0
    nodes: list[Node] = []
    for block in SyntaxTreeNode(tokens).children:
        start, end = block.map or (shown_up_to, shown_up_to)
        nodes += _unless_blank(lines[shown_up_to:start])
        found, source = _nodes(block), lines[start:end]
        complete = _letters("\n".join(source)) == _letters("".join(map(_text, found)))
        nodes += found if complete else _unless_blank(source)
        shown_up_to = end
    return (*nodes, *_unless_blank(lines[shown_up_to:]))


def _plain(text: str) -> Node:
    return ["div", {"class": "plain"}, [*_visible(text)]]


def _unless_blank(lines: list[str]) -> list[Node]:
    text = "\n".join(lines)
    return [_plain(text)] if text.strip() else []


def _too_deep(tokens: list[Token]) -> bool:
    inline = (child for token in tokens for child in token.children or ())
    return any(token.level >= MAX_DEPTH for token in (*tokens, *inline))


_PUNCTUATION = str.maketrans("", "", string.punctuation)


def _letters(text: str) -> str:
    """Return all but spaces and ASCII punctuation, which is what Markdown's syntax is made of."""
    return "".join(text.translate(_PUNCTUATION).split())


def _text(node: JSON) -> str:
    """Return the text of a node as its model wrote it."""
    if isinstance(node, str):
        return node
    _, attributes, children = node
    own = attributes.get("source", attributes.get("value", ""))
    return own if "source" in attributes else own + "".join(map(_text, children))


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False, "maxNesting": 2 * MAX_DEPTH})
    # Definitions are shown as text. An entity could become a character that nobody sees: without
    # `text_join` it stays apart, with what the model wrote.
    parser.enable(["table", "strikethrough"]).disable(["image", "reference", "text_join"])
    parser.inline.ruler.at("link", _link_with_target)
    parser.normalizeLinkText = lambda link: link  # type: ignore[method-assign]
    return parser


def _link_with_target(state: StateInline, silent: bool) -> bool:
    """Parse `[label](target "title")`, and keep the round brackets as they stand."""
    start, known = state.pos, len(state.tokens)
    if not link(state, silent):
        return False
    if not silent:
        label_end = state.md.helpers.parseLinkLabel(state, start, True)
        opening = next(token for token in state.tokens[known:] if token.type == "link_open")
        opening.meta["target"] = state.src[label_end + 1 : state.pos]
    return True


_SAME_NAME = ("blockquote", "em", "strong", "s", "hr", "table", "thead", "tbody", "tr", "th", "td")
_TAGS = {tag: tag for tag in _SAME_NAME}
_TAGS |= {"paragraph": "p", "bullet_list": "ul", "ordered_list": "ol", "list_item": "li"}


def _code_block(node: SyntaxTreeNode) -> list[Node]:
    block: Node = ["pre", {}, [["code", {}, [*_visible(node.content)]]]]
    language = node.info.strip()
    return [["div", {"class": "language"}, [*_visible(language)]], block] if language else [block]


def _special(node: SyntaxTreeNode) -> list[Node]:
    """Show an entity as it was typed, and a backslash before what it protects."""
    if node.info == "escape" and node.content != node.markup:
        return [["span", {"class": "syntax"}, ["\\"]], *_visible(node.content)]
    return [*_visible(node.markup)]


_LEAVES: dict[str, Callable[[SyntaxTreeNode], list[Node]]] = {
    "text": lambda node: [*_visible(node.content)],
    "text_special": _special,
    # People see a line break where the model wrote one.
    "softbreak": lambda _: [["br", {}, []]],
    "hardbreak": lambda _: [["br", {}, []]],
    "code_inline": lambda node: [["code", {}, [*_visible(node.content)]]],
    "code_block": _code_block,
    "fence": _code_block,
}


def _nodes(node: SyntaxTreeNode) -> list[Node]:
    if node.type in _LEAVES:
        return _LEAVES[node.type](node)
    children = [found for child in node.children for found in _nodes(child)]
    if node.type == "link" and node.meta.get("target"):
        target: Node = ["span", {"class": "syntax"}, [*_visible(node.meta["target"])]]
        return [*_element(node, children), target]
    return _element(node, children)


def _element(node: SyntaxTreeNode, children: list[Node]) -> list[Node]:
    """Return the element of a node; its children where it has none of its own."""
    if node.type == "heading":
        # The page has headings of its own above these.
        return [[f"h{min(6, int(node.tag[1]) + 3)}", {}, children]]
    if node.type == "link":
        target = str(node.attrs.get("href", ""))
        allowed = target.startswith(("https://", "http://"))
        return [["a", {"href": target}, children]] if allowed else children
    if node.type == "list_item" and node.info:
        return [["li", {"value": node.info}, children]]
    if node.type == "paragraph" and node.hidden:  # an item of a tight list
        return children
    tag = _TAGS.get(node.type)
    return children if tag is None else [[tag, {}, children]]


# A picture such as ␛ for each control character but tab and line feed.
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(0x20) if code not in (9, 10)}
_CONTROL_PICTURES[0x7F] = "\u2421"
# Characters without a shape that are no control or format characters by category: fillers, blank
# braille, selectors of variants, separators of lines.
_SHAPELESS = re.compile(
    "[\u034f\u115f\u1160\u17b4\u17b5\u180b-\u180f\u2028\u2029\u2065\u2800\u3164\ufe00-\ufe0f\uffa0"
    "\ufff0-\ufff8\U000e0000-\U000e0fff]"
)
_PERHAPS_UNSEEN = re.compile(r"[^\n\t -~]")
_JOINERS, _SELECTORS = "\u200c\u200d", "\ufe0e\ufe0f"


def _visible(text: str) -> list[Node]:
    """Cut a text where characters cannot be seen, and put their code points there."""
    nodes: list[Node] = []
    shown_up_to = 0
    for found in _PERHAPS_UNSEEN.finditer(text):
        character, place = found[0], found.start()
        if not _unseen(character) or _needed(text, place):
            continue
        if place > shown_up_to:
            nodes.append(text[shown_up_to:place])
        name = f"U+{ord(character):04X}"
        nodes.append(["span", {"class": "unseen-character", "source": character}, [name]])
        shown_up_to = place + 1
    return [*nodes, text[shown_up_to:]] if text[shown_up_to:] else nodes


def _unseen(character: str) -> bool:
    category = unicodedata.category(character)
    return category in ("Cc", "Cf", "Cs") or _SHAPELESS.match(character) is not None


def _needed(text: str, place: int) -> bool:
    """Return whether an emoji, or a script that joins its letters, needs this character."""
    character, before, after = text[place], text[place - 1 : place], text[place + 1 : place + 2]
    if not before:
        return False
    kind = unicodedata.category(before)
    if character in _SELECTORS:
        if before in string.digits + "#*":
            return after == "\u20e3"  # a keycap
        return before > "\x7f" and kind in ("So", "Sm", "Sk", "Po", "Pd") or before == "\u2139"
    if character not in _JOINERS or after <= "\x7f" or _unseen(after):
        return False
    if before in _SELECTORS:
        return True
    joins = unicodedata.bidirectional(before) in ("R", "AL") or "\u0900" <= before < "\u1d00"
    return not _unseen(before) and (joins or kind in ("So", "Sk"))


_PARSER = _parser()
