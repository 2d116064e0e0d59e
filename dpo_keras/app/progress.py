"""What a run tells while it works; `runs` takes any object with these three methods."""

from __future__ import annotations

from typing import Any, Protocol


class Progress(Protocol):
    """Hears from a run. The command line's writes to stderr; the default says nothing."""

    def stage(self, title: str) -> None:
        """A new stage begins.

        Args:
            title: for instance "Preference training".
        """

    def note(self, text: str) -> None:
        """Something worth reading: a report, a warning.

        Args:
            text: one or more lines.
        """

    def advance(self, done: int, total: int | None, **values: Any) -> None:
        """The stage went on.

        Args:
            done: steps (pairs, prompts) done.
            total: steps in all, where known.
            **values: figures of the moment, such as `loss`.
        """


class Silent:
    """A `Progress` that says nothing."""

    def stage(self, title: str) -> None:
        """Says nothing."""

    def note(self, text: str) -> None:
        """Says nothing."""

    def advance(self, done: int, total: int | None, **values: Any) -> None:
        """Says nothing."""
