"""How pairs are handed out to people."""

from __future__ import annotations

from dataclasses import dataclass

from dpo_keras.errors import InputError


@dataclass(frozen=True, slots=True)
class Settings:
    """How pairs are handed out.

    Args:
        overlap: how many people judge each pair, >= 1; 2 or more lets agreement be measured.
        lease_seconds: how long a pair waits for the person it was given to, > 0.
        gold_share: share of presentations that check a known answer, in [0, 0.5].
        repeat_share: share of presentations that show an earlier pair again, in [0, 0.5].
        repeat_distance: how many other pairs lie between the two, >= 1.

    Raises:
        InputError: naming every value that breaks a rule.

    Example:
        >>> Settings(overlap=0, gold_share=2)
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: overlap must be a whole number >= 1, got 0.
        gold_share must be in [0, 0.5], got 2.
    """

    overlap: int = 2
    lease_seconds: float = 1800.0
    gold_share: float = 0.05
    repeat_share: float = 0.03
    repeat_distance: int = 10

    def __post_init__(self) -> None:
        """Checks every rule."""
        problems = []
        for name in ("overlap", "repeat_distance"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                problems.append(f"{name} must be a whole number >= 1, got {value!r}.")
        if not 0 < self.lease_seconds < float("inf"):
            problems.append(f"lease_seconds must be finite and > 0, got {self.lease_seconds!r}.")
        for name in ("gold_share", "repeat_share"):
            if not 0 <= getattr(self, name) <= 0.5:
                problems.append(f"{name} must be in [0, 0.5], got {getattr(self, name)!r}.")
        if problems:
            raise InputError(problems)
