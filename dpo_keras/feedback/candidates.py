"""Candidates: prompts with two or more responses, read from a file and added to the store."""

import gzip
import itertools
import json
import os
import sqlite3
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.feedback.database import has_lone_surrogate, sha256
from dpo_keras.preferences import Image, Message
from dpo_keras.preferences.pair import ROLES, place_faults, read_images
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened

MAX_NESTED = 50  # levels of lists and objects in a line


@dataclass(frozen=True, slots=True)
class Response:
    """One response to a prompt."""

    text: str
    maker: str | None = None  # label of its policy and setting; policies are compared by it
    setting: Mapping[str, JSON] | None = None  # everything known about how it was made


@dataclass(frozen=True, slots=True)
class Candidates:
    """A prompt and its responses.

    Example:
        >>> candidates = Candidates("Hi", (Response("Hello!"), Response(" "), Response("Yes?")))
        >>> [(first.text, second.text) for first, second in candidates.pairs()]
        [('Hello!', 'Yes?')]
    """

    prompt: str | tuple[Message, ...]
    responses: tuple[Response, ...]  # pairs leave out identical and empty ones
    id: str | None = None  # a name for the prompt
    group: str | None = None  # kept for group-robust training
    # Index of the response that is known to be better than all others: a check of the annotators.
    gold: int | None = None
    images: tuple[Image, ...] = ()  # what the prompt shows

    def usable(self) -> list[Response]:
        """Return the responses that differ and are not empty."""
        found: dict[str, Response] = {}
        for response in self.responses:
            if response.text.strip():
                found.setdefault(response.text.strip(), response)
        return list(found.values())

    def left_out(self) -> Counter[str]:
        """Count what makes no pair, by the names of `Imported`."""
        usable = len(self.usable())
        empty = sum(not response.text.strip() for response in self.responses)
        identical = len(self.responses) - empty - usable
        return Counter(empty=empty, identical=identical, alone=int(usable < 2))

    def pairs(self) -> list[tuple[Response, Response]]:
        """Return every two of the usable responses."""
        return list(itertools.combinations(self.usable(), 2))


def read_candidates(path: str | os.PathLike[str]) -> list[Candidates]:
    """Read a candidates file, as `dpo-keras generate` writes it.

    Args:
        path: JSONL (`.gz` too). Each line has `prompt` and `responses` (texts), and may have
            `makers` (a label or the settings of each response), `id`, `group`, `gold` and `images`
            (paths from the file's folder, data URLs or base64; `image` for one).
            `response_a` and `response_b`, or `chosen` and `rejected`, stand for two responses too.

    Raises:
        InputError: naming every line that breaks a rule; or the file has no line.

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
        place = f"{path} line {number}:"
        try:
            found.append(_candidates(_record(line), str(path.parent)))
        except InputError as error:
            problems += [p.renamed(f"{place} {p.argument}".strip()) for p in error.problems]
        except ValueError as error:
            problems.append(InputProblem(place, f"is not JSON: {error}"))
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
        return content.decode("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} must be UTF-8 text; byte {error.start} is not.") from error
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(f"{path} is a damaged gzip file: {error}. Get it again.") from error
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error


def _record(line: str) -> JSON:
    """Parse a line that holds each key once and is not nested deep."""
    too_deep = InputProblem("", f"must not be nested deeper than {MAX_NESTED} levels.")
    try:
        record = json.loads(line, object_pairs_hook=_mapping)
    except RecursionError:
        raise InputError(too_deep) from None
    level = [record]
    for _ in range(MAX_NESTED):
        lists = [one.values() if isinstance(one, dict) else one for one in level if _holds(one)]
        level = [inner for one in lists for inner in one]
    if level:
        raise InputError(too_deep)
    return record


def _holds(value: JSON) -> bool:
    return isinstance(value, dict | list)


def _mapping(pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
    found = dict(pairs)
    if len(found) < len(pairs):
        counts = Counter(name for name, _ in pairs)
        twice = ", ".join(shortened(repr(name), 60) for name, n in counts.items() if n > 1)
        raise InputError(InputProblem("", f"must hold each key once; {twice} is there twice."))
    return found


def _candidates(record: JSON, folder: str = "") -> Candidates:
    if not isinstance(record, dict):
        raise InputError(InputProblem("", f"must be a JSON object, got {type(record).__name__}."))
    prompt, texts = _prompt(record.get("prompt")), _texts(record)
    makers, gold = record.get("makers"), record.get("gold")
    if makers is None:
        makers = [None] * len(texts)
    rules = {
        "prompt": (prompt is not None, "must be text, or a list of role/content messages"),
        "responses": (
            len(texts) >= 2,
            "must be a list of two or more texts (or give response_a and response_b, or chosen "
            "and rejected)",
        ),
        "makers": (
            isinstance(makers, list)
            and len(makers) == len(texts)
            and all(isinstance(maker, str | dict | None) for maker in makers),
            "must name or describe the maker of each response, one text or object per response",
        ),
        "gold": (
            gold is None
            or (isinstance(gold, int) and not isinstance(gold, bool) and 0 <= gold < len(texts)),
            f"must be the index of a response, 0 to {len(texts) - 1}",
        ),
        "id": (isinstance(record.get("id"), str | int | None), "must be text"),
        "group": (isinstance(record.get("group"), str | int | None), "must be text"),
    }
    problems = [
        InputProblem(name, f"{rule}, got {shortened(repr(record.get(name)), 60)}")
        for name, (kept, rule) in rules.items()
        if not kept
    ]
    images = record_images(record, prompt, folder, problems)
    if has_lone_surrogate(json.dumps(record, ensure_ascii=False)):
        rule = "holds half of a character (a lone surrogate), which is not valid text."
        problems.append(InputProblem("", rule))
    if problems or prompt is None:
        raise InputError(problems)
    responses = []
    for text, maker in zip(texts, makers, strict=True):
        described = isinstance(maker, dict)
        label = maker_label(maker) if described else maker
        responses.append(Response(text, label, maker if described else None))
    names = {n: None if record.get(n) is None else str(record[n]) for n in ("id", "group")}
    return Candidates(prompt, tuple(responses), gold=gold, images=images, **names)


def record_images(
    record: dict[str, JSON],
    prompt: str | tuple[Message, ...] | None,
    folder: str,
    problems: list[InputProblem],
) -> tuple[Image, ...]:
    """Return the images of a record's prompt; add what is wrong with them to the problems."""
    values = [record[name] for name in ("images", "image") if record.get(name) is not None]
    if not values:
        return ()
    if len(values) == 2:
        problems.append(InputProblem("images", "must be given once, as images or as image."))
    listed = values[0] if isinstance(values[0], list) else [values[0]]
    images, faults = read_images(listed, folder)
    if prompt is not None and not faults:
        faults = place_faults(prompt, images)
    problems += [InputProblem("", fault.message) for fault in faults]
    return images


def prompt_content(candidates: Candidates) -> str:
    """Return a prompt as the store keeps it: JSON, with references to its images."""
    prompt = candidates.prompt
    content: JSON = prompt if isinstance(prompt, str) else [turn.as_dict() for turn in prompt]
    if candidates.images:
        images = [[image.digest, image.path or image.as_text()] for image in candidates.images]
        content = {"prompt": content, "images": images}
    return json.dumps(content, ensure_ascii=False, sort_keys=True)


def stored_prompt(content: str) -> tuple[JSON, tuple[Image, ...]]:
    """Return the text or messages, and the images, of a prompt as the store keeps it."""
    prompt = json.loads(content)
    if not isinstance(prompt, dict):
        return prompt, ()
    images = (
        Image.of(place) if place.startswith("data:") else Image(digest, place)
        for digest, place in prompt["images"]
    )
    return prompt["prompt"], tuple(images)


def _texts(record: dict[str, JSON]) -> list[str]:
    """Return the responses of a record; none where they are not texts."""
    texts = record.get("responses")
    for columns in (("response_a", "response_b"), ("chosen", "rejected")):
        if texts is None and all(column in record for column in columns):
            texts = [record[column] for column in columns]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return []
    return texts


def _prompt(prompt: JSON) -> str | tuple[Message, ...] | None:
    if isinstance(prompt, str):
        return prompt if prompt.strip() else None
    if not isinstance(prompt, list) or not prompt:
        return None
    for turn in prompt:
        text = turn.get("content") if isinstance(turn, dict) else None
        text = "" if text is None and isinstance(turn, dict) and turn.get("tool_calls") else text
        if not isinstance(text, str) or turn.get("role") not in ROLES:
            return None
    return tuple(map(Message.from_dict, prompt))


def maker_label(setting: Mapping[str, JSON]) -> str:
    """Return the label by which responses of one policy and setting, seed apart, are compared."""
    words = [str(setting.get("policy", "unnamed"))]
    for name in ("temperature", "top_p", "top_k"):
        if (value := setting.get(name)) is not None:
            words.append(f"{name}={value:g}" if isinstance(value, int | float) else str(value))
    return " ".join(words)


@dataclass(frozen=True, slots=True)
class Imported:
    """What a candidates file added, and what was left out."""

    pairs: int = 0  # new ones
    known: int = 0  # pairs that were there before
    gold: int = 0  # new pairs that are checks with a known answer
    identical: int = 0  # responses that equal another one of their prompt
    empty: int = 0  # responses that hold nothing but whitespace
    alone: int = 0  # prompts without two different responses

    def summary(self) -> str:
        """Return what was added and left out, as a sentence."""
        return (
            f"{self.pairs:,} new pairs ({self.gold:,} with a known answer), {self.known:,} known; "
            f"left out: {self.identical:,} identical and {self.empty:,} empty responses, "
            f"{self.alone:,} prompts without two different responses"
        )


def add_candidates(
    connection: sqlite3.Connection, place: Callable[[], float], candidates: Iterable[Candidates]
) -> Imported:
    """Add pairs in a transaction; known pairs stay. Those of a lower `place` are shown first."""
    counts: Counter[str] = Counter()
    for prompt in candidates:
        counts += prompt.left_out()
        if len(prompt.usable()) >= 2:
            counts += _add_pairs(connection, place, prompt)
    return Imported(**counts)


def _add_pairs(
    connection: sqlite3.Connection, place: Callable[[], float], candidates: Candidates
) -> Counter[str]:
    counts: Counter[str] = Counter()
    content = prompt_content(candidates)
    connection.execute(
        "INSERT INTO prompts (hash, content, name, grp) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
        (sha256(content), content, candidates.id, candidates.group),
    )
    prompt_id = connection.execute(
        "SELECT id FROM prompts WHERE hash = ?", (sha256(content),)
    ).fetchone()[0]
    ids = {}
    for response in candidates.usable():
        setting = None
        if response.setting is not None:
            setting = json.dumps(response.setting, ensure_ascii=False, sort_keys=True, default=str)
        key = prompt_id, sha256(response.text)
        connection.execute(
            "INSERT INTO responses (prompt, hash, content, maker, setting) "
            "VALUES (?, ?, ?, ?, ?) ON CONFLICT DO NOTHING",
            (*key, response.text, response.maker, setting),
        )
        ids[response.text] = connection.execute(
            "SELECT id FROM responses WHERE prompt = ? AND hash = ?", key
        ).fetchone()[0]
    gold = candidates.gold
    better = None if gold is None else candidates.responses[gold].text.strip()
    for pair in candidates.pairs():
        first, second = sorted(ids[response.text] for response in pair)
        winner = next((ids[r.text] for r in pair if r.text.strip() == better), None)
        added = connection.execute(
            "INSERT INTO pairs (prompt, first, second, gold, shuffle) VALUES (?, ?, ?, ?, ?) "
            "ON CONFLICT DO NOTHING",
            (prompt_id, first, second, winner, place()),
        ).rowcount
        counts["pairs"] += added
        counts["known"] += 1 - added
        counts["gold"] += added if winner is not None else 0
    return counts
