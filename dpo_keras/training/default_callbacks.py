"""What every run has: the check that it begins where it must, its speed, and a clean heap."""

import ctypes
import sys
import time
from typing import Any

import keras
import numpy as np

from dpo_keras.cluster import StopRequest, Watchdog
from dpo_keras.training.checkpoints import RunCheckpoint


class StartsAtReference(keras.callbacks.Callback):
    """Refuses a run whose first loss is not that of a policy equal to its reference.

    Before the first update the policy is its reference, so every log-ratio is 0 and the
    preference loss is a known number: log 2 for `sigmoid`. A loss that starts elsewhere means that
    policy and reference were not given the same tokens, masks or weights, and nothing learned from
    it can be trusted (open-instruct#1900 trained from 6 log 2).
    """

    due = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Finds out whether this run is one to look at."""
        model = self.model
        fresh = model.steps_taken() == 0 and not model.dropout
        self.due = (
            fresh and model.reference.starts_as_policy and model.preference_loss.needs_reference
        )

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks at the first batch of a fresh run, and at no other."""
        if not self.due:
            return
        self.due = False
        model = self.model
        first = float(model.first_step_logs["preference_loss"])
        expected = float(model.first_step_logs["at_reference"])
        # Half precision leaves noise in long sums; it is some thousandths of a nat.
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
    """Adds `pairs_per_second` and `tokens_per_second` of each epoch to its logs.

    Tokens are those the policy computes on, padding left out. Validation time is left out, the
    tracing of the first step is not: an epoch's speed is what its user waited for.
    """

    def on_epoch_begin(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Starts the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Stops it, again and again, before validation can begin."""
        self.stopped = time.perf_counter()
        self.counts = self.model.counts

    def on_test_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Keeps what training counted: validation resets it."""
        self._read()

    def on_epoch_end(self, epoch: int, logs: dict[str, Any] | None = None) -> None:
        """Adds the figures; callbacks behind this one see them."""
        self._read()
        if logs is not None:
            logs.update(self.rates)

    def _read(self) -> None:
        if self.counts is None:
            return
        seconds = max(self.stopped - self.started, 1e-9)
        self.rates = {f"{name}_per_second": n / seconds for name, n in self.counts().items()}
        self.counts = None

    counts: Any = None
    rates: dict[str, float] = {}


class ReleasesTracing(keras.callbacks.Callback):
    """Gives back what tracing and compiling the first step left behind.

    That is most of a hundred megabytes of C's heap, which no step uses: tensors come from
    TensorFlow's own pool.
    """

    due = False

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Every `fit` may trace."""
        self.due = True

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Once, behind the first step."""
        if not self.due:
            return
        self.due = False
        if sys.platform == "linux":
            trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
            if trim is not None:  # not every C library has it
                trim(0)


class StopTogether(keras.callbacks.Callback):
    """Saves and ends a run behind the step in which somebody asked for it.

    Each worker puts its own request among the metrics that the step sums over replicas anyway, so
    all of them learn of it with the same step, whoever was asked, and no step waits for it.

    Args:
        stop: whether this process was asked.
        start_step: steps taken before.
        checkpoint: saves; None: nothing is saved.
        watchdog: of a cluster; workers wait until the chief has saved.

    Raises:
        RunStopped: behind that step.
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

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        """Lets the model's steps hear of the request."""
        self.model.stop_requested = lambda: self.stop.requested

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks whether any worker was asked."""
        self.step += self.model.steps_per_execution
        self._look()

    def on_test_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """Looks in validation, too."""
        self._look()

    def _look(self) -> None:
        if not float(self.model.step_logs["stop"]):
            return
        if self.checkpoint is not None:
            self.checkpoint.save_now()
        if self.watchdog is not None:
            self.watchdog.agree("step to stop at", self.step)
        raise self.stop.stopped(self.step if self.checkpoint is not None else None)
