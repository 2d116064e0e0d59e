"""Candidate files: prompts with two or more responses, and who made each."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

from dpo_keras.errors import InputError
from dpo_keras.preferences import Message
from dpo_keras.preferences.pair import ROLES

_KNOWN_SETTINGS = ("temperature", "top_p", "top_k")


@dataclass(frozen=True, slots=True)
class Response:
    """One response to a prompt.

    Args:
        text: what it says.
        maker: label of the policy and setting that made it; policies are compared by it.
        setting: everything known of how it was made.
    """

    text: str
    maker: str | None = None
    setting: Mapping[str, Any] | None = None


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt and its responses.

    Args:
        prompt: text, or messages.
        responses: two or more; identical and empty ones are left out when pairs are made.
        id: a name for the prompt.
        group: kept for group-robust training.
        gold: index of the response that is better than all others, where that is known: a hidden
            check of the annotators.

    Example:
        >>> one = Candidates("Hi", (Response("Hello!"), Response(" "), Response("Yes?")))
        >>> [(a.text, b.text) for a, b in one.pairs()]
        [('Hello!', 'Yes?')]
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[Response, ...]
    id: str | None = None
    group: str | None = None
    gold: int | None = None

    def usable(self) -> list[Response]:
        """The responses that differ and are not empty."""
        found: dict[str, Response] = {}
        for response in self.responses:
            if response.text.strip():
                found.setdefault(response.text.strip(), response)
        return list(found.values())

    def pairs(self) -> list[tuple[Response, Response]]:
        """Every two of the usable responses."""
        return list(combinations(self.usable(), 2))


def read_candidates(path: str | os.PathLike[str]) -> list[Candidates]:
    """Reads a candidates file, as `dpo-keras generate` writes it.

    Args:
        path: JSONL (`.gz` too): `prompt`, `responses` (texts), and perhaps `makers` (labels or
            settings, one per response), `id`, `group`, `gold`. `response_a`, `response_b` or
            `chosen`, `rejected` stand for two responses as well.

    Raises:
        InputError: naming every line that breaks a rule; or there is no line.

    Example:
        >>> import pathlib, tempfile
        >>> line = {"prompt": "Hi", "responses": ["Hello!", "No."], "makers": ["a", "b"]}
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     file = pathlib.Path(folder, "candidates.jsonl")
        ...     _ = file.write_text(json.dumps(line))
        ...     read_candidates(file)[0].responses[1].maker
        'b'
    """
    path = Path(path)
    problems: list[str] = []
    found: list[Candidates] = []
    for number, line in enumerate(_lines(path), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            problems.append(f"{path} line {number}: is not JSON: {error}.")
            continue
        broken, candidates = _candidates(record)
        problems += [f"{path} line {number}: {problem}" for problem in broken]
        if candidates is not None:
            found.append(candidates)
    if problems:
        raise InputError(problems)
    if not found:
        raise InputError(f"{path}: there are no candidates in it.")
    return found


def _lines(path: Path) -> list[str]:
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        # Not splitlines(), which takes more than line feeds as ends of lines.
        return content.decode("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text; byte {error.start} is not.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    except EOFError as error:
        raise InputError(f"{path} is a damaged gzip file: {error}.") from error


def _candidates(record: Any) -> tuple[list[str], Candidates | None]:
    if not isinstance(record, dict):
        return [f"must be a JSON object, got {type(record).__name__}."], None
    problems = []
    prompt = _prompt(record.get("prompt"))
    if prompt is None:
        problems.append(
            "prompt must be text, or a list of role/content messages, got "
            f"{_short(record.get('prompt'))}."
        )
    texts = _texts(record)
    if texts is None:
        problems.append(
            "responses must be a list of two or more texts (or give response_a and response_b, or "
            f"chosen and rejected), got {_short(record.get('responses'))}."
        )
    count = len(texts or ())
    makers = record.get("makers")
    if makers is not None and (
        not isinstance(makers, list)
        or len(makers) != count
        or not all(maker is None or isinstance(maker, str | dict) for maker in makers)
    ):
        problems.append(
            "makers must name or describe the maker of each response, one text or object per "
            f"response, got {_short(makers)}."
        )
        makers = None
    gold = record.get("gold")
    if gold is not None and (
        not isinstance(gold, int) or isinstance(gold, bool) or not 0 <= gold < count
    ):
        problems.append(
            f"gold must be the index of a response, 0 to {count - 1}, got {_short(gold)}."
        )
    for name in ("id", "group"):
        if not isinstance(record.get(name), str | int | None):
            problems.append(f"{name} must be text, got {_short(record[name])}.")
    text = json.dumps(record, ensure_ascii=False)
    if any("\ud800" <= letter <= "\udfff" for letter in text):
        problems.append("holds half of a character (a lone surrogate), which is not valid text.")
    if problems or prompt is None or texts is None:
        return problems, None
    responses = tuple(
        Response(text, *_maker(maker))
        for text, maker in zip(texts, makers or [None] * count, strict=True)
    )
    names = {
        name: str(record[name]) if record.get(name) is not None else None
        for name in ("id", "group")
    }
    return [], Candidates(prompt, responses, gold=gold, **names)


def _texts(record: Mapping[str, Any]) -> list[str] | None:
    texts = record.get("responses")
    for columns in (("response_a", "response_b"), ("chosen", "rejected")):
        if texts is None and all(column in record for column in columns):
            texts = [record[column] for column in columns]
    if not isinstance(texts, list) or len(texts) < 2:
        return None
    return texts if all(isinstance(text, str) for text in texts) else None


def _prompt(prompt: Any) -> str | tuple[Message, ...] | None:
    if isinstance(prompt, str):
        return prompt if prompt.strip() else None
    if not isinstance(prompt, list) or not prompt:
        return None
    turns = []
    for turn in prompt:
        if not isinstance(turn, dict):
            return None
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES or not isinstance(content, str):
            return None
        turns.append(Message(role, content))
    return tuple(turns)


def _maker(maker: str | Mapping[str, Any] | None) -> tuple[str | None, Mapping[str, Any] | None]:
    if maker is None or isinstance(maker, str):
        return maker, None
    return maker_label(maker), maker


def maker_label(setting: Mapping[str, Any]) -> str:
    """The label under which responses of one policy and setting are compared; seeds are not in it.

    Args:
        setting: `policy`, `temperature`, ... of one response.

    Example:
        >>> maker_label({"policy": "runs/a", "temperature": 0.7, "top_p": 1.0, "seed": 3})
        'runs/a temperature=0.7 top_p=1'
    """
    words = [str(setting.get("policy", "unnamed"))]
    for name in _KNOWN_SETTINGS:
        if (value := setting.get(name)) is not None:
            words.append(f"{name}={value:g}" if isinstance(value, int | float) else str(value))
    return " ".join(words)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:56] + "..." + text[-1]
