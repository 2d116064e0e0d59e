"""Stop a cluster's workers together: on a signal, after an error, or when one of them is lost."""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType

from dpo_keras.cluster.tf_config import Cluster
from dpo_keras.cluster.worker_links import ClusterError, Greeting, Link, Message, lost_peer, meet
from dpo_keras.errors import InputError
from dpo_keras.utils import JSON

FAILED, WRONG_INPUT, STOPPED = 1, 2, 75
RESUME = "Start all workers again with --resume; the run goes on from its newest checkpoint."
_SILENCE = 35.0  # longer than the kernel's probes of a machine that is gone
_GRACE = 5.0
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


def end_process(text: str, code: int) -> None:
    """Print a message and end the process, whatever its main thread is waiting for."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(code)


class Watchdog:
    """A link from each worker to the chief, for as long as a run takes.

    TensorFlow 2.21 detects a lost peer too, but late. Only the next worker of the ring fails at
    once (`UnavailableError`). The others hang in their next collective until heartbeats are missed
    (10 s), and that message also names workers that left in the meantime.

    Use it as a context manager. A normal exit says goodbye to the other workers. An exception tells
    them why, and they end with the same exit code.

    Args:
        cluster: the processes.
        stop: receives the stop requests of other workers, and its own are sent to them.
        end: called from a thread with a message and an exit code; must end the process.

    Example:
        >>> from dpo_keras.cluster import read_tf_config
        >>> alone = '{"cluster": {"worker": ["a:7000"]}, "task": {"type": "worker", "index": 0}}'
        >>> with Watchdog(read_tf_config(alone)).meet(timeout=60) as watchdog:
        ...     watchdog.agree("step", 4)
    """

    def __init__(
        self,
        cluster: Cluster,
        stop: StopRequest | None = None,
        end: Callable[[str, int], None] = end_process,
    ):
        self.cluster = cluster
        self._place = cluster.in_step.index(cluster.this)
        self._stop, self._end = stop, end
        self._links: dict[int, Link] = {}
        self._gone: set[int] = set()
        self._ending = self._closing = False
        self._changed = threading.Condition()
        self._votes: dict[int, dict[int, JSON]] = {}
        self._round = 0

    def meet(self, timeout: float = 300.0, greeting: Greeting | None = None) -> Watchdog:
        """Wait for all workers, for `timeout` seconds, and watch them from then on.

        The values of `greeting` must be equal on all workers. Raises as `worker_links.meet` does.
        """
        self._links = meet(self.cluster, timeout, greeting or {})
        if self._stop is not None:
            self._stop.announce = lambda name: self._tell(stop=f"{name} at {self.cluster.this}")
        for place in self._links:
            threading.Thread(target=self._watch, args=(place,), daemon=True).start()
        return self

    def agree(self, what: str, value: JSON, hint: str = "") -> None:
        """Wait until all workers reach this call with the same value.

        If it differs, all of them raise an InputError that names it as `what` and ends with `hint`.
        """
        self._round += 1
        number = self._round
        self._vote(number, self._place, value)
        if self._links and not self.cluster.is_chief:
            self._links[0].send(vote=number, value=value)
        with self._changed:
            # The chief waits for the values of all workers, a worker for the chief's list.
            while len(self._votes[number]) < len(self._links) + 1:
                self._changed.wait(0.2)
            values = self._votes.pop(number)
        if self.cluster.is_chief:
            ordered = [values[place] for place in range(len(values))]
            self._tell(votes=number, values=ordered)
        else:
            ordered = values[-1]
        if any(value != ordered[0] for value in ordered):
            tasks = zip(self.cluster.in_step, ordered, strict=True)
            each = ", ".join(f"{task} has {value}" for task, value in tasks)
            raise InputError(f"the workers do not have the same {what}: {each}. {hint}".rstrip())

    def __enter__(self) -> Watchdog:
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Say goodbye, or tell the other workers why this one ends."""
        peer = lost_peer(self.cluster, error)
        if peer is not None:
            # The thread that reads which worker was lost ends this process in the meantime.
            time.sleep(_SILENCE)
        self._closing = True
        if error is None:
            self._tell(bye=True)
        else:
            self._tell(left=self._place, **_farewell(error))
        for link in self._links.values():
            link.finish()
        if peer is not None:
            raise ClusterError(
                f"{peer} does not answer any more: its process hangs, or its machine does not "
                f"reach this one. {RESUME}"
            ) from error

    def _tell(self, but: int | None = None, **message: JSON) -> None:
        for place, link in self._links.items():
            if place != but:
                link.send(**message)

    def _vote(self, number: int, place: int, value: JSON) -> None:
        with self._changed:
            self._votes.setdefault(number, {})[place] = value
            self._changed.notify_all()

    def _watch(self, place: int) -> None:
        while (message := self._links[place].receive(None)) is not None:
            self._react(place, message)
        if place not in self._gone:
            self._lost(place)
        self._links[place].close()

    def _react(self, place: int, message: Message) -> None:
        match message:
            case {"vote": number, "value": value}:
                self._vote(number, place, value)
            case {"votes": number, "values": values}:
                self._vote(number, -1, values)
            case {"bye": _}:
                self._gone.add(place)
            case {"left": _}:
                self._left(place, message)
            case {"lost": lost}:
                self._lost(lost)
            case {"stop": reason}:
                if self.cluster.is_chief:
                    self._tell(but=place, stop=reason)
                if self._stop is not None:
                    self._stop.request(reason)

    def _left(self, place: int, message: Message) -> None:
        self._gone.add(place)
        if not self._is_first(place, **message):
            return
        # All workers may end for the same reason; then each reports it itself.
        deadline = time.monotonic() + _GRACE
        while not self._closing and time.monotonic() < deadline:
            time.sleep(0.05)
        self._finish(f"{self.cluster.in_step[message['left']]} {message['why']}", message["code"])

    def _lost(self, place: int) -> None:
        # Only the first reason counts: links close one after another when workers end.
        if not self._is_first(place, lost=place):
            return
        self._finish(
            f"{self.cluster.in_step[place]} was lost: its process ended without a word (killed, "
            f"crashed, or its machine is gone). {RESUME}",
            FAILED,
        )

    def _is_first(self, place: int, **message: JSON) -> bool:
        """Tell whether this is the first reason to end; the chief then passes it on."""
        with self._changed:
            first = not self._ending and not self._closing
            self._ending = True
        if first and self.cluster.is_chief:
            self._tell(but=place, **message)
        return first

    def _finish(self, text: str, code: int) -> None:
        if self._closing:
            return
        self._closing = True
        for link in self._links.values():
            link.finish()
        # Sockets of an ended process may discard what peers have not read yet.
        time.sleep(0.5)
        self._end(text, code)


def _farewell(error: BaseException) -> dict[str, JSON]:
    if isinstance(error, KeyboardInterrupt):
        reason = error.reason if isinstance(error, RunStopped) else "Ctrl-C"
        return {"code": STOPPED, "why": f"was stopped by {reason}. {RESUME}"}
    if isinstance(error, InputError):
        return {"code": WRONG_INPUT, "why": f"refused its input: {' '.join(error.problems)}"}
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"code": FAILED, "why": f"failed ({type(error).__name__}: {first[:300]}). {RESUME}"}
