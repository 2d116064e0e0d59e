"""`Preferences`: validated pairs with the report of how they were read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload

from dpo_keras.errors import InputError
from dpo_keras.preferences.report import ReadReport
from dpo_keras.preferences.schema import PreferencePair
from dpo_keras.preferences.splitting import split_indices


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
