"""Who makes which rows of a batch: with several workers, each makes and reads only its own."""

from collections.abc import Callable

import tensorflow as tf

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
