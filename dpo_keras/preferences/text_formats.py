"""Text files, read record by record: JSON Lines, one JSON list, CSV.

No more than one record is in memory, and none longer than `LONGEST`: a few kilobytes of gzip can
hold a line of gigabytes.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Iterator
from typing import BinaryIO

from dpo_keras.preferences.pair import Fault, shown
from dpo_keras.preferences.record_kinds import header_faults
from dpo_keras.preferences.record_stream import CutOff, Reading, Records
from dpo_keras.utils import JSON
from dpo_keras.utils.text import with_formulas

LONGEST = 10_000_000  # bytes of one record
CHUNK = 2**16
BOM = b"\xef\xbb\xbf"
_TOO_LONG = Fault("too long", "line", None, f"the record is longer than {LONGEST:,} bytes.")
_NO_SPACE = re.compile(r"\S")


def read_jsonl(stream: BinaryIO, reading: Reading) -> Records:
    """Read JSON Lines."""
    decoder = _JSONDecoder()
    number = 0
    # Lines end at "\n" only: JSON strings may hold other separators.
    while line := stream.readline(LONGEST + 1):
        number += 1
        if len(line) > LONGEST and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(CHUNK)
            yield number, _TOO_LONG
            continue
        text = (line.removeprefix(BOM) if number == 1 else line).strip()
        if not text:
            continue
        record = decoder.line(text)
        if isinstance(record, Fault) and text[:1] == b"{" and not line.endswith((b"\n", b"}")):
            raise CutOff(f"line {number:,} ends in the middle of a record")
        yield number, reading.renamed(record)


class _JSONDecoder:
    """A JSON decoder that finds keys that occur twice, of which `json` keeps the last one only."""

    def __init__(self) -> None:
        self._repeated: list[str] = []
        self._decoder = json.JSONDecoder(object_pairs_hook=self._mapping)

    def _mapping(self, pairs: list[tuple[str, JSON]]) -> dict[str, JSON]:
        found = dict(pairs)
        if len(found) < len(pairs):
            counts = Counter(key for key, _ in pairs)
            self._repeated += [key for key, count in counts.items() if count > 1]
        return found

    def line(self, line: bytes) -> JSON:
        """Return the record of a line, or a `Fault`."""
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError as error:
            rule = f"not UTF-8: byte {error.start + 1} of the line is {line[error.start]:#04x}."
            return Fault("not UTF-8", "line", shown(line), rule)
        self._repeated.clear()
        try:
            record = self._decoder.decode(text)
        except (ValueError, RecursionError) as error:
            return Fault("not JSON", "line", shown(text), f"not JSON ({error}), got {shown(text)}.")
        return self._repeated_key() or record

    def element(self, text: str, start: int) -> tuple[JSON, int]:
        """Return the value that starts at a place, or a `Fault`, and where it ends."""
        self._repeated.clear()
        record, end = self._decoder.raw_decode(text, start)
        return self._repeated_key() or record, end

    def _repeated_key(self) -> Fault | None:
        if not self._repeated:
            return None
        keys = ", ".join(shown(key) for key in dict.fromkeys(self._repeated))
        rule = f"has the key {keys} more than once, so it is not clear which one is meant."
        return Fault("repeated key", "record", None, f"the record {rule}")


def read_json_list(stream: BinaryIO, reading: Reading) -> Records:
    """Read one JSON list record by record, never all of it at once."""
    # A byte that is not UTF-8 becomes a surrogate, which costs that record only.
    text = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    try:
        characters = _Characters(text)
        characters.next()  # the bracket
        number, mark = 0, characters.next()
        if mark != "]":
            characters.place -= 1
            mark = ","
        decoder = _JSONDecoder()
        while mark == ",":
            number += 1
            yield number, reading.renamed(characters.value(decoder))
            mark = characters.next()
        if mark != "]":
            raise CutOff(f"a record must be followed by a comma or a bracket, got {mark!r}")
        if characters.next():
            raise CutOff("there is more text after the list")
    finally:
        text.detach()  # otherwise its end would close the caller's stream


class _Characters:
    """A text of any length, of which one value after the other is in memory."""

    def __init__(self, text: io.TextIOWrapper):
        self.text = text
        self.buffer, self.place = "", 0

    def next(self) -> str:
        """Return the next character that is no white space, and step over it; "" at the end."""
        while not (found := _NO_SPACE.search(self.buffer, self.place)):
            self.place = len(self.buffer)
            if not self._more():
                return ""
        self.place = found.end()
        return found[0]

    def value(self, decoder: _JSONDecoder) -> JSON:
        """Return the next JSON value, and step over it."""
        if not self.next():
            raise CutOff("the list has no end")
        self.place -= 1
        more, reason = True, "not JSON"
        while more:
            try:
                value, end = decoder.element(self.buffer, self.place)
            except (ValueError, RecursionError) as error:
                reason = f"not JSON: {getattr(error, 'msg', error)}"
            else:
                if end < len(self.buffer) or isinstance(value, dict | Fault):  # numbers may go on
                    self.place = end
                    return value
            if len(self.buffer) - self.place > LONGEST:
                raise CutOff(f"the next record is longer than {LONGEST:,} bytes, or {reason}")
            more = self._more()
        raise CutOff(reason)

    def _more(self) -> bool:
        # Twice as much each time, so that long values are not decoded too often.
        held = len(self.buffer) - self.place
        chunk = self.text.read(max(CHUNK, min(held, LONGEST - held)))
        self.buffer, self.place = self.buffer[self.place :] + chunk, 0
        return bool(chunk)


def read_csv(stream: BinaryIO, reading: Reading) -> Records:
    """Read CSV, whose first row names the columns."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    # Cells hold whole conversations. The limit is the module's, so it is put back.
    limit = csv.field_size_limit(2**31 - 1)
    try:
        lines = _Lines(text)
        rows = csv.reader(lines, strict=True)
        header: list[str] | None = None
        while True:
            line = lines.begin_row()
            try:
                row = next(rows)
            except StopIteration:
                return
            except _LineTooLong:
                if lines.quotes % 2:
                    raise CutOff(f"the quotes that open in line {line:,} never close") from None
                yield line, _TOO_LONG
                continue
            except csv.Error as error:
                if not lines.last:
                    raise CutOff(f"the quotes that open in line {line:,} never close") from error
                yield line, Fault("not CSV", "line", str(error), f"not CSV: {error}.")
                continue
            if not any(row):
                continue
            if header is None:
                header = reading.our_names(name.strip() for name in row)
                if faults := _separator_faults(row) or header_faults(header):
                    yield from ((None, fault) for fault in faults)
                    return
            else:
                ended = lines.last.endswith(("\n", "\r"))
                if len(row) < len(header) and not ended:
                    raise CutOff(f"line {line:,} ends in the middle of a row")
                yield line, _csv_record(header, row)
    finally:
        csv.field_size_limit(limit)
        text.detach()  # otherwise its end would close the caller's stream


def _csv_record(header: list[str], row: list[str]) -> JSON:
    if len(row) == len(header):
        return with_formulas(dict(zip(header, row, strict=True)))
    rule = f"the row has {len(row)} cells, the header has {len(header)} columns."
    return Fault("wrong number of cells", "line", len(row), rule)


class _LineTooLong(Exception):  # noqa: N818 (it costs one record)
    pass


class _Lines(Iterator[str]):
    """The lines of a CSV file; those of one row may not be longer than a record together."""

    def __init__(self, text: io.TextIOWrapper):
        self.text = text
        self.last = ""
        self.number = self.size = self.quotes = 0

    def begin_row(self) -> int:
        """Return the number of the line in which the next row begins."""
        self.size = self.quotes = 0
        return self.number + 1

    def __next__(self) -> str:
        line = self._next(LONGEST + 1)
        if self.size > LONGEST:
            # The row ends with a line, but not within quotes.
            while self.last and (self.quotes % 2 or not self.last.endswith(("\n", "\r"))):
                self._next(CHUNK)
            raise _LineTooLong
        if not line:
            raise StopIteration
        return line

    def _next(self, size: int) -> str:
        self.last = self.text.readline(size)
        self.number += self.last.endswith(("\n", "\r"))
        self.size += len(self.last)
        self.quotes += self.last.count('"')
        return self.last


def _separator_faults(header: list[str]) -> list[Fault]:
    """Return a fault where a header of one cell is separated by something else than commas."""
    for separator in ";\t|":
        if len(header) == 1 and separator in header[0]:
            rule = (
                f"the columns are separated by {separator!r}, got {shown(header[0])}; save the "
                "file with commas."
            )
            return [Fault("not separated by commas", "line", header[0], rule)]
    return []
