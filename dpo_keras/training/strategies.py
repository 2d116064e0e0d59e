"""Which devices take part: names for `tf.distribute` strategies."""

import os
import signal
import threading
from collections.abc import Callable
from typing import Any

import tensorflow as tf

from dpo_keras.cluster import Watchdog, read_tf_config
from dpo_keras.errors import InputError
from dpo_keras.training.parameter_servers import parameter_server


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
