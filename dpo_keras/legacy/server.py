"""The process of a worker or a parameter server: `python -m dpo_keras.legacy.server`."""

import os
import sys
from typing import Any

import tensorflow as tf

from dpo_keras.errors import InputError
from dpo_keras.training.parameter_servers import read_task, report_failures


def run_server() -> None:
    """Serves as the worker or the parameter server that TF_CONFIG names, until it is stopped.

    The process has no program of its own: the chief sends it what to compute. It must have the
    chief's TensorFlow. It does not end with the chief; whatever started it stops it.

    Raises:
        InputError: TF_CONFIG is wrong, or this process is the chief.

    Example:
        >>> import os
        >>> os.environ["TF_CONFIG"] = "{}"
        >>> try: run_server()
        ... except InputError as error: print(error.problems[0])
        ... finally: del os.environ["TF_CONFIG"]
        TF_CONFIG: cluster.chief must be a list of host:port, got None.
    """
    task = read_task()
    if task.job == "chief":
        raise InputError(
            "TF_CONFIG makes this process the chief, which runs the training program itself: "
            'dpo_keras.strategy("parameter_server"). Servers are for worker and ps.'
        )
    report_failures()
    _server(task).join()


def _server(task: Any) -> Any:
    options = tf.compat.v1.ConfigProto()
    # Each closure that waits for another machine holds a thread; too few and none is left to work.
    options.inter_op_parallelism_threads = max(os.cpu_count() or 1, task.workers + 1)
    return tf.distribute.Server(
        tf.train.ClusterSpec(task.cluster),
        job_name=task.job,
        task_index=task.index,
        protocol="grpc",
        config=options,
    )


if __name__ == "__main__":
    try:
        run_server()
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
