"""Times a run as it reports its progress, predicts how long it takes, and measures its memory."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from dpo_keras.app.console import Progress, duration
from dpo_keras.app.prediction import Stage, StageTimes, seconds_left
from dpo_keras.utils import JSON

WARM_UP, TRAINING = "Supervised warm-up", "Preference training"  # titles of stages
_FIRST_STEPS = 10  # after which a run predicts its own end
_SETTLED = 3  # units of a stage before its speed is shown


class RunClock(Progress):
    """A `Progress` that passes everything on, with the seconds that are left of the whole run.

    Args:
        shown: the listener.
        now: a clock in seconds.

    Attributes:
        seen: what was timed of each stage, by title, in order.
        prediction: what the run predicted of itself after its first steps of preference training:
            `{"step", "seconds", "peak_bytes"}`, or None before.
    """

    def __init__(self, shown: Progress, now: Callable[[], float] = time.monotonic):
        self.shown, self.now = shown, now
        self.began = now()
        self.stages: dict[str, Stage] = {}
        self.seen: dict[str, StageTimes] = {}
        self.prediction: dict[str, JSON] | None = None

    def expect(self, stages: Sequence[Stage]) -> None:
        """Take the work of all stages to come."""
        self.stages = {stage.title: stage for stage in stages}

    def stage(self, title: str) -> None:
        """Begin a stage, which ends the one before."""
        self.end()
        known = self.stages.get(title)
        self.seen[title] = StageTimes(self.now(), known.every if known else 0)
        self.shown.stage(title)

    def end(self) -> None:
        """End the stage that is under way."""
        for times in list(self.seen.values())[-1:]:
            times.ended = times.ended or self.now()

    def note(self, text: str) -> None:
        """Pass a note on."""
        self.shown.note(text)

    def advance(self, done: int, total: int | None, **values: float) -> None:
        """Pass progress on, with `seconds_left` once the speed of the stage has settled."""
        title, times = next(reversed(self.seen.items()))
        now = self.now()
        times.report(done, now)
        left = seconds_left(list(self.stages.values()), self.seen, now)
        if left is not None and times.timed >= _SETTLED:
            values["seconds_left"] = left
        if title == TRAINING and left is not None and self.prediction is None and total is not None:
            # A short run predicts before its last step.
            half = 2 * done >= total + (times.first or 0)
            if times.timed >= _FIRST_STEPS or (times.timed and half):
                seconds = now - self.began + left
                memory = peak_memory()
                self.prediction = {"step": done, "seconds": seconds, "peak_bytes": memory}
        self.shown.advance(done, total, **values)

    def outcome(self) -> dict[str, JSON] | None:
        """Compare time and memory so far with the prediction; None where the run made none."""
        if self.prediction is None:
            return None
        now = self.now()  # one reading: the stages add up to no more than the whole
        actual = {"seconds": now - self.began, "peak_bytes": peak_memory()}
        of = {"seconds": "time up to the report", "peak_bytes": "peak memory"}
        return {
            "step": self.prediction["step"],
            "stages": {title: times.seconds(now) for title, times in self.seen.items()},
            **{
                name: {
                    "of": of[name],
                    "predicted": self.prediction[name],
                    "actual": value,
                    "difference": self.prediction[name] / max(value, 1e-9) - 1,
                }
                for name, value in actual.items()
            },
        }


def outcome_lines(outcome: Mapping[str, JSON] | None) -> dict[str, str]:
    """Say how far a run's prediction of itself was off, from `RunClock.outcome`, by what it is of.

    Example:
        >>> time = {"of": "time", "predicted": 66.0, "actual": 60.0, "difference": 0.1}
        >>> outcome_lines({"step": 10, "seconds": time})
        {'time': '1 min 0 s; after step 10 predicted 1 min 6 s (+10 %)'}
    """
    words = {"seconds": duration, "peak_bytes": megabytes}
    return {
        found["of"]: f"{words[name](found['actual'])}; after step {outcome['step']} predicted "
        f"{words[name](found['predicted'])} ({100 * found['difference']:+.0f} %)"
        for name in words
        if outcome is not None and (found := outcome.get(name)) is not None
    }


def megabytes(count: float) -> str:
    """Return a number of bytes in words."""
    return f"{count / 1e6:,.0f} MB"


def peak_memory() -> int:
    """Return the most bytes of memory that this process has held so far, GPUs' not included."""
    status = Path("/proc/self/status")
    if status.is_file():  # ru_maxrss of Linux counts what the parent process held, too
        for line in status.read_text(encoding="ascii", errors="replace").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else most * 1024


def peak_device_memory() -> dict[str, int]:
    """Return the most bytes that Keras' backend has held on each GPU, by name."""
    from dpo_keras.utils.backends import uses_jax

    if uses_jax():
        import jax

        held = {f"{d.platform}:{d.id}": d.memory_stats() for d in jax.local_devices()}
        return {name: int(stats["peak_bytes_in_use"]) for name, stats in held.items() if stats}
    import tensorflow as tf

    gpus = [device.name.partition("device:")[2] for device in tf.config.list_logical_devices("GPU")]
    return {name: int(tf.config.experimental.get_memory_info(name)["peak"]) for name in gpus}
