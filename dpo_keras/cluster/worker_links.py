"""TCP connections from each worker to the chief: one line of JSON per message."""

from __future__ import annotations

import json
import re
import select
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress

from dpo_keras.cluster.tf_config import Cluster, Task
from dpo_keras.errors import InputError
from dpo_keras.utils import JSON

Message = dict[str, JSON]
Greeting = Mapping[str, str]
_HELLO_SECONDS = 5.0
# Names of what TensorFlow raises when a peer is gone: this package does not import TensorFlow.
_PEER_ERRORS = {
    *("UnavailableError", "AbortedError", "CancelledError"),
    *("DeadlineExceededError", "FailedPreconditionError"),
}
_PROBES = {"TCP_KEEPIDLE": 10, "TCP_KEEPINTVL": 5, "TCP_KEEPCNT": 4, "TCP_USER_TIMEOUT": 30_000}


class ClusterError(RuntimeError):
    """A worker is missing or was lost. The input is not at fault."""


def lost_peer(cluster: Cluster, error: BaseException | None) -> str | None:
    """Return the task whose heartbeats TensorFlow misses; None if the error has another cause."""
    if type(error).__name__ not in _PEER_ERRORS:
        return None
    found = re.search(r"unhealthy.*?/job:(\w+)/replica:0/task:(\d+)", str(error), re.DOTALL)
    silent = found and (found[1], int(found[2]))
    named = (str(task) for task in cluster.in_step if (task.type, task.index) == silent)
    return next(named, "a worker")


class Link:
    """A connected TCP socket that carries lines of JSON.

    A process that ends in any way closes its connections, and its peer reads the end at once. A
    machine that is gone closes nothing, so the kernel probes a silent connection and gives it up
    after about 30 seconds. No Python thread takes part in that, so a busy interpreter does no harm.
    """

    def __init__(self, connection: socket.socket):
        self.socket = connection
        self._lines = connection.makefile("r", encoding="utf-8", errors="replace", newline="\n")
        self._sending = threading.Lock()
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in _PROBES.items():
            if hasattr(socket, name):
                connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def send(self, **message: JSON) -> None:
        """Send a message. The reading side notices a peer that is gone."""
        with self._sending, suppress(OSError):
            self.socket.sendall((json.dumps(message) + "\n").encode())

    def receive(self, seconds: float | None) -> Message | None:
        """Wait for a message; None if the connection ends, times out or carries something else."""
        try:
            self.socket.settimeout(seconds)
            message = json.loads(self._lines.readline(1 << 16))
        except (OSError, ValueError):
            return None
        return message if isinstance(message, dict) else None

    def finish(self) -> None:
        """Close the sending side. What was sent still arrives."""
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        """Close the connection."""
        self._lines.close()
        self.socket.close()


def meet(cluster: Cluster, timeout: float, greeting: Greeting) -> dict[int, Link]:
    """Wait for all workers; return the links by place in `cluster.in_step`, a worker's as 0.

    The workers meet on the chief's own address before TensorFlow listens there, so no further port
    has to be open. TensorFlow itself waits for ever when the chief is up and a worker is not.
    """
    if len(cluster.in_step) == 1:
        return {}
    _check_port(cluster.this)
    if cluster.is_chief:
        return _welcome(cluster, timeout, greeting)
    return {0: _join(cluster, timeout, greeting)}


def _check_port(task: Task, patience: float = 10.0) -> None:
    # The process that this one replaces may still be shutting down.
    deadline = time.monotonic() + patience
    while True:
        try:
            _listener(task).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"TF_CONFIG: port {task.port} of {task} can not be used on this machine "
                    f"({error.strerror}); end the process that has it, or name another port."
                ) from error
        time.sleep(0.2)


def _listener(task: Task) -> socket.socket:
    family = socket.AF_INET6 if ":" in task.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        # TensorFlow must be able to bind the port while these links are still open.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("", task.port))
        listener.listen(64)
    except OSError:
        listener.close()
        raise
    return listener


def _welcome(cluster: Cluster, timeout: float, greeting: Greeting) -> dict[int, Link]:
    deadline = time.monotonic() + timeout
    links: dict[int, Link] = {}
    problems: list[str] = []
    with _listener(cluster.chief) as listener:
        while len(links) < len(cluster.in_step) - 1 and not problems:
            if time.monotonic() > deadline:
                raise _missing(cluster, links, timeout)
            waiting = {link.socket: place for place, link in links.items()}
            for ready in select.select([listener, *waiting], [], [], 0.2)[0]:
                if ready is listener:
                    problems += _greet(listener, cluster, links, greeting)
                else:  # workers send nothing before the welcome: this one closed its connection
                    links.pop(waiting[ready]).close()
    if problems:
        _dismiss(links, refused=problems)
        raise InputError(problems)
    for link in links.values():
        link.send(welcome=True)
    return links


def _dismiss(links: Mapping[int, Link], **message: JSON) -> None:
    for link in links.values():
        link.send(**message)
        link.close()


def _greet(
    listener: socket.socket, cluster: Cluster, links: dict[int, Link], greeting: Greeting
) -> list[str]:
    """Accept one connection; return the problems with it."""
    connection, _ = listener.accept()
    link = Link(connection)
    hello = link.receive(_HELLO_SECONDS) or {}
    place = hello.get("place")
    if not isinstance(place, int) or not 0 < place < len(cluster.in_step):
        link.close()  # a port scanner, a health check, or a worker of an earlier cluster
        return []
    task = cluster.in_step[place]
    links[place] = link
    if hello.get("addresses") != _addresses(cluster):
        return [f"TF_CONFIG of {task} has another cluster than that of {cluster.chief}."]
    theirs = hello.get("greeting", {})
    return [
        f"{task} has {name} {theirs.get(name)}, but {cluster.chief} has {value}: start all of them "
        "with the same."
        for name, value in greeting.items()
        if theirs.get(name) != value
    ]


def _missing(cluster: Cluster, links: Mapping[int, Link], timeout: float) -> ClusterError:
    missing = [str(task) for n, task in enumerate(cluster.in_step) if n and n not in links]
    text = (
        f"{' and '.join(missing)} did not connect within {timeout:g} seconds. Start every process "
        "that TF_CONFIG names, check that its addresses are right and reachable, or wait longer "
        "with training.worker_timeout=SECONDS."
    )
    _dismiss(links, missing=text)
    return ClusterError(text)


def _join(cluster: Cluster, timeout: float, greeting: Greeting) -> Link:
    deadline = time.monotonic() + timeout
    chief, place = cluster.chief, cluster.in_step.index(cluster.this)
    problem = "it did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            connection = socket.create_connection((chief.host, chief.port), min(left, 5.0))
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.2)
            continue
        link = Link(connection)
        link.send(place=place, addresses=_addresses(cluster), greeting=dict(greeting))
        # The chief may have started to wait later than this worker.
        answer = link.receive(timeout + 5.0) or {}
        if "welcome" in answer:
            return link
        link.close()
        if "refused" in answer:
            raise InputError(answer["refused"])
        if "missing" in answer:
            raise ClusterError(answer["missing"])
        time.sleep(0.2)
    raise ClusterError(
        f"{cluster.this} could not reach {chief} within {timeout:g} seconds ({problem}). Start it, "
        "check that its address in TF_CONFIG is right and reachable, or wait longer with "
        "training.worker_timeout=SECONDS."
    )


def _addresses(cluster: Cluster) -> list[str]:
    return [str(task) for task in cluster.in_step]
