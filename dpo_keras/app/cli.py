"""The command line. It parses and prints; the work is library calls in `dpo_keras.app.runs`.

Neither TensorFlow nor Keras is imported here, so that `--help` answers at once.
"""

from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from dpo_keras.app import runs, views
from dpo_keras.app.config import build_config, config_document, given_text
from dpo_keras.app.console import (
    AsJson,
    ConfigFile,
    Debug,
    Force,
    Overrides,
    Progress,
    Silent,
    TerminalProgress,
    check_backend,
    check_output,
    plain_types,
    prepare_keras,
    reporting,
    working,
)
from dpo_keras.app.feedback_commands import annotate, feedback
from dpo_keras.app.plan import plan
from dpo_keras.app.pretrained_export import check_format, export_pretrained
from dpo_keras.cluster import StopRequest, read_tf_config
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import audit, build_preferences, read_preferences
from dpo_keras.utils import JSON
from dpo_keras.version import __version__

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
data = typer.Typer(help="Look at preference data, and make records of it.", no_args_is_help=True)
app.add_typer(data, name="data")
app.add_typer(feedback, name="feedback")
app.command()(annotate)

Run = Annotated[Path, typer.Argument(metavar="RUN", help="A run's directory.")]
PairLimit = Annotated[
    int | None, typer.Option("--limit", min=1, help="Read this many pairs at most.")
]
Columns = Annotated[
    list[str] | None,
    typer.Option("--column", help="prompt=question reads the prompt from that column; repeatable."),
]
AllowTruncated = Annotated[
    bool,
    typer.Option("--allow-truncated", help="Read what is left of files that are cut off."),
]
Format = Annotated[str, typer.Option(help="How to read them; auto goes by name and columns.")]


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
    resume: Annotated[bool, typer.Option("--resume", help="Go on where it was stopped.")] = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Train a policy: warm-up, preference training, evaluation before and after, export.

    Several processes train together where TF_CONFIG names them; the chief writes and reports.

    SIGTERM, or Ctrl-C once, ends the step in progress, saves, and exits with 75; --resume goes on.
    """
    with reporting(as_json, debug) as terminal:
        read_tf_config()  # a wrong one is refused before anybody waits for TensorFlow
        document = config_document(config, overrides or ())
        given = given_text(config, overrides or ())
        settings = build_config(document, outside=True)
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


app.command()(plan)


@app.command()
def validate(
    config: ConfigFile,
    overrides: Overrides = None,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Check a configuration: every error at once, or the resolved configuration."""
    with reporting(as_json, debug) as terminal:
        check_backend()
        settings = build_config(config_document(config, overrides or ()), outside=True)
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


@data.command("inspect")
def data_inspect(
    files: Annotated[
        list[str], typer.Argument(metavar="FILE...", help="Preference files, or builtin:support.")
    ],
    format: Format = "auto",
    column: Columns = None,
    limit: PairLimit = None,
    allow_truncated: AllowTruncated = False,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Show counts, lengths, bad lines, duplicates, contradictions and biases of the data."""
    with reporting(as_json, debug) as terminal:
        pairs = read_preferences(
            files,
            format=format,
            columns=_renaming(column or ()),
            limit=limit,
            allow_truncated=allow_truncated,
        )
        picture = audit(pairs)
        content = {"report": pairs.report.as_dict(), "audit": picture.as_dict()}
        terminal.result(content, *views.data_views(pairs, picture))


@data.command("build")
def data_build(  # noqa: PLR0913, PLR0917 (a parameter is an option)
    files: Annotated[
        list[str],
        typer.Argument(metavar="FILE...", help="Preference files, or tfds:NAME/CONFIG:SPLIT."),
    ],
    out: Annotated[
        Path, typer.Option("--out", "-o", help="The directory to make; data.path of a run.")
    ],
    format: Format = "auto",
    column: Columns = None,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where TensorFlow Datasets keeps its data.")
    ] = None,
    on_error: Annotated[
        str, typer.Option(help="report keeps the good records, fail builds nothing if any is bad.")
    ] = "report",
    limit: PairLimit = None,
    allow_truncated: AllowTruncated = False,
    shard_megabytes: Annotated[int, typer.Option(min=1, help="Size of a shard.")] = 256,
    as_json: AsJson = False,
    debug: Debug = False,
) -> None:
    """Make sharded, checksummed records of data of any size, to train on without loading it."""
    with reporting(as_json, debug) as terminal:
        with working(terminal) as progress:
            progress.stage("Records")
            stored = build_preferences(
                files,
                out,
                columns=_renaming(column or ()),
                format=format,
                data_dir=data_dir,
                on_error=on_error,
                limit=limit,
                allow_truncated=allow_truncated,
                shard_bytes=shard_megabytes * 2**20,
                on_pairs=lambda done: progress.advance(done, None),
            )
        result: dict[str, JSON] = {
            "directory": str(out),
            "pairs": len(stored),
            "bytes": sum(shard.bytes for shard in stored.shards),
            "checksum": stored.checksum,
            "shards": [vars(shard) for shard in stored.shards],
            "report": stored.report.as_dict(),
            "summary": stored.report.summary(),
        }
        terminal.result(result, *views.build_views(result))


def _renaming(columns: Sequence[str]) -> Mapping[str, str]:
    wrong = [text for text in columns if not all(text.partition("="))]
    if wrong:
        raise InputError([InputProblem("--column", "must be ours=theirs", text) for text in wrong])
    return {ours: theirs for ours, _, theirs in (text.partition("=") for text in columns)}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line on the words after `dpo-keras`, and return the exit code."""
    command = plain_types(typer.main.get_command(app))
    try:
        command(args=None if arguments is None else list(arguments), prog_name="dpo-keras")
    except SystemExit as done:
        return done.code if isinstance(done.code, int) else int(bool(done.code))
    return 0
