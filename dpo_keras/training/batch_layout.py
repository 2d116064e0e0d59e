"""How a training lays out its pairs: packed rows where the models allow it, else buckets."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import tensorflow as tf

from dpo_keras.batching import Batching, TokenizedPairs, preference_dataset, steps_per_epoch
from dpo_keras.errors import InputError
from dpo_keras.scoring import packing_obstacle

BatchingChoice = Literal["auto", "packed", "buckets"]


@dataclass(frozen=True)
class Layout:
    """One way to lay out pairs, for all datasets of a training.

    Args:
        batching: "buckets" or "packed".
        buckets: lengths that bucketed batches come in.
        row_length: tokens per packed row; None chooses.
        replicas: that share a batch.
    """

    batching: Batching = "buckets"
    buckets: int = 4
    row_length: int | None = None
    replicas: int = 1

    @property
    def packed(self) -> bool:
        """Whether rows hold several pairs."""
        return self.batching == "packed"

    def dataset(
        self, tokenized: TokenizedPairs, batch_size: int, **options: Any
    ) -> tf.data.Dataset:
        """Makes batches laid out so.

        Args:
            tokenized: the pairs.
            batch_size: pairs per step, over all replicas.
            **options: as `preference_dataset` takes.
        """
        return preference_dataset(
            tokenized,
            batch_size=batch_size,
            buckets=self.buckets,
            batching=self.batching,
            row_length=self.row_length,
            replicas=self.replicas,
            **options,
        )

    def steps(self, tokenized: TokenizedPairs, batch_size: int, seed: int = 0) -> int:
        """Counts the steps of an epoch.

        Args:
            tokenized: the pairs.
            batch_size: pairs per step, over all replicas.
            seed: of the order, which packing depends on.
        """
        return steps_per_epoch(
            tokenized,
            batch_size,
            batching=self.batching,
            row_length=self.row_length,
            replicas=self.replicas,
            seed=seed,
        )


def choose_layout(
    models: Sequence[Any],
    batching: BatchingChoice = "auto",
    *,
    buckets: int = 4,
    row_length: int | None = None,
    replicas: int = 1,
    note: Callable[[str], Any] = print,
) -> Layout:
    """Takes packed rows where every model that scores the pairs can be run on them.

    Args:
        models: the policy, and the reference where it is a model of its own.
        batching: "auto" falls back to buckets, and says why; "packed" insists.
        buckets: lengths that bucketed batches come in.
        row_length: tokens per packed row; None chooses.
        replicas: that share a batch.
        note: hears the line about falling back.

    Returns:
        The layout.

    Raises:
        InputError: an unknown name; "packed" where it is not possible; a row length for buckets.

    Example:
        >>> import keras
        >>> plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        >>> choose_layout([plain], "auto", note=lambda line: None).batching
        'buckets'
    """
    problems = []
    if batching not in get_args(BatchingChoice):
        names = ", ".join(map(repr, get_args(BatchingChoice)))
        problems.append(f"batching must be one of {names}, got {batching!r}.")
    if batching == "buckets" and row_length is not None:
        problems.append(
            f"row_length has no effect with batching='buckets', got {row_length}; leave it out."
        )
    if problems:
        raise InputError(problems)
    if batching == "buckets":
        return Layout("buckets", buckets, replicas=replicas)
    reason = next((why for model in models if (why := packing_obstacle(model)) is not None), None)
    if reason is None:
        return Layout("packed", buckets, row_length, replicas)
    if batching == "packed":
        raise InputError(
            f"batching cannot be 'packed': {reason}. Choose 'auto' or 'buckets', which run with "
            "every model."
        )
    note(f"batching: buckets instead of packed rows, because {reason}.")
    return Layout("buckets", buckets, replicas=replicas)
