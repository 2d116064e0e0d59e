"""How the workers of a run meet on the chief's port, before TensorFlow listens there."""

from __future__ import annotations

import errno
import os
import select
import socket
import time
from collections.abc import Mapping
from contextlib import suppress

from dpo_keras.cluster.shared_secret import chief_secret, where_secret, worker_secret
from dpo_keras.cluster.tf_config import Cluster, Task
from dpo_keras.cluster.worker_links import ClusterError, Link, Message
from dpo_keras.errors import InputError
from dpo_keras.utils import JSON

Greeting = Mapping[str, str]
Directory = str | os.PathLike[str] | None
_HELLO_SECONDS = 5.0
_MOST_STRANGERS = 64  # connections that have not shown the secret, beside one for each worker


def meet(
    cluster: Cluster, timeout: float, greeting: Greeting, run_directory: Directory = None
) -> dict[int, Link]:
    """Wait for all workers; return the links by place in `cluster.in_step`, a worker's as 0.

    The workers meet on the chief's own address before TensorFlow listens there, so no further port
    has to be open. TensorFlow itself waits for ever when the chief is up and a worker is not.
    """
    if len(cluster.in_step) == 1:
        return {}
    _check_port(cluster.this)
    if not cluster.is_chief:
        return {0: _join(cluster, timeout, greeting, run_directory)}
    with chief_secret(run_directory) as secret:
        reception = _Reception(cluster, greeting, secret)
        return reception.welcome(timeout, where_secret(run_directory))


def _check_port(task: Task, patience: float = 10.0) -> None:
    # The process that this one replaces may still be shutting down.
    deadline = time.monotonic() + patience
    while True:
        try:
            # TensorFlow will listen on all addresses of this machine.
            _bound(_family(task), ("", task.port)).close()
            return
        except OSError as error:
            if time.monotonic() > deadline:
                raise InputError(
                    f"TF_CONFIG: port {task.port} of {task} can not be used on this machine "
                    f"({error.strerror}); end the process that has it, or name another port."
                ) from error
        time.sleep(0.2)


def _family(task: Task) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in task.host else socket.AF_INET


def _bound(family: int, address: tuple) -> socket.socket:
    made = socket.socket(family, socket.SOCK_STREAM)
    try:
        # TensorFlow must be able to bind the port while these links are still open.
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError:
        made.close()
        raise
    return made


def _listener(task: Task) -> socket.socket:
    """Listen on the address that TF_CONFIG names.

    Where no address of this machine has that name (behind NAT, or before DNS knows a new pod), it
    listens on all of them, as TensorFlow does.
    """
    places: list[tuple[int, tuple]] = []
    with suppress(OSError):
        found = socket.getaddrinfo(task.host, task.port, type=socket.SOCK_STREAM)
        places = [(family, address) for family, *_, address in found]
    for family, address in (*places, (_family(task), ("", task.port))):
        try:
            listener = _bound(family, address)
            break
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise
    listener.listen(128)
    return listener


class _Reception:
    """The chief's side of a meeting.

    A connection has a few seconds to show the secret, and none waits for another: strangers can
    neither hold up the workers nor make the chief wait longer than its timeout.
    """

    def __init__(self, cluster: Cluster, greeting: Greeting, secret: bytes):
        self.cluster, self.greeting, self.secret = cluster, greeting, secret
        self.links: dict[int, Link] = {}
        self.problems: list[str] = []
        self.forgers: set[str] = set()
        self._strangers: dict[socket.socket, tuple[Link, str, float]] = {}  # the oldest first

    def welcome(self, timeout: float, where: str) -> dict[int, Link]:
        """Wait until all workers are here and started alike; then tell all of them."""
        deadline = time.monotonic() + timeout
        try:
            with _listener(self.cluster.chief) as listener:
                while len(self.links) < len(self.cluster.in_step) - 1 and not self.problems:
                    if time.monotonic() > deadline:
                        raise self._missing(timeout, where)
                    self._wait(listener)
        finally:
            for stranger in tuple(self._strangers):
                self._strangers.pop(stranger)[0].close()
        if self.problems:
            self._dismiss(refused=self.problems)
            raise InputError(self.problems)
        for link in self.links.values():
            link.send(welcome=True)
        return self.links

    def _wait(self, listener: socket.socket, seconds: float = 0.2) -> None:
        workers = {link.socket: place for place, link in self.links.items()}
        for ready in select.select([listener, *self._strangers, *workers], [], [], seconds)[0]:
            if ready is listener:
                self._accept(listener)
            elif ready in self._strangers:
                self._hear(ready)
            elif ready in workers:
                # Workers send nothing before the welcome: this one closed its connection.
                self.links.pop(workers[ready]).close()
        now = time.monotonic()
        for stranger, (link, _, until) in tuple(self._strangers.items()):
            if now > until or len(self._strangers) > _MOST_STRANGERS + len(self.cluster.in_step):
                self._strangers.pop(stranger)
                link.close()

    def _accept(self, listener: socket.socket) -> None:
        with suppress(OSError):  # it may be gone again
            connection, address = listener.accept()
            connection.settimeout(_HELLO_SECONDS)
            link = Link(connection, self.secret, is_chief=True)
            self._strangers[connection] = link, address[0], time.monotonic() + _HELLO_SECONDS

    def _hear(self, stranger: socket.socket) -> None:
        """Read what a stranger has to say; take it for a worker if that is a sealed hello."""
        link, host, _ = self._strangers[stranger]
        try:
            link.read()
            while (message := link.next_message()) is not None and "place" not in message:
                pass  # its random number
        except (OSError, ValueError):
            # A port scanner, a health check, or a worker of another run.
            if link.forged:
                self.forgers.add(host)
            self._strangers.pop(stranger)
            link.close()
            return
        if message is not None:
            self._strangers.pop(stranger)
            self._greet(link, message)

    def _greet(self, link: Link, hello: Message) -> None:
        """Compare a worker's start with the chief's, and keep its link."""
        place = hello["place"]
        if not 0 < place < len(self.cluster.in_step):
            link.close()
            return
        link.send(accepted=True)
        if place in self.links:  # the worker was started again
            self.links[place].close()
        self.links[place] = link
        task, chief, theirs = self.cluster.in_step[place], self.cluster.chief, hello["greeting"]
        if hello["addresses"] != _addresses(self.cluster):
            self.problems += [f"TF_CONFIG of {task} has another cluster than that of {chief}."]
            return
        self.problems += [
            f"{task} has {name} {theirs.get(name)}, but {chief} has {value}: start all of them "
            "with the same."
            for name, value in self.greeting.items()
            if theirs.get(name) != value
        ]

    def _missing(self, timeout: float, where: str) -> ClusterError:
        tasks = enumerate(self.cluster.in_step)
        missing = [str(task) for place, task in tasks if place and place not in self.links]
        text = (
            f"{' and '.join(missing)} did not connect within {timeout:g} seconds. Start every "
            "process that TF_CONFIG names, check that its addresses are right and reachable, or "
            "wait longer with training.worker_timeout=SECONDS."
        )
        if self.forgers:
            hosts = ", ".join(sorted(self.forgers)[:5])
            text += f" Connections from {hosts} had another secret than {where} has here."
        self._dismiss(missing=text)
        return ClusterError(text)

    def _dismiss(self, **message: JSON) -> None:
        for link in self.links.values():
            link.send(**message)
            link.close()


def _join(cluster: Cluster, timeout: float, greeting: Greeting, run_directory: Directory) -> Link:
    deadline = time.monotonic() + timeout
    problem = "it did not answer"
    while (left := deadline - time.monotonic()) > 0:
        try:
            link = _connect(cluster, greeting, run_directory, min(left, _HELLO_SECONDS))
        except OSError as error:
            problem = error.strerror or str(error)
            time.sleep(0.2)
            continue
        # The chief may have started to wait later than this worker.
        answer = link.receive(timeout + _HELLO_SECONDS) or {}
        if "welcome" in answer:
            return link
        link.close()
        if "refused" in answer:
            raise InputError(answer["refused"])
        if "missing" in answer:
            raise ClusterError(answer["missing"])
        time.sleep(0.2)
    raise ClusterError(
        f"{cluster.this} could not reach {cluster.chief} within {timeout:g} seconds ({problem}). "
        "Start it, check that its address in TF_CONFIG is right and reachable, or wait longer with "
        "training.worker_timeout=SECONDS."
    )


def _connect(
    cluster: Cluster, greeting: Greeting, run_directory: Directory, seconds: float
) -> Link:
    """Connect to the chief, and return the link once the chief has shown the secret too."""
    chief, place = cluster.chief, cluster.in_step.index(cluster.this)
    secret, where = worker_secret(run_directory), where_secret(run_directory)
    if secret is None:
        raise ConnectionError(f"no {where} yet: the chief writes it, where all workers must see it")
    link = Link(socket.create_connection((chief.host, chief.port), seconds), secret, False)
    if link.receive(seconds) is not None:
        link.send(place=place, addresses=_addresses(cluster), greeting=dict(greeting))
        if link.receive(seconds) == {"accepted": True}:
            return link
    link.close()
    raise ConnectionError(f"it did not show the secret that {where} has here")


def _addresses(cluster: Cluster) -> list[str]:
    return [str(task) for task in cluster.in_step]
