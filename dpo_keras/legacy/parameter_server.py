"""The process of a worker or a parameter server: `python -m dpo_keras.legacy.parameter_server`."""

import os
import sys

import tensorflow as tf

from dpo_keras.errors import InputError
from dpo_keras.training.distribution import JOBS, read_server_cluster, report_failures


def run_server() -> None:
    """Serve as the worker or the parameter server that TF_CONFIG names, until the process is ended.

    The process has no program of its own: the chief sends it what to compute. It needs the chief's
    release of TensorFlow. It does not end with the chief; whatever started it must stop it.

    Raises:
        InputError: TF_CONFIG is wrong, or this process is the chief.

    Example:
        >>> run_server()
        Traceback (most recent call last):
        ...
        dpo_keras.errors.InputError: parameter servers need the environment variable TF_CONFIG: ...
    """
    cluster = read_server_cluster()
    if cluster.is_chief:
        raise InputError(
            "TF_CONFIG makes this process the chief, which runs the training program itself: "
            'dpo_keras.strategy("parameter_server"). Servers are for worker and ps.'
        )
    report_failures()
    options = tf.compat.v1.ConfigProto()
    # Each closure that waits for another machine holds a thread; one more must be left to work.
    workers = len(cluster.of_type("worker"))
    options.inter_op_parallelism_threads = max(os.cpu_count() or 1, workers + 1)
    server = tf.distribute.Server(
        tf.train.ClusterSpec({job: [t.address for t in cluster.of_type(job)] for job in JOBS}),
        job_name=cluster.this.type,
        task_index=cluster.this.index,
        protocol="grpc",
        config=options,
    )
    server.join()


if __name__ == "__main__":
    try:
        run_server()
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
