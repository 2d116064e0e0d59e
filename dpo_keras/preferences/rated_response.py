"""The record of unpaired feedback: one response, and whether people found it good."""

from __future__ import annotations

from dataclasses import dataclass, fields

from dpo_keras.preferences.images import Image
from dpo_keras.preferences.pair import (
    BOUNDED,
    LARGEST,
    Fault,
    InvalidPair,
    Text,
    as_number,
    broken,
    form_faults,
    name_faults,
    offered_tools,
    place_faults,
    read_images,
    shown,
    wrong_type,
)
from dpo_keras.utils import JSON


@dataclass(frozen=True, slots=True)
class RatedResponse:
    """One rated response: `response` is good with probability `desirable`.

    Args:
        prompt: text, or the conversation so far as messages.
        response: text, or messages that begin and end with the assistant's.
        desirable: True (a thumb up) or False, or P(good) in [0, 1]; kept as a float.
        weight: how much the response counts in the loss, in [0, 1e6].
        annotator: who rated it.
        group: what the response belongs to (a topic, a language).
        id: name of the response in reports.
        images: what the prompt shows, as `PreferencePair` takes it.

    Raises:
        InvalidPair: (an `InputError`) with every broken rule.

    Example:
        >>> RatedResponse("2 + 2 =", " 4", True).desirable
        1.0
        >>> RatedResponse("2 + 2 =", "", 1.7)
        Traceback (most recent call last):
        ...
        dpo_keras.preferences.pair.InvalidPair: response must hold text, ...
        desirable must be true, false or a number in [0, 1], got 1.7.
    """

    prompt: Text
    response: Text
    desirable: float
    weight: float = 1.0
    annotator: str | None = None
    group: str | None = None
    id: str | None = None
    images: tuple[Image, ...] = ()

    def __post_init__(self) -> None:
        faults = form_faults((self.prompt, self.response), ("prompt", "response"))
        if self.images:
            images, image_problems = read_images(self.images)
            object.__setattr__(self, "images", images)
            faults += image_problems or place_faults(self.prompt, images)
        faults += rating_faults(self.desirable, self.weight)
        for name in ("annotator", "group", "id"):
            faults += name_faults(name, getattr(self, name))
        if faults:
            raise InvalidPair(faults)
        object.__setattr__(self, "desirable", float(self.desirable))

    @property
    def responses(self) -> tuple[Text]:
        """The response alone, as every record has its responses."""
        return (self.response,)

    @property
    def tools(self) -> list[JSON]:
        """The tools that the prompt offers, as JSON schemas."""
        return offered_tools(self.prompt)

    def as_dict(self) -> dict[str, JSON]:
        """Return the response as a record for files: messages as dicts, defaults left out."""
        record: dict[str, JSON] = {}
        for name in ("prompt", "response"):
            text = getattr(self, name)
            record[name] = text if isinstance(text, str) else [turn.as_dict() for turn in text]
        if self.tools:
            record["tools"] = record["prompt"][0].pop("tools")
        record["desirable"] = self.desirable
        for field in fields(self):
            if field.name not in record and (value := getattr(self, field.name)) != field.default:
                record[field.name] = value
        if self.images:
            record["images"] = [image.as_text() for image in self.images]
        return record


def rating_faults(desirable: object, weight: object, name: str = "desirable") -> list[Fault]:
    """Check a rating, called `name` in its file, and a weight; return the broken rules."""
    faults = []
    value = float(desirable) if isinstance(desirable, bool) else as_number(desirable)
    must = f"must be true, false or a number in [0, 1], got {shown(desirable)}."
    if value is None:
        faults.append(broken("wrong type", name, desirable, must))
    elif not 0.0 <= value <= 1.0:  # NaN fails this too
        faults.append(broken("desirable out of range", name, desirable, must))
    number = as_number(weight)
    if number is None:
        faults.append(wrong_type("weight", weight, "a number"))
    elif not 0.0 <= number <= LARGEST:
        rule = f"{BOUNDED}, got {shown(weight)}."
        faults.append(broken("weight out of range", "weight", weight, rule))
    return faults
