"""Stopping a run on SIGTERM or Ctrl-C where nothing is lost: behind the step in progress."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from dpo_keras.cluster.tf_config import Cluster
from dpo_keras.cluster.worker_links import ClusterError, Greeting, Link, Message, meet
from dpo_keras.errors import InputError

_SIGNALS = (signal.SIGTERM, signal.SIGINT)


class RunStopped(KeyboardInterrupt):
    """A run was asked to stop, and stopped where it can go on.

    Args:
        reason: who asked.
        step: the step that was saved last; None where no training was under way.

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

    Within `at_step_end`, a request waits for whoever looks at `requested`; elsewhere it ends the
    main thread's work at once with `RunStopped`: a run's files are written whole or not at all.
    SIGTERM may come any number of times; a second Ctrl-C is a `KeyboardInterrupt`.

    Attributes:
        announce: called once, from whatever thread, with the name of a signal that came here.

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
        self._waiting = 0
        self._interrupts = 0
        self._leaving = False
        self._installed = False

    @property
    def requested(self) -> bool:
        """Whether somebody asked."""
        return self._requested.is_set()

    def request(self, reason: str) -> None:
        """Asks, from any thread.

        Args:
            reason: who asks.
        """
        if self.requested:
            return
        self.reason = reason
        self._requested.set()
        # Others are told of signals that came here, not of what they said themselves.
        self._announced.acquire(blocking=False)
        if self._installed:
            # Only a signal reaches a main thread that works in Python and looks at nothing.
            os.kill(os.getpid(), signal.SIGTERM)

    @contextmanager
    def at_step_end(self) -> Iterator[None]:
        """Within this, requests wait to be looked at."""
        self._waiting += 1
        try:
            yield
        finally:
            self._waiting -= 1

    def stopped(self, step: int | None = None) -> RunStopped:
        """Makes the exception that ends the run.

        Args:
            step: see `RunStopped`.
        """
        self._leaving = True
        return RunStopped(self.reason or "another worker", step)

    @contextmanager
    def signals(self) -> Iterator[None]:
        """Takes SIGTERM and SIGINT for requests; does nothing outside the main thread."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # A main thread inside TensorFlow runs no handler; a pipe learns of the signal at once.
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
                for number in received:
                    if number in _SIGNALS:
                        self._announce(signal.Signals(number).name)

    def _announce(self, name: str) -> None:
        # Once in a process: the lock is never given back.
        if self.announce is not None and self._announced.acquire(blocking=False):
            with suppress(OSError):
                self.announce(name)

    def _handle(self, number: int, frame: Any) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts > 1:
            raise KeyboardInterrupt
        self.reason = self.reason or signal.Signals(number).name
        self._requested.set()
        if not self._waiting and not self._leaving:
            raise self.stopped()


FAILED, WRONG_INPUT, STOPPED = 1, 2, 75
RESUME = "Start all workers again with --resume; the run goes on from its newest checkpoint."
# What TensorFlow raises where a peer is gone; this package does not import it for their types.
_PEER_ERRORS = {
    *("UnavailableError", "AbortedError", "CancelledError"),
    *("DeadlineExceededError", "FailedPreconditionError"),
}
_SILENCE = 35.0  # longer than the kernel's probes of a machine that is gone
_GRACE = 5.0


def end_process(text: str, code: int) -> None:
    """Prints a message and ends the process, whatever its main thread is waiting for.

    Args:
        text: why.
        code: exit code.
    """
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(code)


class Watchdog:
    """Holds a link from each worker to the chief for as long as a run takes.

    TensorFlow notices a lost peer as well, but late and badly (2.21, on the loopback): the ring's
    next worker fails at once with `UnavailableError`, the others hang in the collective until the
    coordination service misses heartbeats (10 s), its message then accuses those too that left in
    the meantime, and a worker busy outside of a collective goes on until its next one.

    Use it as a context: leaving it normally says goodbye, leaving it by an exception tells the
    others why, and they end with the same exit code.

    Args:
        cluster: the processes.
        stop: is told when another worker was asked to stop, and tells the others.
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
        self._votes: dict[int, dict[int, Any]] = {}
        self._round = 0

    def meet(self, timeout: float = 300.0, greeting: Greeting | None = None) -> Watchdog:
        """Waits for all workers, and watches them from then on.

        Args:
            timeout: seconds to wait for them.
            greeting: what all must have alike, by name.

        Returns:
            Itself, to be used as a context.

        Raises:
            ClusterError: somebody did not come in time.
            InputError: the greetings differ, or a port is not free.
        """
        self._links = meet(self.cluster, timeout, greeting or {})
        if self._stop is not None:
            self._stop.announce = self._announce_stop
        for place in self._links:
            threading.Thread(target=self._watch, args=(place,), daemon=True).start()
        return self

    def agree(self, what: str, value: Any, hint: str = "") -> None:
        """Waits until all workers have come to this place with the same value.

        Args:
            what: the value's name, for the message.
            value: any value that JSON has.
            hint: what to do if it differs.

        Raises:
            InputError: if it is not the same on all workers; all of them raise it.
        """
        self._round += 1
        number = self._round
        self._vote(number, self._place, value)
        if self._links and not self.cluster.is_chief:
            self._links[0].send(vote=number, value=value)
        with self._changed:
            # The chief waits for everyone's value, a worker for the chief's list of them.
            while len(self._votes[number]) < len(self._links) + 1:
                self._changed.wait(0.2)
            values = self._votes.pop(number)
        if self.cluster.is_chief:
            ordered = [values[place] for place in range(len(values))]
            self._tell(votes=number, values=ordered)
        else:
            ordered = values[-1]
        if any(value != ordered[0] for value in ordered):
            each = ", ".join(
                f"{task} has {value}"
                for task, value in zip(self.cluster.in_step, ordered, strict=True)
            )
            raise InputError(f"the workers do not have the same {what}: {each}. {hint}".rstrip())

    def __enter__(self) -> Watchdog:
        """Returns itself."""
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        """Says goodbye, or why this worker ends."""
        if type(error).__name__ in _PEER_ERRORS:
            # The thread that learns which worker it was ends this process.
            time.sleep(_SILENCE)
        self._closing = True
        if error is None:
            self._tell(bye=True)
        else:
            self._tell(left=self._place, **_farewell(error))
        for link in self._links.values():
            link.finish()
        if type(error).__name__ in _PEER_ERRORS:
            raise ClusterError(
                f"{self._silent(str(error))} does not answer any more: its process hangs, or its "
                f"machine does not reach this one. {RESUME}"
            ) from error

    def _silent(self, text: str) -> str:
        """Names the task whose heartbeats TensorFlow misses."""
        found = re.search(r"unhealthy.*?/job:(\w+)/replica:0/task:(\d+)", text, re.DOTALL)
        named = [
            str(task)
            for task in self.cluster.in_step
            if found and (task.type, task.index) == (found[1], int(found[2]))
        ]
        return named[0] if named else "a worker"

    def _announce_stop(self, name: str) -> None:
        self._tell(stop=f"{name} at {self.cluster.this}")

    def _tell(self, but: int | None = None, **message: Any) -> None:
        for place, link in self._links.items():
            if place != but:
                link.send(**message)

    def _vote(self, number: int, place: int, value: Any) -> None:
        with self._changed:
            self._votes.setdefault(number, {})[place] = value
            self._changed.notify_all()

    def _watch(self, place: int) -> None:
        for message in self._links[place].messages():
            for name, react in _REACTIONS.items():
                if name in message:
                    react(self, place, message)
        if place not in self._gone:
            self._lost(place)
        self._links[place].close()

    def _on_vote(self, place: int, message: Message) -> None:
        self._vote(message["vote"], place, message["value"])

    def _on_votes(self, place: int, message: Message) -> None:
        self._vote(message["votes"], -1, message["values"])

    def _on_bye(self, place: int, message: Message) -> None:
        self._gone.add(place)

    def _on_stop(self, place: int, message: Message) -> None:
        if self.cluster.is_chief:
            self._tell(but=place, stop=message["stop"])
        if self._stop is not None:
            self._stop.request(message["stop"])

    def _on_left(self, place: int, message: Message) -> None:
        self._gone.add(place)
        if not self._is_first():
            return
        if self.cluster.is_chief:
            self._tell(but=place, **message)
        # All may have found the same fault, or have stopped at the same step: each says so itself.
        deadline = time.monotonic() + _GRACE
        while not self._closing and time.monotonic() < deadline:
            time.sleep(0.05)
        task = self.cluster.in_step[message["left"]]
        self._finish(f"{task} {message['why']}", message["code"])

    def _on_lost(self, place: int, message: Message) -> None:
        self._lost(message["lost"])

    def _lost(self, place: int) -> None:
        # Workers that this one tells, or that tell this one, close their links too.
        if not self._is_first():
            return
        if self.cluster.is_chief:
            self._tell(but=place, lost=place)
        self._finish(
            f"{self.cluster.in_step[place]} was lost: its process ended without a word (killed, "
            f"crashed, or its machine is gone). {RESUME}",
            FAILED,
        )

    def _is_first(self) -> bool:
        """Whether no reason to end was known before."""
        with self._changed:
            first = not self._ending and not self._closing
            self._ending = True
            return first

    def _finish(self, text: str, code: int) -> None:
        if self._closing:
            return
        self._closing = True
        for link in self._links.values():
            link.finish()
        # Closed sockets of an ended process may take back what the peers have not read yet.
        time.sleep(0.5)
        self._end(text, code)


_REACTIONS: dict[str, Callable[[Watchdog, int, Message], None]] = {
    "vote": Watchdog._on_vote,
    "votes": Watchdog._on_votes,
    "bye": Watchdog._on_bye,
    "stop": Watchdog._on_stop,
    "left": Watchdog._on_left,
    "lost": Watchdog._on_lost,
}


def _farewell(error: BaseException) -> dict[str, Any]:
    if isinstance(error, KeyboardInterrupt):
        reason = error.reason if isinstance(error, RunStopped) else "Ctrl-C"
        return {"code": STOPPED, "why": f"was stopped by {reason}. {RESUME}"}
    if isinstance(error, InputError):
        return {"code": WRONG_INPUT, "why": f"refused its input: {' '.join(error.problems)}"}
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"code": FAILED, "why": f"failed ({type(error).__name__}: {first[:300]}). {RESUME}"}
