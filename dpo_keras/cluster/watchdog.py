"""End a cluster's workers together: on a signal, after an error, or when one of them is lost."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable

from dpo_keras.cluster.meeting import Directory, Greeting, meet
from dpo_keras.cluster.stop_request import RunStopped, StopRequest
from dpo_keras.cluster.tf_config import Cluster
from dpo_keras.cluster.worker_links import ClusterError, Link, Message, lost_peer
from dpo_keras.errors import InputError
from dpo_keras.utils import JSON

FAILED, WRONG_INPUT, STOPPED = 1, 2, 75
RESUME = "Start all workers again with --resume; the run goes on from its newest checkpoint."
_SILENCE = 35.0  # longer than the kernel's probes of a machine that is gone
_GRACE = 5.0
# NFS shows a change of a directory after up to 60 seconds.
_LAG_PAUSE, _LAG_TRIES = 5.0, 18


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
        4
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

    def meet(
        self,
        timeout: float = 300.0,
        greeting: Greeting | None = None,
        run_directory: Directory = None,
    ) -> Watchdog:
        """Wait for all workers, and watch them from then on.

        Args:
            timeout: seconds to wait.
            greeting: values that must be equal on all workers.
            run_directory: shared by all workers. The chief puts the secret of this meeting into it
                where the environment variable DPO_KERAS_CLUSTER_SECRET has none.

        Raises:
            InputError: no secret, a port in use, or workers that were started differently.
            ClusterError: not all workers came in time.
        """
        self._links = meet(self.cluster, timeout, greeting or {}, run_directory)
        if self._stop is not None:
            self._stop.announce = lambda name: self._tell(stop=f"{name} at {self.cluster.this}")
        for place in self._links:
            threading.Thread(target=self._watch, args=(place,), daemon=True).start()
        return self

    def agree(
        self, what: str, value: JSON, hint: str = "", again: Callable[[], JSON] | None = None
    ) -> JSON:
        """Wait until all workers reach this call with the same value, and return it.

        If it differs, all of them raise an InputError that names it as `what` and ends with `hint`.
        With `again`, which reads the value from a shared file system that may lag behind, all of
        them first read it again every 5 seconds, for 90 seconds.
        """
        values = self._values_of_all(value)
        tries = 0 if again is None else _LAG_TRIES
        while again is not None and tries and any(other != values[0] for other in values):
            tries -= 1
            time.sleep(_LAG_PAUSE)
            value = again()
            values = self._values_of_all(value)
        if any(other != values[0] for other in values):
            tasks = zip(self.cluster.in_step, values, strict=True)
            each = ", ".join(f"{task} has {value}" for task, value in tasks)
            waited = f", {_LAG_PAUSE * _LAG_TRIES:g} seconds long" if again else ""
            raise InputError(
                f"the workers do not have the same {what}{waited}: {each}. {hint}".rstrip()
            )
        return value

    def _values_of_all(self, value: JSON) -> list[JSON]:
        """Exchange a value with all workers; return theirs in the cluster's order."""
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
        if not self.cluster.is_chief:
            return values[-1]
        ordered = [values[place] for place in range(len(values))]
        self._tell(votes=number, values=ordered)
        return ordered

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
            if not self._react(place, message):
                break
        if place not in self._gone:
            self._lost(place)
        self._links[place].close()

    def _react(self, place: int, message: Message) -> bool:
        """Do what a message asks for; return False if it is not for this worker to get."""
        is_chief, count = self.cluster.is_chief, len(self.cluster.in_step)
        match message:
            case {"vote": number, "value": value} if is_chief:
                self._vote(number, place, value)
            case {"votes": number, "values": values} if not is_chief and len(values) == count:
                self._vote(number, -1, values)
            case {"bye": _}:
                self._gone.add(place)
            case {"left": who, "code": code} if code in (FAILED, WRONG_INPUT, STOPPED) and (
                who == place if is_chief else who < count
            ):
                self._left(place, message)
            case {"lost": lost} if not is_chief and lost < count:
                self._lost(lost)
            case {"stop": reason}:
                if is_chief:
                    self._tell(but=place, stop=reason)
                if self._stop is not None:
                    self._stop.request(reason)
            case _:
                return False
        return True

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
