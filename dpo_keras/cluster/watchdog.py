"""End a cluster's workers together, and name the one that was lost."""

from __future__ import annotations

import os
import re
import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

from dpo_keras.cluster.stop_request import RunStopped, StopRequest
from dpo_keras.cluster.tf_config import Cluster
from dpo_keras.cluster.worker_links import ClusterError, Greeting, Link, Message, meet
from dpo_keras.errors import InputError
from dpo_keras.utils.tensors import JSON

FAILED, WRONG_INPUT, STOPPED = 1, 2, 75
RESUME = "Start all workers again with --resume; the run goes on from its newest checkpoint."
# Names of what TensorFlow raises when a peer is gone: this package does not import TensorFlow.
_PEER_ERRORS = {
    *("UnavailableError", "AbortedError", "CancelledError"),
    *("DeadlineExceededError", "FailedPreconditionError"),
}
_SILENCE = 35.0  # longer than the kernel's probes of a machine that is gone
_GRACE = 5.0


def end_process(text: str, code: int) -> None:
    """Print a message and end the process, whatever its main thread is waiting for."""
    print(f"error: {text}", file=sys.stderr, flush=True)
    os._exit(code)


class Watchdog:
    """A link from each worker to the chief, for as long as a run takes.

    TensorFlow 2.21 detects a lost peer too, but slowly and with the wrong names. The next worker of
    the ring fails at once with `UnavailableError`. The others hang in the collective until the
    coordination service misses heartbeats (10 s), and its message also names workers that left in
    the meantime. A worker outside of a collective continues until its next one.

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
        """Wait for all workers, and watch them from then on.

        Args:
            timeout: seconds to wait.
            greeting: values, by name, that must be equal on all workers.

        Returns:
            This object, as a context manager.

        Raises:
            ClusterError: a worker did not connect in time.
            InputError: the greetings differ, or a port is not free.
        """
        self._links = meet(self.cluster, timeout, greeting or {})
        if self._stop is not None:
            self._stop.announce = self._announce_stop
        for place in self._links:
            threading.Thread(target=self._watch, args=(place,), daemon=True).start()
        return self

    def agree(self, what: str, value: JSON, hint: str = "") -> None:
        """Wait until all workers reach this call with the same value.

        Args:
            what: name of the value, for the message.
            value: the value.
            hint: what to do if it differs.

        Raises:
            InputError: the value differs between workers; all of them raise it.
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
            each = ", ".join(
                f"{task} has {value}"
                for task, value in zip(self.cluster.in_step, ordered, strict=True)
            )
            raise InputError(f"the workers do not have the same {what}: {each}. {hint}".rstrip())

    def __enter__(self) -> Watchdog:
        """Return this object."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Say goodbye, or tell the other workers why this one ends."""
        if type(error).__name__ in _PEER_ERRORS:
            # The thread that reads which worker was lost ends this process in the meantime.
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
        """Return the task whose heartbeats TensorFlow misses, from its message."""
        found = re.search(r"unhealthy.*?/job:(\w+)/replica:0/task:(\d+)", text, re.DOTALL)
        named = [
            str(task)
            for task in self.cluster.in_step
            if found and (task.type, task.index) == (found[1], int(found[2]))
        ]
        return named[0] if named else "a worker"

    def _announce_stop(self, name: str) -> None:
        self._tell(stop=f"{name} at {self.cluster.this}")

    def _tell(self, but: int | None = None, **message: JSON) -> None:
        for place, link in self._links.items():
            if place != but:
                link.send(**message)

    def _vote(self, number: int, place: int, value: JSON) -> None:
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
        # All workers may end for the same reason; then each reports it itself.
        deadline = time.monotonic() + _GRACE
        while not self._closing and time.monotonic() < deadline:
            time.sleep(0.05)
        task = self.cluster.in_step[message["left"]]
        self._finish(f"{task} {message['why']}", message["code"])

    def _on_lost(self, place: int, message: Message) -> None:
        self._lost(message["lost"])

    def _lost(self, place: int) -> None:
        # Only the first reason counts: links close one after another when workers end.
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
        """Tell whether this is the first reason to end, and remember that there is one."""
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
        # Sockets of an ended process may discard what peers have not read yet.
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


def _farewell(error: BaseException) -> dict[str, JSON]:
    if isinstance(error, KeyboardInterrupt):
        reason = error.reason if isinstance(error, RunStopped) else "Ctrl-C"
        return {"code": STOPPED, "why": f"was stopped by {reason}. {RESUME}"}
    if isinstance(error, InputError):
        return {"code": WRONG_INPUT, "why": f"refused its input: {' '.join(error.problems)}"}
    first = (str(error).strip() or type(error).__name__).splitlines()[0]
    return {"code": FAILED, "why": f"failed ({type(error).__name__}: {first[:300]}). {RESUME}"}
