"""YAML whose types the configuration decides, with the place of every key kept.

PyYAML guesses types from the text: `1e-4` becomes a string and `on` becomes True. Here an unquoted
scalar stays text (`Plain`) until a typed field converts it. A number in exponent notation is then a
number where a number belongs, and a name that happens to be `on` is a name.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import yaml

from dpo_keras.utils import JSON

_NULLS = {"", "~", "null", "Null", "NULL"}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_STANDARD_TAG = re.compile(r"tag:yaml\.org,2002:[a-z]+")
MOST_DIGITS = 400  # a longer number becomes infinite, which no option takes
DEEPEST = 20  # levels; Python's own limit on recursion is far beyond
HALF = "holds half of a character (a surrogate), which no file can hold."
TOO_DEEP = "is nested too deeply; a configuration has at most four levels."
_SURROGATE = re.compile("[\ud800-\udfff]")
_LAST_PART = re.compile(r"(\.?[^.\[\]]+|\[\d+\])$")


class Plain(str):
    """An unquoted YAML scalar: text whose type the field that receives it decides."""


def dotted(parts: Iterable[str | int]) -> str:
    """Write the path of a key as people write it: `data.path[0]`."""
    text = ""
    for part in parts:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written: a source, and a line from 1; None for an override."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        """Return the place as it is written in a message."""
        return self.source if self.line is None else f"{self.source}, line {self.line}"


@dataclass
class Document:
    """A tree of mappings, lists and text, with the place of every key and item."""

    source: str  # name used in messages
    tree: dict[str, JSON] = field(default_factory=dict)  # leaves are Plain, str (quoted) or None
    places: dict[str, Place] = field(default_factory=dict)  # by the dotted name of the key
    problems: list[str] = field(default_factory=list)  # what could not be read, with its place
    readable: bool = True  # False where the problems leave no tree at all

    def place(self, key: str) -> Place:
        """Return where a key, or the nearest key above it, was written."""
        while key:
            if key in self.places:
                return self.places[key]
            key = _LAST_PART.sub("", key)
        return Place(self.source)

    def override(self, text: str) -> None:
        """Apply one `section.key=value`; the value is YAML and follows the file's rules.

        A faulty one is added to `problems` and changes nothing.
        """
        place = Place(f"override {text!r}")
        if _SURROGATE.search(text):
            self.problems.append(f"{place}: it {HALF}")
            return
        name, equals, value_text = text.partition("=")
        name = name.strip()
        *sections, last = name.split(".")
        if not equals or not all((*sections, last)):
            self.problems.append(
                f"{place}: must read section.key=value, for instance training.epochs=2."
            )
            return
        try:
            node = yaml.compose(value_text, Loader=yaml.SafeLoader)
        except RecursionError:
            self.problems.append(f"{place}: {TOO_DEEP}")
            return
        except yaml.YAMLError:
            self.problems.append(
                f"{place}: the value {value_text!r} is not YAML; quote it within the argument: "
                f"'{name}=\"{value_text}\"'."
            )
            return
        reader = _Reader(place.source, with_lines=False)
        value = None if node is None else reader.value(node, name)
        if reader.problems:
            self.problems.extend(reader.problems)
            return
        branch = self.tree
        for depth, section in enumerate(sections, start=1):
            if branch.get(section) is None:
                branch[section] = {}
            if not isinstance(branch[section], dict):
                self.problems.append(
                    f"{place}: {'.'.join(sections[:depth])} is {branch[section]!r}, not a section; "
                    f"{name} can not be set in it."
                )
                return
            branch = branch[section]
        branch[last] = value
        # An override replaces all that was there, so older places under it do not hold any more.
        replaced = (name + ".", name + "[")
        self.places = {key: at for key, at in self.places.items() if not key.startswith(replaced)}
        self.places |= {**reader.places, name: place}


class _Reader:
    """Turns YAML nodes into a tree, and notes places and problems on the way."""

    def __init__(self, source: str, with_lines: bool = True):
        self.source = source
        self.with_lines = with_lines
        self.places: dict[str, Place] = {}
        self.problems: list[str] = []
        self._open: list[yaml.Node] = []

    def at(self, node: yaml.Node) -> Place:
        return Place(self.source, node.start_mark.line + 1 if self.with_lines else None)

    def value(self, node: yaml.Node, key: str) -> JSON:
        if obstacle := self._obstacle(node, key):
            return self._refuse(node, obstacle)
        self._open.append(node)
        try:
            if isinstance(node, yaml.ScalarNode):
                return _scalar(node)
            if isinstance(node, yaml.SequenceNode):
                return [self._item(item, f"{key}[{i}]") for i, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, key)
        finally:
            self._open.pop()

    def _obstacle(self, node: yaml.Node, key: str) -> str:
        if not _STANDARD_TAG.fullmatch(node.tag):
            return f"the tag {node.tag!r} is not supported."
        if node in self._open:
            return "this alias contains itself."
        if len(self._open) > DEEPEST:
            return TOO_DEEP
        if isinstance(node, yaml.ScalarNode) and _SURROGATE.search(node.value):
            return f"{key} {HALF}"
        return ""

    def _refuse(self, node: yaml.Node, why: str) -> None:
        self.problems.append(f"{self.at(node)}: {why}")

    def _item(self, node: yaml.Node, key: str) -> JSON:
        self.places[key] = self.at(node)
        return self.value(node, key)

    def _mapping(self, node: yaml.MappingNode, section: str) -> dict[str, JSON]:
        tree: dict[str, JSON] = {}
        merged: dict[str, JSON] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self._refuse(key_node, "a key must be a plain word.")
                continue
            if _SURROGATE.search(key_node.value):
                self._refuse(key_node, f"a key {HALF}")
                continue
            name = str(key_node.value)
            key = f"{section}.{name}" if section else name
            if key_node.tag == "tag:yaml.org,2002:merge":
                included = self.value(value_node, section)
                for part in included if isinstance(included, list) else [included]:
                    if isinstance(part, dict):
                        merged = {**part, **merged}
                    else:
                        self._refuse(key_node, "<< takes a mapping.")
            elif name in tree:
                # YAML itself would let the last one win without a word.
                self._refuse(key_node, f"{key} is given twice; it is at {self.places[key]} too.")
            elif ":" in name and key_node.style is None and _is_empty(value_node):
                self._refuse(key_node, f"{name!r} must have a space after its colon.")
            else:
                self.places[key] = self.at(key_node)
                tree[name] = self.value(value_node, key)
        return {**merged, **tree}


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value == ""


def _scalar(node: yaml.ScalarNode) -> str | None:
    if node.style is not None:
        return str(node.value)
    return None if node.value in _NULLS else Plain(node.value)


def read_document(text: str, source: str) -> Document:
    """Read YAML text; what can not be read is in `problems` of the result."""
    document = Document(source)
    reader = _Reader(source)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except RecursionError:
        document.problems.append(f"{source}: {TOO_DEEP}")
        document.readable = False
        return document
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = Place(source, mark.line + 1 if mark is not None else None)
        reason = getattr(error, "problem", None) or str(error)
        document.problems.append(f"{place}: this is not YAML: {reason}.")
        document.readable = False
        return document
    if node is None:
        return document
    if not isinstance(node, yaml.MappingNode):
        document.readable = False
        document.problems.append(f"{reader.at(node)}: a configuration must be keys with values.")
        return document
    return Document(source, reader.value(node, ""), reader.places, reader.problems)


def guess_types(value: JSON) -> JSON:
    """Convert `Plain` text by YAML 1.2's rules, for values that no field gives a type to."""
    if isinstance(value, Plain):
        if value in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return value.lower() == "true"
        if _INTEGER.fullmatch(value) and len(value) < MOST_DIGITS:
            return int(value)
        return float(value) if _FLOAT.fullmatch(value) else str(value)
    if isinstance(value, Mapping):
        return {key: guess_types(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [guess_types(item) for item in value]
    return value
