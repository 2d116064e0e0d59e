"""Default training callbacks: the check of the first loss, speed, memory, and stopping."""

import ctypes
import sys
import time
from collections.abc import Callable
from typing import Any

import keras
import numpy as np

from dpo_keras.cluster import StopRequest, Watchdog
from dpo_keras.training.checkpoints import RunCheckpoint
from dpo_keras.training.metrics import STOP
from dpo_keras.utils import JSON
from dpo_keras.utils.garbage_collection import freeze_graphs


class StartsAtReference(keras.callbacks.Callback):
    """End a run whose first loss is not that of a policy equal to its reference.

    Before the first update every log-ratio is 0 and the preference loss a known number: log 2 for
    `sigmoid`. A loss that starts elsewhere means that policy and reference did not get the same
    tokens, masks or weights (open-instruct#1900 trained from 6 log 2).
    """

    due = False

    def on_train_begin(self, logs: dict[str, JSON] | None = None) -> None:
        """Determine whether this run must start at the reference."""
        model = self.model
        fresh = model.steps_taken() == 0 and not model.dropout
        comparable = model.reference.starts_as_policy and model.preference_loss.needs_reference
        self.due = fresh and comparable

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Check the first batch of a fresh run, and no other."""
        if not self.due:
            return
        self.due = False
        model = self.model
        first = float(model.first_step_logs["preference_loss"])
        expected = float(model.first_step_logs["at_reference"])
        # Half precision leaves noise in long sums, some thousandths of a nat.
        tolerance = 1e-4 if model.policy.compute_dtype == "float32" else 5e-2
        if not np.isfinite(first):
            raise RuntimeError(
                f"The first preference loss is {first}. The model returns log-probs that are not "
                "finite: check its weights and its dtype (float16 needs loss scaling)."
            )
        if abs(first - expected) > tolerance:
            raise RuntimeError(
                f"The first preference loss is {first:.6f}. With the policy equal to its reference "
                f"it must be {expected:.6f}: policy and reference do not see the same tokens, "
                "masks or weights. Check a cached reference, and a custom model's use of the mask."
            )


class Throughput(keras.callbacks.Callback):
    """Add `pairs_per_second` and `tokens_per_second` of each epoch to its logs.

    Tokens do not include padding. Validation time does not count. Tracing of the first step does:
    an epoch's speed is what its user waited for.
    """

    def __init__(self) -> None:
        super().__init__()
        # Read late: reading a count waits for the step that is in progress.
        self.counts: Callable[[], dict[str, float]] | None = None
        self.rates: dict[str, float] = {}

    def on_epoch_begin(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Note the time, before validation can begin."""
        self.stopped = time.perf_counter()
        self.counts = self.model.counts

    def on_test_begin(self, logs: dict[str, JSON] | None = None) -> None:
        """Read what training counted: validation resets it."""
        self._read()

    def on_epoch_end(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Add the rates for the callbacks after this one."""
        self._read()
        if logs is not None:
            logs.update(self.rates)

    def _read(self) -> None:
        if self.counts is not None:
            seconds = max(self.stopped - self.started, 1e-9)
            self.rates = {f"{name}_per_second": n / seconds for name, n in self.counts().items()}
            self.counts = None


class ReleasesTracing(keras.callbacks.Callback):
    """Put away what tracing has left, once it is over.

    Python's garbage collector need not walk over graphs again (see `dpo_keras.utils.
    garbage_collection`). C's heap gives back near a hundred megabytes: steps use TensorFlow's.
    """

    def __init__(self) -> None:
        super().__init__()
        self.on_train_begin()

    def on_train_begin(self, logs: dict[str, JSON] | None = None) -> None:
        """Expect traces: every `fit` may make some."""
        # By the end of an epoch every shape of a bucketed batch has been traced.
        self.expected = {"train step", "test step", "epoch"}

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Put away the graph of the first step."""
        self._put_away("train step", self.model.train_function)

    def on_test_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Put away the graph of the first evaluation step."""
        self._put_away("test step", self.model.test_function)

    def on_epoch_end(self, epoch: int, logs: dict[str, JSON] | None = None) -> None:
        """Put away the graphs of other shapes."""
        self._put_away("epoch", self.model.train_function)

    def _put_away(self, moment: str, step: Any) -> None:
        if moment not in self.expected:
            return
        self.expected.remove(moment)
        # A program may call `fit` once per epoch. It shall not wait for a collection each time.
        known: set[str] = vars(step).setdefault("put_away", set())
        traced = moment not in known
        known.add(moment)
        freeze_graphs(collect=traced)
        if traced and sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:  # not every C library has it
                trim(0)


class StopTogether(keras.callbacks.Callback):
    """Save and end a run after the step in which a stop was requested on any worker.

    Each worker puts its own request among the metrics that the step sums over replicas anyway. All
    of them learn of it in the same step, and no step waits for it. They wait until the chief has
    saved. The run ends with RunStopped.
    """

    def __init__(
        self,
        stop: StopRequest,
        start_step: int = 0,
        checkpoint: RunCheckpoint | None = None,
        watchdog: Watchdog | None = None,
    ):
        super().__init__()
        self.stop, self.step = stop, start_step
        self.checkpoint, self.watchdog = checkpoint, watchdog

    def on_train_begin(self, logs: dict[str, JSON] | None = None) -> None:
        """Show the request to the model's steps."""
        self.model.stop_requested = lambda: self.stop.requested

    def on_train_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """Count the step, and end the run where any worker was asked to."""
        self.step += self.model.steps_per_execution
        self._end_if_requested()

    def on_test_batch_end(self, batch: int, logs: dict[str, JSON] | None = None) -> None:
        """End the run in validation, too."""
        self._end_if_requested()

    def _end_if_requested(self) -> None:
        if not float(self.model.step_logs[STOP]):
            return
        if self.checkpoint is not None:
            self.checkpoint.save_now()
            self.checkpoint.wait()
        if self.watchdog is not None:
            self.watchdog.agree("step to stop at", self.step)
        raise self.stop.stopped(self.step if self.checkpoint is not None else None)
