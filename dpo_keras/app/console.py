"""What a run and a command say to people, and how a command ends."""

from __future__ import annotations

import errno
import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, Protocol, Self, get_args, get_type_hints

import typer
from rich.console import Console, RenderableType
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as Bar
from rich.text import Text

from dpo_keras.app.keras_backend import choose_backend
from dpo_keras.cluster import ClusterError, RunStopped
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON
from dpo_keras.utils.deferred_imports import quiet_tensorflow
from dpo_keras.utils.garbage_collection import freeze_until_exit
from dpo_keras.utils.text import shortened, visible

AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the file if it exists.")]
ConfigFile = Annotated[
    Path, typer.Argument(metavar="CONFIG", help="YAML configuration, or builtin:NAME.")
]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Override the file, for instance training.epochs=2 or model.lora_rank=null.",
    ),
]

# 75 is EX_TEMPFAIL of sysexits.h: try again.
DONE, FAILED, WRONG_INPUT, STOPPED, INTERRUPTED = 0, 1, 2, 75, 130
_KINDS = {FAILED: "failed", WRONG_INPUT: "input", STOPPED: "stopped", INTERRUPTED: "interrupted"}

# What is shown of a step's figures, and what it is called where there is little room.
_SHOWN = {
    "loss": "loss",
    "reward_accuracy": "accuracy",
    "reward_margin": "margin",
    "kl": "kl",
    "pairs_per_second": "pairs/s",
}


class Progress(Protocol):
    """Listens to a run."""

    def stage(self, title: str) -> None:
        """Begin a stage, such as "Preference training"."""
        return

    def note(self, text: str) -> None:
        """Take a report or a warning of one or more lines."""
        return

    def advance(self, done: int, total: int | None, **values: float) -> None:
        """Take the steps (pairs, prompts) done, and figures of the moment such as `loss`."""
        return


class Silent(Progress):
    """A `Progress` that says nothing."""


def duration(seconds: float) -> str:
    """Return seconds in words.

    Example:
        >>> duration(7.24), duration(94), duration(3 * 3600 + 120)
        ('7 s', '1 min 34 s', '3 h 2 min')
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


class _TimeLeft(TimeRemainingColumn):
    """Show the time that is left of the run where it is known, else of the stage."""

    def render(self, task: Task) -> Text:
        left = task.fields.get("left")
        return super().render(task) if left is None else Text(f"{duration(left)} left")


class TerminalProgress:
    """A `Progress` on a console: a bar on a terminal, a line now and then in a log."""

    def __init__(self, console: Console, every: float = 10.0):
        self.console = console
        self.every = every  # seconds between the lines of a log
        self._said = 0.0
        self._bar = Bar(
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            _TimeLeft(),
            TextColumn("{task.fields[figures]}"),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        """Start drawing."""
        self._bar.start()
        return self

    def __exit__(self, *error: object) -> None:
        """Stop drawing."""
        self._bar.stop()

    def stage(self, title: str) -> None:
        """Print the title; a new bar comes once the stage advances."""
        self._said = time.monotonic()
        if self._task is not None:
            self._bar.remove_task(self._task)
            self._task = None
        self.console.print(f"[bold]{escape(title)}[/bold]")

    def note(self, text: str) -> None:
        """Print text, indented under the stage."""
        for line in text.splitlines():
            print_wrapped(self.console, Text(line), indent=2)

    def advance(self, done: int, total: int | None, **values: float) -> None:
        """Move the bar, or print a line if the last one is long ago."""
        figures = "  ".join(
            f"{label} {values[name]:.3g}" for name, label in _SHOWN.items() if name in values
        )
        left = values.get("seconds_left")
        if self.console.is_terminal:
            fields: dict[str, Any] = {"figures": figures, "left": left}
            if self._task is None:
                self._task = self._bar.add_task("", total=total, **fields)
            self._bar.update(self._task, completed=done, total=total, **fields)
            return
        now = time.monotonic()
        if now - self._said >= self.every or (done == total and figures):
            self._said = now
            of = f" of {total}" if total else ""
            figures += "" if left is None else f"  {duration(left)} left of the run"
            self.console.print(f"  {done}{of}  {figures}".rstrip(), markup=False)


def print_wrapped(console: Console, text: Text, indent: int = 0) -> None:
    """Print a line: on a terminal between its margins, elsewhere unbroken."""
    if console.is_terminal:
        console.print(Padding(text, (0, 0, 0, indent)))
    else:
        console.print(Text(" " * indent) + text)


class Terminal:
    """Where a command prints: results on stdout (`out`), messages on stderr (`log`)."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.out = Console(soft_wrap=not sys.stdout.isatty(), highlight=False)
        self.log = Console(stderr=True, soft_wrap=not sys.stderr.isatty(), highlight=False)

    def result(self, content: Mapping[str, JSON], *views: RenderableType) -> None:
        """Print a command's result: all of `content` as JSON, or `views` for people."""
        if self.as_json:
            json.dump(content, sys.stdout, indent=2, ensure_ascii=False, default=str)
            sys.stdout.write("\n")
            return
        for view in views:
            self.out.print(view, markup=False) if isinstance(view, str) else self.out.print(view)

    def say(self, text: str) -> None:
        """Print a message for people, as it is, on stderr."""
        print_wrapped(self.log, Text(text))

    def fail(self, code: int, problems: list[str]) -> None:
        """Print what went wrong: for people on stderr, with `--json` also on stdout."""
        problems = [visible(problem) for problem in problems]  # as a terminal can show it
        for problem in problems:
            print_wrapped(self.log, Text.assemble(("error:", "bold red"), " ", problem))
        if self.as_json:
            self.result({"error": {"kind": _KINDS.get(code, "failed"), "problems": problems}})

    def end(self, text: str, code: int) -> None:
        """Print what went wrong elsewhere, and end the process whatever it is doing."""
        self.log.show_cursor(True)
        self.fail(code, [text])
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@contextmanager
def reporting(as_json: bool, debug: bool) -> Iterator[Terminal]:
    """Run a command's body, and turn its errors into messages and exit codes."""
    terminal = Terminal(as_json)
    problems: list[str]
    try:
        with _plain_warnings(terminal):
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
    except Exception as error:
        known = isinstance(error, ClusterError)
        code, problems = FAILED, [str(error) if known else failure(error)]
    if debug:
        traceback.print_exc()
    terminal.fail(code, problems)
    raise typer.Exit(code)


@contextmanager
def _plain_warnings(terminal: Terminal) -> Iterator[None]:
    """Print Python's warnings as messages, without the line of code that gave them."""
    original = warnings.showwarning
    warnings.showwarning = lambda message, *place: terminal.say(f"warning: {message}")
    try:
        yield
    finally:
        warnings.showwarning = original


def check_output(path: str | Path | None, overwrite: bool, argument: str = "output") -> None:
    """Refuse to replace a file unasked, and a place that no file can be made at, before any work.

    Raises:
        InputError: there is a file or a directory, or no file can be made there.
    """
    if path is None:
        return
    path = Path(path)
    parent = next(parent for parent in path.absolute().parents if parent.exists())
    if path.is_dir():
        problem, hint = f"{path} is a directory", "Give a file."
    elif path.exists() and not overwrite:
        problem, hint = f"{path} exists", "Give another path, or --force to replace it."
    elif not parent.is_dir() or not os.access(parent, os.W_OK):
        problem, hint = f"{path} cannot be written: {parent} takes no files", "Give another path."
    else:
        return
    raise InputError(InputProblem(argument, f": {problem}", hint=hint))


@contextmanager
def working(terminal: Terminal) -> Iterator[TerminalProgress]:
    """Import Keras, then show the progress of what the block does.

    Print results after the block: a bar that is still drawn captures what is printed.
    """
    prepare_keras()
    with TerminalProgress(terminal.log) as progress:
        yield progress


def failure(error: Exception) -> str:
    """Describe an unforeseen error in one sentence."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        what = f"{error.filename or 'a file'} could not be written"
        return f"the disk is full: {what}. Make room, then go on with --resume."
    if type(error).__name__ == "ResourceExhaustedError" and os.strerror(errno.ENOSPC) in str(error):
        return "the disk is full: TensorFlow could not write. Make room, then go on with --resume."
    first = (str(error).strip() or "no reason given").splitlines()[0]
    return f"{type(error).__name__}: {shortened(first, 400)} (--debug shows the traceback.)"


def prepare_keras() -> None:
    """Import Keras, on TensorFlow unless another is chosen, without TensorFlow's start-up notices.

    A configuration that is checked before it has chosen its `training.backend`.
    """
    choose_backend()
    with quiet_tensorflow():
        import keras  # noqa: F401 (so that its own notices are held back too)
    freeze_until_exit()


_TYPES = {bool: "", int: "NUMBER", float: "NUMBER", Path: "PATH", str: "TEXT"}


def plain_types(command: Any) -> Any:
    """Change the `--help` of a command of typer to name types in words, not as Python does."""
    for inner in getattr(command, "commands", {}).values():
        plain_types(inner)
    kinds = {} if command.callback is None else get_type_hints(command.callback)
    parameters_of = command.get_params

    def parameters(context: Any) -> list[Any]:
        found = parameters_of(context)
        for parameter in found:
            if parameter.param_type_name == "argument":
                # Its name says what it is. Typer has no public way to leave the type out.
                parameter.display_type = lambda ctx: ""
            elif parameter.metavar is None:  # --help itself is a switch
                parameter.metavar = _type_in_words(kinds.get(parameter.name, bool))
        return list(found)

    command.get_params = parameters
    return command


def _type_in_words(kind: Any) -> str | None:
    """Return the word for a type, or for the items of a list; None for other types."""
    if kind in _TYPES:
        return _TYPES[kind]
    return next((words for inner in get_args(kind) if (words := _type_in_words(inner))), None)
