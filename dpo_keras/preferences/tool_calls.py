"""Tool calls in messages, and the tools that a prompt offers, as Hugging Face and OpenAI have them.

A message is hashed and compared: what it has beside role and content is kept as JSON text.
The tools of a pair belong to its prompt: they are kept with the prompt's first message, and are the
column `tools` in files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping

from dpo_keras.preferences.pair import DETAILS, Fault, Message, Text, wrong_type
from dpo_keras.utils import JSON

_CALLS = "a list of calls, such as {'function': {'name': …, 'arguments': …}}"
_TOOLS = "a list of JSON schemas of functions, each with a name"


def read_details(place: str, message: Mapping[str, JSON]) -> tuple[dict[str, JSON], list[Fault]]:
    """Return what a message of tools has beside role and content, and the broken rules.

    Keys without a value are left out at any depth: Parquet and data frames fill them in. Arguments
    written as JSON text stay as they are.
    """
    unused = {"tools"} if message.get("role") == "tool" else {"tools", "name"}
    details = {key: _plain(message.get(key)) for key in DETAILS if key not in unused}
    details = {key: value for key, value in details.items() if value is not None}
    faults = [
        wrong_type(f"{place}: {key}", details[key], "text")
        for key in ("name", "tool_call_id")
        if not isinstance(details.get(key, ""), str)
    ]
    if "tool_calls" in details:
        calls = details["tool_calls"] = _parsed(details["tool_calls"])
        if not calls:  # an empty list calls nothing
            del details["tool_calls"]
        elif not _are_named(calls):
            faults.append(wrong_type(f"{place}: tool_calls", calls, _CALLS))
    return details, faults


def read_tools(value: JSON) -> tuple[list[JSON], list[Fault]]:
    """Return the tools of a record's column `tools`, and the broken rules."""
    tools = _parsed(_plain(value))
    if not tools:
        return [], []
    return (tools, []) if _are_named(tools) else ([], [wrong_type("tools", tools, _TOOLS)])


def with_tools(prompt: Text, tools: list[JSON]) -> tuple[Message, ...]:
    """Return a prompt, as messages, that offers tools."""
    first, *others = (Message("user", prompt),) if isinstance(prompt, str) else prompt
    return (Message.from_dict({**first.as_dict(), "tools": tools}), *others)


def calls_as_text(record: dict[str, JSON]) -> dict[str, JSON]:
    """Return a record whose tools and calls are JSON text: they have no schema for a table."""
    texts: dict[str, JSON] = {
        name: _turns_as_text(value)
        for name, value in record.items()
        if name in ("prompt", "chosen", "rejected")
    }
    if "responses" in record:
        texts["responses"] = [_turns_as_text(value) for value in record["responses"]]
    if "tools" in record:
        texts["tools"] = json.dumps(record["tools"], ensure_ascii=False)
    return {**record, **texts}


def _turns_as_text(value: JSON) -> JSON:
    return [_turn_as_text(turn) for turn in value] if isinstance(value, list) else value


def _turn_as_text(turn: dict[str, JSON]) -> dict[str, JSON]:
    if "tool_calls" not in turn:
        return turn
    return {**turn, "tool_calls": json.dumps(turn["tool_calls"], ensure_ascii=False)}


def _are_named(items: JSON) -> bool:
    if not isinstance(items, list):
        return False
    functions = [item.get("function", item) if isinstance(item, dict) else None for item in items]
    return all(isinstance(f, dict) and isinstance(f.get("name"), str) for f in functions)


def _parsed(value: JSON) -> JSON:
    """Parse what a file holds as JSON text; other text stays, and is a fault."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value) if value else None
    except ValueError:
        return value


def _plain(value: JSON) -> JSON:
    """Return plain lists and dicts, without keys that have no value."""
    if hasattr(value, "tolist"):  # NumPy's
        value = value.tolist()
    if isinstance(value, bytes):
        return value.decode("utf-8", "surrogateescape")
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items() if item is not None}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
