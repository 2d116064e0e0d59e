"""The cluster that TF_CONFIG describes, for training with parameter servers."""

import json
import os
from dataclasses import dataclass
from typing import Any

import tensorflow as tf

from dpo_keras.errors import InputError

_SHAPE = (
    '{"cluster": {"chief": ["host0:port"], "ps": ["host1:port"], "worker": ["host2:port", …]}, '
    '"task": {"type": "chief", "index": 0}}, with each process\'s own task'
)


@dataclass(frozen=True)
class Task:
    """One process of a cluster with parameter servers.

    Args:
        cluster: addresses by job: `chief`, `ps`, `worker`.
        job: this process's.
        index: its number within the job.
    """

    cluster: dict[str, list[str]]
    job: str
    index: int

    @property
    def workers(self) -> int:
        """How many workers there are."""
        return len(self.cluster["worker"])


def read_task() -> Task:
    """This process's place in the cluster, from TF_CONFIG.

    Raises:
        InputError: there is none, or it is not that of a cluster with parameter servers; every
            fault in it.
    """
    text = os.environ.get("TF_CONFIG")
    if not text:
        raise InputError(f"parameter servers need the environment variable TF_CONFIG: {_SHAPE}.")
    try:
        config: Any = json.loads(text)
    except ValueError as error:
        raise InputError(f"TF_CONFIG must be JSON ({error}): {_SHAPE}; got {text!r}.") from error
    parts = [config.get(name) if isinstance(config, dict) else None for name in ("cluster", "task")]
    cluster, task = (part if isinstance(part, dict) else {} for part in parts)
    problems = [
        f"TF_CONFIG: cluster.{job} must be a list of host:port, got {cluster.get(job)!r}."
        for job in ("chief", "ps", "worker")
        if not _addresses(cluster.get(job))
    ]
    job: Any = task.get("type")
    index: Any = task.get("index")
    if job not in ("chief", "ps", "worker"):
        problems.append(f"TF_CONFIG: task.type must be chief, ps or worker, got {job!r}.")
    elif not problems and index not in range(len(cluster[job])):
        problems.append(
            f"TF_CONFIG: task.index must be 0 to {len(cluster[job]) - 1} for {job}, got {index!r}."
        )
    if problems:
        raise InputError([*problems, f"It must be {_SHAPE}."])
    return Task(cluster, job, index)


def _addresses(value: Any) -> bool:
    return bool(value) and isinstance(value, list) and all(isinstance(a, str) for a in value)


def parameter_server(**options: Any) -> tf.distribute.Strategy:
    """The strategy of the chief, which drives workers and parameter servers.

    Raises:
        InputError: TF_CONFIG is wrong, or this process is not the chief.
    """
    task = read_task()
    if task.job != "chief":
        raise InputError(
            f"strategy 'parameter_server' is for the chief, and TF_CONFIG makes this process "
            f"{task.job} {task.index}. Here run: python -m dpo_keras.legacy.server"
        )
    report_failures()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    return tf.distribute.ParameterServerStrategy(resolver)


def report_failures() -> None:
    """Makes calls to a process that is gone fail, where gRPC would wait for it."""
    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")
