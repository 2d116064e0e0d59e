"""The chief of a cluster with parameter servers."""

import os
from typing import Any

import tensorflow as tf

from dpo_keras.cluster import Cluster, read_tf_config
from dpo_keras.errors import InputError

JOBS = ("chief", "ps", "worker")
_SHAPE = (
    '{"cluster": {"chief": ["host0:port"], "ps": ["host1:port"], "worker": ["host2:port", …]}, '
    '"task": {"type": "chief", "index": 0}}, with each process\'s own task'
)


def read_server_cluster() -> Cluster:
    """The cluster that TF_CONFIG describes: one chief, parameter servers, workers.

    Raises:
        InputError: TF_CONFIG is missing or wrong, or a job is missing in it.
    """
    cluster = read_tf_config()
    if cluster is None:
        raise InputError(f"parameter servers need the environment variable TF_CONFIG: {_SHAPE}.")
    missing = [job for job in JOBS if not cluster.of_type(job)]
    if missing or cluster.this.type not in JOBS:
        fault = (
            f"has no {' and no '.join(missing)}"
            if missing
            else f"makes this process an {cluster.this.type}"
        )
        raise InputError(f"TF_CONFIG {fault}; for parameter servers it must be {_SHAPE}.")
    return cluster


def parameter_server(**options: Any) -> tf.distribute.Strategy:
    """The strategy of the chief, which drives workers and parameter servers.

    Raises:
        InputError: TF_CONFIG is wrong, or this process is not the chief.
    """
    cluster = read_server_cluster()
    if not cluster.is_chief:
        raise InputError(
            "strategy 'parameter_server' is for the chief, and TF_CONFIG makes this process "
            f"{cluster.this}. Here run: python -m dpo_keras.legacy.server"
        )
    report_failures()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    return tf.distribute.ParameterServerStrategy(resolver)


def report_failures() -> None:
    """Makes calls to a process that is gone fail, where gRPC would wait for it."""
    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")
