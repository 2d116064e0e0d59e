"""A run's progress on a console."""

from __future__ import annotations

import errno
import importlib
import json
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from dpo_keras.cluster import ClusterError, RunStopped
from dpo_keras.errors import InputError

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


# 75 is EX_TEMPFAIL of sysexits.h: try again.
DONE, FAILED, WRONG_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
_KINDS = {FAILED: "failed", WRONG_INPUT: "input", STOPPED: "stopped", INTERRUPTED: "interrupted"}


class Terminal:
    """Where a command prints.

    Args:
        as_json: print the result as JSON, for programs.

    Attributes:
        out: for results, on stdout.
        log: for progress and messages, on stderr.
    """

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.out = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        self.log = Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)

    def result(self, content: Mapping[str, Any], *views: Any) -> None:
        """Prints a command's result.

        Args:
            content: all of it, for `--json`.
            *views: what people see instead: strings and rich tables.
        """
        if self.as_json:
            json.dump(content, sys.stdout, indent=2, ensure_ascii=False, default=str)
            sys.stdout.write("\n")
            return
        for view in views:
            self.out.print(view, markup=False) if isinstance(view, str) else self.out.print(view)

    def say(self, text: str) -> None:
        """Prints a message for people on stderr.

        Args:
            text: printed as it is.
        """
        self.log.print(text, markup=False)

    def fail(self, kind: str, problems: list[str]) -> None:
        """Prints what went wrong: for people on stderr, with `--json` also on stdout.

        Args:
            kind: "input", "failed", "stopped" or "interrupted".
            problems: one sentence each.
        """
        for problem in problems:
            self.log.print(f"[bold red]error:[/bold red] {_escaped(problem)}", soft_wrap=True)
        if self.as_json:
            self.result({"error": {"kind": kind, "problems": problems}})

    def end(self, text: str, code: int) -> None:
        """Prints what went wrong elsewhere and ends the process, whatever it is doing.

        Args:
            text: what went wrong.
            code: exit code.
        """
        self.log.show_cursor(True)
        self.fail(_KINDS.get(code, "failed"), [text])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


@contextmanager
def reporting(as_json: bool, debug: bool) -> Iterator[Terminal]:
    """Runs a command's body and turns its errors into messages and exit codes.

    Args:
        as_json: see `Terminal`.
        debug: print the traceback too.

    Yields:
        The terminal to print to.

    Raises:
        typer.Exit: 2 for an `InputError`, 75 for a run that was stopped and can go on, 130 on any
            other Ctrl-C, 1 for any other error.
    """
    terminal = Terminal(as_json)
    problems: list[str]
    try:
        yield terminal
        return
    except (typer.Exit, typer.Abort):
        raise
    except InputError as error:
        code, problems = WRONG_INPUT, list[str](error.problems)
    except RunStopped as stopped:
        code, problems = STOPPED, [f"{stopped} Go on with the same command and --resume."]
    except KeyboardInterrupt:
        code = INTERRUPTED
        problems = ["stopped; a training goes on from its last checkpoint with --resume."]
    except ClusterError as error:
        code, problems = FAILED, [str(error)]
    except Exception as error:
        code, problems = FAILED, [failure(error)]
    if debug:
        traceback.print_exc()
    terminal.fail(_KINDS[code], problems)
    raise typer.Exit(code)


def failure(error: Exception) -> str:
    """Writes an unforeseen error as one sentence.

    Args:
        error: what was raised.

    Example:
        >>> failure(OSError(28, "No space left on device", "runs/a/checkpoints"))
        'the disk is full: runs/a/checkpoints could not be written. Make room, then go on with
         --resume.'
    """
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = error.filename or "a file"
        return (
            f"the disk is full: {what} could not be written. Make room, then go on with --resume."
        )
    first = (str(error).strip() or "no reason given").splitlines()[0]
    first = first if len(first) <= 400 else first[:397] + "..."
    return f"{type(error).__name__}: {first} (--debug shows the traceback.)"


def prepare_keras() -> None:
    """Imports Keras on TensorFlow, without TensorFlow's start-up notices.

    Raises:
        InputError: if the environment asks for another backend.
    """
    backend = os.environ.setdefault("KERAS_BACKEND", "tensorflow")
    if backend != "tensorflow":
        raise InputError(
            f"KERAS_BACKEND is {backend!r}; training and serving run on TensorFlow only. Unset it "
            "or set it to tensorflow."
        )
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    with _quiet_start():
        import_module = importlib.import_module
        import_module("tensorflow").config.list_physical_devices()
        import_module("keras")


@contextmanager
def _quiet_start() -> Iterator[None]:
    """Holds back what TensorFlow's C++ side prints before its log level is in force.

    If the import fails, what it printed is the best explanation there is, and is shown.
    """
    if "tensorflow" in sys.modules or os.environ["TF_CPP_MIN_LOG_LEVEL"] in ("0", "1"):
        yield
        return
    sys.stderr.flush()
    original = os.dup(2)
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            yield
        except BaseException:
            held.seek(0)
            os.write(original, held.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)
