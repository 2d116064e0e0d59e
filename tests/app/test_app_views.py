"""What people see: progress on a terminal and in a log, tables that nothing can break."""

import io
import re

from rich.console import Console

from dpo_keras.app import views
from dpo_keras.app.console import Terminal, TerminalProgress, failure


def console(terminal):
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, highlight=False)


def drawn(*renderables):
    target = console(False)
    for renderable in renderables:
        target.print(renderable)
    return target.file.getvalue()


def test_progress_in_a_log_is_a_line_now_and_then_and_one_at_the_end():
    target = console(False)
    with TerminalProgress(target, every=1000) as progress:
        progress.stage("Training [1]")
        for step in range(1, 6):
            progress.advance(step, 5, loss=0.5, reward_accuracy=0.75, unknown=3.0)
        progress.note("two\nlines")
    assert target.file.getvalue().splitlines() == [
        "Training [1]",
        "  5 of 5  loss 0.5  accuracy 0.75",
        "  two",
        "  lines",
    ]


def test_progress_on_a_terminal_is_a_bar():
    target = console(True)
    with TerminalProgress(target) as progress:
        progress.stage("Training")
        progress.advance(1, 4, loss=0.5)
        progress.advance(4, 4, loss=0.25)
    text = target.file.getvalue()
    assert "4/4" in text and "loss 0.25" in text


def test_progress_shows_the_time_that_is_left_of_the_whole_run():
    for terminal, expected in ((False, "2 min 5 s left of the run"), (True, "2 min 5 s left")):
        target = console(terminal)
        with TerminalProgress(target, every=0) as progress:
            progress.stage("Training")
            progress.advance(1, 4, loss=0.5, seconds_left=124.6)
        assert expected in target.file.getvalue()


def test_what_a_model_writes_can_not_break_the_table():
    sample = {
        "prompt": "[red]x",
        "before": "\x1b[2J\x07",
        "after": "[/bold] ok",
        "after_preferred": True,
    }
    text = drawn(views.sample_table([sample]))
    assert "\x1b" not in text and "\x07" not in text
    assert "[red]x" in text and "good: [/bold] ok" in text


def test_long_prompts_show_their_end():
    text = drawn(
        *views.candidate_views([{"prompt": "x" * 500 + "END", "responses": ["a", "b"]}] * 7)
    )
    assert "END" in text and "and 2 more prompts" in text


def test_figures_stand_side_by_side_with_their_intervals():
    before = {"loss": {"value": 0.6931, "count": 3}, "old": {"value": 1.0}}
    after = {"loss": {"value": 0.5, "low": 0.4, "high": 0.6, "count": 3}}
    text = drawn(views.figure_table("Title", {"before": before, "after": after}))
    assert "0.693" in text and "0.500 (0.400 to 0.600)" in text and "old" in text


def test_an_unforeseen_error_is_one_line():
    assert failure(ValueError("")) == "ValueError: no reason given (--debug shows the traceback.)"
    assert "\n" not in failure(RuntimeError("a\nb")) and len(failure(RuntimeError("x" * 999))) < 500


def test_json_goes_to_stdout_and_messages_to_stderr(capsys):
    terminal = Terminal(as_json=True)
    terminal.say("[bold]working")
    terminal.result({"é": 1}, "for people")
    out, err = capsys.readouterr()
    assert out == '{\n  "é": 1\n}\n' and err == "[bold]working\n"


def test_on_a_terminal_messages_break_between_words_and_keep_their_indent(monkeypatch):
    terminal = Terminal(as_json=False)
    terminal.log = Console(file=io.StringIO(), force_terminal=True, width=30, highlight=False)
    terminal.fail(2, ["the directory of the run exists already; give another"])
    progress = TerminalProgress(terminal.log)
    progress.note("warning: prompts of many pairs were cut")
    text = re.sub("\x1b\\[[0-9;]*m", "", terminal.log.file.getvalue())
    assert [line.rstrip() for line in text.splitlines()] == [
        "error: the directory of the",
        "run exists already; give",
        "another",
        "  warning: prompts of many",
        "  pairs were cut",
    ]
