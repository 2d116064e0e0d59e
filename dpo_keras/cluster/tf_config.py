"""TF_CONFIG: the processes of a cluster, and which of them this one is."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dpo_keras.errors import InputError
from dpo_keras.utils import JSON
from dpo_keras.utils.text import shortened

TYPES = ("chief", "worker", "ps", "evaluator")
IN_STEP = ("chief", "worker")
_EXAMPLE = (
    '{"cluster": {"worker": ["host1:port", "host2:port"]}, "task": {"type": "worker", "index": 0}}'
)


@dataclass(frozen=True)
class Task:
    """One process of a cluster.

    Args:
        type: `chief`, `worker`, `ps` or `evaluator`.
        index: among those of its type.
        address: `host:port`.
    """

    type: str
    index: int
    address: str

    @property
    def host(self) -> str:
        """The address without its port."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def port(self) -> int:
        """The port that the process listens on."""
        return int(self.address.rpartition(":")[2])

    def __str__(self) -> str:
        return f"{self.type} {self.index} ({self.address})"


@dataclass(frozen=True)
class Cluster:
    """The processes that TF_CONFIG names.

    Args:
        tasks: chief, workers, parameter servers and evaluators.
        this: the task of this process.
    """

    tasks: tuple[Task, ...]
    this: Task

    def of_type(self, *types: str) -> tuple[Task, ...]:
        """Return the tasks of these types (see `TYPES`), in the cluster's order."""
        return tuple(task for task in self.tasks if task.type in types)

    @property
    def in_step(self) -> tuple[Task, ...]:
        """The tasks that take every step together: chief and workers."""
        return self.of_type(*IN_STEP)

    @property
    def chief(self) -> Task:
        """The task that writes a run's files: the chief, or worker 0 where there is none."""
        return self.in_step[0]

    @property
    def is_chief(self) -> bool:
        """Whether this process is the chief."""
        return self.this == self.chief


def read_tf_config(text: str | None = None) -> Cluster | None:
    """Read and check TF_CONFIG.

    Args:
        text: its content; None reads the environment variable.

    Returns:
        The cluster; None where TF_CONFIG is not set, empty or `{}`.

    Raises:
        InputError: TF_CONFIG breaks a rule; all problems together.

    Example:
        >>> workers = '"cluster": {"worker": ["a:7000", "b:7000"]}'
        >>> cluster = read_tf_config('{%s, "task": {"type": "worker", "index": 1}}' % workers)
        >>> str(cluster.this), cluster.is_chief, str(cluster.chief)
        ('worker 1 (b:7000)', False, 'worker 0 (a:7000)')

    References:
        https://www.tensorflow.org/guide/distributed_training#TF_CONFIG
    """
    text = os.environ.get("TF_CONFIG", "") if text is None else text
    if not text.strip():
        return None
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(
            f"TF_CONFIG must be JSON like {_EXAMPLE}, got {_shown(text)} ({error})."
        ) from error
    if content == {}:
        return None
    if not isinstance(content, dict):
        raise InputError(f"TF_CONFIG must be an object like {_EXAMPLE}, got {_shown(content)}.")
    problems = [*_cluster_problems(content.get("cluster")), *_task_problems(content)]
    if problems:
        raise InputError([f"TF_CONFIG: {problem}" for problem in problems])
    tasks = tuple(
        Task(kind, index, address)
        for kind in TYPES
        for index, address in enumerate(content["cluster"].get(kind, ()))
    )
    mine = content["task"]["type"], int(content["task"]["index"])
    return Cluster(tasks, next(task for task in tasks if (task.type, task.index) == mine))


def _cluster_problems(cluster: JSON) -> Iterator[str]:
    if cluster is None:
        yield f"cluster is missing; it must look like {_EXAMPLE}."
        return
    if not isinstance(cluster, dict):
        yield f"cluster must be an object of address lists, got {_shown(cluster)}."
        return
    for kind in cluster:
        if kind not in TYPES:
            yield f"cluster has the unknown type {kind!r}; known are {', '.join(TYPES)}."
    for kind, addresses in cluster.items():
        if not isinstance(addresses, list) or not addresses:
            yield f"cluster.{kind} must be a list of host:port, got {_shown(addresses)}."
    if not any(kind in cluster for kind in IN_STEP):
        yield "cluster.worker is missing: the addresses of the workers, a list of host:port."
    if len(_addresses(cluster, "chief")) > 1:
        yield f"cluster.chief must be one address, got {_shown(cluster['chief'])}."
    yield from _address_problems(cluster)


def _addresses(cluster: Mapping[str, JSON], kind: str) -> list[JSON]:
    addresses = cluster.get(kind)
    return addresses if isinstance(addresses, list) else []


def _address_problems(cluster: Mapping[str, JSON]) -> Iterator[str]:
    seen: dict[str, str] = {}
    for kind in cluster:
        for index, address in enumerate(_addresses(cluster, kind)):
            name = f"cluster.{kind}[{index}]"
            if not isinstance(address, str) or not address.strip():
                yield f"{name} must be the address of {kind} {index}, got {_shown(address)}."
                continue
            host, _, port = address.rpartition(":")
            if not host:
                yield f"{name} must be host:port, got {address!r}."
            elif not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16):
                yield f"{name} must have a port from 1 to 65535, got {address!r}."
            if address in seen:
                yield f"{name} is {address!r}, which is {seen[address]} already."
            seen.setdefault(address, name)


def _task_problems(content: Mapping[str, JSON]) -> Iterator[str]:
    task = content.get("task")
    if not isinstance(task, dict):
        what = "is missing" if task is None else f"is {_shown(task)}"
        yield f'task {what}; it must say who this process is: {{"type": "worker", "index": 0}}.'
        return
    cluster = content.get("cluster")
    kinds = list(cluster) if isinstance(cluster, dict) else list(TYPES)
    kind, index = task.get("type"), task.get("index")
    if kind not in kinds:
        yield f"task.type must be one of {', '.join(kinds)} (the cluster's), got {_shown(kind)}."
    try:
        # Some launchers write the index as a string, which TensorFlow accepts.
        number = int(index) if isinstance(index, int | str) else -1
    except ValueError:
        number = -1
    if isinstance(index, bool) or number < 0:
        yield f"task.index must be an integer >= 0, got {_shown(index)}."
    elif isinstance(cluster, dict) and kind in kinds:
        count = len(_addresses(cluster, str(kind)))
        if number >= count:
            yield (
                f"task.index is {number}, but cluster.{kind} has {count} "
                f"address{'es' if count != 1 else ''}, numbered from 0."
            )


def _shown(value: JSON) -> str:
    return shortened("nothing" if value is None else repr(value), 120)
