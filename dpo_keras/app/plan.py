"""Predict a run from a trial: all of its stages, each of them short, in a temporary directory."""

from __future__ import annotations

import signal
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dpo_keras.app.config import Config
from dpo_keras.app.console import Progress
from dpo_keras.app.prediction import Stage, StageTimes, stretched
from dpo_keras.app.run_clock import (
    TRAINING,
    WARM_UP,
    RunClock,
    peak_device_memory,
    peak_memory,
)
from dpo_keras.app.run_devices import devices_of
from dpo_keras.app.run_directory import RunDirectory, writable
from dpo_keras.app.run_work import Work, stages_of, work_of
from dpo_keras.app.runs import Prepared, carry_out, cluster_of, prepare
from dpo_keras.app.training_stages import Context, with_reference
from dpo_keras.cluster import StopRequest
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON

if TYPE_CHECKING:
    from dpo_keras.batching import TokenizedPairs

_STEPS = 5  # of the trial, before and after its evaluation: the first of them holds the trace
_BATCHES = 4  # of each evaluation
_GENERATED = 2  # batches of samples


def predict_run(config: Config, progress: Progress) -> dict[str, JSON]:
    """Predict what `train` of a configuration takes. It is not changed, nor is its directory.

    Args:
        config: of the run.
        progress: listens to the trial.

    Returns:
        `pairs` (counts), `sections` (`warmup` and `training`: `steps`, `steps_per_epoch`, `tokens`,
        `fill`, `batches`, `seconds_per_step`), `stages` (seconds of each in the trial and in the
        run), `seconds` and `peak_bytes` (of the process, and of each GPU).

    Raises:
        InputError: as `train`; a run of several processes, of which one knows nothing alone.
    """
    cluster = cluster_of(config)
    if cluster is not None and len(cluster.in_step) > 1:
        hint = "Unset TF_CONFIG to plan for this machine alone."
        rule = f"cannot be planned by one of its {len(cluster.in_step)} processes"
        raise InputError(InputProblem("training.strategy", rule, hint=hint))
    output = Path(str(config.output)).absolute()
    beside = next(parent for parent in output.parents if parent.is_dir())
    clock = RunClock(progress)
    devices = devices_of(config)
    import keras

    with (
        _exit_on_sigterm(),
        writable("output", beside),
        tempfile.TemporaryDirectory(prefix=".dpo-keras-plan-", dir=beside) as folder,
    ):
        run = RunDirectory(Path(folder) / "run", temporary=True)
        run.path.mkdir()
        keras.utils.set_random_seed(config.seed)
        settings = config.model_copy(update={"output": str(run.path)})
        context = Context(settings, run, False, clock, devices, StopRequest(), None)
        return _Trial(context, clock).run()


class _Trial:
    """A run made short, whose clock then tells how long the whole takes."""

    def __init__(self, context: Context, clock: RunClock):
        self.context, self.clock = context, clock
        self.works: dict[str, Work] = {}  # by the stage's title
        self.whole: dict[str, Stage] = {}
        self.short: dict[str, Stage] = {}

    def run(self) -> dict[str, JSON]:
        context, clock, config = self.context, self.clock, self.context.config
        prepared = prepare(context)
        pairs, held_out = prepared.pairs, prepared.held_out
        self.works = {TRAINING: work_of(context, config.training, pairs)}
        if config.warmup is not None:
            self.works = {WARM_UP: work_of(context, config.warmup, pairs), **self.works}
        self.whole = _by_title(stages_of(context, prepared.reference, pairs, held_out))
        self._shorten(prepared)
        carry_out(context, prepared, clock)
        clock.end()
        return self._result(prepared.counts)

    def _shorten(self, prepared: Prepared) -> None:
        """Give the context, and the inputs, the few steps and batches of the trial."""
        context, config = self.context, self.context.config
        training, evaluation = config.training, config.evaluation
        half = training.steps_per_execution * max(_STEPS, training.gradient_accumulation)
        start = self.works[TRAINING].longest // half * half
        changes: dict[str, JSON] = {
            "training": training.model_copy(
                update={
                    "max_steps": start + 2 * half,
                    "evaluate_every": half,
                    "checkpoint_every": None,
                    "keep_checkpoints": 1,
                    "loggers": [],
                }
            ),
            "evaluation": evaluation.model_copy(
                update={"prompts": min(evaluation.prompts, _GENERATED * evaluation.batch_size)}
            ),
        }
        context.first_steps[TRAINING] = start
        if config.warmup is not None:
            start = self.works[WARM_UP].longest
            context.first_steps[WARM_UP] = start
            update = {"max_steps": start + _STEPS + 1}
            changes["warmup"] = config.warmup.model_copy(update=update)
        if config.export is not None:
            path = str(context.run.path / "exported" / "plan" / "1")
            changes["export"] = config.export.model_copy(update={"path": path})
        context.config = config.model_copy(update=changes)
        rows = _BATCHES * evaluation.batch_size
        if prepared.held_out is not None:
            prepared.held_out = _some(prepared.held_out, rows)
        if prepared.reference == "cached":
            self._short_reference(prepared, rows)
        self.short = self._short_stages(prepared)
        self.clock.expect(list(self.short.values()))

    def _short_reference(self, prepared: Prepared, rows: int) -> None:
        """Compute a few reference log-probs. The others are 0, which costs training the same."""
        for name in ("train", "held_out"):
            pairs = prepared.pairs if name == "train" else prepared.held_out
            if pairs is None:
                continue
            with_reference(self.context, prepared.policy, _some(pairs, rows), name)
            known = pairs.with_reference(np.zeros((len(pairs), 2), np.float32))
            if name == "train":
                prepared.pairs = known
            else:
                prepared.held_out = known

    def _short_stages(self, prepared: Prepared) -> dict[str, Stage]:
        found = stages_of(self.context, prepared.reference, prepared.pairs, prepared.held_out)
        stages = _by_title(found)
        rows = _BATCHES * self.context.config.evaluation.batch_size
        for title, stage in stages.items():
            # `first_steps` are not taken; of a reference only some pairs are scored.
            units = stage.units - self.context.first_steps.get(title, 0)
            if title.startswith("Reference log-probs"):
                units = min(units, rows)
            stages[title] = replace(stage, units=units)
        return stages

    def _result(self, counts: dict[str, int]) -> dict[str, JSON]:
        seconds = {title: self._seconds(title, times) for title, times in self.clock.seen.items()}
        sections = {
            {WARM_UP: "warmup", TRAINING: "training"}[title]: {
                "steps": work.steps,
                "steps_per_epoch": work.per_epoch,
                "tokens": work.tokens,
                "fill": work.fill,
                "batches": work.shape,
                "seconds_per_step": self._per_unit(title),
            }
            for title, work in self.works.items()
        }
        stages = {
            title: {"trial": times.seconds(times.reported), "run": seconds[title]}
            for title, times in self.clock.seen.items()
        }
        memory = {"the process": peak_memory(), **peak_device_memory()}
        return {
            "pairs": counts,
            "sections": sections,
            "stages": stages,
            "seconds": sum(seconds.values()),
            "peak_bytes": memory,
        }

    def _seconds(self, title: str, times: StageTimes) -> float:
        whole = self.whole.get(title)
        if whole is None:
            return times.seconds(times.reported)
        pair = self._per_unit(whole.like) if whole.like in self.clock.seen else 0.0
        return stretched(times, self.short[title], whole, self._per_unit(title), pair)

    def _per_unit(self, title: str) -> float:
        """Return the seconds of a unit of the run: of a step with as many places as the mean."""
        times = self.clock.seen[title]
        if title not in self.works:
            return times.per_unit_of(lambda unit: 1.0)
        places = self.works[title].step_places
        per_place = times.per_unit_of(lambda step: float(places[step % len(places)]))
        return per_place * float(places.mean())


def _by_title(stages: list[Stage]) -> dict[str, Stage]:
    return {stage.title: stage for stage in stages}


def _some(pairs: TokenizedPairs, count: int) -> TokenizedPairs:
    """Return pairs from all over the data, the longest among them."""
    if len(pairs) <= count:
        return pairs
    rows = np.linspace(0, len(pairs) - 1, count).astype(np.int64)
    longest = int(pairs.lengths.argmax())
    return pairs.take(rows if longest in rows else np.append(rows[:-1], longest))


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the process by way of Python, which removes the trial's directory."""
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
