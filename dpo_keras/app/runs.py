"""Runs from Python: `train`, `evaluate`, `generate` and `export_run` are what the commands call."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

from dpo_keras.app.candidate_generation import generate
from dpo_keras.app.config import Config
from dpo_keras.app.config_rules import keys_for_arguments
from dpo_keras.app.console import Progress, Silent
from dpo_keras.app.keras_backend import choose_backend
from dpo_keras.app.models import check_length, load_policy, save_policy
from dpo_keras.app.pretrained_export import save_adapters
from dpo_keras.app.run_clock import RunClock, outcome_lines
from dpo_keras.app.run_devices import check_devices, devices_of
from dpo_keras.app.run_directory import (
    check_run,
    locked_run,
    start_run,
)
from dpo_keras.app.run_evaluation import Examiner, evaluate, load_trained, report_training
from dpo_keras.app.run_export import check_export, export_alone, export_model, export_run
from dpo_keras.app.run_inputs import Sides, read_sides, record_prompts, texts_of, tokenize
from dpo_keras.app.run_work import stages_of
from dpo_keras.app.training_stages import (
    Context,
    build_model,
    check_steps,
    choose_reference,
    leave_together,
    train_policy,
    warm_up_policy,
)
from dpo_keras.cluster import Cluster, StopRequest, Watchdog, read_tf_config
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON

if TYPE_CHECKING:
    import keras

    from dpo_keras.batching import TokenizedPairs

__all__ = ["RunResult", "evaluate", "export_run", "generate", "train"]

End = Callable[[str, int], None]


@dataclass
class RunResult:
    """The outcome of a run; `result.json` holds the same."""

    directory: str
    steps: int  # of preference training
    pairs: dict[str, int]  # how many were trained on, held out, and dropped
    before: dict[str, JSON] | None = None  # `metrics`, `figures` with 95 % intervals, `responses`
    after: dict[str, JSON] | None = None  # None without held-out pairs
    samples: list[dict[str, JSON]] = field(default_factory=list)  # some of `samples.jsonl`
    report: dict[str, str] = field(default_factory=dict)  # paths of its files, by kind
    findings: list[str] = field(default_factory=list)  # what the report warns about
    prediction: dict[str, JSON] | None = None  # of time and memory, and what they were
    export: dict[str, JSON] | None = None  # what was exported, and what it answered
    seconds: float = 0.0  # of wall time, of the process that finished the run

    def as_dict(self) -> dict[str, JSON]:
        """Return everything as plain values, for JSON."""
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
    """Run the main job: warm-up, preference training, evaluation before and after, export.

    `given` is the configuration as it was given, for the record. A run that is finished returns its
    result with `resume`; one that never began, begins, and says so. Until the end no other process
    may train in the run's directory. A requested `stop` ends the run after the step in progress
    (`RunStopped`). `end` is how this process of a cluster ends when another worker was lost (see
    `Watchdog`).
    """
    progress, stop = progress or Silent(), stop or StopRequest()
    if config.improve is not None:
        raise InputError(InputProblem("improve", "is for dpo-keras improve only; set it to null."))
    cluster = cluster_of(config)
    run, _ = check_run(config, resume)
    if resume and run.finished:
        progress.note(f"{run.path} is done already.")
        return RunResult(**run.read("result.json"))
    writes = cluster is None or cluster.is_chief
    with locked_run(config, resume, writes):
        if resume and not run.begun:
            progress.note(f"{run.path} has no checkpoint to resume: it starts from the beginning.")
        if cluster is not None:
            progress.stage("Waiting for all workers that TF_CONFIG names")
        with meet_workers(cluster, config, resume, stop, end) as watchdog:
            started = time.monotonic()
            devices = devices_of(config, cluster=cluster, watchdog=watchdog)
            import keras

            run = start_run(config, resume, given, writes)
            keras.utils.set_random_seed(config.seed)
            clock = RunClock(progress)
            context = Context(config, run, resume, clock, devices, stop, watchdog)
            result = _run_stages(context, clock)
            result.seconds = time.monotonic() - started
            run.write("result.json", result.as_dict())
            leave_together(devices)
            return result


def cluster_of(config: Config) -> Cluster | None:
    """Return the cluster that a run trains on; None for a single process."""
    choose_backend(config.training.backend, config.training.mesh is not None)
    if config.training.strategy not in ("auto", "multi_worker"):
        return None
    cluster = read_tf_config()
    if cluster is not None and cluster.this not in cluster.in_step:
        why = f"multi_worker has chief and workers only, but TF_CONFIG makes this {cluster.this}"
        raise InputError(InputProblem("training.strategy", why))
    return cluster


def meet_workers(
    cluster: Cluster | None, config: Config, resume: bool, stop: StopRequest, end: End | None
) -> AbstractContextManager[Watchdog | None]:
    """Wait for all workers of a run, and watch over them until the context is left."""
    if cluster is None or len(cluster.in_step) == 1:
        return nullcontext()
    options = {} if end is None else {"end": end}
    digest = hashlib.sha256(config.resolved().encode()).hexdigest()
    greeting = {"the configuration": digest[:12], "--resume": str(resume)}
    return Watchdog(cluster, stop, **options).meet(
        config.training.worker_timeout, greeting, config.output
    )


@dataclass
class Prepared:
    """The inputs of a run's stages, whose layout of batches is settled."""

    policy: keras.Model
    reference: keras.Model | str
    sides: Sides
    pairs: TokenizedPairs
    held_out: TokenizedPairs | None
    counts: dict[str, int]  # of pairs


def _run_stages(context: Context, clock: RunClock) -> RunResult:
    if context.run.writes:
        check_export(context.config, context.run)
    prepared = prepare(context)
    clock.expect(stages_of(context, prepared.reference, prepared.pairs, prepared.held_out))
    return carry_out(context, prepared, clock)


def prepare(context: Context) -> Prepared:
    """Read and tokenize the pairs, load the policy and the reference, and settle the layout."""
    config, run, progress = context.config, context.run, context.progress
    progress.stage("Data")
    sides = read_sides(config, progress, run)
    progress.stage("Policy")
    with context.devices.scope():
        policy = load_policy(config.model, texts_of(sides.train))
    check_length(policy, config.data.max_length)
    with keys_for_arguments(section="training"):
        check_devices(policy)
    progress.note(f"{type(policy).__name__}, {policy.count_params():,} weights")
    pairs = tokenize(config.data, sides.train, policy, "training", progress, run)
    held_out = None
    if sides.held_out is not None:
        held_out = tokenize(config.data, sides.held_out, policy, "held-out", progress, run)
    _check_same_data(context, pairs, held_out)
    record_prompts(run, sides.train)
    reports = [side.report for side in (pairs, held_out) if side is not None]
    counts = {
        "train": len(pairs),
        "held_out": 0 if held_out is None else len(held_out),
        "dropped": sides.dropped + sum(report.pairs - report.kept for report in reports),
    }
    reference = choose_reference(context, policy)
    images = any(side is not None and side.images is not None for side in (pairs, held_out))
    context.settle_layout(policy, reference, images)
    check_steps(context, pairs)
    return Prepared(policy, reference, sides, pairs, held_out, counts)


def carry_out(context: Context, prepared: Prepared, clock: RunClock) -> RunResult:
    """Run all stages after `prepare`: warm-up, training, measurements, report and export."""
    from dpo_keras.utils.backends import process_count, values_of_all_processes

    config, run, progress = context.config, context.run, context.progress
    policy, counts = prepared.policy, prepared.counts
    warm_up_policy(context, policy, prepared.pairs)
    model, pairs, held_out = build_model(
        context, policy, prepared.reference, prepared.pairs, prepared.held_out
    )
    examiner = Examiner(context, model, held_out, prepared.sides.held_out)
    before = examiner.measure("before")
    steps = train_policy(context, model, pairs, held_out)
    after = examiner.measure("after")

    with values_of_all_processes(model.variables):
        if not run.writes:
            return RunResult(str(run.path), steps, counts)
        save_policy(policy, run.policy)
        save_adapters(policy, run.adapters)
        if config.trains_reward:
            model.save_head(run.reward_head)
    report = {}
    prediction = clock.outcome()
    if before is not None and after is not None:
        said = outcome_lines(prediction)
        report = report_training(context, prepared.sides.held_out, before, after, said)
    run.write("prediction.json", prediction)
    result = RunResult(str(run.path), steps, counts, prediction=prediction, **report)
    if config.export is not None and process_count() > 1:
        result.export = export_alone(config, config.export, progress, run)
    elif config.export is not None:
        # The served model meets new texts, for which nothing is cached.
        cached = model.reference.mode == "cached"
        served = load_trained(run, policy) if cached else model
        result.export = export_model(config, config.export, served, examiner.chosen, progress, run)
    return result


def _check_same_data(
    context: Context, pairs: TokenizedPairs, held_out: TokenizedPairs | None
) -> None:
    """Refuse other tokens than the run began with, or the other workers have."""
    run = context.run
    sides = {"train": pairs, "held_out": held_out}
    now = {name: None if side is None else side.fingerprint for name, side in sides.items()}
    if context.watchdog is not None:
        hint = "Give all of them the same files at data.path."
        context.watchdog.agree("pairs (fingerprint)", now, hint)
    then = run.read("data.json")
    if then is None:
        replicas = context.devices.num_replicas_in_sync
        made = {"split": "hash of the prompt", "trees": "prompts", "replicas": replicas}
        run.write("data.json", {**now, **made})
    elif changed := " and ".join(name for name in now if now[name] != then.get(name)):
        why = f": the {changed} pairs are not those that {run.path} was started with; restore the"
        why += " files, or start a new run with output=DIRECTORY."
        raise InputError(InputProblem("data.path", why))
