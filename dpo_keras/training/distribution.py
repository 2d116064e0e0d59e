"""Tensors of all replicas together."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dpo_keras.cluster import Cluster, Watchdog, read_tf_config
from dpo_keras.errors import InputError


def sum_over_replicas(values: Any) -> Any:
    """Adds up tensors (one, or a list) over all replicas; outside a strategy they stay as is."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def gather_over_replicas(values: dict[str, Any]) -> dict[str, Any]:
    """Puts the rows of all replicas behind one another; gradients go back to where they came from.

    Args:
        values: tensors with rows in dimension 0.

    Returns:
        The same names, with the rows of all replicas, on every replica.
    """
    context = tf.distribute.get_replica_context()
    return {name: context.all_gather(value, axis=0) for name, value in values.items()}


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
            f"{cluster.this}. Here run: python -m dpo_keras.legacy.parameter_server"
        )
    report_failures()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    return tf.distribute.ParameterServerStrategy(resolver)


def report_failures() -> None:
    """Makes calls to a process that is gone fail, where gRPC would wait for it."""
    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")


Worker = tuple[int, int]


def per_worker(
    strategy: tf.distribute.Strategy, make: Callable[[Worker | None], tf.data.Dataset]
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Makes a dataset for `fit` of which every worker makes its own rows only.

    Left to itself, `fit` has every worker make every batch and throw the others' rows away.

    Args:
        strategy: of the model.
        make: from (index, number of workers), or None for all rows, to a dataset: that of
            `preference_dataset(…, worker=…)`.

    Returns:
        The dataset. Workers with several replicas make all rows, which the strategy cuts.

    Example:
        >>> int(per_worker(tf.distribute.get_strategy(), lambda worker: tf.data.Dataset.range(3))
        ...     .cardinality())
        3
    """
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    # What a function makes is taken replica by replica: right where a worker has just one.
    if (
        not several
        or len(strategy.extended.worker_devices) > 1
        or strategy.num_replicas_in_sync < 2
    ):
        return make(None)
    return strategy.distribute_datasets_from_function(
        lambda context: make((context.input_pipeline_id, context.num_input_pipelines))
    )


def _one_device(**options: Any) -> tf.distribute.Strategy:
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return tf.distribute.OneDeviceStrategy(options.get("device") or f"/{kind}:0")


def _mirrored(**options: Any) -> tf.distribute.Strategy:
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    devices = options.get("devices") or [d.name for d in tf.config.list_logical_devices(kind)]
    # NCCL is for GPUs only; the default elsewhere copies everything to one device and back.
    operations = None if kind == "GPU" else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=operations)


def _multi_worker(**options: Any) -> tf.distribute.Strategy:
    cluster = read_tf_config()
    if cluster is None:
        raise InputError(
            "strategy 'multi_worker' needs the environment variable TF_CONFIG: "
            '{"cluster": {"worker": ["host1:port", "host2:port"]}, '
            '"task": {"type": "worker", "index": 0}}, with each worker\'s own index.'
        )
    if cluster.this not in cluster.in_step:
        raise InputError(
            f"strategy 'multi_worker' has chief and workers only, and TF_CONFIG makes this process "
            f"{cluster.this}."
        )
    if "watchdog" not in options:
        # TensorFlow itself waits without end for a worker that does not come.
        with Watchdog(cluster).meet(options.get("timeout", 300.0)):
            pass
    before = signal.getsignal(signal.SIGTERM)
    made = tf.distribute.MultiWorkerMirroredStrategy()
    if before is not None and threading.current_thread() is threading.main_thread():
        # TensorFlow's coordination takes SIGTERM, and nothing ends the process any more.
        signal.signal(signal.SIGTERM, before)
    return made


def _tpu(**options: Any) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(options.get("address", ""))
        tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (ValueError, tf.errors.OpError) as error:
        raise InputError(
            f"strategy 'tpu' found no TPU ({error}). Run on a TPU VM, or give its address."
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def _auto(**options: Any) -> tf.distribute.Strategy:
    if os.environ.get("TF_CONFIG"):
        return _multi_worker(**options)
    if len(tf.config.list_logical_devices("GPU")) > 1:
        return _mirrored(**options)
    return _one_device(**options)


STRATEGIES: dict[str, Callable[..., tf.distribute.Strategy]] = {
    "auto": _auto,
    "one_device": _one_device,
    "mirrored": _mirrored,
    "multi_worker": _multi_worker,
    "tpu": _tpu,
    "parameter_server": parameter_server,
}


def strategy(name: str = "auto", **options: Any) -> tf.distribute.Strategy:
    """A `tf.distribute.Strategy` by name.

    Build and compile the model inside its scope, and call `fit` as always:

        with dpo_keras.strategy("mirrored").scope():
            model = dpo_keras.DPOModel(policy)
            model.compile(…)
        model.fit(…)

    Args:
        name: `"one_device"`; `"mirrored"` (all GPUs of this machine, or all logical CPUs);
            `"multi_worker"` (every machine in `TF_CONFIG`, one process each); `"tpu"`;
            `"parameter_server"` (on the chief in `TF_CONFIG`, for `dpo_keras.legacy` only);
            `"auto"`: `multi_worker` where TF_CONFIG is set, else `mirrored` with two GPUs or more,
            else `one_device`.
        **options: `device` for `one_device`, `devices` for `mirrored`, `address` for `tpu`; for
            `multi_worker` `timeout` (seconds to wait for the others, 300), or `watchdog`, a
            `dpo_keras.cluster.Watchdog` whose workers have met.

    Returns:
        The strategy. Make it before anything else touches TensorFlow's devices.

    Raises:
        InputError: an unknown name, or what the strategy needs is not there.
        ClusterError: a worker did not come in time.

    Example:
        >>> strategy("one_device").num_replicas_in_sync
        1
    """
    if name not in STRATEGIES:
        raise InputError(f"strategy must be one of {', '.join(STRATEGIES)}; got {name!r}.")
    return STRATEGIES[name](**options)
