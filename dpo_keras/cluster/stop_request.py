"""Requests to stop a run, from a signal or from another worker."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunStopped(KeyboardInterrupt):
    """A run was asked to stop, and stopped where it can be resumed.

    Args:
        reason: what asked.
        step: the step that was saved last; None outside of training.

    Example:
        >>> str(RunStopped("SIGTERM", 7))
        'stopped by SIGTERM after step 7, which is saved.'
    """

    def __init__(self, reason: str, step: int | None = None):
        self.reason, self.step = reason, step
        where = "between steps" if step is None else f"after step {step}, which is saved"
        super().__init__(f"stopped by {reason} {where}.")


class StopRequest:
    """Whether a run has been asked to stop.

    Within `at_step_end`, a request waits until the training loop reads `requested`. Elsewhere it
    raises `RunStopped` in the main thread at once; that is safe, since files are written whole or
    not at all. SIGTERM may arrive any number of times. A second Ctrl-C raises `KeyboardInterrupt`.

    Attributes:
        announce: called once, from any thread, with the name of a signal that arrived here.

    Example:
        >>> stop = StopRequest()
        >>> with stop.at_step_end():
        ...     stop.request("SIGTERM at worker 1")
        ...     stop.requested, stop.reason
        (True, 'SIGTERM at worker 1')
    """

    def __init__(self) -> None:
        self.reason = ""
        self.announce: Callable[[str], None] | None = None
        self._requested = threading.Event()
        self._announced = threading.Lock()
        self._waiting = self._interrupts = 0
        self._leaving = self._installed = False

    @property
    def requested(self) -> bool:
        """Whether a stop was requested."""
        return self._requested.is_set()

    def request(self, reason: str) -> None:
        """Request a stop, from any thread, for a reason that the message names."""
        if self.requested:
            return
        self.reason = reason
        self._requested.set()
        # Announce only signals that arrived here, not the requests of other workers.
        self._announced.acquire(blocking=False)
        if self._installed:
            # Only a signal interrupts a main thread that is busy in Python code.
            os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def at_step_end(self) -> Iterator[None]:
        """Defer requests: within this context they wait until `requested` is read."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def stopped(self, step: int | None = None) -> RunStopped:
        """Make the exception that ends the run, after a saved step or outside of training."""
        self._leaving = True
        return RunStopped(self.reason or "another worker", step)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Turn SIGTERM and SIGINT into requests; do nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A main thread inside TensorFlow runs no handlers, but the wake-up pipe gets every signal.
        ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        threading.Thread(target=self._listen, args=(ours,), daemon=True).start()
        wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        before = {number: signal.signal(number, self._handle) for number in _SIGNALS}
        self._installed = True
        try:
            yield
        finally:
            self._installed = False
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            theirs.close()

    def _listen(self, pipe: socket.socket) -> None:
        with pipe:
            while received := pipe.recv(16):
                for number in set(received).intersection(_SIGNALS):
                    self._announce(signal.Signals(number).name)

    def _announce(self, name: str) -> None:
        # Once in a process: the lock is never released.
        if self.announce is not None and self._announced.acquire(blocking=False):
            with suppress(OSError):
                self.announce(name)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name
        self._requested.set()
        if not self._waiting and not self._leaving:
            raise self.stopped()


@contextmanager
def sigterm_kept() -> Iterator[None]:
    """Keep what SIGTERM does, in a block that starts a backend's own coordination of processes.

    That takes SIGTERM over, and nothing would end the process.
    """
    before = signal.getsignal(signal.SIGTERM)
    yield
    if before is not None and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, before)
