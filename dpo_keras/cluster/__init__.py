"""Runs of several processes: which take part, and how they start, stop and end together."""

from dpo_keras.cluster.stop_request import RunStopped, StopRequest
from dpo_keras.cluster.tf_config import Cluster, Task, read_tf_config
from dpo_keras.cluster.watchdog import Watchdog
from dpo_keras.cluster.worker_links import ClusterError

__all__ = [
    "Cluster",
    "ClusterError",
    "RunStopped",
    "StopRequest",
    "Task",
    "Watchdog",
    "read_tf_config",
]
