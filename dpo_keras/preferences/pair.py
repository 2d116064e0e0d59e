"""The record that everything downstream works on: one comparison of two responses to a prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from numbers import Real
from typing import TypeAlias

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.images import PLACE, Image, InvalidImage
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened

# What a message may have beside role and content; `tools` stands in a prompt's first message.
DETAILS = ("tool_calls", "tool_call_id", "name", "tools")
ROLES = ("system", "user", "assistant", "tool")
# Larger weights and margins overflow float32 in the loss, where the model would seem at fault.
LARGEST, BOUNDED = 1e6, "must be in [0, 1e6]"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation.

    Args:
        role: "system", "user", "assistant" or "tool".
        content: the text of the turn; empty where it only calls tools.
        details: what else it has (`tool_calls`, `tool_call_id`, `name`), a JSON object as text.

    Example:
        >>> call = {"function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
        >>> turn = Message.from_dict({"role": "assistant", "tool_calls": [call]})
        >>> print(turn.words)
        {"name": "add", "arguments": {"a": 2, "b": 2}}
    """

    role: str
    content: str
    details: str = ""

    @classmethod
    def from_dict(cls, turn: Mapping[str, JSON]) -> Message:
        """Make a message of a mapping that is known to be well-formed."""
        details = {key: turn[key] for key in DETAILS if turn.get(key) is not None}
        text = json.dumps(details, ensure_ascii=False) if details else ""
        return cls(turn["role"], turn.get("content") or "", text)

    def as_dict(self) -> dict[str, JSON]:
        """Return the message in the form of chat templates and files."""
        details = json.loads(self.details) if self.details else {}
        return {"role": self.role, "content": self.content, **details}

    @property
    def words(self) -> str:
        """What the message says, with the tools that it calls, to be shown."""
        calls = self.as_dict().get("tool_calls") or () if self.details else ()
        texts = [json.dumps(call.get("function", call), ensure_ascii=False) for call in calls]
        return "\n".join(filter(None, [self.content, *texts]))


Text: TypeAlias = str | tuple[Message, ...]
"""A prompt or a response: plain text, or the messages of a conversation."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One broken rule of one record: its short name, the column, the value found, a sentence."""

    rule: str
    field: str
    value: object
    message: str


class InvalidPair(InputError):  # noqa: N818 (public name)
    """A record that breaks rules; `faults` holds one `Fault` for each."""

    def __init__(self, faults: Iterable[Fault]):
        self.faults = tuple(faults)
        super().__init__([fault.message for fault in self.faults])


@dataclass(frozen=True, slots=True)
class PreferencePair:
    """One comparison: `chosen` is better than `rejected` with probability `preference`.

    Args:
        prompt: text, or the conversation so far as messages.
        chosen: the better response: text, or messages that begin and end with the assistant's.
        rejected: the other response, in the same form.
        preference: P(chosen is better), in [0.5, 1]; 0.5 is a tie. The readers swap the responses
            of records with less; here it is an error.
        weight: how much the pair counts in the loss, in [0, 1e6].
        annotator: who compared.
        group: what the pair belongs to (a topic, a language), for group-robust training.
        id: name of the pair in reports.
        margin: strength of the preference, in [0, 1e6] (arXiv 2307.09288, section 3.2.2).
        swapped: the source showed `rejected` first. `audit` measures position bias by it.
        images: what the prompt shows: paths, bytes, data URLs, images of Pillow or `Image`s. They
            stand where the prompt says `<image>`, once for each; before its text where it does not.

    Raises:
        InvalidPair: (an `InputError`) with every broken rule.

    Example:
        >>> PreferencePair("2 + 2 =", " 4", " 5", annotator="ann").preference
        1.0
        >>> PreferencePair("2 + 2 =", " 4", " 4", preference=1.7)
        Traceback (most recent call last):
        ...
        dpo_keras.preferences.pair.InvalidPair: chosen and rejected are the same text, ...
        preference must be in [0.5, 1], got 1.7.
    """

    prompt: Text
    chosen: Text
    rejected: Text
    preference: float = 1.0
    weight: float = 1.0
    annotator: str | None = None
    group: str | None = None
    id: str | None = None
    margin: float | None = None
    swapped: bool = False
    images: tuple[Image, ...] = ()

    def __post_init__(self) -> None:
        faults = text_faults(self.prompt, self.chosen, self.rejected)
        if self.images:
            images, image_problems = read_images(self.images)
            object.__setattr__(self, "images", images)
            faults += image_problems or place_faults(self.prompt, images)
        faults += number_faults(self.preference, self.weight, self.margin, lowest=0.5)
        for name in ("annotator", "group", "id"):
            faults += name_faults(name, getattr(self, name))
        if faults:
            raise InvalidPair(faults)

    @property
    def responses(self) -> tuple[Text, Text]:
        """Chosen and rejected, as every record has its responses."""
        return self.chosen, self.rejected

    @property
    def tools(self) -> list[JSON]:
        """The tools that the prompt offers, as JSON schemas."""
        return offered_tools(self.prompt)

    def as_dict(self) -> dict[str, JSON]:
        """Return the pair as a record for files: messages as dicts, optional defaults left out."""
        record: dict[str, JSON] = {}
        for name in ("prompt", "chosen", "rejected"):
            text = getattr(self, name)
            record[name] = text if isinstance(text, str) else [turn.as_dict() for turn in text]
        if self.tools:
            record["tools"] = record["prompt"][0].pop("tools")
        record["preference"] = self.preference
        for field in fields(self):
            if field.name not in record and (value := getattr(self, field.name)) != field.default:
                record[field.name] = value
        if self.images:
            record["images"] = [image.as_text() for image in self.images]
        return record


def offered_tools(prompt: Text) -> list[JSON]:
    """Return the tools that a prompt offers, as JSON schemas."""
    if isinstance(prompt, str) or not prompt or not prompt[0].details:
        return []
    return list(prompt[0].as_dict().get("tools") or ())


def plain_text(text: Text) -> str:
    r"""Return the words of a text or of messages, without roles: for lengths and display.

    Example:
        >>> plain_text((Message("user", "Hi"), Message("assistant", "Hello!")))
        'Hi\nHello!'
    """
    return text if isinstance(text, str) else "\n".join(message.words for message in text)


def shown(value: object, width: int = 60) -> str:
    """Return a value for an error message, cut where it is long."""
    try:
        return shortened(repr(value), width)
    except ValueError:  # integers of thousands of digits have no repr
        return f"a very long {type(value).__name__}"


def as_number(value: object) -> float | None:
    """Return a real number (NumPy's included, bool excluded) as float, anything else as None."""
    if isinstance(value, float):
        return value
    if not isinstance(value, Real) or isinstance(value, bool):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer beyond all floats
        return math.inf


def broken(rule: str, field: str, value: object, must: str) -> Fault:
    """Return a fault whose message is the field's name and what it must be."""
    return Fault(rule, field, value, InputProblem(field, must))


def wrong_type(field: str, value: object, wanted: str) -> Fault:
    """Return the fault of a value of another type than the wanted one."""
    kind = type(value).__name__
    return broken("wrong type", field, value, f"must be {wanted}, got {shown(value)} ({kind}).")


def text_faults(
    prompt: Text,
    chosen: Text,
    rejected: Text,
    names: tuple[str, str, str] = ("prompt", "chosen", "rejected"),
) -> list[Fault]:
    """Check a prompt and two responses; return the broken rules, with `names` as fields."""
    if faults := form_faults((prompt, chosen, rejected), names):
        return faults
    # White space at the ends makes no preference. Messages are compared unchanged.
    one, other = (text.strip() if isinstance(text, str) else text for text in (chosen, rejected))
    if one == other:
        must = (
            f"and {names[2]} are the same text, so neither can be preferred, "
            f"got {shown(plain_text(chosen))} twice."
        )
        return [broken("identical responses", names[1], chosen, must)]
    return []


def form_faults(texts: Sequence[Text], names: Sequence[str]) -> list[Fault]:
    """Check that a prompt and its responses hold text, all of one form; `names` are the fields."""
    faults = _faults_of("prompt", names[0], texts[0])
    for name, response in zip(names[1:], texts[1:], strict=True):
        faults += _faults_of("response", name, response) or _role_faults(name, response)
    forms = ["text" if isinstance(text, str) else "messages" for text in texts]
    if faults or len(set(forms)) == 1:
        return faults
    found = ", ".join(f"{name} is {form}" for name, form in zip(names, forms, strict=True))
    message = f"{', '.join(names)} must all be text or all be messages; {found}."
    return [Fault("mixed forms", names[1], texts[1], message)]


def read_images(values: Iterable[JSON], folder: str = "") -> tuple[tuple[Image, ...], list[Fault]]:
    """Return references to images, and a fault for each that cannot be one."""
    images, faults = [], []
    for number, value in enumerate(values, 1):
        try:
            images.append(Image.of(value, folder))
        except InvalidImage as error:
            rule = f"{error.rule}: image {number} {error.must}"
            faults.append(Fault(error.rule, "images", number, f"images: {rule}"))
    return tuple(images), faults


def place_faults(prompt: Text, images: tuple[Image, ...], parts: int = 0) -> list[Fault]:
    """Check that a prompt has no place for an image, or one for each; `parts` are image parts."""
    places = plain_text(prompt).count(PLACE)
    if places == len(images) or (not places and not parts) or (not images and not parts):
        return []
    must = (
        f"must be as many as the prompt's places for them ({PLACE} or parts of type 'image'), got "
        f"{len(images)} images and {places} places."
    )
    return [broken("images and places differ", "images", len(images), must)]


def number_faults(
    preference: object, weight: object, margin: object, *, lowest: float
) -> list[Fault]:
    """Check preference (in [lowest, 1]), weight and margin; return the broken rules."""
    numbers = (
        ("preference", preference, lowest, 1.0, f"must be in [{lowest:g}, 1]"),
        ("weight", weight, 0.0, LARGEST, BOUNDED),
        ("margin", 0.0 if margin is None else margin, 0.0, LARGEST, BOUNDED),
    )
    faults = []
    for name, number, low, high, must in numbers:
        value = as_number(number)
        if value is None:
            faults.append(wrong_type(name, number, "a number"))
        elif not low <= value <= high:  # NaN fails this too
            rule = f"{name} out of range"
            faults.append(broken(rule, name, number, f"{must}, got {shown(number)}."))
    return faults


def name_faults(field: str, name: object) -> list[Fault]:
    """Check the name of an annotator, a group or a pair; return the broken rules."""
    if name is None:
        return []
    if not isinstance(name, str):
        return [wrong_type(field, name, "text")]
    return [] if name.isascii() else _unicode_faults(field, name)


def _faults_of(kind: str, name: str, text: Text) -> list[Fault]:
    """Check the form of one text, and that it holds any."""
    if isinstance(text, str):
        faults = [] if text.isascii() else _unicode_faults(name, text)
    elif isinstance(text, tuple) and all(isinstance(message, Message) for message in text):
        faults = [fault for n, message in enumerate(text, 1) for fault in _turn(name, n, message)]
    else:
        faults = [wrong_type(name, text, "text or a list of role/content messages")]
    if not faults and not plain_text(text).strip():
        faults.append(broken(f"empty {kind}", name, text, f"must hold text, got {shown(text)}."))
    return faults


def _turn(name: str, number: int, message: Message) -> list[Fault]:
    content = f"{name}: content of message {number}"
    if isinstance(message.content, str):
        faults = _unicode_faults(content, message.content)
        faults += _unicode_faults(f"{name}: tool calls of message {number}", message.details)
    else:
        faults = [wrong_type(content, message.content, "text")]
    if message.role not in ROLES:
        known = f"must be one of {', '.join(ROLES)}, got {shown(message.role)}."
        rule = f"{name}: role of message {number} {known}"
        faults.append(Fault("unknown role", name, message.role, rule))
    return faults


def _role_faults(name: str, text: Text) -> list[Fault]:
    if isinstance(text, str):
        return []
    roles = [message.role for message in text]
    if roles[0] == roles[-1] == "assistant" and "user" not in roles:
        return []
    must = (
        "must be the assistant's turn: messages that begin and end with role 'assistant', and "
        f"none of the user's, got roles {shown(roles)}."
    )
    return [broken("not the assistant's turn", name, roles, must)]


def _unicode_faults(name: str, text: str) -> list[Fault]:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        # JSON can spell half of a character ("\ud83d"), which no tokenizer can read.
        bad = text[error.start : error.start + 1]
        must = f"must be valid UTF-8 text, character {error.start + 1} is {bad!r}."
        return [broken("not UTF-8", name, bad, must)]
    return []
