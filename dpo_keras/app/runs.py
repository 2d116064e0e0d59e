"""The part of a run that depends on how many processes take part in it."""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_keras.app.build_model import build_model, given_reference
from dpo_keras.app.candidate_generation import generate
from dpo_keras.app.finished_run import evaluate, export_run, export_trained
from dpo_keras.app.models import check_length, load_policy, save_policy
from dpo_keras.app.progress import Progress, Silent
from dpo_keras.app.run_directory import RunDirectory, check_run, start_run, versions
from dpo_keras.app.run_inputs import Pairs, read_sides, texts_of, tokenize
from dpo_keras.app.run_measurements import Examiner, Measured
from dpo_keras.app.training_stages import (
    Context,
    check_steps,
    leave_together,
    train_policy,
    warm_up_policy,
)
from dpo_keras.cluster import Cluster, StopRequest, Watchdog, read_tf_config
from dpo_keras.errors import InputError

if TYPE_CHECKING:
    from dpo_keras.app.config import Config
    from dpo_keras.batching import TokenizedPairs


End = Callable[[str, int], None]
_IN_STEP = ("auto", "multi_worker")


def cluster_of(config: Config) -> Cluster | None:
    """Returns the cluster that a run trains on; None for a single process.

    Args:
        config: the run's configuration.

    Raises:
        InputError: if TF_CONFIG is wrong, or this process has no part in such a run.
    """
    if config.training.strategy not in _IN_STEP:
        return None
    cluster = read_tf_config()
    if cluster is not None and cluster.this not in cluster.in_step:
        raise InputError(
            f"training.strategy multi_worker has chief and workers only, but TF_CONFIG makes this "
            f"process {cluster.this}."
        )
    return cluster


def meet_workers(
    cluster: Cluster | None,
    config: Config,
    *,
    resume: bool,
    stop: StopRequest,
    end: End | None = None,
) -> AbstractContextManager[Watchdog | None]:
    """Waits for all workers of a run, and watches over them until the context is left.

    Args:
        cluster: None gives a context that does nothing.
        config: all workers must have the same.
        resume: all workers must have the same.
        stop: of this process.
        end: how a process ends whose peer was lost: prints the message, exits with the code.

    Raises:
        ClusterError: somebody did not connect within `training.worker_timeout`.
        InputError: the workers were not started with the same configuration.
    """
    if cluster is None or len(cluster.in_step) == 1:
        return nullcontext()
    options = {} if end is None else {"end": end}
    digest = hashlib.sha256(config.resolved().encode()).hexdigest()
    greeting = {"the configuration": digest[:12], "--resume": str(resume)}
    return Watchdog(cluster, stop, **options).meet(config.training.worker_timeout, greeting)


__all__ = ["RunResult", "evaluate", "export_run", "generate", "train"]


@dataclass
class RunResult:
    """The outcome of a run; `result.json` holds the same.

    Args:
        directory: the run's directory.
        steps: of preference training.
        pairs: how many were trained on and held out, and how many were dropped.
        before: `metrics`, `figures` (with 95 % intervals) on the held-out pairs and of the
            `responses` before preference training; None without held-out pairs.
        after: the same after it.
        samples: some of the responses to held-out prompts side by side; `samples.jsonl` has all.
        report: paths of the report's files, by kind.
        findings: what the report warns about.
        export: what was exported and what it answered; None without export.
        seconds: of wall time, of the process that finished the run.
    """

    directory: str
    steps: int
    pairs: dict[str, int]
    before: dict[str, Any] | None = None
    after: dict[str, Any] | None = None
    samples: list[dict[str, Any]] = field(default_factory=list)
    report: dict[str, str] = field(default_factory=dict)
    findings: list[str] = field(default_factory=list)
    export: dict[str, Any] | None = None
    seconds: float = 0.0

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        return asdict(self)


def train(
    config: Config,
    *,
    resume: bool = False,
    given: str | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
    end: End | None = None,
) -> RunResult:
    """Runs the main job: warm-up, preference training, evaluation before and after, export.

    Args:
        config: what to do.
        resume: go on where this run was stopped; a run that is done returns its result, and one
            that never began, begins.
        given: the configuration as it was given, for the record.
        progress: hears what happens; None: nobody.
        stop: asked, it ends the run behind the step in progress.
        end: on a cluster, how this process ends when another worker was lost (see `Watchdog`).

    Returns:
        The outcome, which `result.json` in the run's directory holds too.

    Raises:
        InputError: if the configuration or the data are wrong, or a run is there already.
        RuntimeError: if the loss is no number any more, or does not start where it must.
        ClusterError: if a worker did not come, or does not answer any more.
        RunStopped: if `stop` was asked.
    """
    progress, stop = progress or Silent(), stop or StopRequest()
    cluster = cluster_of(config)
    run, _ = check_run(config, resume)
    if resume and run.finished:
        progress.note(f"{run.path} is done already.")
        return RunResult(**run.read("result.json"))
    if cluster is not None:
        progress.stage("Waiting for all workers that TF_CONFIG names")
    with meet_workers(cluster, config, resume=resume, stop=stop, end=end) as watchdog:
        return _train(config, cluster, watchdog, stop, resume, given, progress)


def _train(
    config: Config,
    cluster: Cluster | None,
    watchdog: Watchdog | None,
    stop: StopRequest,
    resume: bool,
    given: str | None,
    progress: Progress,
) -> RunResult:
    import keras

    from dpo_keras.training import strategy

    started = time.monotonic()
    # First of all: a strategy must be made before TensorFlow has set up its devices.
    replicas = strategy(config.training.strategy, watchdog=watchdog)
    run = start_run(config, resume, given, writes=cluster is None or cluster.is_chief)
    context = Context(config, run, resume, progress, replicas, stop, watchdog)
    keras.utils.set_random_seed(config.seed)

    progress.stage("Data")
    sides = read_sides(config, progress, run)
    progress.stage("Policy")
    with replicas.scope():
        policy = load_policy(config.model, texts_of(sides.train))
    check_length(policy, config.data.max_length)
    progress.note(f"{type(policy).__name__}, {policy.count_params():,} weights")
    pairs = tokenize(config, sides.train, policy, "training", progress, run)
    held_out = None
    if sides.held_out is not None:
        held_out = tokenize(config, sides.held_out, policy, "held-out", progress, run)
    _check_same_data(run, watchdog, pairs, held_out)

    reference = given_reference(context, policy)
    context.settle_layout(policy, reference)
    check_steps(context, pairs)

    warm_up_policy(context, policy, pairs)
    model, (pairs, held_out) = build_model(context, policy, reference, pairs, held_out)
    examiner = Examiner(context, model, held_out, sides.held_out)
    before = examiner.measure("before")
    steps = train_policy(context, model, pairs, held_out)
    after = examiner.measure("after")

    result = RunResult(
        directory=str(run.path),
        steps=steps,
        pairs={
            "train": len(pairs),
            "held_out": 0 if held_out is None else len(held_out),
            "dropped": sides.dropped
            + sum(
                side.report.pairs - side.report.kept
                for side in (pairs, held_out)
                if side is not None
            ),
        },
    )
    if run.writes:
        _save_policy(run, policy)
        if before is not None and after is not None:
            _report(context, sides.held_out, before, after, result)
        if config.export is not None:
            result.export = export_trained(run, model, examiner.chosen, progress)
    result.seconds = time.monotonic() - started
    run.write("result.json", result.as_dict())
    leave_together(replicas)
    return result


def _check_same_data(
    run: RunDirectory,
    watchdog: Watchdog | None,
    pairs: TokenizedPairs,
    held_out: TokenizedPairs | None,
) -> None:
    """Refuses other tokens than the run began with, or the other workers have."""
    now = {
        "train": pairs.fingerprint,
        "held_out": None if held_out is None else held_out.fingerprint,
    }
    if watchdog is not None:
        watchdog.agree("pairs (fingerprint)", now, "Give all of them the same files at data.path.")
    then = run.read("data.json")
    if then is None:
        run.write("data.json", {**now, "split": "hash of the prompt"})
    elif changed := " and ".join(name for name in now if now[name] != then.get(name)):
        raise InputError(
            f"data.path: the {changed} pairs are not those that {run.path} was started with; "
            "restore the files, or start a new run with output=DIRECTORY."
        )


def _save_policy(run: RunDirectory, policy: Any) -> None:
    partial = run.path / ".policy.partial"
    shutil.rmtree(partial, ignore_errors=True)
    save_policy(policy, partial)
    shutil.rmtree(run.policy, ignore_errors=True)
    os.replace(partial, run.policy)


def _report(
    context: Context,
    held_out: Pairs | None,
    before: Measured,
    after: Measured,
    result: RunResult,
) -> None:
    """Writes the report and puts what it says into the result."""
    from dpo_keras.evaluation import side_by_side, write_report

    run, config = context.run, context.config
    context.progress.stage("Report")
    result.before, result.after = before.as_dict(), after.as_dict()
    if after.samples is not None:
        rows = side_by_side(before.samples, after.samples, len(after.samples))
        run.write("samples.jsonl", rows)
        result.samples = rows[: config.evaluation.samples_shown]
    report = write_report(
        run.path,
        after.held_out,
        before=before.held_out,
        samples_before=before.samples,
        samples_after=after.samples,
        metrics_jsonl=run.path / "metrics.jsonl",
        config_text=config.resolved(),
        pairs=held_out,
        title=config.name,
        details={"data": ", ".join(config.data.path or ()), **versions()},
        samples_shown=config.evaluation.samples_shown,
    )
    result.report = {kind: str(path) for kind, path in report.paths.items()}
    result.findings = [f"{finding.severity}: {finding.text}" for finding in report.findings]
    for notice in report.notices:
        context.progress.note(notice)
