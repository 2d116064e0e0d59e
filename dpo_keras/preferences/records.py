r"""Prompts that stand only inside `chosen` and `rejected`, as in HH-RLHF: split by turn.

Both columns then hold the whole conversation. Everything before the last assistant turn is the
prompt, and must be the same in both. It is never found by the longest common beginning: that would
also swallow the words with which two responses happen to start.

Text is split after the last "\n\nAssistant:": the prompt ends with that marker, the response
begins with whatever follows it, as a rule a space. Joining them gives the conversation back, and
" Sure" after ":" is what byte-pair tokenizers have as one token.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from dpo_keras.preferences.pair import (
    Fault,
    InvalidPair,
    Message,
    PreferencePair,
    Text,
    as_number,
    number_faults,
    shown,
    text_faults,
    wrong_type,
)

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def is_conversation(text: object) -> bool:
    r"""Whether a value holds a conversation: messages, or text with an assistant marker.

    Example:
        >>> is_conversation("\n\nHuman: Hi\n\nAssistant: Hello!"), is_conversation("Hello!")
        (True, False)
    """
    return ASSISTANT in text if isinstance(text, str) else isinstance(text, tuple)


def split_conversations(
    chosen: Text, rejected: Text, names: tuple[str, str]
) -> tuple[Text, Text, Text] | list[Fault]:
    r"""Takes the shared prompt out of two conversations.

    Args:
        chosen: a conversation for which `is_conversation` holds.
        rejected: another of the same form.
        names: the columns they come from, for messages.

    Returns:
        `(prompt, chosen, rejected)`, or the broken rules.

    Example:
        >>> split_conversations(
        ...     "\n\nHuman: Hi\n\nAssistant: I am well", "\n\nHuman: Hi\n\nAssistant: I", ("c", "r")
        ... )
        ('\n\nHuman: Hi\n\nAssistant:', ' I am well', ' I')
    """
    faults = []
    parts: list[tuple[Text, Text]] = []
    for name, conversation in zip(names, (chosen, rejected), strict=True):
        if isinstance(conversation, str):
            part: tuple[Text, Text] | Fault = _split_text(name, conversation)
        else:
            part = _split_messages(name, conversation)
        if isinstance(part, Fault):
            faults.append(part)
        else:
            parts.append(part)
    if faults:
        return faults
    (prompt, chosen), (other, rejected) = parts
    if prompt != other:
        return [
            Fault(
                "conversations differ",
                names[0],
                _difference(prompt, other),
                f"{names[0]} and {names[1]} must be the same up to the last assistant turn; "
                f"they part at {shown(_difference(prompt, other))}.",
            )
        ]
    return prompt, chosen, rejected


def strip_prompt(prompt: tuple[Message, ...], response: tuple[Message, ...]) -> tuple[Message, ...]:
    """Drops the prompt's messages from a response that repeats them, as UltraFeedback's do."""
    return response[len(prompt) :] if response[: len(prompt)] == prompt else response


def _split_text(name: str, text: str) -> tuple[str, str] | Fault:
    cut = text.rfind(ASSISTANT)
    if text.rfind(HUMAN) > cut:
        return _last_turn(name, text[-60:])
    cut += len(ASSISTANT)
    prompt = text[:cut]
    if not prompt.replace(ASSISTANT, "").replace(HUMAN, "").strip():
        return _no_prompt(name, text)
    return prompt, text[cut:]


def _split_messages(
    name: str, messages: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...]] | Fault:
    if not messages or messages[-1].role != "assistant":
        return _last_turn(name, messages[-1].role if messages else messages)
    # A turn may be several messages: tool calls and their results up to the answer.
    start = len(messages) - 1
    while start and messages[start - 1].role in ("assistant", "tool"):
        start -= 1
    if not start:
        return _no_prompt(name, messages)
    return messages[:start], messages[start:]


def _last_turn(name: str, value: object) -> Fault:
    rule = f"{name} must end with the assistant's turn, got {shown(value)} last."
    return Fault("not the assistant's turn", name, value, rule)


def _no_prompt(name: str, value: object) -> Fault:
    rule = f"{name} must hold a human turn before the response, got {shown(value)}."
    return Fault("empty prompt", name, value, rule)


def _difference(one: Text, other: Text) -> Text:
    place = next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    longer = one if len(one) > place else other
    return longer[place : place + 40]


OPTIONAL = ("preference", "weight", "annotator", "group", "id", "margin", "swapped")
LAYOUTS = {
    "chosen/rejected": ("chosen", "rejected"),
    "response_a/response_b": ("response_a", "response_b"),
}
COLUMNS = frozenset(("prompt", *OPTIONAL, *(name for names in LAYOUTS.values() for name in names)))

# In a CSV cell messages stand as JSON. Cells that only resemble it must not be trained on as text.
_MESSAGES_JSON = re.compile(r'\s*\[\s*\{\s*"(?:role|content)"\s*:')
_INVALID: Any = object()


def read_record(
    record: Any, *, cells: bool = False, unused: Counter[str] | None = None
) -> tuple[PreferencePair, str]:
    """Turns a record into a pair.

    Args:
        record: a mapping with `chosen` and `rejected`, or `response_a`, `response_b` and
            `preference`; `prompt` may be missing where the responses are whole conversations.
            Texts are strings (or UTF-8 bytes) or lists of role/content mappings.
        cells: the values are CSV cells: numbers and messages stand as text, empty is missing.
        unused: counts columns and message keys that nothing is done with.

    Returns:
        The pair, and the layout it came in: a key of `LAYOUTS`.

    Raises:
        InvalidPair: naming every broken rule of the record.

    Example:
        >>> pair, layout = read_record(
        ...     {"prompt": "2 + 2 =", "response_a": " 5", "response_b": " 4", "preference": 0.25}
        ... )
        >>> pair.chosen, pair.preference, pair.swapped, layout
        (' 4', 0.75, True, 'response_a/response_b')
    """
    if isinstance(record, PreferencePair):
        return record, "chosen/rejected"
    if not isinstance(record, Mapping):
        raise InvalidPair([_not_a_record(record)])
    layout = "chosen/rejected"
    if "response_a" in record or "response_b" in record:
        if "chosen" not in record and "rejected" not in record:
            layout = "response_a/response_b"
    names = LAYOUTS[layout]
    unused = Counter() if unused is None else unused
    if not record.keys() <= COLUMNS:
        unused.update(f"column {column!r}" for column in record if column not in COLUMNS)

    faults: list[Fault] = []
    one = _text(record, names[0], cells, faults, unused)
    other = _text(record, names[1], cells, faults, unused)
    prompt: Any = _INVALID
    if record.get("prompt") is not None:
        prompt = _text(record, "prompt", cells, faults, unused)
    elif is_conversation(one) and is_conversation(other):
        parts = split_conversations(one, other, names)
        if isinstance(parts, list):
            faults += parts
        else:
            prompt, one, other = parts
    elif one is not _INVALID and other is not _INVALID:
        faults.append(_missing(record, "prompt"))

    preference = _number(record, "preference", 1.0, cells)
    if layout == "response_a/response_b" and record.get("preference") in (None, ""):
        faults.append(_missing(record, "preference"))
        preference = 1.0
    weight = _number(record, "weight", 1.0, cells)
    margin = _number(record, "margin", None, cells)
    faults += number_faults(preference, weight, margin, lowest=0.0)
    annotator = _name(record, "annotator", faults)
    group = _name(record, "group", faults)
    name = _name(record, "id", faults)
    swapped = _flag(record, "swapped", cells, faults)

    fields = ("prompt", *names)
    readable = prompt is not _INVALID and one is not _INVALID and other is not _INVALID
    if readable:
        prompt, one, other = _same_form(prompt, one, other)
    if faults:
        # What could be read is checked too, so that one look mends the whole line.
        raise InvalidPair(faults + (text_faults(prompt, one, other, fields) if readable else []))
    first, second = one, other
    if preference < 0.5:
        first, second, preference, swapped = other, one, 1.0 - preference, not swapped
    try:
        pair = PreferencePair(
            prompt,
            first,
            second,
            float(preference),
            float(weight),
            annotator,
            group,
            name,
            None if margin is None else float(margin),
            swapped,
        )
    except InvalidPair:
        # Only texts can still be wrong; told with the columns that the file has.
        raise InvalidPair(text_faults(prompt, one, other, fields)) from None
    return pair, layout


def missing_columns(columns: Iterable[str]) -> list[Fault]:
    """Returns the faults of a table's header, one for each column that every record would lack.

    Example:
        >>> [fault.field for fault in missing_columns(["prompt", "choosen", "rejected"])]
        ['chosen']
    """
    header = dict.fromkeys(columns)
    if header.keys() & {"response_a", "response_b"} and not header.keys() & {"chosen", "rejected"}:
        needed: tuple[str, ...] = (*LAYOUTS["response_a/response_b"], "preference")
    else:
        needed = LAYOUTS["chosen/rejected"]
    # 'prompt' is not asked for: whole conversations may hold it.
    return [_missing(header, name) for name in needed if name not in header]


def _text(
    record: Mapping[str, Any],
    name: str,
    cells: bool,
    faults: list[Fault],
    unused: Counter[str],
) -> Any:
    """Returns a text or a tuple of messages; `_INVALID`, with the fault noted, for all else."""
    value = record.get(name)
    if value is None:
        faults.append(_missing(record, name))
        return _INVALID
    if isinstance(value, bytes):  # as TensorFlow Datasets gives text
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        if not (cells and _MESSAGES_JSON.match(value)):
            return value
        try:
            value = json.loads(value)
        except ValueError as error:
            rule = f"{name} begins like a JSON list of messages but is not one: {error}."
            faults.append(Fault("not JSON", name, value, rule))
            return _INVALID
    if hasattr(value, "tolist"):  # a NumPy array, as pandas gives lists
        value = value.tolist()
    if not isinstance(value, list | tuple):
        faults.append(wrong_type(name, value, "text or a list of role/content messages"))
        return _INVALID
    before = len(faults)
    messages = [
        _message(f"{name}: message {number}", message, faults, unused)
        for number, message in enumerate(value, 1)
    ]
    return tuple(messages) if len(faults) == before else _INVALID


def _message(place: str, value: Any, faults: list[Fault], unused: Counter[str]) -> Any:
    if isinstance(value, Message):
        return value
    if not isinstance(value, Mapping):
        faults.append(wrong_type(place, value, "a mapping with role and content"))
        return _INVALID
    texts: list[Any] = []
    for key in ("role", "content"):
        text = value.get(key)
        if isinstance(text, bytes):
            text = text.decode("utf-8", "surrogateescape")
        if not isinstance(text, str):
            faults.append(wrong_type(f"{place}: {key}", text, "text"))
        texts.append(text)
    for key in value:
        # Parquet fills the keys that other messages have with None: nothing is lost by those.
        if key not in ("role", "content") and value[key] is not None:
            unused[f"message key {key!r}"] += 1
    return Message(texts[0], texts[1])


def _same_form(prompt: Any, one: Any, other: Any) -> tuple[Any, Any, Any]:
    """Brings mixed text and messages to messages, and takes repeated prompts off responses."""
    if isinstance(prompt, str) and isinstance(one, tuple) and isinstance(other, tuple):
        prompt = (Message("user", prompt),)
    if isinstance(prompt, tuple):
        one, other = (
            (Message("assistant", text),) if isinstance(text, str) else strip_prompt(prompt, text)
            for text in (one, other)
        )
    return prompt, one, other


def _number(record: Mapping[str, Any], name: str, default: Any, cells: bool) -> Any:
    value = record.get(name)
    if value is None or (cells and value == ""):
        return default
    if cells:
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _name(record: Mapping[str, Any], key: str, faults: list[Fault]) -> str | None:
    value = record.get(key)
    if value is None or value == "":
        return None
    if isinstance(value, bytes):
        value = value.decode("utf-8", "surrogateescape")
    if isinstance(value, str):
        return value
    number = as_number(value)
    if number is not None and math.isnan(number):  # a missing value in pandas
        return None
    if number is not None and number.is_integer():
        return str(int(value))
    faults.append(wrong_type(key, value, "text or a whole number"))
    return None


def _flag(record: Mapping[str, Any], key: str, cells: bool, faults: list[Fault]) -> bool:
    value = record.get(key)
    if cells and isinstance(value, str):
        value = {"": False, "false": False, "true": True}.get(value.lower(), value)
    if value is None or isinstance(value, bool):
        return bool(value)
    faults.append(wrong_type(key, value, "true or false"))
    return False


def _missing(record: Mapping[str, Any], name: str) -> Fault:
    if name in record:
        return Fault("missing value", name, record[name], f"{name} has no value.")
    columns = ", ".join(map(str, record)) or "none"
    near = difflib.get_close_matches(name, [str(key) for key in record if key not in COLUMNS], 1)
    hint = f"; did you mean {near[0]!r} by it?" if near else "."
    return Fault(
        "missing column",
        name,
        None,
        f"column {name!r} is missing, the columns are: {shown(columns, 200)[1:-1]}{hint}",
    )


def _not_a_record(value: Any) -> Fault:
    return wrong_type("the record", value, "a mapping such as {'prompt': ..., 'chosen': ..., ...}")
