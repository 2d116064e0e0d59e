"""YAML read so that the configuration's types decide, with the place of every key kept.

PyYAML guesses types from the text: `1e-4` becomes a string and `on` becomes True. Here an unquoted
scalar stays text (`Plain`) until a typed field converts it, so a number in exponent notation is a
number where a number belongs, and a name that happens to be `on` is a name.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

KeyPath = tuple[str | int, ...]

_NULLS = {"", "~", "null", "Null", "NULL"}
_INTEGER = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_STANDARD_TAG = re.compile(r"tag:yaml\.org,2002:[a-z]+")


class Plain(str):
    """An unquoted YAML scalar: text whose type the field that receives it decides."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a value was written.

    Args:
        source: name of the file, or of the override.
        line: line number from 1, or None for an override.

    Example:
        >>> str(Place("quickstart.yaml", 12))
        'quickstart.yaml, line 12'
    """

    source: str
    line: int | None = None

    def __str__(self) -> str:
        """Returns the place as it stands in a message."""
        return self.source if self.line is None else f"{self.source}, line {self.line}"


@dataclass
class Document:
    r"""A tree of mappings, lists and text, with the place of every key and item.

    Args:
        source: name used in messages.
        tree: nested dicts and lists; leaves are `Plain`, `str` (quoted) or None.
        places: place of each key path; `place` finds the nearest.
        problems: what could not be read, each with its place.
        readable: False where there is no tree at all for the problems.

    Example:
        >>> document = read_document("loss:\n  beta: 1e-1\n", "a.yaml")
        >>> document.tree, str(document.place(("loss", "beta")))
        ({'loss': {'beta': '1e-1'}}, 'a.yaml, line 2')
    """

    source: str
    tree: dict[str, Any] = field(default_factory=dict)
    places: dict[KeyPath, Place] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    readable: bool = True

    def place(self, path: KeyPath) -> Place:
        """Returns where `path`, or the nearest key above it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return Place(self.source)

    def override(self, text: str) -> None:
        """Applies one `section.key=value`; the value is YAML and follows the file's rules.

        Args:
            text: for instance `training.epochs=2`, `data.path=[a.jsonl, b.jsonl]`, `warmup=null`.
                A faulty one is added to `problems` and changes nothing.
        """
        place = Place(f"override {text!r}")
        name, equals, value_text = text.partition("=")
        keys = tuple(name.strip().split("."))
        if not equals or not all(keys):
            self.problems.append(
                f"{place}: must read section.key=value, for instance training.epochs=2."
            )
            return
        try:
            node = yaml.compose(value_text, Loader=yaml.SafeLoader)
        except yaml.YAMLError:
            self.problems.append(
                f"{place}: the value {value_text!r} is not YAML; quote it within the argument: "
                f"'{name}=\"{value_text}\"'."
            )
            return
        reader = _Reader(place.source, with_lines=False)
        value = None if node is None else reader.value(node, keys)
        if reader.problems:
            self.problems.extend(reader.problems)
            return
        branch = self.tree
        for depth, key in enumerate(keys[:-1], start=1):
            if branch.get(key) is None:
                branch[key] = {}
            if not isinstance(branch[key], dict):
                self.problems.append(
                    f"{place}: {'.'.join(keys[:depth])} is {branch[key]!r}, not a section; "
                    f"{name} can not be set in it."
                )
                return
            branch = branch[key]
        branch[keys[-1]] = value
        # An override replaces all that stood there, so no older place under it holds any more.
        self.places = {p: at for p, at in self.places.items() if p[: len(keys)] != keys}
        self.places |= {**reader.places, keys: place}


class _Reader:
    """Turns YAML nodes into a tree and notes places and problems on the way."""

    def __init__(self, source: str, with_lines: bool = True):
        self.source = source
        self.with_lines = with_lines
        self.places: dict[KeyPath, Place] = {}
        self.problems: list[str] = []
        self._open: list[yaml.Node] = []

    def at(self, node: yaml.Node) -> Place:
        return Place(self.source, node.start_mark.line + 1 if self.with_lines else None)

    def value(self, node: yaml.Node, path: KeyPath) -> Any:
        if not _STANDARD_TAG.fullmatch(node.tag):
            self.problems.append(f"{self.at(node)}: the tag {node.tag!r} is not supported.")
            return None
        if node in self._open:
            self.problems.append(f"{self.at(node)}: this alias contains itself.")
            return None
        self._open.append(node)
        try:
            if isinstance(node, yaml.ScalarNode):
                return _scalar(node)
            if isinstance(node, yaml.SequenceNode):
                return [self._item(item, (*path, i)) for i, item in enumerate(node.value)]
            assert isinstance(node, yaml.MappingNode)
            return self._mapping(node, path)
        finally:
            self._open.pop()

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.places[path] = self.at(node)
        return self.value(node, path)

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        tree: dict[str, Any] = {}
        merged: dict[str, Any] = {}
        for key_node, value_node in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                self.problems.append(f"{self.at(key_node)}: a key must be a plain word.")
                continue
            key = str(key_node.value)
            if key_node.tag == "tag:yaml.org,2002:merge":
                included = self.value(value_node, path)
                for part in included if isinstance(included, list) else [included]:
                    if isinstance(part, dict):
                        merged = {**part, **merged}
                    else:
                        self.problems.append(f"{self.at(key_node)}: << takes a mapping.")
                continue
            if key in tree:
                # YAML itself would let the last one win without a word.
                self.problems.append(
                    f"{self.at(key_node)}: {'.'.join(map(str, (*path, key)))} is given twice; "
                    f"it stands at {self.places[(*path, key)]} too."
                )
                continue
            if ":" in key and key_node.style is None and _is_empty(value_node):
                self.problems.append(
                    f"{self.at(key_node)}: {key!r} must have a space after its colon."
                )
                continue
            self.places[(*path, key)] = self.at(key_node)
            tree[key] = self.value(value_node, (*path, key))
        return {**merged, **tree}


def _is_empty(node: yaml.Node) -> bool:
    return isinstance(node, yaml.ScalarNode) and node.style is None and node.value == ""


def _scalar(node: yaml.ScalarNode) -> str | None:
    if node.style is not None:
        return str(node.value)
    return None if node.value in _NULLS else Plain(node.value)


def read_document(text: str, source: str) -> Document:
    r"""Reads YAML text; what can not be read is in `problems` of the result.

    Args:
        text: the YAML text; its top level is a mapping, or it is empty.
        source: name used in messages, usually the file's path.

    Returns:
        The tree with its places. An empty text gives an empty tree.

    Example:
        >>> read_document("a: 1\na: 2\n", "x.yaml").problems
        ['x.yaml, line 2: a is given twice; it stands at x.yaml, line 1 too.']
    """
    document = Document(source)
    reader = _Reader(source)
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
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
    document.tree = reader.value(node, ())
    document.places = reader.places
    document.problems = reader.problems
    return document


def guess_types(value: Any) -> Any:
    """Converts `Plain` text by YAML 1.2's rules, for values that no field gives a type to.

    Args:
        value: a tree as `Document.tree` holds it; anything else is returned as it is.

    Returns:
        The tree with `true`/`false`, integers and floats (`1e-4` too) converted; quoted text and
        all other text stay text.

    Example:
        >>> guess_types({"alpha": Plain("1e-4"), "kind": Plain("on"), "name": "3"})
        {'alpha': 0.0001, 'kind': 'on', 'name': '3'}
    """
    if isinstance(value, Plain):
        if value in ("true", "True", "TRUE", "false", "False", "FALSE"):
            return value.lower() == "true"
        if _INTEGER.fullmatch(value):
            return int(value)
        return float(value) if _FLOAT.fullmatch(value) else str(value)
    if isinstance(value, Mapping):
        return {key: guess_types(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [guess_types(item) for item in value]
    return value
