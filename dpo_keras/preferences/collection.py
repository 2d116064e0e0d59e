"""Preference pairs as a sequence, and the one way to split them, in memory and on disk."""

from __future__ import annotations

import hashlib
import json
from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import Any, ClassVar, Self, TypeVar, overload

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.pair import PreferencePair, Text, as_number
from dpo_keras.preferences.rated_response import RatedResponse
from dpo_keras.preferences.read_report import ReadReport

SPLIT_KEYS = ("prompt", "annotator", "group")
R = TypeVar("R", bound=PreferencePair | RatedResponse)


def text_bytes(text: Text) -> bytes:
    """Return a text or messages as bytes; different texts never have the same."""
    if isinstance(text, str):
        return b"s" + text.encode()
    turns = [[turn.role, turn.content, *filter(None, [turn.details])] for turn in text]
    return b"m" + json.dumps(turns).encode()


def prompt_bytes(pair: PreferencePair | RatedResponse) -> bytes:
    """Return a record's prompt, its images included, as bytes; different prompts differ."""
    text = text_bytes(pair.prompt)
    if not pair.images:
        return text
    return b"i" + " ".join(image.digest for image in pair.images).encode() + b" " + text


def hash64(*parts: bytes) -> int:
    """Return a 64-bit hash of a sequence of byte strings. Built directories keep it."""
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


class PairSequence(Sequence[R]):
    """Records in a fixed order: what pairs and rated responses, in memory and on disk, share."""

    report: ReadReport
    """How the pairs were read."""

    @property
    @abstractmethod
    def prompt_hashes(self) -> np.ndarray:
        """The hash of each pair's prompt, uint64 `[N]`; equal for equal prompts."""

    @abstractmethod
    def select(self, rows: np.ndarray) -> Self:
        """Return the pairs at `rows`, int `[n]`, ascending."""

    @abstractmethod
    def _pair(self, row: int) -> R: ...

    @overload
    def __getitem__(self, index: int) -> R: ...

    @overload
    def __getitem__(self, index: slice) -> Self: ...

    def __getitem__(self, index: int | slice) -> R | Self:
        """Return one pair, or the pairs of a slice."""
        if isinstance(index, slice):
            return self.select(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(f"pair {index} of {len(self)}")
        return self._pair(index % len(self))

    def split(self, fraction: float, seed: int = 0, by: str = "prompt") -> tuple[Self, Self]:
        """Split into training and held-out pairs; no prompt is ever on both sides.

        The sides depend on the pairs and the arguments only, not on the order of the pairs, nor on
        whether they are in memory or on disk.

        `by="prompt"` holds a prompt out where `draw(hash, seed) < fraction`, with draws uniform in
        [0, 1). Pairs that are added later move no other prompt; the held-out share is the fraction
        up to chance. If a side stays empty, the prompt whose draw is nearest changes sides.

        Annotators and groups are few and large. They are held out in the order of their draws for
        as long as they fit, so that the held-out share is as near to the fraction as they allow.

        Args:
            fraction: share of the pairs to hold out, in (0, 1).
            seed: another seed draws another split.
            by: "prompt", or "annotator" or "group" to keep each of those on one side too, together
                with those that share a prompt with it, directly or through others.

        Returns:
            `(train, held_out)`, each in the order of the pairs here.

        Raises:
            InputError: if the fraction is not in (0, 1), `by` is unknown or not set on every pair,
                all pairs belong together, or no annotator or group is near the fraction.

        Example:
            >>> from dpo_keras.preferences import support_pairs
            >>> train, held_out = support_pairs(100).split(0.1)
            >>> len(train), len(held_out)
            (92, 8)
        """
        problems = []
        number = as_number(fraction)
        if number is None or not 0 < number < 1:
            problems.append(InputProblem("fraction", "must be a number in (0, 1)", fraction))
        if by not in SPLIT_KEYS:
            problems.append(InputProblem("by", f"must be one of {', '.join(SPLIT_KEYS)}", by))
        if problems or number is None:
            raise InputError(problems)
        units = _units(self, by)
        held = _held_out(units, number, seed, by)
        if held.all() or not held.any():
            raise InputError(_empty_side(held, number, by, units))
        return self.select(np.flatnonzero(~held)), self.select(np.flatnonzero(held))


class _InMemory(PairSequence[R]):
    """Records in memory, all of one kind: list-like and immutable."""

    _kind: ClassVar[type]
    _unit: ClassVar[str]

    def __init__(self, pairs: Iterable[R], report: ReadReport | None = None):
        self._pairs = tuple(pairs)
        for place, pair in enumerate(self._pairs):
            if not isinstance(pair, self._kind):
                wanted, found = self._kind.__name__, f"item {place} is a {type(pair).__name__}"
                must = f"must be {wanted} objects, {found}; read_preferences() takes records."
                raise InputError(InputProblem("pairs", must))
        count = len(self._pairs)
        self.report = ReadReport(read=count, kept=count) if report is None else report

    def __len__(self) -> int:
        return len(self._pairs)

    def __iter__(self) -> Iterator[R]:
        return iter(self._pairs)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _InMemory) and self._pairs == other._pairs

    def __hash__(self) -> int:
        return hash(self._pairs)

    def __repr__(self) -> str:
        units = self._unit if len(self) == 1 else f"{self._unit}s"
        return f"{type(self).__name__}({len(self):,} {units}, {self.report.dropped:,} dropped)"

    def _pair(self, row: int) -> R:
        return self._pairs[row]

    @cached_property
    def prompt_hashes(self) -> np.ndarray:
        """The hash of each pair's prompt, uint64 `[N]`."""
        return np.array([hash64(prompt_bytes(pair)) for pair in self._pairs], np.uint64)

    def select(self, rows: np.ndarray) -> Self:
        """Return the pairs at `rows`, int `[n]`, ascending."""
        return type(self)((self._pairs[row] for row in rows.tolist()), self.report)


class Preferences(_InMemory[PreferencePair]):
    """Preference pairs in memory: list-like and immutable.

    Args:
        pairs: the pairs, in order.
        report: how they were read; a slice or a split keeps the report of the whole.

    Example:
        >>> Preferences([PreferencePair("Hi", "Hello!", "Go away.")])
        Preferences(1 pair, 0 dropped)
    """

    _kind, _unit = PreferencePair, "pair"

    def unpaired(self) -> RatedResponses:
        """Return each pair's responses as rated ones: what an unpaired objective trains on.

        The chosen response is desirable with probability `preference`, the rejected one with
        1 - preference. Margins have no place in them.

        Example:
            >>> rated = Preferences([PreferencePair("Hi", "Hello!", "Go away.")]).unpaired()
            >>> [(one.response, one.desirable) for one in rated]
            [('Hello!', 1.0), ('Go away.', 0.0)]
        """
        return RatedResponses(
            (
                RatedResponse(
                    pair.prompt,
                    response,
                    desirable,
                    pair.weight,
                    *(pair.annotator, pair.group, pair.id, pair.images),
                )
                for pair in self
                for response, desirable in zip(
                    pair.responses, (pair.preference, 1.0 - pair.preference), strict=True
                )
            ),
            self.report,
        )


class RatedResponses(_InMemory[RatedResponse]):
    """Rated responses in memory: list-like and immutable, split like pairs.

    Args:
        pairs: the rated responses, in order.
        report: how they were read; a slice or a split keeps the report of the whole.

    Example:
        >>> rated = RatedResponses([RatedResponse("Hi", "Hello!", True)])
        >>> rated, rated.ratings
        (RatedResponses(1 rated response, 0 dropped), (1, 0))
    """

    _kind, _unit = RatedResponse, "rated response"

    @property
    def ratings(self) -> tuple[int, int]:
        """Number of desirable and of undesirable responses; P(good) of 0.5 is neither."""
        ratings = [one.desirable for one in self._pairs]
        return sum(rating > 0.5 for rating in ratings), sum(rating < 0.5 for rating in ratings)


def _held_out(units: np.ndarray, fraction: float, seed: int, by: str) -> np.ndarray:
    """Choose what is held out, bool `[N]`; `PairSequence.split` describes how."""
    if by != "prompt":
        names, unit, sizes = np.unique(units, return_inverse=True, return_counts=True)
        return _fitting(sizes, np.argsort(_draws(names, seed)), fraction)[unit]
    draws = _draws(units, seed)
    held = draws < np.uint64(fraction * 2**64)
    if len(draws) and not held.any():
        held = draws == draws.min()
    elif held.all():
        held = draws != draws.max(initial=0)
    return held


def _units(pairs: PairSequence[Any], by: str) -> np.ndarray:
    """Return a number for each pair, equal for pairs that stay together, uint64 `[N]`.

    Annotators or groups that share a prompt, directly or through others, stay together.
    """
    prompts = pairs.prompt_hashes
    if by == "prompt":
        return prompts
    values = _value_hashes(pairs, by)
    names, value = np.unique(values, return_inverse=True)
    order = np.argsort(prompts, kind="stable")
    same = prompts[order][1:] == prompts[order][:-1]
    shared = np.unique(np.stack([value[order][:-1][same], value[order][1:][same]]), axis=1)
    parent = list(range(len(names)))

    def root(number: int) -> int:
        while parent[number] != number:
            parent[number] = parent[parent[number]]
            number = parent[number]
        return number

    for one, other in shared.T.tolist():
        low, high = sorted((root(one), root(other)))
        parent[high] = low
    return names[[root(number) for number in range(len(names))]][value]


def earlier_split(
    pairs: Preferences, fraction: float, seed: int, by: str
) -> tuple[Preferences, Preferences]:
    """Split as this package did before memory and disk had one split: for runs begun then."""
    _, unit, sizes = np.unique(_units(pairs, by), return_inverse=True, return_counts=True)
    least: dict[int, str] = {}
    for number, pair in zip(unit.tolist(), pairs, strict=True):
        prompt = json.dumps(pair.as_dict()["prompt"])
        least[number] = min(prompt, least.get(number, prompt))
    order = sorted(least, key=lambda n: hashlib.sha256(f"{seed}:{least[n]}".encode()).hexdigest())
    held = _fitting(sizes, np.array(order), fraction)[unit]
    return pairs.select(np.flatnonzero(~held)), pairs.select(np.flatnonzero(held))


def _value_hashes(pairs: PairSequence[Any], by: str) -> np.ndarray:
    hashes = array("Q")
    missing = 0
    for pair in pairs:
        value = getattr(pair, by)
        missing += value is None
        hashes.append(hash64(text_bytes(value or "")))
    if missing:
        must = f"{by!r} needs {by} on every pair; {missing:,} of {len(pairs):,} have none"
        raise InputError(InputProblem("by", must))
    return np.array(hashes, np.uint64)


def _draws(hashes: np.ndarray, seed: int) -> np.ndarray:
    """Return uniform draws in [0, 2⁶⁴): mix(hash XOR mix(seed))."""
    return _mix(np.asarray(hashes, np.uint64) ^ _mix(np.array([seed % 2**64], np.uint64)))


def _mix(values: np.ndarray) -> np.ndarray:
    """Apply the finalizer of SplitMix64 (Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))


def _fitting(sizes: np.ndarray, order: np.ndarray, fraction: float) -> np.ndarray:
    """Choose units, in order, whose sizes add up to nearly the fraction: bool `[units]`."""
    held = np.zeros(len(sizes), bool)
    left = fraction * sizes.sum()
    for unit in order:
        if sizes[unit] <= left:
            held[unit] = True
            left -= sizes[unit]
    for unit in order:
        # Too large, but the share is nearer to the fraction with it than without.
        if not held[unit] and sizes[unit] < 2 * left:
            held[unit] = True
            left -= sizes[unit]
    return held


def _empty_side(held: np.ndarray, fraction: float, by: str, units: np.ndarray) -> str:
    count = f"{len(held):,} pair{'s' if len(held) != 1 else ''}"
    together = len(np.unique(units))
    if together > 1:
        side = "training" if held.all() else "held-out"
        must = (
            f"{fraction:g} of {count} in {together:,} units (pairs that share a prompt or {by} "
            f"stay together) leaves the {side} side empty; choose another fraction."
        )
        return InputProblem("fraction", must)
    reason = f"every {by} shares prompts with the others; split by='prompt' instead"
    if by == "prompt":
        reason = f"all {count} have one prompt"
    return f"Cannot split {count} so that no prompt is on both sides: {reason}."
