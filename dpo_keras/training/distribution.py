"""Strategies of `tf.distribute` by name, sums over their replicas, several steps in one graph."""

import os
from collections.abc import Callable
from typing import Any, TypeAlias

import tensorflow as tf

from dpo_keras.batching import Batch
from dpo_keras.cluster import Cluster, Watchdog, read_tf_config
from dpo_keras.cluster.stop_request import sigterm_kept
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import Tensor

OneStep: TypeAlias = Callable[[Batch, Tensor], Tensor]  # to the sums of all replicas, [names, 2]
Worker: TypeAlias = tuple[int, int]
"""Index of a worker, and how many workers there are."""

JOBS = ("chief", "ps", "worker")
_SHAPE = (
    '{"cluster": {"chief": ["host0:port"], "ps": ["host1:port"], "worker": ["host2:port", …]}, '
    '"task": {"type": "chief", "index": 0}}, with each process\'s own task'
)


def strategy(name: str = "auto", **options: object) -> tf.distribute.Strategy:
    """Make a `tf.distribute.Strategy` by name.

    Build and compile the model in its scope, and call `fit` as usual:

        with dpo_keras.strategy("mirrored").scope():
            model = dpo_keras.DPOModel(policy)
            model.compile(…)
        model.fit(…)

    Args:
        name: `"one_device"`; `"mirrored"` (all GPUs of this machine, or all logical CPUs);
            `"multi_worker"` (all machines in `TF_CONFIG`, one process each); `"tpu"`;
            `"parameter_server"` (on the chief in `TF_CONFIG`, for `dpo_keras.legacy`); `"auto"`
            (`multi_worker` with TF_CONFIG, `mirrored` with several GPUs, else `one_device`).
        **options: `device` for `one_device`, `devices` for `mirrored`, `address` for `tpu`; for
            `multi_worker` `timeout` (seconds to wait for the others, 300) and `run_directory` (on
            storage that all see, for the secret of their meeting; without it, set the environment
            variable DPO_KERAS_CLUSTER_SECRET), or `watchdog`, a `dpo_keras.cluster.Watchdog` whose
            workers have met.

    Returns:
        The strategy. Make it before anything else touches TensorFlow's devices.

    Raises:
        InputError: an unknown name, or what the strategy needs is missing.
        ClusterError: a worker did not connect in time.

    Example:
        >>> strategy("one_device").num_replicas_in_sync
        1
    """
    if name not in STRATEGIES:
        raise InputError(InputProblem("strategy", f"must be one of {', '.join(STRATEGIES)}", name))
    return STRATEGIES[name](**options)


def replica_count() -> int:
    """Return how many replicas share the current step; 1 outside a strategy."""
    return int(tf.distribute.get_strategy().num_replicas_in_sync)


def sum_over_replicas(values: Tensor) -> Tensor:
    """Sum a tensor, or each of a list, over all replicas; unchanged outside a strategy."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return values
    return context.all_reduce(tf.distribute.ReduceOp.SUM, values)


def gather_over_replicas(values: dict[str, Tensor]) -> dict[str, Tensor]:
    """Concatenate the rows of all replicas on each; gradients return to where rows came from."""
    context = tf.distribute.get_replica_context()
    return {name: context.all_gather(value, axis=0) for name, value in values.items()}


def per_worker(
    strategy: tf.distribute.Strategy, make: Callable[[Worker | None], tf.data.Dataset]
) -> tf.data.Dataset | tf.distribute.DistributedDataset:
    """Make a dataset for `fit` of which every worker makes only its own rows.

    By default `fit` lets every worker make all rows. `make` gets the argument `worker` of
    `preference_dataset`: None where workers have several replicas, whose rows the strategy splits.
    """
    several = isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy)
    several = several and strategy.num_replicas_in_sync > 1
    # TensorFlow takes such a dataset replica by replica, which is right with one on each worker.
    if not several or len(strategy.extended.worker_devices) > 1:
        return make(None)
    return strategy.distribute_datasets_from_function(
        lambda context: make((context.input_pipeline_id, context.num_input_pipelines))
    )


def read_server_cluster() -> Cluster:
    """Read from TF_CONFIG a cluster of one chief, parameter servers and workers."""
    cluster = read_tf_config()
    if cluster is None:
        raise InputError(f"parameter servers need the environment variable TF_CONFIG: {_SHAPE}.")
    missing = [job for job in JOBS if not cluster.of_type(job)]
    if missing or cluster.this.type not in JOBS:
        fault = f"makes this process an {cluster.this.type}"
        if missing:
            fault = f"has no {' and no '.join(missing)}"
        raise InputError(f"TF_CONFIG {fault}; for parameter servers it must be {_SHAPE}.")
    return cluster


def report_failures() -> None:
    """Let calls to a process that is gone fail, where gRPC would wait for it."""
    os.environ.setdefault("GRPC_FAIL_FAST", "use_caller")


def _parameter_server(**options: object) -> tf.distribute.Strategy:
    cluster = read_server_cluster()
    if not cluster.is_chief:
        raise InputError(
            "strategy 'parameter_server' is for the chief, and TF_CONFIG makes this process "
            f"{cluster.this}. Here run: python -m dpo_keras.legacy.parameter_server"
        )
    report_failures()
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    return tf.distribute.ParameterServerStrategy(resolver)


def _one_device(device: str | None = None, **others: object) -> tf.distribute.Strategy:
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    return tf.distribute.OneDeviceStrategy(device or f"/{kind}:0")


def _mirrored(devices: list[str] | None = None, **others: object) -> tf.distribute.Strategy:
    kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
    devices = devices or [device.name for device in tf.config.list_logical_devices(kind)]
    # NCCL is for GPUs only; the default elsewhere copies everything to one device and back.
    operations = None if kind == "GPU" else tf.distribute.ReductionToOneDevice()
    return tf.distribute.MirroredStrategy(devices, cross_device_ops=operations)


def _multi_worker(
    timeout: float = 300.0, run_directory: str | None = None, **others: object
) -> tf.distribute.Strategy:
    cluster = read_tf_config()
    if cluster is None:
        raise InputError(
            "strategy 'multi_worker' needs the environment variable TF_CONFIG: "
            '{"cluster": {"worker": ["host1:port", "host2:port"]}, '
            '"task": {"type": "worker", "index": 0}}, with each worker\'s own index.'
        )
    if cluster.this not in cluster.in_step:
        fault = f"TF_CONFIG makes this process {cluster.this}"
        raise InputError(f"strategy 'multi_worker' has chief and workers only, and {fault}.")
    if "watchdog" not in others:
        # TensorFlow itself waits without end for a worker that does not connect.
        with Watchdog(cluster).meet(timeout, run_directory=run_directory):
            pass
    with sigterm_kept():
        return tf.distribute.MultiWorkerMirroredStrategy()


def _tpu(address: str = "", **others: object) -> tf.distribute.Strategy:
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(address)
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
    "parameter_server": _parameter_server,
}
"""Strategies by the name that `strategy` takes."""


def next_steps(one_step: OneStep, most: int, names: int) -> Callable[..., tuple[Tensor, ...]]:
    """Return a function that takes up to `most` steps in one graph while there are batches."""

    def next_steps(iterator: tf.data.Iterator, stop: Tensor) -> tuple[Tensor, ...]:
        def more(count: Tensor, batch: Tensor, *_: Tensor) -> Tensor:
            return tf.logical_and(count < most, batch.has_value())

        def body(
            count: Tensor, batch: Tensor, first: Tensor, _: Tensor, totals: Tensor
        ) -> tuple[Tensor, ...]:
            sums = one_step(batch.get_value(), stop)
            first = tf.where(count == 0, sums, first)
            following = tf.cond(count + 1 >= most, lambda: batch, iterator.get_next_as_optional)
            return count + 1, following, first, sums, totals + tf.cast(sums, "float64")

        batch, zeros = iterator.get_next_as_optional(), tf.zeros((names, 2))
        state = (tf.constant(0), batch, zeros, zeros, tf.zeros((names, 2), "float64"))
        count, _, first, sums, totals = tf.while_loop(more, body, state)
        return first, sums, totals, count

    return next_steps
