"""Predict how long a run takes, from the work of its stages and from what was timed of them.

A stage counts its work in units: steps, pairs or prompts. The first unit also holds the tracing of
its graph, so speed is measured from the second one on.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

_RECENT = 50  # units whose median is the speed of a stage


@dataclass(frozen=True)
class Stage:
    """The work of one stage of a run, as known before it begins.

    Args:
        title: name under which it reports progress.
        units: steps, pairs or prompts that its progress counts.
        passes: token places times forward passes over them, in all; a backward pass counts two.
        every: units between its pauses, in which it validates and saves; 0 for none.
        validated: pairs that each pause validates.
        like: title of an earlier stage that does the same work, or whose pairs are as fast.
    """

    title: str
    units: int
    passes: float = 0.0
    every: int = 0
    validated: int = 0
    like: str | None = None

    def pauses(self, done: int = 0) -> int:
        """Count the pauses that come after `done` units; a stage ends with one."""
        return -(-self.units // self.every) - done // self.every if self.every else 0


class StageTimes:
    """When a stage began, reported its progress, and ended.

    Args:
        now: seconds on some clock.
        every: as `Stage.every`. The unit after a pause says nothing about the speed.

    Example:
        >>> times = StageTimes(0.0)
        >>> for done, now in ((1, 9.0), (2, 10.0), (3, 11.0), (4, 14.0)):
        ...     times.report(done, now)
        >>> times.typical
        1.0
    """

    def __init__(self, now: float, every: int = 0):
        self.began, self.every = now, every
        self.ended: float | None = None
        self.done, self.reported = 0, now
        self.first: int | None = None  # units done at the first report
        # Seconds, units, and units done at the end of them.
        self._recent: deque[tuple[float, int, int]] = deque(maxlen=_RECENT)

    def report(self, done: int, now: float) -> None:
        """Take the number of units done so far."""
        if self.first is None:
            self.first = done
        elif done > self.done and not (self.every and self.done % self.every == 0):
            self._recent.append((now - self.reported, done - self.done, done))
        self.done, self.reported = done, now

    def seconds(self, now: float) -> float:
        """Return how long the stage took, or has taken until now."""
        return (now if self.ended is None else self.ended) - self.began

    @property
    def timed(self) -> int:
        """Number of intervals that the speed is known from."""
        return len(self._recent)

    @property
    def typical(self) -> float | None:
        """Median of the recent seconds per unit; None before the second unit."""
        found = [seconds / units for seconds, units, _ in self._recent]
        return statistics.median(found) if found else None

    def per_unit_of(self, work: Callable[[int], float]) -> float:
        """Return the median seconds per work of a unit, `work(k)` of unit k; 0 if none is timed."""
        found = [
            seconds / sum(map(work, range(done - units, done)))
            for seconds, units, done in self._recent
        ]
        return statistics.median(found) if found else 0.0

    @property
    def pause(self) -> float:
        """Seconds from the last unit to the end: of an ended stage's last pause."""
        return 0.0 if self.ended is None else self.ended - self.reported


def seconds_left(
    stages: Sequence[Stage], seen: Mapping[str, StageTimes], now: float
) -> float | None:
    """Estimate how long a run still takes, its last stages without units aside.

    A stage under way goes on at its typical speed. One that is yet to come takes as long as the one
    that it is `like`, or else what its `passes` cost at the speed of the latest stage.

    Args:
        stages: all of a run, in order.
        seen: what was timed so far, by title, in order.
        now: seconds on the same clock.

    Returns:
        Seconds; None before anything was timed.
    """
    order = {stage.title: number for number, stage in enumerate(stages)}
    known = [title for title in seen if title in order]
    speeds = [
        typical * stages[order[title]].units / stages[order[title]].passes
        for title in known
        if (typical := seen[title].typical) is not None and stages[order[title]].passes
    ]
    if not speeds:
        return None
    left = 0.0
    for stage in stages[order[known[-1]] :]:
        times = seen.get(stage.title)
        if times is not None and times.ended is not None:
            continue
        alike = seen.get(stage.like or "")
        if times is not None and times.typical is not None:
            left += max(stage.units - times.done, 0) * times.typical
            left += _validation(stage, stage.pauses(times.done), alike)
        elif alike is not None and not stage.every:
            left += max(alike.seconds(now) - (now - times.began if times else 0.0), 0.0)
        else:
            left += stage.passes * speeds[-1]
    return left


def stretched(
    times: StageTimes, trial: Stage, whole: Stage, per_unit: float, per_pair: float
) -> float:
    """Predict the seconds of a whole stage from a trial of it that has ended.

    The trial's own seconds hold what a stage does once, such as tracing. What the whole has more
    of comes on top: units, pauses, and pairs validated in them.

    Args:
        times: of the trial.
        trial: what the trial did.
        whole: what the run does.
        per_unit: seconds of a unit of the whole.
        per_pair: seconds to validate a pair.

    Returns:
        Seconds.

    Example:
        >>> times = StageTimes(0.0, every=2)
        >>> for done, now in ((1, 9.0), (2, 10.0), (3, 14.0), (4, 15.0)):
        ...     times.report(done, now)
        >>> times.ended = 17.0
        >>> trial, whole = (Stage("Training", units, every=2, validated=4) for units in (4, 10))
        >>> stretched(times, trial, whole, per_unit=1.0, per_pair=0.5)  # 6 steps, 3 pauses more
        29.0
    """
    found = times.seconds(times.reported) + (whole.units - trial.units) * per_unit
    found += (whole.pauses() - trial.pauses()) * times.pause
    return found + whole.pauses() * (whole.validated - trial.validated) * per_pair


def _validation(stage: Stage, pauses: int, alike: StageTimes | None) -> float:
    if alike is None or alike.typical is None:
        return 0.0
    return pauses * stage.validated * alike.typical
