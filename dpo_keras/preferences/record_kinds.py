"""Raw records of every kind: pairs, rated responses, rankings, and lines of a feedback log."""

from __future__ import annotations

import contextlib
import json
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import TypeAlias

from dpo_keras.preferences import records
from dpo_keras.preferences.feedback_log import (
    FEEDBACKS,
    LOG_COLUMNS,
    is_log_record,
    read_log_record,
)
from dpo_keras.preferences.implicit_prompts import is_conversation, split_conversation
from dpo_keras.preferences.pair import (
    Fault,
    InvalidPair,
    PreferencePair,
    Text,
    form_faults,
    number_faults,
    wrong_type,
)
from dpo_keras.preferences.ranked_responses import RankedResponses, ranking_faults
from dpo_keras.preferences.rated_response import RatedResponse, rating_faults
from dpo_keras.preferences.records import LAYOUTS, TOOLS, Fields, is_given, missing, same_form
from dpo_keras.preferences.tool_calls import read_tools, with_tools
from dpo_keras.utils import JSON

Record: TypeAlias = PreferencePair | RatedResponse | RankedResponses
"""A record of preference data, of any kind."""
# What errors call one record of a kind, and several.
KINDS: dict[type, tuple[str, str]] = {
    PreferencePair: ("a pair", "pairs (choices)"),
    RatedResponse: ("a rated response", "rated responses (thumbs)"),
    RankedResponses: ("a ranking", "rankings"),
}

# Our names of a rated response's columns, and TRL's.
RATED_LAYOUTS = {
    "response/desirable": ("response", "desirable"),
    "completion/label": ("completion", "label"),
}
_SHARED = ("prompt", "image", "images", TOOLS, "weight", "annotator", "group", "id")
_RATED = frozenset(name for names in RATED_LAYOUTS.values() for name in names)
ORDERS = ("ranking", "scores")
_RANKED = frozenset((*_SHARED, "responses", *ORDERS)) - {"image", "images"}
_RESPONSES = frozenset(name for names in LAYOUTS.values() for name in names)
COLUMNS = records.COLUMNS | _RATED | _RANKED | LOG_COLUMNS


def read_records(
    record: object,
    *,
    feedback: str | None = None,
    cells: bool = False,
    unused: Counter[str] | None = None,
    folder: str = "",
) -> tuple[list[Record], str]:
    """Return what a raw record holds, and its layout; raise `InvalidPair` with every fault.

    A line of a log may hold several records of both kinds, or none: `feedback` takes its "choices"
    or its "thumbs" only. The other arguments are those of `records.read_record`.
    """
    unused = Counter() if unused is None else unused
    if isinstance(record, RatedResponse):
        return [record], "response/desirable"
    if isinstance(record, RankedResponses):
        return [record], "responses/ranking"
    if isinstance(record, Mapping) and _is_ranked(record):
        return _read_ranked(record, cells, unused)
    if isinstance(record, Mapping) and is_log_record(record):
        return _feedback_of(record, feedback, unused), "feedback log"
    if isinstance(record, Mapping) and _is_rated(record):
        return _read_rated(record, cells, unused, folder)
    pair, layout = records.read_record(record, cells=cells, unused=unused, folder=folder)
    return [pair], layout


def mixed_kinds(first: tuple[str, Record], other: tuple[str, Record], logged: bool) -> str:
    """Say that a record, given with its place, is of another kind than the first one."""
    types = {type(record) for _, record in (first, other)}
    kinds = " and ".join(f"{plural}" for kind, (_, plural) in KINDS.items() if kind in types)
    where = "the same line" if first[0] == other[0] else other[0]
    advice = "Put them into files of their own."
    if logged:
        advice = (
            "Say which feedback of the log to take: feedback='choices' or 'thumbs' (in a "
            "configuration data.feedback, on the command line --feedback)."
        )
    return (
        f"the data hold {kinds}, and training takes one kind: {first[0]} holds "
        f"{KINDS[type(first[1])][0]}, {where} holds {KINDS[type(other[1])][0]}. {advice}"
    )


def columns_of(header: Collection[str]) -> frozenset[str]:
    """Return the columns of a table that mean something, by the kinds of record it can hold."""
    columns = records.COLUMNS
    if _is_ranked(dict.fromkeys(header)):
        columns |= _RANKED
    if _RATED & set(header):
        columns |= _RATED
    return columns | LOG_COLUMNS if _is_log(header) else columns


def header_faults(columns: Iterable[str]) -> list[Fault]:
    """Return the faults of a table's header: repeated columns, and those that every row lacks."""
    header = Counter(columns)
    pairs_faults = records.header_faults(header.elements())
    if not pairs_faults or pairs_faults[0].rule == "repeated column":
        return pairs_faults
    if _is_log(header) or _is_ranked(dict.fromkeys(header)):
        return []
    if not _is_rated(dict.fromkeys(header)):
        return pairs_faults
    _, names = _rated_layout(header)
    return [missing(header, name) for name in names if name not in header]


def _is_log(header: Collection[str]) -> bool:
    return is_log_record(dict.fromkeys(header))


def _is_ranked(record: Mapping[str, object]) -> bool:
    """Tell whether a record has several responses, and their order or nothing in its place."""
    if "responses" not in record:
        return False
    ordered = not record.keys().isdisjoint(ORDERS)
    return ordered or not (is_log_record(record) or record.keys() & (_RESPONSES | _RATED))


def _read_ranked(
    record: Mapping[str, JSON], cells: bool, unused: Counter[str]
) -> tuple[list[Record], str]:
    fields = _RankedFields(record, cells, unused)
    prompt, responses = fields.text("prompt"), fields.responses()
    given = {name: fields.numbers(name) for name in ORDERS}
    weight = fields.number("weight", 1.0)
    fields.faults += number_faults(1.0, weight, None, lowest=0.5)
    others: dict[str, JSON] = {key: fields.name(key) for key in ("annotator", "group", "id")}
    tools, faults = read_tools(record.get(TOOLS))
    fields.faults += faults
    if prompt is not None and responses is not None:
        if tools:
            prompt = with_tools(prompt, tools)
        forms = [same_form(prompt, response, response)[:2] for response in responses]
        prompt = forms[0][0] if forms else prompt
        responses = [response for _, response in forms]
        fields.faults += ranking_faults(prompt, responses, *given.values())
    if fields.faults or prompt is None or responses is None:
        raise InvalidPair(fields.faults)
    order: dict[str, JSON] = {n: tuple(found) for n, found in given.items() if found is not None}
    ranked = RankedResponses(prompt, tuple(responses), weight=float(weight), **order, **others)
    return [ranked], f"responses/{'ranking' if given['ranking'] is not None else 'scores'}"


class _RankedFields(Fields):
    """The values of one ranking; broken rules are collected in `faults`."""

    columns = _RANKED

    def responses(self) -> list[Text] | None:
        """Return the responses, or None where one of them cannot be read."""
        values = self._list("responses")
        if values is None:
            self.faults.append(missing(self.record, "responses"))
            return None
        texts = [self.value(f"responses[{place}]", value) for place, value in enumerate(values)]
        return None if None in texts else [text for text in texts if text is not None]

    def numbers(self, name: str) -> list[JSON] | None:
        """Return the numbers of a column, whole ones as such; None where it has no value."""
        return self._list(name) if is_given(self.record, name) else None

    def _list(self, name: str) -> list[JSON] | None:
        value: JSON = self.record.get(name)
        value = value.tolist() if hasattr(value, "tolist") else value
        if self.cells and isinstance(value, str) and value:
            with contextlib.suppress(ValueError):
                value = json.loads(value)
        if isinstance(value, list | tuple):
            return list(value)
        if value is not None:
            self.faults.append(wrong_type(name, value, "a list"))
        return None


def _is_rated(record: Mapping[str, object]) -> bool:
    """Tell whether a record is a rated response; `label` alone can be anything."""
    rated = _RATED - {"label"} & record.keys()
    return bool(rated & record.keys()) and not any(is_given(record, n) for n in _RESPONSES)


def _rated_layout(record: Collection[str]) -> tuple[str, tuple[str, str]]:
    """Return the layout's name, and the names of the response and its rating."""
    for layout, names in RATED_LAYOUTS.items():
        if set(names) <= set(record):
            return layout, names
    names = (
        "completion" if "completion" in record and "response" not in record else "response",
        "label" if "label" in record and "desirable" not in record else "desirable",
    )
    return "response/desirable", names


def _read_rated(
    record: Mapping[str, JSON], cells: bool, unused: Counter[str], folder: str
) -> tuple[list[Record], str]:
    layout, (response_name, rating_name) = _rated_layout(record)
    fields = _RatedFields(record, cells, unused)
    texts = _texts(fields, response_name)
    weight = fields.number("weight", 1.0)
    rating = _rating(record.get(rating_name), cells)
    if rating is None:
        fields.faults.append(missing(record, rating_name))
    fields.faults += rating_faults(0.0 if rating is None else rating, weight, rating_name)
    others: dict[str, JSON] = {key: fields.name(key) for key in ("annotator", "group", "id")}
    triple = None if texts is None else (*texts, texts[1])
    others["images"] = fields.images(triple, (response_name, response_name), folder)
    tools, faults = read_tools(record.get(TOOLS))
    fields.faults += faults
    names = ("prompt", response_name)
    if fields.faults or texts is None:
        raise InvalidPair(fields.faults + (form_faults(texts, names) if texts else []))
    prompt, response = texts
    if tools:
        prompt, response, _ = same_form(with_tools(prompt, tools), response, response)
    try:
        return [RatedResponse(prompt, response, rating, float(weight), **others)], layout
    except InvalidPair:
        raise InvalidPair(form_faults((prompt, response), names)) from None


class _RatedFields(Fields):
    """The values of one rated response; broken rules are collected in `faults`."""

    columns = frozenset(_SHARED) | _RATED


def _texts(fields: Fields, name: str) -> tuple[Text, Text] | None:
    """Return prompt and response in one form; None where one of them cannot be read."""
    response = fields.text(name)
    if fields.record.get("prompt") is not None:
        prompt = fields.text("prompt")
        if prompt is None or response is None:
            return None
        return same_form(prompt, response, response)[:2]
    if response is None or not is_conversation(response):
        fields.faults.append(missing(fields.record, "prompt"))
        return None
    parts = split_conversation(name, response)
    if isinstance(parts, Fault):
        fields.faults.append(parts)
        return None
    return same_form(parts[0], parts[1], parts[1])[:2]


def _rating(value: JSON, cells: bool) -> JSON:
    """Return a rating as it was meant; None where it is missing."""
    if hasattr(value, "item"):
        value = value.item()
    if not cells or not isinstance(value, str):
        return value
    known = {"": None, "true": True, "false": False}
    if value.lower() in known:
        return known[value.lower()]
    try:
        return float(value)
    except ValueError:
        return value


def _feedback_of(
    record: Mapping[str, JSON], feedback: str | None, unused: Counter[str]
) -> list[Record]:
    log = read_log_record(record)
    wanted = FEEDBACKS if feedback is None else (feedback,)
    found: list[Record] = [*(log.pairs() if "choices" in wanted else ())]
    found += log.rated() if "thumbs" in wanted else ()
    if not found:
        unused[f"lines of a feedback log without {' or '.join(wanted)}"] += 1
    return found
