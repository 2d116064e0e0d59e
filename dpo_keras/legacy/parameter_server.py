"""Parameter servers: the process of a server, and batches for workers, which run graphs only.

`python -m dpo_keras.legacy.parameter_server` is the process. The rows of `worker_batches` are laid
out beforehand, all in one shape. They either travel to the workers inside the data graph, or lie in
files that all machines see.
"""

from __future__ import annotations

import os
import pathlib
import sys
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
import tensorflow as tf

from dpo_keras.batching import TokenizedPairs, collate, plan_buckets
from dpo_keras.batching.batch_stream import prefetched
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.training.distribution import JOBS, read_server_cluster, report_failures
from dpo_keras.utils import Tensor
from dpo_keras.utils.atomic_files import replaced

if TYPE_CHECKING:
    import tf_keras

GRAPH_LIMIT = 64 * 2**20  # bytes of rows that may travel inside the graph, to every worker
_AT_ONCE = 1024
_SHUFFLED = 100_000
Rows: TypeAlias = dict[str, np.ndarray]


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


def worker_batches(
    tokenized: TokenizedPairs,
    *,
    batch_size: int = 8,
    seed: int = 0,
    shuffle: bool = True,
    directory: str | pathlib.Path | None = None,
    workers: int | None = None,
) -> tf_keras.utils.experimental.DatasetCreator:
    """Return what `fit` takes on parameter servers: endless batches of each worker's own pairs.

    Worker i has pairs i, i + workers, i + 2·workers, …, in an order of its own in each pass. Pass
    `steps_per_epoch` to `fit`: the steps of all workers together.

    Args:
        tokenized: what `dpo_keras.tokenize_pairs` returns, with cached reference log-probs where
            the model's reference is `"cached"`.
        batch_size: pairs per step of one worker.
        seed: seed of the order.
        shuffle: False keeps the order of the pairs.
        directory: where to write the rows. All machines must see it under this path. Needed for
            more than 64 MiB of rows; None sends them inside the graph.
        workers: number of workers; by default that of TF_CONFIG.

    Returns:
        A creator of datasets of the batch contract, with all batches in one static shape.

    Raises:
        InputError: there are more rows than can travel in the graph, or fewer pairs than one batch
            per worker.

    Example:
        >>> from dpo_keras.preferences import PreferencePair
        >>> from dpo_keras.batching import tokenize_pairs
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [list(map(ord, t)) for t in texts])
        >>> pairs = [PreferencePair("2+2=", "4", wrong) for wrong in "567"]
        >>> creator = worker_batches(tokenize_pairs(pairs, Letters()), batch_size=2, workers=1)
        >>> batch = next(iter(creator(None)))
        >>> batch["token_ids"].shape
        TensorShape([2, 2, 8])
    """
    # A server process imports this module, and needs no tf-keras.
    import tf_keras

    if workers is None:
        workers = len(read_server_cluster().of_type("worker"))
    plan = plan_buckets(tokenized, batch_size, 1)
    shape = (plan.lengths[-1], plan.slots[-1])
    sample = _rows(tokenized, np.arange(1), shape)
    size = len(tokenized) * sum(value.nbytes for value in sample.values())
    problems = []
    if len(tokenized) < workers * batch_size:
        rule = f"must hold a batch for each worker, {workers} x {batch_size} pairs"
        problems.append(InputProblem("tokenized", rule, len(tokenized)))
    if directory is None and size > GRAPH_LIMIT:
        found, limit = (f"{count / 2**20:.0f} MiB" for count in (size, GRAPH_LIMIT))
        rule = f"is {found} when laid out, and at most {limit} travel inside the graph"
        hint = "Give a directory that all machines see."
        problems.append(InputProblem("tokenized", rule, hint=hint))
    if problems:
        raise InputError(problems)
    if directory is None:
        whole = _rows(tokenized, np.arange(len(tokenized)), shape)

        def rows(index: Tensor) -> tf.data.Dataset:
            return tf.data.Dataset.from_tensor_slices(whole).shard(workers, index)
    else:
        files = _write(tokenized, shape, pathlib.Path(directory), workers)

        def rows(index: Tensor) -> tf.data.Dataset:
            mine = tf.data.Dataset.from_tensor_slices(files).shard(workers, index)
            return mine.flat_map(tf.data.TFRecordDataset).map(lambda row: _parse(row, sample))

    def batches(context: tf.distribute.InputContext | None) -> tf.data.Dataset:
        # All workers run the same graph, in which this op tells them apart.
        current = tf.distribute.coordinator.experimental_get_current_worker_index
        dataset = rows(current() if tf.inside_function() else tf.constant(0, tf.int64))
        if shuffle:
            buffer = min(-(-len(tokenized) // workers), _SHUFFLED)
            dataset = dataset.shuffle(buffer, seed, reshuffle_each_iteration=True)
        return prefetched(dataset.repeat().batch(batch_size, drop_remainder=True))

    return tf_keras.utils.experimental.DatasetCreator(batches)


def _rows(tokenized: TokenizedPairs, places: np.ndarray, shape: tuple[int, int]) -> Rows:
    batch = collate(tokenized, places, *shape)
    return {name: np.asarray(value) for name, value in batch.items()}


def _write(
    tokenized: TokenizedPairs, shape: tuple[int, int], directory: pathlib.Path, workers: int
) -> list[str]:
    """Write the rows, one file for each worker; a row is the bytes of its fields in order."""
    files = []
    for worker in range(workers):
        file = directory / f"rows-{worker:05}-of-{workers:05}.tfrecord"
        places = np.arange(worker, len(tokenized), workers)
        with replaced(file) as partial, tf.io.TFRecordWriter(str(partial)) as writer:
            for start in range(0, len(places), _AT_ONCE):
                batch = _rows(tokenized, places[start : start + _AT_ONCE], shape)
                for row in range(len(batch["owner"])):
                    writer.write(b"".join(value[row].tobytes() for value in batch.values()))
        files.append(str(file))
    return files


def _parse(record: Tensor, sample: Rows) -> dict[str, Tensor]:
    row, start = {}, 0
    for name, value in sample.items():
        part = tf.strings.substr(record, start, value.nbytes)
        row[name] = tf.reshape(tf.io.decode_raw(part, value.dtype), value.shape[1:])
        start += value.nbytes
    return row


if __name__ == "__main__":
    try:
        run_server()
    except InputError as error:
        print(error, file=sys.stderr)
        raise SystemExit(2) from None
