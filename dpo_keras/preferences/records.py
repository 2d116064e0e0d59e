"""One raw record of any layout becomes a pair."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping

from dpo_keras.preferences.images import PART_KEYS, PLACE, Image
from dpo_keras.preferences.implicit_prompts import is_conversation, split_conversations
from dpo_keras.preferences.pair import (
    Fault,
    InvalidPair,
    Message,
    PreferencePair,
    Text,
    as_number,
    broken,
    name_faults,
    number_faults,
    place_faults,
    plain_text,
    read_images,
    text_faults,
    wrong_type,
)
from dpo_keras.preferences.tool_calls import read_details, read_tools, with_tools
from dpo_keras.utils import JSON
from dpo_keras.utils.text import nearest, shortened, visible

TOOLS = "tools"
KNOWN_KEYS = frozenset(("role", "content", "tool_calls", "tool_call_id"))
OPTIONAL = ("preference", "weight", "annotator", "group", "id", "margin", "swapped", "images")
LAYOUTS = {
    "chosen/rejected": ("chosen", "rejected"),
    "response_a/response_b": ("response_a", "response_b"),
}
_RESPONSES = tuple(name for names in LAYOUTS.values() for name in names)
COLUMNS = frozenset(("prompt", "image", TOOLS, *OPTIONAL, *_RESPONSES))

# A CSV cell holds messages as JSON. Cells that only resemble it must not be trained on as text.
_MESSAGES_JSON = re.compile(r'\s*\[\s*\{\s*"(?:role|content)"\s*:')


def read_record(
    record: object,
    *,
    cells: bool = False,
    unused: Counter[str] | None = None,
    folder: str = "",
) -> tuple[PreferencePair, str]:
    """Return a record's pair and layout (of `LAYOUTS`), or raise `InvalidPair` with every fault.

    With `cells` the values are those of CSV: numbers and messages are text, empty is missing.
    `unused` counts the columns and message keys that are ignored. Relative paths of images begin at
    `folder`.
    """
    if isinstance(record, PreferencePair):
        return record, "chosen/rejected"
    if not isinstance(record, Mapping):
        wanted = "a mapping such as {'prompt': ..., 'chosen': ..., ...}"
        raise InvalidPair([wrong_type("the record", record, wanted)])
    layout = _layout(record)
    if isinstance(layout, Fault):
        raise InvalidPair([layout])
    fields = Fields(record, cells, Counter() if unused is None else unused)
    texts = fields.texts(LAYOUTS[layout])
    preference = fields.number("preference", 1.0)
    if layout == "response_a/response_b" and record.get("preference") in (None, ""):
        fields.faults.append(missing(record, "preference"))
        preference = 1.0
    weight, margin = fields.number("weight", 1.0), fields.number("margin", None)
    fields.faults += number_faults(preference, weight, margin, lowest=0.0)
    others: dict[str, JSON] = {key: fields.name(key) for key in ("annotator", "group", "id")}
    swapped = fields.flag("swapped")
    others["images"] = fields.images(texts, LAYOUTS[layout], folder)
    tools, faults = read_tools(record.get(TOOLS))
    fields.faults += faults

    columns = ("prompt", *LAYOUTS[layout])
    if fields.faults or texts is None:
        # Whatever could be read is checked too, so that one look mends the whole line.
        raise InvalidPair(fields.faults + (text_faults(*texts, columns) if texts else []))
    if tools:
        texts = same_form(with_tools(texts[0], tools), *texts[1:])
    prompt, chosen, rejected = texts
    if preference < 0.5:
        chosen, rejected = rejected, chosen
        preference, swapped = 1.0 - preference, not swapped
    others |= {"preference": float(preference), "weight": float(weight), "swapped": swapped}
    if margin is not None:
        others["margin"] = float(margin)
    try:
        return PreferencePair(prompt, chosen, rejected, **others), layout
    except InvalidPair:
        # Only texts can still be wrong. The faults name the columns that the file has.
        raise InvalidPair(text_faults(*texts, columns)) from None


def header_faults(columns: Iterable[str]) -> list[Fault]:
    """Return the faults of a table's header: columns that occur twice, or that every row lacks."""
    header = Counter(columns)
    repeated = [name for name, count in header.items() if count > 1 and name]
    if repeated:
        rule = "occurs more than once, so it is not clear which one is meant; keep one."
        return [Fault("repeated column", n, None, f"column {n!r} {rule}") for n in repeated]
    # 'prompt' is not required: whole conversations may hold it.
    needed = (("chosen", "rejected"), ("response_a", "response_b", "preference"))
    one, other = ([name for name in names if name not in header] for names in needed)
    if not one or not other:
        return []
    compared = len(one) == 2 and len(other) < 3
    return [missing(header, name) for name in (other if compared else one)]


def _layout(record: Mapping[str, object]) -> str | Fault:
    """Return the layout whose columns hold values; a fault where both do."""
    one, other = LAYOUTS
    if not record.keys() & LAYOUTS[other]:
        return one
    if not record.keys() & LAYOUTS[one]:
        return other
    # Both have columns, as in a table of files of both layouts: the values decide.
    held = {layout: [n for n in names if is_given(record, n)] for layout, names in LAYOUTS.items()}
    if held[one] and held[other]:
        more = ["preference"] if is_given(record, "preference") else []
        rule = (
            f"the record has {', '.join(held[one])} and also {', '.join(held[other] + more)}: two "
            "formats, which may contradict each other. Keep the columns of one, or choose it by "
            f"columns, as in columns={{'{held[one][0]}': '{held[one][0]}'}}."
        )
        return Fault("two formats", held[one][0], None, rule)
    return other if held[other] else one


def is_given(record: Mapping[str, object], name: str) -> bool:
    """Return whether a record has a value in a column."""
    value = record.get(name)
    return value is not None and not (isinstance(value, str) and not value)


def missing(record: Mapping[str, object], name: str) -> Fault:
    """Return the fault of a record that lacks a column, or has no value in it."""
    if name in record:
        return broken("missing value", name, record[name], "has no value.")
    columns = shortened(", ".join(visible(str(key)) for key in record) or "none", 200)
    near = nearest(name, [str(key) for key in record if key not in COLUMNS])
    if near:
        hint = f"; did you mean {near!r} by it? Then"
    else:
        hint, near = ". If the data call it otherwise,", "..."
    rule = (
        f"column {name!r} is missing, the columns are: {columns}{hint} give "
        f"columns={{{name!r}: {near!r}}} (in a configuration data.columns, on the command line "
        f"--column {name}={near})."
    )
    return Fault("missing column", name, None, rule)


class Fields:
    """The values of one record; broken rules are collected in `faults`."""

    columns = COLUMNS

    def __init__(self, record: Mapping[str, JSON], cells: bool, unused: Counter[str]):
        self.record, self.cells, self.unused = record, cells, unused
        self.faults: list[Fault] = []
        self.parts: dict[str, list[JSON]] = {}  # the image of each image part, None without
        if not record.keys() <= self.columns:
            unused.update(f"column {name!r}" for name in record if name not in self.columns)

    def texts(self, names: tuple[str, str]) -> tuple[Text, Text, Text] | None:
        """Return prompt and responses in one form; None where one of them cannot be read."""
        one, other = self.text(names[0]), self.text(names[1])
        separate = self.record.get("prompt") is not None
        prompt = self.text("prompt") if separate else None
        if one is None or other is None or (separate and prompt is None):
            return None
        if prompt is not None:
            return same_form(prompt, one, other)
        if is_conversation(one) and is_conversation(other):
            parts = split_conversations(one, other, names)
            if not isinstance(parts, list):
                return same_form(*parts)
            self.faults += parts
        else:
            self.faults.append(missing(self.record, "prompt"))
        return None

    def text(self, name: str) -> Text | None:
        """Return a text or a tuple of messages."""
        if self.record.get(name) is None:
            self.faults.append(missing(self.record, name))
            return None
        return self.value(name, decoded(self.record[name]))

    def value(self, name: str, value: JSON) -> Text | None:
        """Return a text or a tuple of messages of the value that a field has."""
        if isinstance(value, str):
            if not (self.cells and _MESSAGES_JSON.match(value)):
                return value
            try:
                value = json.loads(value)
            except ValueError as error:
                must = f"begins like a JSON list of messages but is not one: {error}."
                self.faults.append(broken("not JSON", name, value, must))
                return None
        if hasattr(value, "tolist"):  # a NumPy array: lists in pandas
            value = value.tolist()
        if not isinstance(value, list | tuple):
            self.faults.append(wrong_type(name, value, "text or a list of role/content messages"))
            return None
        before = len(self.faults)
        turns = [self._message(name, n, turn) for n, turn in enumerate(value, 1)]
        return tuple(turns) if len(self.faults) == before else None

    def _message(self, name: str, number: int, value: JSON) -> Message:
        place = f"{name}: message {number}"
        if isinstance(value, Message):
            return value
        if not isinstance(value, Mapping):
            self.faults.append(wrong_type(place, value, "a mapping with role and content"))
            return Message("", "")
        details, faults = read_details(place, value)
        self.faults += faults
        content = self._joined(name, value.get("content"))
        texts = [decoded(value.get("role")), decoded(content)]
        if texts[1] is None and details:
            texts[1] = ""  # a message that only calls tools
        for key, text in zip(("role", "content"), texts, strict=True):
            if not isinstance(text, str):
                self.faults.append(wrong_type(f"{place}: {key}", text, "text"))
        for key in value:
            # Parquet fills keys that only other messages have with None: nothing is lost.
            if key not in KNOWN_KEYS | details.keys() and value[key] is not None:
                self.unused[f"message key {key!r}"] += 1
        return Message.from_dict({"role": texts[0], "content": texts[1], **details})

    def _joined(self, name: str, content: JSON) -> JSON:
        """Return content parts as one text with places for images; other content as it is."""
        content = content.tolist() if hasattr(content, "tolist") else content
        if not isinstance(content, list | tuple):
            return content
        words: list[str] = []
        for part in content:
            kind = part.get("type") if isinstance(part, Mapping) else None
            if kind == "text" and isinstance(part.get("text"), str):
                words.append(part["text"])
            elif kind in ("image", "image_url"):
                words.append(PLACE)
                given = any(part.get(key) is not None for key in PART_KEYS)
                self.parts.setdefault(name, []).append(part if given else None)
            else:
                return content
        return "".join(words)

    def images(
        self, texts: tuple[Text, Text, Text] | None, names: tuple[str, str], folder: str
    ) -> tuple[Image, ...]:
        """Return the prompt's images: those of a column, or of the parts of its messages."""
        columns = [name for name in ("images", "image") if is_given(self.record, name)]
        if not columns and not self.parts:
            return ()
        source = "prompt" if "prompt" in self.parts else names[0]
        inside = [image for image in self.parts.get(source, []) if image is not None]
        values = _as_list(self.record[columns[0]], self.cells) if columns else inside
        if len(columns) == 2 or (values and inside and columns):
            must = "must be given once: in a column, or in the parts of the prompt's messages."
            self.faults.append(broken("images twice", "images", None, must))
            return ()
        images, faults = read_images(values, folder)
        self.faults += faults
        if texts is None or faults:
            return images
        for name, response in zip(names, texts[1:], strict=True):
            if name in self.parts and PLACE in plain_text(response):
                must = "must have its images in the prompt; a response is text."
                self.faults.append(broken("image in a response", name, None, must))
        self.faults += place_faults(texts[0], images, len(self.parts.get(source, [])))
        return images

    def number(self, name: str, default: float | None) -> JSON:
        """Return a number, or whatever stands in its place."""
        value = self.record.get(name)
        if value is None or (self.cells and value == ""):
            return default
        with contextlib.suppress(ValueError):
            return float(value) if self.cells else value
        return value

    def name(self, key: str) -> str | None:
        """Return a name; integers become text, a missing value None."""
        value = decoded(self.record.get(key))
        if value is None or value == "":
            return None
        if isinstance(value, str):
            self.faults += name_faults(key, value)
            return value
        number = as_number(value)
        if number is not None and math.isnan(number):  # a missing value in pandas
            return None
        if number is not None and number.is_integer():
            return str(int(value))
        self.faults.append(wrong_type(key, value, "text or a whole number"))
        return None

    def flag(self, key: str) -> bool:
        """Return a truth value; a missing one is False."""
        value = self.record.get(key)
        if self.cells and isinstance(value, str):
            value = {"": False, "false": False, "true": True}.get(value.lower(), value)
        if value is None or isinstance(value, bool):
            return bool(value)
        self.faults.append(wrong_type(key, value, "true or false"))
        return False


def _as_list(value: JSON, cells: bool) -> list[JSON]:
    """Return the images of a column: it holds a list, or one."""
    if hasattr(value, "tolist"):  # a NumPy array: lists in pandas
        value = value.tolist()
    if cells and isinstance(value, str) and value.startswith("["):
        with contextlib.suppress(ValueError):
            value = json.loads(value)
    return list(value) if isinstance(value, list | tuple) else [value]


def decoded(value: JSON) -> JSON:
    """Decode text that TensorFlow Datasets holds as bytes."""
    return value.decode("utf-8", "surrogateescape") if isinstance(value, bytes) else value


def same_form(prompt: Text, one: Text, other: Text) -> tuple[Text, Text, Text]:
    """Turn mixed text and messages into messages; drop the prompt's messages from responses."""
    if isinstance(prompt, str):
        if isinstance(one, str) or isinstance(other, str):
            return prompt, one, other
        prompt = (Message("user", prompt),)
    return prompt, _reply(prompt, one), _reply(prompt, other)


def _reply(prompt: tuple[Message, ...], response: Text) -> Text:
    if isinstance(response, str):
        return (Message("assistant", response),)
    # UltraFeedback's responses repeat the prompt.
    return response[len(prompt) :] if response[: len(prompt)] == prompt else response
