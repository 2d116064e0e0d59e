"""From validation errors to one sentence each: the place, the key, the rule, the value."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticCustomError

from dpo_keras.app.yaml_document import Document, KeyPath

_FAULTS = "dpo_keras_faults"

RULES: Mapping[str, str] = {
    "missing": "is required",
    "int_parsing": "must be a whole number",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "float_parsing": "must be a number",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_parsing": "must be true or false",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "string_too_short": "must not be empty",
    "list_type": "must be a list, such as [a, b]",
    "dict_type": "must be a mapping, such as {{name: 0.1}}",
    "model_type": "must be a section: keys with values",
    "model_attributes_type": "must be a section: keys with values",
    "greater_than": "must be > {gt:g}",
    "greater_than_equal": "must be >= {ge:g}",
    "less_than": "must be < {lt:g}",
    "less_than_equal": "must be <= {le:g}",
    "literal_error": "must be one of {expected}",
    "too_short": "must have at least {min_length} item(s)",
}


class Fault(NamedTuple):
    """One broken rule.

    Args:
        path: the key, from the top of the configuration: `("loss", "beta")`.
        rule: what follows the key in the message: `must be > 0, got -1.`, or a sentence of its own
            after a colon.
    """

    path: KeyPath
    rule: str


def raise_faults(faults: Iterable[Fault]) -> None:
    """Raises one pydantic error that carries all `faults`; does nothing when there are none.

    A pydantic validator can raise one error only; `faults_of` unfolds this one.

    Args:
        faults: with paths relative to the model that is being validated.

    Raises:
        PydanticCustomError: if there is any fault.
    """
    found = list(faults)
    if found:
        text = " ".join(f"{dotted(fault.path)} {fault.rule}" for fault in found)
        # The braces of a value would be taken for a field of the message's format.
        context = {"text": text, "faults": found}
        raise PydanticCustomError(_FAULTS, "{text}", context)


def dotted(path: KeyPath) -> str:
    """Writes a key path as people write it.

    Args:
        path: keys and list indices.

    Example:
        >>> dotted(("data", "path", 0))
        'data.path[0]'
    """
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else str(part)
    return text


def render(faults: Iterable[Fault], document: Document) -> list[str]:
    """Puts the place before each fault; in the order of the file, overrides last.

    Args:
        faults: with paths from the top of the configuration.
        document: knows the lines.
    """
    placed = [(document.place(path), dotted(path), rule) for path, rule in faults]
    placed.sort(key=lambda fault: fault[0].line if fault[0].line is not None else 10**9)
    return [
        f"{place}: {name}{rule}" if rule.startswith(":") else f"{place}: {name} {rule}"
        for place, name, rule in placed
    ]


def faults_of(error: ValidationError, model: type[BaseModel]) -> Iterator[Fault]:
    """Yields every broken rule; an unknown key is answered with the nearest right one.

    Args:
        error: what pydantic raised.
        model: the configuration's top-level model, which knows the right keys.
    """
    for item in error.errors(include_url=False):
        path: KeyPath = item["loc"]
        context = item.get("ctx", {})
        if item["type"] == _FAULTS:
            for fault in context["faults"]:
                yield Fault((*path, *fault.path), fault.rule)
        elif item["type"] == "extra_forbidden":
            yield Fault(path, f"is not a known key{_suggestion(path, model)}")
        elif item["type"] == "missing":
            yield Fault(path, "is required.")
        else:
            rule = item["msg"]
            if item["type"] in RULES:
                rule = RULES[item["type"]].format(**_plain_words(context))
            hint = nearest(item)
            yield Fault(path, f"{rule}, got {_shown(item['input'])}{hint or '.'}")


def _plain_words(context: Mapping[str, Any]) -> dict[str, Any]:
    # pydantic lists allowed values as Python writes them, a file has them bare and in lower case.
    return {
        name: value.replace("'", "").replace("True", "true").replace("False", "false")
        if isinstance(value, str)
        else value
        for name, value in context.items()
    }


def _shown(value: Any) -> str:
    if value is None:
        return "nothing"
    # Numbers stand in the file as text, so quotes would only puzzle there.
    text = str(value) if isinstance(value, str) and value and value.isascii() else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def nearest(item: Mapping[str, Any]) -> str:
    """Names the allowed value that a misspelt one is nearest to.

    Args:
        item: one entry of pydantic's `ValidationError.errors()`.

    Returns:
        `"; did you mean 'cosine'?"`, or an empty string.
    """
    if item["type"] != "literal_error" or not isinstance(item["input"], str):
        return ""
    words = _plain_words(item["ctx"])["expected"].replace(" or ", ", ").split(", ")
    close = difflib.get_close_matches(item["input"], words, n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def keys_of(model: type[BaseModel], prefix: KeyPath = ()) -> dict[KeyPath, list[str]]:
    """Lists the keys of a model and of the models in it.

    Args:
        model: a pydantic model.
        prefix: the path that `model` itself stands at.

    Returns:
        Section path to the names of its keys; `()` is the top level.
    """
    found = {prefix: list(model.model_fields)}
    for name, info in model.model_fields.items():
        for part in (info.annotation, *get_args(info.annotation)):
            if isinstance(part, type) and issubclass(part, BaseModel):
                found |= keys_of(part, (*prefix, name))
    return found


def _suggestion(path: KeyPath, model: type[BaseModel]) -> str:
    sections = keys_of(model)
    *section, key = path
    siblings = sections.get(tuple(section), [])
    close = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.75)
    if close:
        return f"; did you mean {dotted((*section, close[0]))}?"
    elsewhere = [dotted((*where, key)) for where, keys in sections.items() if key in keys]
    if elsewhere:
        return f"; did you mean {' or '.join(elsewhere)}?"
    every = {name: dotted((*where, name)) for where, keys in sections.items() for name in keys}
    close = difflib.get_close_matches(str(key), siblings, n=1, cutoff=0.6)
    if close:
        return f"; did you mean {dotted((*section, close[0]))}?"
    close = difflib.get_close_matches(str(key), list(every), n=1, cutoff=0.8)
    if close:
        return f"; did you mean {every[close[0]]}?"
    return f"; the keys here are {', '.join(siblings)}."
