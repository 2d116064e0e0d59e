"""Preference files, candidates and configurations.

A text may say something else after a mutation. Then the program must read what it says, as the few
lines here do, or must report it. Compressed files and Parquet must be as they were, or be refused.
"""

from __future__ import annotations

import contextlib
import csv
import gzip
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from dpo_keras.app.config import load_config, parse_config
from dpo_keras.feedback import read_candidates
from dpo_keras.preferences import (
    PreferencePair,
    read_preferences,
    support_pairs,
    write_preferences,
)
from fuzzing.kind import (
    Finding,
    Kind,
    Mutate,
    Row,
    as_name,
    difference,
    odd_value,
    strict_json,
)


def some_pairs() -> list[PreferencePair]:
    """Return pairs that use every column."""
    return [
        PreferencePair(
            pair.prompt,
            pair.chosen,
            pair.rejected,
            (1.0, 0.8, 0.5)[n % 3],
            weight=1.0 + n % 2,
            annotator=f"a{n % 3}",
            group="é",
            id=f"p{n}",
            margin=0.5,
        )
        for n, pair in enumerate(support_pairs(12))
    ]


def row_of(pair: PreferencePair) -> Row:
    """Return what a pair says."""
    named = (pair.annotator or None, pair.group or None, pair.id or None)
    return (
        pair.prompt,
        pair.chosen,
        pair.rejected,
        pair.preference,
        pair.weight,
        pair.margin,
        *named,
    )


def row_in(record: dict[str, Any]) -> Row:
    """Return what a record of a file says: the rules of `read_preferences`, once more."""
    layouts = [("chosen", "rejected"), ("response_a", "response_b")]
    used = [names for names in layouts if set(names) & set(record)]
    if len(used) != 1:
        raise Finding(f"accepted without a message: the columns {sorted(record)}")
    first, second = (_content(record.get(name)) for name in used[0])

    def number(name: str, absent: float | None) -> float | None:
        value = _given(record, name)
        return absent if value is None else float(value)

    preference = number("preference", 1.0)
    assert preference is not None
    if preference < 0.5:
        first, second, preference = second, first, 1 - preference
    named = (as_name(_given(record, name)) for name in ("annotator", "group", "id"))
    prompt = _content(record.get("prompt"))
    return (
        prompt,
        first,
        second,
        preference,
        number("weight", 1.0),
        number("margin", None),
        *named,
    )


def _given(record: dict[str, Any], name: str) -> Any:
    # NaN is what tables hold where nothing is.
    value = record.get(name)
    absent = value in (None, "") or (isinstance(value, float) and math.isnan(value))
    return None if absent else value


def _content(value: Any) -> Any:
    # Messages as JSON in a CSV cell are messages.
    if isinstance(value, str) and value.lstrip().startswith('[{"role"'):
        value = json.loads(value)
    return value


def json_lines(content: bytes) -> list[Any]:
    """Return what JSONL says."""
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    return [strict_json(line.decode()) for line in lines if line.strip()]


def csv_records(content: bytes) -> list[dict[str, str]]:
    """Return what CSV says."""
    text = io.StringIO(content.decode("utf-8-sig"), newline="")
    header, *others = [row for row in csv.reader(text, strict=True) if any(row)]
    header = [name.strip() for name in header]
    if len(set(header)) != len(header):
        raise Finding("accepted without a message: a column that is given twice")
    return [dict(zip(header, row, strict=True)) for row in others]


class PreferenceFile(Kind):
    """A file of pairs; `says` reads it again, and is None where it carries checksums."""

    def __init__(
        self, folder: Path, suffix: str, says: Callable[[bytes], list[dict[str, Any]]] | None
    ):
        super().__init__(folder)
        self.name, self.says, self.path = suffix, says, folder / f"pairs.{suffix}"
        write_preferences(some_pairs(), self.path)
        self.content, self.pairs = self.path.read_bytes(), [row_of(pair) for pair in some_pairs()]

    def attempt(self, chance: random.Random, mutate: Mutate) -> str:
        """Damage it, and compare what is read with what it says."""
        content = mutate(self.content)
        if self.name == "jsonl" and chance.random() < 0.5:
            content = odd_value(self.content, chance)
        self.path.write_bytes(content)
        found = read_preferences(self.path, on_error="report")
        summary = found.report.summary()
        for text in (summary, json.dumps(found.report.as_dict(), ensure_ascii=False, default=str)):
            text.encode()  # can be printed
        rows = [row_of(pair) for pair in found]
        json.dumps(rows, default=vars, ensure_ascii=False).encode()  # can be tokenized
        if found.report.dropped or len(summary.splitlines()) > 1:
            return "reported"
        if rows == self.pairs:
            return "unchanged"
        if self.says is None:
            raise Finding(f"{len(rows)} pairs are not those that were written, without a message")
        if rows != (said := [row_in(record) for record in self.says(content)]):
            raise Finding(f"the pairs are not what the file says: {difference(rows, said)}")
        return "as it says"


class CandidatesFile(Kind):
    """A file of candidates, plain or gzipped."""

    def __init__(self, folder: Path, suffix: str):
        super().__init__(folder)
        self.name, self.path = f"candidates{suffix}", folder / f"candidates.jsonl{suffix}"
        records = [
            {
                "prompt": pair.prompt,
                "responses": [pair.chosen, pair.rejected],
                "makers": ["a", "b"],
                "id": f"c{n}",
                "group": "g",
                "gold": n % 2,
            }
            for n, pair in enumerate(support_pairs(8))
        ]
        self.text = "\n".join(map(json.dumps, records)).encode()
        self.zipped = gzip.compress(self.text, mtime=0)
        self.whole = [self._row(record) for record in records]

    def attempt(self, chance: random.Random, mutate: Mutate) -> str:
        """Damage it, and compare what is read with what it says."""
        packed = self.path.suffix == ".gz"
        content = mutate(self.zipped if packed else self.text)
        if not packed and chance.random() < 0.4:
            content = odd_value(self.text, chance)
        self.path.write_bytes(content)
        rows = [
            (
                c.prompt,
                [r.text for r in c.responses],
                [r.maker for r in c.responses],
                c.id,
                c.group,
                c.gold,
            )
            for c in read_candidates(self.path)
        ]
        json.dumps(rows, default=str, ensure_ascii=False).encode()
        if rows == self.whole:
            return "unchanged"
        if packed:
            raise Finding(f"{len(rows)} candidates are not those that were written")
        if rows != (said := [self._row(record) for record in json_lines(content)]):
            raise Finding(f"the candidates are not what the file says: {difference(rows, said)}")
        return "as it says"

    @staticmethod
    def _row(record: dict[str, Any]) -> Row:
        texts = record.get("responses")
        makers = record.get("makers") or [None] * len(texts or ())
        named = (as_name(record.get("id")), as_name(record.get("group")), record.get("gold"))
        return record["prompt"], texts, makers, *named


CONFIGURATION = (Path(__file__).parents[2] / "configs/quickstart.yaml").read_bytes()


class Configuration(Kind):
    """A YAML file, read without a look at what lies outside it."""

    name = "yaml"

    def attempt(self, chance: random.Random, mutate: Mutate) -> str:
        """Damage it, and compare what is read with what it says."""
        content = mutate(CONFIGURATION)
        path = self.folder / "c.yaml"
        path.write_bytes(content)

        config = load_config(path)
        resolved = config.resolved()
        resolved.encode()
        if parse_config(resolved) != config:
            raise Finding("the resolved configuration is another")
        if config == parse_config(CONFIGURATION.decode()):
            return "unchanged"
        said = _leaves(yaml.load(content.decode("utf-8-sig"), yaml.BaseLoader))
        read = _leaves(config.model_dump(mode="json"))
        for key, value in said.items():
            if key not in read or not _same(value, read[key]):
                raise Finding(f"{key} is read as {read.get(key)!r}, the file says {value!r}")
        return "as it says"


def _leaves(tree: Any, key: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {key: tree}
    return {
        k: v for name, value in tree.items() for k, v in _leaves(value, f"{key}.{name}").items()
    }


def _same(said: Any, read: Any) -> bool:
    words = {
        "null": None,
        "~": None,
        "": None,
        "true": True,
        "on": True,
        "yes": True,
        "false": False,
        "off": False,
        "no": False,
    }
    if isinstance(read, list) and not isinstance(said, list):
        return read == [said]
    if said == read or str(said) == str(read):
        return True
    if isinstance(said, str) and said.lower() in words and words[said.lower()] is read:
        return True
    for number in (float, lambda text: int(text, 0)):
        with contextlib.suppress(ValueError, TypeError):
            return bool(float(read) == number(said))
    return False
