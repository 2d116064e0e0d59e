"""The part of a run that depends on how many processes take part in it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

from dpo_keras.cluster import Cluster, StopRequest, Watchdog, read_tf_config
from dpo_keras.errors import InputError

if TYPE_CHECKING:
    from dpo_keras.app.config import Config

End = Callable[[str, int], None]
_IN_STEP = ("auto", "multi_worker")


def cluster_of(config: Config) -> Cluster | None:
    """Returns the cluster that a run trains on; None for a single process.

    Args:
        config: the run's configuration.

    Raises:
        InputError: if TF_CONFIG is wrong, or this process has no part in such a run.
    """
    if config.training.strategy not in _IN_STEP:
        return None
    cluster = read_tf_config()
    if cluster is not None and cluster.this not in cluster.in_step:
        raise InputError(
            f"training.strategy multi_worker has chief and workers only, but TF_CONFIG makes this "
            f"process {cluster.this}."
        )
    return cluster


def meet_workers(
    cluster: Cluster | None,
    config: Config,
    *,
    resume: bool,
    stop: StopRequest,
    end: End | None = None,
) -> AbstractContextManager[Watchdog | None]:
    """Waits for all workers of a run, and watches over them until the context is left.

    Args:
        cluster: None gives a context that does nothing.
        config: all workers must have the same.
        resume: all workers must have the same.
        stop: of this process.
        end: how a process ends whose peer was lost: prints the message, exits with the code.

    Raises:
        ClusterError: somebody did not come within `training.worker_timeout`.
        InputError: the workers were not started with the same configuration.
    """
    if cluster is None or len(cluster.in_step) == 1:
        return nullcontext()
    options = {} if end is None else {"end": end}
    digest = hashlib.sha256(config.resolved().encode()).hexdigest()
    greeting = {"the configuration": digest[:12], "--resume": str(resume)}
    return Watchdog(cluster, stop, **options).meet(config.training.worker_timeout, greeting)
