"""A run's progress on a console."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

# What is shown of a step's figures, and what it is called where there is little room.
_SHOWN = {
    "loss": "loss",
    "reward_accuracy": "accuracy",
    "reward_margin": "margin",
    "kl": "kl",
    "pairs_per_second": "pairs/s",
}


class TerminalProgress:
    """Shows a run's progress on a console: a bar on a terminal, a line now and then in a log.

    Args:
        console: usually on stderr.
        every: seconds between lines where there is no terminal.
    """

    def __init__(self, console: Console, every: float = 10.0):
        self.console = console
        self.every = every
        self.title = ""
        self._said = 0.0
        self._bar = Bar(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: Any = None

    def __enter__(self) -> TerminalProgress:
        """Starts drawing."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stops drawing."""
        self._bar.stop()

    def stage(self, title: str) -> None:
        """Begins a stage: its title, and a new bar once it advances.

        Args:
            title: the stage's name.
        """
        self.title = title
        self._said = time.monotonic()
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self.console.print(f"[bold]{escape(title)}[/bold]")

    def note(self, text: str) -> None:
        """Prints text, indented under the stage.

        Args:
            text: one or more lines.
        """
        for line in text.splitlines():
            self.console.print(f"  {line}", markup=False)

    def advance(self, done: int, total: int | None, **values: Any) -> None:
        """Moves the bar, or prints a line if the last one is long ago.

        Args:
            done: steps done.
            total: steps in all.
            **values: figures of the moment.
        """
        figures = "  ".join(
            f"{label} {values[name]:.3g}" for name, label in _SHOWN.items() if name in values
        )
        if self.console.is_terminal:
            if self._task is None:
                self._task = self._bar.add_task("", total=total, figures=figures)
            self._bar.update(self._task, completed=done, total=total, figures=figures)
            return
        now = time.monotonic()
        if now - self._said >= self.every or (done == total and figures):
            self._said = now
            of = f" of {total}" if total else ""
            self.console.print(f"  {done}{of}  {figures}".rstrip(), markup=False)
