"""The log of a served policy: what people asked, what it answered, what they thought of it.

One line of JSON per request; all but `prompt` and `responses` may be missing:

    {"id": "r17", "time": "2026-03-01T12:00:00+00:00", "prompt": "2 + 2 =",
     "responses": [" 4", " 5"], "versions": ["7", "8"], "choice": 0, "thumbs": [true, null]}

`choice` is the number of the response that was chosen, or "tie". `thumbs` has true, false or null
for each response. A choice makes a pair of the chosen response with each other one, a tie of two
responses a pair of preference 0.5, and a thumb a rated response.
"""

from __future__ import annotations

import json
import os
import time as clock
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import (
    InvalidPair,
    PreferencePair,
    Text,
    broken,
    form_faults,
    shown,
    wrong_type,
)
from dpo_keras.preferences.rated_response import RatedResponse
from dpo_keras.preferences.records import Fields, missing, same_form
from dpo_keras.utils import JSON

FEEDBACKS = ("choices", "thumbs")
TIE = "tie"
LOG_COLUMNS = frozenset(
    ("id", "time", "prompt", "responses", "versions", "choice", "thumbs", "annotator", "group")
)


@dataclass(frozen=True, slots=True)
class LogRecord:
    """One request to a served policy, with the feedback that it got.

    Args:
        prompt: text, or the conversation so far as messages.
        responses: what was shown, in this order.
        versions: which version of the policy wrote each response; empty where unknown.
        choice: number of the response that was chosen, `TIE`, or None where nobody chose.
        thumbs: True, False or None for each response; empty where nobody rated.
        id: name of the request.
        time: ISO 8601, or seconds since 1970.
        annotator: who gave the feedback.
        group: what the request belongs to.
    """

    prompt: Text
    responses: tuple[Text, ...]
    versions: tuple[str, ...] = ()
    choice: int | str | None = None
    thumbs: tuple[bool | None, ...] = ()
    id: str | None = None
    time: str | float | None = None
    annotator: str | None = None
    group: str | None = None

    def pairs(self) -> list[PreferencePair]:
        """Return what the choice says: the chosen response with each other one."""
        if self.choice is None:
            return []
        first = 0 if self.choice == TIE else int(self.choice)
        return [
            PreferencePair(
                self.prompt,
                self.responses[first],
                other,
                preference=0.5 if self.choice == TIE else 1.0,
                annotator=self.annotator,
                group=self.group,
                id=self.id,
                swapped=place < first,  # `audit` counts how often the first response wins
            )
            for place, other in enumerate(self.responses)
            if place != first
        ]

    def rated(self) -> list[RatedResponse]:
        """Return what the thumbs say: a rated response for each."""
        names = (self.annotator, self.group, self.id)
        return [
            RatedResponse(self.prompt, response, thumb, 1.0, *names)
            for response, thumb in zip(self.responses, self.thumbs, strict=False)
            if thumb is not None
        ]


def is_log_record(record: object) -> bool:
    """Tell whether a raw record is a line of a feedback log."""
    return (
        isinstance(record, Mapping)
        and "responses" in record
        and not record.keys().isdisjoint(("choice", "thumbs", "versions"))
    )


def read_log_record(record: Mapping[str, JSON]) -> LogRecord:
    """Check one line of a feedback log.

    Args:
        record: the line, decoded from JSON.

    Raises:
        InvalidPair: (an `InputError`) with every broken rule.

    Example:
        >>> line = {"prompt": "2 + 2 =", "responses": [" 4", " 5"], "thumbs": [True, None]}
        >>> read_log_record(line).rated()
        [RatedResponse(prompt='2 + 2 =', response=' 4', desirable=1.0, ...)]
        >>> read_log_record({**line, "choice": 2})
        Traceback (most recent call last):
        ...
        dpo_keras.preferences.pair.InvalidPair: choice must be the number of a response ...
    """
    fields = _LogFields(record, cells=False, unused=Counter())
    responses = fields.responses()
    prompt = fields.text("prompt") if "prompt" in record else None
    if "prompt" not in record:
        fields.faults.append(missing(record, "prompt"))
    count = len(responses)
    choice = fields.choice(count)
    thumbs = fields.per_response("thumbs", count, (bool, type(None)), "true, false or null")
    versions = fields.per_response("versions", count, (str, int), "names")
    names = {key: fields.name(key) for key in ("id", "annotator", "group")}
    time = record.get("time")
    if time is not None and (isinstance(time, bool) or not isinstance(time, str | int | float)):
        fields.faults.append(wrong_type("time", time, "ISO 8601 text or seconds since 1970"))
    if prompt is not None and responses and not fields.faults:
        texts = [same_form(prompt, response, response)[:2] for response in responses]
        prompt, responses = texts[0][0], [text for _, text in texts]
        labels = [f"responses[{place}]" for place in range(len(responses))]
        fields.faults += form_faults((prompt, *responses), ("prompt", *labels))
    if fields.faults or prompt is None:
        raise InvalidPair(fields.faults)
    labels_of = tuple(map(str, versions))
    return LogRecord(prompt, tuple(responses), labels_of, choice, tuple(thumbs), time=time, **names)


class _LogFields(Fields):
    """The values of one line of a log; broken rules are collected in `faults`."""

    columns = LOG_COLUMNS

    def responses(self) -> list[Text]:
        values = self._list("responses", "a list of responses")
        texts = [self.value(f"responses[{place}]", value) for place, value in enumerate(values)]
        return [text for text in texts if text is not None]

    def choice(self, count: int) -> int | str | None:
        value: JSON = self.record.get("choice")
        value = value.item() if hasattr(value, "item") else value
        if value is None or (value == TIE and count == 2):
            return value
        if value == TIE:
            must = f"can be a tie of two responses only, got {count}."
            self.faults.append(broken("tie of many", "choice", value, must))
        elif isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < count:
            must = f"must be the number of a response (0 to {count - 1}), {TIE!r} or null, got "
            self.faults.append(broken("unknown choice", "choice", value, f"{must}{shown(value)}."))
        elif count == 1:
            must = "needs two responses to choose from, got 1."
            self.faults.append(broken("unknown choice", "choice", value, must))
        return value

    def per_response(
        self, name: str, count: int, types: tuple[type, ...], wanted: str
    ) -> list[JSON]:
        """Return the values of a column that has one for each response, or none."""
        if self.record.get(name) is None:
            return []
        values = self._list(name, f"a list of {wanted}")
        if not all(isinstance(value, types) for value in values):
            self.faults.append(wrong_type(name, values, f"a list of {wanted}"))
        elif values and len(values) != count:
            must = f"must have a value for each of the {count} responses, got {len(values)}."
            self.faults.append(broken("wrong length", name, values, must))
        return values

    def _list(self, name: str, wanted: str) -> list[JSON]:
        value: JSON = self.record.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        if isinstance(value, list | tuple) and (value or name != "responses"):
            return list(value)
        self.faults.append(wrong_type(name, value, wanted))
        return []


class FeedbackLog:
    """Append requests and their feedback to a log, one whole line at a time.

    Several threads and processes may write the same file: each line is one write at its end. A
    request that is logged twice, once when it is answered and once when its feedback comes, gives
    two lines; `read_preferences` takes feedback from both, so log the thumb once.

    Args:
        path: the file; it is made where it is missing.

    Raises:
        InputError: the file cannot be written.

    Example:
        >>> import tempfile
        >>> from dpo_keras.preferences import read_preferences
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     log = FeedbackLog(f"{folder}/feedback.jsonl")
        ...     log.write("2 + 2 =", [" 4"], versions=["7"], thumbs=[True])
        ...     log.write("2 + 2 =", [" 5"], versions=["8"], thumbs=[False])
        ...     rated = read_preferences(log.path)
        >>> [(one.response, one.desirable) for one in rated]
        [(' 4', 1.0), (' 5', 0.0)]
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)

    def write(
        self,
        prompt: str | Sequence[Mapping[str, JSON]],
        responses: Sequence[str | Sequence[Mapping[str, JSON]]],
        *,
        versions: Sequence[str] = (),
        choice: int | str | None = None,
        thumbs: Sequence[bool | None] = (),
        id: str | None = None,
        time: str | float | None = None,
        annotator: str | None = None,
        group: str | None = None,
    ) -> None:
        """Append one line; the arguments are those of `LogRecord`, `time` by default now.

        Raises:
            InvalidPair: (an `InputError`) the line breaks a rule; nothing is written.
            InputError: the file cannot be written.
        """
        if time is None:
            time = datetime.fromtimestamp(clock.time(), UTC).isoformat(timespec="milliseconds")
        record: dict[str, JSON] = {"time": time, "prompt": prompt, "responses": list(responses)}
        given = {"versions": list(versions), "thumbs": list(thumbs)}
        record |= {name: values for name, values in given.items() if values}
        names = {"id": id, "annotator": annotator, "group": group}
        record |= {name: value for name, value in names.items() if value is not None}
        record["choice"] = choice
        read_log_record(record)
        line = (json.dumps(record, ensure_ascii=False) + "\n").encode()
        try:
            place = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                # One call: the system puts lines of several processes behind each other.
                written = os.write(place, line)
            finally:
                os.close(place)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written: {error.strerror}.") from error
        if written < len(line):
            raise InputError(f"{self.path}: cannot be written: the disk is full.")
