"""The command line. It parses and prints; the work is library calls in `dpo_keras.app.runs`.

Nothing heavy is imported here, so that `--help` answers at once.
"""

import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from dpo_keras.app.console import prepare_keras, reporting
from dpo_keras.app.data_commands import data
from dpo_keras.app.feedback_commands import annotate, feedback
from dpo_keras.app.options import AsJson, Debug, PairLimit

app = typer.Typer(
    name="dpo-keras",
    help="Direct Preference Optimization for Keras: train, evaluate and serve a policy.",
    epilog="Exit codes: 0 done, 1 the run failed, 2 the input or the configuration is wrong, "
    "75 the training was asked to stop (SIGTERM, Ctrl-C), is saved and goes on with --resume.",
    add_completion=False,
    pretty_exceptions_enable=False,
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.add_typer(data, name="data")
app.add_typer(feedback, name="feedback")
app.command()(annotate)

ConfigFile = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML configuration.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]
Overrides = Annotated[
    list[str] | None,
    typer.Argument(
        metavar="SECTION.KEY=VALUE",
        help="Override the file, for instance training.epochs=2 or model.lora_rank=null.",
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        names = ("dpo-keras", "tensorflow", "keras", "keras-hub")
        print(", ".join(f"{name} {_version(name)}" for name in names))
        raise typer.Exit()


def _version(name: str) -> str:
    if name == "dpo-keras":
        from dpo_keras.version import __version__

        return __version__
    try:
        return version(name)
    except PackageNotFoundError:
        return "is not installed"


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Show versions and exit."
        ),
    ] = False,
) -> None:
    pass


@app.command()
def train(
    config: ConfigFile,
    overrides: Overrides = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on where this run was stopped.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a policy: warm-up, preference training, evaluation before and after, export.

    Several processes train together where TF_CONFIG names them; the chief writes and reports.

    SIGTERM, or Ctrl-C once, ends the step in progress, saves, and exits with 75; --resume goes on.
    """
    with reporting(as_json, debug) as terminal:
        from dpo_keras.app.config import build_config, config_document, given_text
        from dpo_keras.app.progress import Silent
        from dpo_keras.app.runs import cluster_of
        from dpo_keras.cluster import StopRequest, read_tf_config

        read_tf_config()  # refused before anybody waits for TensorFlow

        document = config_document(config, overrides or ())
        given = given_text(config, overrides or ())
        prepare_keras()
        from dpo_keras.app import runs, views
        from dpo_keras.app.console import TerminalProgress

        settings = build_config(document, outside=True)
        cluster, stop = cluster_of(settings), StopRequest()
        chief = cluster is None or cluster.is_chief
        with stop.signals(), TerminalProgress(terminal.log) as shown:
            progress = shown if chief else Silent()
            result = runs.train(
                settings, resume=resume, given=given, progress=progress, stop=stop, end=terminal.end
            )
        if chief:
            terminal.result(result.as_dict(), *views.run_views(result))
        elif cluster is not None:
            terminal.say(f"{cluster.this} is done; {cluster.chief} has the result.")


@app.command()
def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a configuration: every error at once, or the resolved configuration."""
    with reporting(as_json, debug) as terminal:
        from dpo_keras.app.config import build_config, config_document

        document = config_document(config, overrides or ())
        prepare_keras()
        settings = build_config(document, outside=True)
        terminal.result(settings.model_dump(mode="json"), settings.resolved().rstrip())
        terminal.say(f"{config} is valid.")


@app.command()
def evaluate(
    run: Run,
    file: Annotated[
        str, typer.Argument(metavar="FILE", help="Preference pairs, or builtin:support.")
    ],
    limit: PairLimit = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Measure a run's policy on preference pairs and write a report into the run."""
    with reporting(as_json, debug) as terminal:
        prepare_keras()
        from dpo_keras.app import runs, views
        from dpo_keras.app.console import TerminalProgress

        with TerminalProgress(terminal.log) as progress:
            result = runs.evaluate(run, file, limit=limit, progress=progress)
        terminal.result(result, *views.evaluation_views(result))


@app.command()
def generate(
    config: Annotated[
        Path, typer.Argument(metavar="CONFIG", help="YAML configuration, or a run's directory.")
    ],
    prompts: Annotated[
        Path,
        typer.Argument(
            metavar="PROMPTS", help="JSONL with a prompt column, or text with a prompt a line."
        ),
    ],
    overrides: Overrides = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Write the candidates here as JSONL.")
    ] = None,
    responses: Annotated[int, typer.Option("--responses", "-n", min=1, help="Per prompt.")] = 2,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Default: the configuration's evaluation section.")
    ] = None,
    temperature: Annotated[
        list[float] | None,
        typer.Option(min=0, help="0 takes the likeliest token; give several to compare them."),
    ] = None,
    top_p: Annotated[float | None, typer.Option(min=0, max=1)] = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(help="A further run or configuration whose policy writes too; repeatable."),
    ] = None,
    seed: Annotated[int | None, typer.Option(min=0)] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Use this many prompts at most.")] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write candidate responses for people to compare: two or more for each prompt."""
    with reporting(as_json, debug) as terminal:
        prepare_keras()
        from dpo_keras.app import runs, views
        from dpo_keras.app.console import TerminalProgress

        with TerminalProgress(terminal.log) as progress:
            candidates = runs.generate(
                config,
                prompts,
                overrides or (),
                responses=responses,
                compare=compare or (),
                max_new_tokens=max_new_tokens,
                temperature=temperature or None,
                top_p=top_p,
                seed=seed,
                limit=limit,
                output=output,
                progress=progress,
            )
        terminal.result({"candidates": candidates}, *views.candidate_views(candidates))
        if output is not None:
            terminal.say(f"{len(candidates)} prompts with their candidates are in {output}.")


@app.command()
def export(
    run: Run,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="saved_models/<name>/<version>")],
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default: the configuration's.")
    ] = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a run's policy as a SavedModel and verify it in a process without Keras."""
    with reporting(as_json, debug) as terminal:
        prepare_keras()
        from dpo_keras.app import runs, views
        from dpo_keras.app.console import TerminalProgress

        with TerminalProgress(terminal.log) as progress:
            result = runs.export_run(run, path, max_new_tokens=max_new_tokens, progress=progress)
        terminal.result(result, *views.export_views(result))


@app.command()
def losses(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the objectives that loss.type takes."""
    with reporting(as_json, debug) as terminal:
        prepare_keras()
        from dpo_keras.app import views

        rows = views.loss_rows()
        terminal.result({"losses": rows}, *views.loss_views(rows))


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line.

    Args:
        arguments: the words after `dpo-keras`; None takes the process's own.

    Returns:
        The exit code.

    Example:
        >>> main(["train", "--reusme", "a.yaml"])
        2
    """
    try:
        app(args=None if arguments is None else list(arguments), prog_name="dpo-keras")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    return 0


if __name__ == "__main__":
    sys.exit(main())
