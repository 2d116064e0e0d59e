"""What a kind of input is, and the readings that several kinds share."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

Mutate = Callable[[bytes], bytes]
Row = tuple[Any, ...]

ODD = (None, "", " ", "\ud800", True, 0, -1, 0.2, 1.7, 1e308, float("nan"), 10**400, [], {}, ["x"],
       [{"role": "user"}], "a" * 5000, "\x00", "\u202e")  # fmt: skip


class Finding(Exception):  # noqa: N818 (it is the program's error)
    """Something that must not be: a traceback, a server's error, or a silent change."""


class Kind:
    """A kind of input: makes it once in `folder`, then damages a copy of it in each attempt."""

    name: str

    def __init__(self, folder: Path):
        self.folder = folder

    def attempt(self, chance: random.Random, mutate: Mutate) -> str:
        """Damage it, give it to the program, and return how that went; raise `Finding`."""
        raise NotImplementedError

    def close(self) -> None:
        """Release what is open."""


def strict_json(text: str) -> Any:
    """Parse JSON; a key that is given twice is a `Finding`, for the program has accepted it."""

    def unique(items: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(items)) != len(items):
            raise Finding("accepted without a message: a key that is given twice")
        return dict(items)

    try:
        return json.loads(text, object_pairs_hook=unique)
    except ValueError as error:
        raise Finding(f"accepted without a message: no JSON ({error})") from error


def as_name(value: Any) -> str | None:
    """Return a name as pairs keep it."""
    # Names that are numbers are kept as text; 3.0 is what tables make of 3.
    whole = isinstance(value, float) and value.is_integer()
    return None if value is None else str(int(value) if whole else value)


def odd_value(content: bytes, chance: random.Random) -> bytes:
    """Put an odd value into one record of JSONL, or an odd or second key."""
    lines = content.decode().splitlines()
    number = chance.randrange(len(lines))
    record = json.loads(lines[number])
    key = chance.choice([*record, "response_a", "response_b", "swapped", "other"])
    with contextlib.suppress(ValueError):
        value = json.dumps(chance.choice(ODD))
        if chance.random() < 0.3:
            lines[number] = f'{lines[number][:-1]}, "{key}": {value}}}'
        else:
            lines[number] = json.dumps({**record, key: json.loads(value)})
    return "\n".join(lines).encode()


def difference(rows: list[Row], said: list[Row]) -> str:
    """Describe the first difference between what was read and what the file says."""
    if len(rows) != len(said):
        return f"{len(rows)} of {len(said)}"
    return next(
        f"{str(a)[:150]} for {str(b)[:150]}" for a, b in zip(rows, said, strict=True) if a != b
    )
