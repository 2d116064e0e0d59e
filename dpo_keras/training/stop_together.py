"""Stopping at the end of a step, all workers at the same one."""

from typing import Any

import keras

from dpo_keras.cluster import StopRequest, Watchdog
from dpo_keras.training.checkpoints import RunCheckpoint


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
