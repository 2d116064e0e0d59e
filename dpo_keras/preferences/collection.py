"""Which pairs are held out: whole prompts (annotators, groups), drawn by a seeded hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from dpo_keras.errors import InputError
from dpo_keras.preferences.pair import PreferencePair, as_number
from dpo_keras.preferences.read_report import ReadReport

SPLIT_KEYS = ("prompt", "annotator", "group")


def split_indices(
    pairs: Sequence[PreferencePair], fraction: float, *, seed: int = 0, by: str = "prompt"
) -> list[int]:
    """Returns the indices of the pairs to hold out.

    Args:
        pairs: the pairs to split.
        fraction: share of them to hold out, in (0, 1).
        seed: seeds the hash.
        by: "prompt", "annotator" or "group": what is never on both sides, besides prompts.

    Returns:
        Ascending indices; their number is as near to `fraction * len(pairs)` as the units allow.

    Raises:
        InputError: as `Preferences.split` says.

    Example:
        >>> pairs = [PreferencePair(f"prompt {n // 2}", "yes", "no") for n in range(8)]
        >>> split_indices(pairs, 0.25, seed=1)  # the two pairs of one prompt
        [6, 7]
    """
    number = as_number(fraction)
    if number is None or not 0 < number < 1:
        raise InputError(f"fraction must be a number in (0, 1), got {fraction!r}.")
    if by not in SPLIT_KEYS:
        raise InputError(f"by must be one of {', '.join(SPLIT_KEYS)}, got {by!r}.")
    units = _units(pairs, by)
    target = number * len(pairs)
    held: list[int] = []
    passed_over: list[list[int]] = []
    for _, unit in sorted((_unit_hash(pairs, unit, seed), unit) for unit in units):
        if len(unit) <= target - len(held):
            held += unit
        else:
            passed_over.append(unit)
    for unit in passed_over:
        if len(unit) < 2 * (target - len(held)):  # too large, but nearer with it than without
            held += unit
    if not held or len(held) == len(pairs):
        raise InputError(_empty_side(pairs, number, by, len(units), not held))
    return sorted(held)


def _units(pairs: Sequence[PreferencePair], by: str) -> list[list[int]]:
    """Groups indices that must stay together: those with one prompt, or one value of `by`."""
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = parent[above]
            key = above
        return key

    missing = 0
    for pair in pairs:
        prompt_root = root(("prompt", pair.prompt))
        if by != "prompt":
            value = getattr(pair, by)
            missing += value is None
            parent[root((by, value))] = prompt_root
    if missing:
        raise InputError(
            f"by={by!r} needs {by} set on every pair; {missing:,} of {len(pairs):,} have none."
        )
    units: dict[object, list[int]] = {}
    for index, pair in enumerate(pairs):
        units.setdefault(root(("prompt", pair.prompt)), []).append(index)
    return list(units.values())


def _unit_hash(pairs: Sequence[PreferencePair], unit: list[int], seed: int) -> str:
    # The least prompt stands for the unit, so the order of the pairs changes nothing.
    prompt = min(
        json.dumps(text if isinstance(text, str) else [m.as_dict() for m in text])
        for text in (pairs[index].prompt for index in unit)
    )
    return hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()


def _empty_side(
    pairs: Sequence[PreferencePair], fraction: float, by: str, units: int, held_empty: bool
) -> str:
    count = f"{len(pairs):,} pair{'s' if len(pairs) != 1 else ''}"
    if units < 2:
        reason = (
            f"all {count} have one prompt"
            if by == "prompt"
            else f"every {by} shares prompts with the others; split by='prompt' instead"
        )
        return f"Cannot split {count} so that no prompt is on both sides: {reason}."
    side = "held-out" if held_empty else "training"
    return (
        f"fraction {fraction:g} of {count} in {units:,} units (pairs that share a prompt"
        f"{'' if by == 'prompt' else ' or ' + by} stay together) leaves the {side} side empty; "
        "choose another fraction."
    )


class Preferences(Sequence[PreferencePair]):
    """Preference pairs: list-like and immutable.

    Args:
        pairs: the pairs, in order.
        report: how they were read; a slice or a split keeps the report of the whole.

    Example:
        >>> pairs = Preferences([PreferencePair("Hi", "Hello!", "Go away.")])
        >>> pairs
        Preferences(1 pair, 0 dropped)
        >>> pairs[0].chosen
        'Hello!'
    """

    def __init__(self, pairs: Iterable[PreferencePair], report: ReadReport | None = None):
        self._pairs = tuple(pairs)
        for place, pair in enumerate(self._pairs):
            if not isinstance(pair, PreferencePair):
                raise InputError(
                    f"pairs must be PreferencePair objects, item {place} is a "
                    f"{type(pair).__name__}; read_preferences() takes records."
                )
        count = len(self._pairs)
        self.report = ReadReport(read=count, kept=count) if report is None else report

    def __len__(self) -> int:
        """Returns the number of pairs."""
        return len(self._pairs)

    @overload
    def __getitem__(self, index: int) -> PreferencePair: ...

    @overload
    def __getitem__(self, index: slice) -> Preferences: ...

    def __getitem__(self, index: int | slice) -> PreferencePair | Preferences:
        """Returns one pair, or the `Preferences` of a slice."""
        if isinstance(index, slice):
            return Preferences(self._pairs[index], self.report)
        return self._pairs[index]

    def __iter__(self) -> Iterator[PreferencePair]:
        """Iterates over the pairs."""
        return iter(self._pairs)

    def __eq__(self, other: object) -> bool:
        """Compares the pairs; reports do not count."""
        return isinstance(other, Preferences) and self._pairs == other._pairs

    def __hash__(self) -> int:
        """Returns the hash of the pairs."""
        return hash(self._pairs)

    def __repr__(self) -> str:
        """Returns the counts."""
        pairs = "pair" if len(self) == 1 else "pairs"
        return f"Preferences({len(self):,} {pairs}, {self.report.dropped:,} dropped)"

    def split(
        self, fraction: float, seed: int = 0, by: str = "prompt"
    ) -> tuple[Preferences, Preferences]:
        """Splits into training and held-out pairs; no prompt is ever on both sides.

        The held-out side is drawn by a seeded hash of what must stay together, so it does not
        depend on the order of the pairs, and comes as near to the fraction of pairs as whole
        prompts (annotators, groups) allow.

        Args:
            fraction: share of the pairs to hold out, in (0, 1).
            seed: another seed draws another split.
            by: "prompt", or "annotator" or "group" to also keep each of those on one side. Those
                that share a prompt then stay together too.

        Returns:
            `(train, held_out)`, each in the order of the pairs here.

        Raises:
            InputError: if the fraction is not in (0, 1), `by` is unknown or not set on every
                pair, or one side would be empty.

        Example:
            >>> from dpo_keras.preferences import support_pairs
            >>> train, held_out = support_pairs(100).split(0.1)
            >>> len(train), len(held_out)
            (90, 10)
        """
        held = set(split_indices(self._pairs, fraction, seed=seed, by=by))
        sides: tuple[list[PreferencePair], list[PreferencePair]] = ([], [])
        for index, pair in enumerate(self._pairs):
            sides[index in held].append(pair)
        return Preferences(sides[0], self.report), Preferences(sides[1], self.report)
