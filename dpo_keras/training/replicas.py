"""Tensors of all replicas together."""

from typing import Any

import tensorflow as tf


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
