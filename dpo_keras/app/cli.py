"""The command line. It parses and prints; the work is library calls in `dpo_keras.app.runs`.

What a command works with is imported when it begins, so that `--help` answers at once; TensorFlow
and Keras only where they are needed.
"""

import time
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from dpo_keras.app.arena_command import arena
from dpo_keras.app.comparison_commands import compare
from dpo_keras.app.console import (
    AsJson,
    ConfigFile,
    Debug,
    Force,
    Overrides,
    Progress,
    Silent,
    TerminalProgress,
    check_output,
    plain_types,
    prepare_keras,
    reporting,
    working,
)
from dpo_keras.app.data_commands import PairLimit, data
from dpo_keras.app.feedback_commands import annotate, feedback
from dpo_keras.cluster import StopRequest, read_tf_config
from dpo_keras.utils.deferred_imports import Deferred, deferred_function
from dpo_keras.version import __version__

runs = Deferred("dpo_keras.app.runs")
improvement = Deferred("dpo_keras.app.improve")
views = Deferred("dpo_keras.app.views")
load_config = deferred_function("dpo_keras.app.config", "load_config")
given_text = deferred_function("dpo_keras.app.config", "given_text")
check_format = deferred_function("dpo_keras.app.pretrained_export", "check_format")
export_pretrained = deferred_function("dpo_keras.app.pretrained_export", "export_pretrained")
predict_run = deferred_function("dpo_keras.app.plan", "predict_run")
open_run = deferred_function("dpo_keras.app.run_directory", "open_run")
open_policy = deferred_function("dpo_keras.app.run_directory", "open_policy")

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

Resume = Annotated[bool, typer.Option("--resume", help="Go on where it was stopped.")]
Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]


def _show_version(wanted: bool) -> None:
    if not wanted:
        return
    shown = [f"dpo-keras {__version__}"]
    for package in ("tensorflow", "keras", "keras-hub"):
        try:
            shown.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            shown.append(f"{package} is not installed")
    print(", ".join(shown))
    raise typer.Exit()


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
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a policy: warm-up, preference training, evaluation before and after, export.

    Several processes train together where TF_CONFIG names them; the chief writes and reports.

    SIGTERM, or Ctrl-C once, ends the step in progress, saves, and exits with 75; --resume goes on.
    """
    with reporting(as_json, debug) as terminal:
        read_tf_config()  # a wrong one is refused before anybody waits for TensorFlow
        settings = load_config(config, overrides or (), outside=True)
        given = given_text(config, overrides or ())
        prepare_keras()
        cluster, stop = runs.cluster_of(settings), StopRequest()
        chief = cluster is None or cluster.is_chief
        with stop.signals(), TerminalProgress(terminal.log) as shown:
            progress: Progress = shown if chief else Silent()
            result = runs.train(
                settings, resume=resume, given=given, progress=progress, stop=stop, end=terminal.end
            )
        if chief:
            terminal.result(result.as_dict(), *views.run_views(result))
        elif cluster is not None:
            terminal.say(f"{cluster.this} is done; {cluster.chief} has the result.")


@app.command()
def quickstart(
    overrides: Overrides = None,
    resume: Resume = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Run the main job on bundled data: warm-up, training, evaluation, export, one answer.

    It is `train builtin:quickstart`, in runs/quickstart. An earlier run there is kept beside it.
    """
    config = Path("builtin:quickstart")
    with reporting(as_json, debug) as terminal:
        output = Path(load_config(config, overrides or (), outside=True).output)
        earlier = Path("runs/quickstart")  # another `output` may hold what is no run: `train` asks
        if output == earlier and earlier.exists() and not resume:
            kept = earlier.with_name(f"{earlier.name}.{time.strftime('%Y%m%d-%H%M%S')}")
            terminal.say(f"The earlier run is kept as {earlier.rename(kept)}.")
    train(config, overrides, resume=resume, as_json=as_json, debug=debug)


@app.command()
def improve(
    config: ConfigFile,
    rounds: Annotated[int, typer.Option("--rounds", "-r", help="How many there are in all.")],
    overrides: Overrides = None,
    resume: Resume = False,
    wait: Annotated[
        bool, typer.Option("--wait", help="Where people judge, wait until they have.")
    ] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Improve a policy in rounds: it answers, is judged, and learns from the judgements.

    Where people judge, the command ends when a round is ready for them, and says how to serve the
    page. SIGTERM, or Ctrl-C once, ends it with 75. --resume goes on after either.
    """
    with reporting(as_json, debug) as terminal:
        settings = load_config(config, overrides or (), outside=True)
        given = given_text(config, overrides or ())
        prepare_keras()
        stop = StopRequest()
        with stop.signals(), TerminalProgress(terminal.log) as progress:
            result = improvement.improve(
                settings,
                rounds,
                resume=resume,
                wait=wait,
                given=given,
                progress=progress,
                stop=stop,
            )
        terminal.result(result.as_dict(), *views.improvement_views(result))


@app.command()
def plan(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Predict time, memory, steps, tokens and fill of a training, from a trial of a few steps.

    The trial does all that the training does once: warm-up, measurements, samples, export. It works
    in a temporary directory beside the run's, and leaves nothing behind.
    """
    with reporting(as_json, debug) as terminal:
        settings = load_config(config, overrides or (), outside=True)
        with working(terminal) as progress:
            result = predict_run(settings, progress)
        terminal.result(result, *views.plan_views(result))


@app.command()
def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a configuration: every error at once, or the resolved configuration."""
    with reporting(as_json, debug) as terminal:
        settings = load_config(config, overrides or (), outside=True)
        terminal.result(settings.model_dump(mode="json"), settings.resolved().rstrip())
        for warning in settings.warnings():
            terminal.say(f"warning: {warning}")
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
        open_run(run)  # before anybody waits for TensorFlow
        with working(terminal) as progress:
            result = runs.evaluate(run, file, limit=limit, progress=progress)
        terminal.result(result, *views.evaluation_views(result))


@app.command()
def generate(  # noqa: PLR0913, PLR0917 (a parameter is an option)
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
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write candidate responses for people to compare: two or more for each prompt."""
    with reporting(as_json, debug) as terminal:
        check_output(output, force, "--output")  # before anybody waits for TensorFlow
        with working(terminal) as progress:
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
                overwrite=force,
                progress=progress,
            )
        terminal.result({"candidates": candidates}, *views.candidate_views(candidates))
        if output is not None:
            terminal.say(f"{len(candidates)} prompts with their candidates are in {output}.")


@app.command()
def export(
    run: Run,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="saved_models/<name>/<version>")],
    format: Annotated[
        str, typer.Option(help="saved_model, keras_hub, transformers, or peft (adapters alone).")
    ] = "saved_model",
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help="Longest answer; default: the configuration's.")
    ] = None,
    force: Force = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Write a run's policy: a SavedModel, verified without Keras, or files for other libraries."""
    with reporting(as_json, debug) as terminal:
        check_format(format, force, max_new_tokens)
        open_policy(run)
        with working(terminal) as progress:
            if format != "saved_model":
                result = export_pretrained(run, path, format, overwrite=force, progress=progress)
            else:
                result = runs.export_run(
                    run, path, max_new_tokens=max_new_tokens, progress=progress
                )
        terminal.result(result, *views.export_views(result))


@app.command()
def losses(as_json: AsJson = False, debug: Debug = False) -> None:
    """List the objectives that loss.type takes."""
    with reporting(as_json, debug) as terminal:
        rows = views.loss_rows()
        terminal.result({"losses": rows}, *views.loss_views(rows))


app.command()(arena)
app.command()(annotate)
app.command()(compare)
app.add_typer(data, name="data")
app.add_typer(feedback, name="feedback")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on the words after `dpo-keras`, and return the exit code."""
    command = plain_types(typer.main.get_command(app))
    try:
        command(args=None if arguments is None else list(arguments), prog_name="dpo-keras")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    return 0
