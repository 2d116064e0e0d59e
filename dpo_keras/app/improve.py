"""`dpo-keras improve`: a policy answers, is judged and learns from the judgements, in rounds."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from dpo_keras.app import runs
from dpo_keras.app.config import Config
from dpo_keras.app.config_improve import Improve
from dpo_keras.app.console import Progress, Silent
from dpo_keras.app.improvement import STORE, Improvement
from dpo_keras.app.improvement_evaluation import RESULT, measure
from dpo_keras.app.improvement_report import write_rounds
from dpo_keras.app.improvement_stages import (
    draw_candidates,
    judge,
    prompt_records,
    select,
    train,
    warm_up,
)
from dpo_keras.app.run_directory import check_run, locked_run, open_run, start_run
from dpo_keras.app.run_inputs import read_sides
from dpo_keras.cluster import StopRequest
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON


@dataclass
class Improved:
    """The outcome of an improvement, or how far it is; `improvement.json` holds the same."""

    directory: str
    wanted: int  # rounds
    rounds: list[dict[str, JSON]] = field(default_factory=list)  # measured, from round 0 on
    report: dict[str, str] = field(default_factory=dict)  # paths of its files, by kind
    waiting: dict[str, JSON] | None = None  # for people: `round`, `missing`, `of`, `command`

    def as_dict(self) -> dict[str, JSON]:
        """Return everything as plain values, for JSON."""
        return asdict(self)


def improve(
    config: Config,
    rounds: int,
    *,
    resume: bool = False,
    wait: bool = False,
    given: str | None = None,
    progress: Progress | None = None,
    stop: StopRequest | None = None,
) -> Improved:
    """Improve a policy in rounds: generate, select, judge, train, evaluate.

    Every stage ends in a file that is whole or absent, or in the store, or in a run that resumes
    itself. With `resume` an improvement goes on after the last of them, and ends as if it had never
    been stopped. It may be given more rounds than before.

    Args:
        config: with the sections `improve` and `judge`. Its model, after a warm-up if there is one,
            or the policy of `improve.start`, is round 0.
        rounds: how many there are in all, >= 1.
        resume: go on with the improvement in `config.output`.
        wait: with people as judges, wait until they have judged a round, instead of returning.
        given: the configuration as it was given, for the record.
        progress: hears the stages.
        stop: a request ends the improvement where it can be resumed (`RunStopped`).

    Returns:
        What was measured of each round, the report, and what people still have to judge.

    Raises:
        InputError: the configuration cannot be improved, another process works in the directory, or
            the judge, the candidates or the judgements are of no use. Whatever was made is kept.
    """
    progress = progress or Silent()
    config, settings = _checked(config, rounds)
    run, _ = check_run(config, resume)
    if resume and not run.begun:
        progress.note(f"{run.path} has no round to resume: it starts from the beginning.")
    judge_settings = config.judge
    assert judge_settings is not None
    from dpo_keras.app.reward_judge import judge_of

    improvement = Improvement(
        _from_start(config, settings),
        settings,
        judge_of(judge_settings),
        progress,
        stop or StopRequest(),
    )
    with locked_run(config, resume, writes=True):
        run = start_run(config, resume, given, writes=True)
        result = _run_rounds(improvement, rounds, wait)
        run.write("improvement.json", result.as_dict())
        return result


def _run_rounds(improvement: Improvement, rounds: int, wait: bool) -> Improved:
    result = Improved(str(improvement.path), rounds)
    finished = [n for n in range(rounds + 1) if improvement.round(n).file(RESULT).is_file()]
    if finished:
        improvement.progress.note(f"rounds finished before: {', '.join(map(str, finished))}")
    improvement.progress.stage("Data")
    sides = read_sides(improvement.config, improvement.progress)
    assert sides.held_out is not None
    prompts = prompt_records(improvement, sides)
    warm_up(improvement)
    for number in range(rounds + 1):
        this = improvement.round(number)
        if number and number not in finished:
            draw_candidates(improvement, this, prompts)
            select(improvement, this)
            missing, of = judge(improvement, this)
            while missing and wait:
                improvement.progress.advance(of - missing, of)
                time.sleep(improvement.settings.poll_seconds)
                missing, of = judge(improvement, this)
            if missing:
                result.waiting = {
                    "round": number,
                    "missing": missing,
                    "of": of,
                    "command": f"dpo-keras annotate {this.file('selected.jsonl')} "
                    f"--store {improvement.path / STORE}",
                }
                return result
            train(improvement, this)
        result.rounds.append(measure(improvement, this, sides.held_out))
        result.report = write_rounds(improvement, result.rounds)
    return result


def _checked(config: Config, rounds: int) -> tuple[Config, Improve]:
    """Return the configuration of an improvement, or raise all that is wrong with it."""
    problems = list(_problems(config, rounds))
    if problems or config.improve is None:
        raise InputError(problems)
    return config, config.improve


def _problems(config: Config, rounds: int) -> Iterator[InputProblem]:
    if rounds < 1:
        yield InputProblem("rounds", "must be >= 1", rounds)
    if config.judge is None:
        yield InputProblem("judge", "is required: the section that says who judges")
    if runs.cluster_of(config) is not None:
        rule = "must run in one process; TF_CONFIG names several"
        yield InputProblem("training.strategy", rule, config.training.strategy)
    if not (config.data.held_out or config.data.held_out_path):
        rule = "must be above 0: the rounds are compared on held-out prompts"
        yield InputProblem("data.held_out", rule, config.data.held_out)
    if not config.evaluation.prompts:
        rule = "must be >= 1: the rounds are compared on held-out prompts"
        yield InputProblem("evaluation.prompts", rule, 0)
    settings = config.improve
    if settings is None:
        yield InputProblem("improve", "is required: the section with the rounds' settings")
        return
    if config.model.scratch is not None and config.warmup is None and settings.start is None:
        rule = "has random weights, which write nothing to be judged"
        hint = "Give a warmup, improve.start (a run's directory), or model.path."
        yield InputProblem("model.scratch", rule, hint=hint)
    if (settings.reference == "moving") != (config.training.sync_reference is not None):
        rule = "must be moving where training.sync_reference is given, and only there"
        yield InputProblem("improve.reference", rule, settings.reference)


def _from_start(config: Config, settings: Improve) -> Config:
    """Return the configuration with the policy of `improve.start` in place of its model."""
    if settings.start is None:
        return config
    try:
        policy = open_run(settings.start).policy
    except InputError as error:
        problems = [InputProblem("improve.start", f": {problem}") for problem in error.problems]
        raise InputError(problems) from error
    model = config.model.model_copy(update={"path": str(policy), "scratch": None})
    return config.model_copy(update={"model": model, "warmup": None})
