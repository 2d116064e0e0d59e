"""How a run lays out its batches, and how many steps come of it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from dpo_keras.app.progress import Progress
from dpo_keras.app.training_sections import Optimization
from dpo_keras.errors import InputError

if TYPE_CHECKING:
    from dpo_keras.app.config import Config
    from dpo_keras.app.stages import Context
    from dpo_keras.batching import TokenizedPairs
    from dpo_keras.training import Layout


def layout_of(
    config: Config, policy: Any, reference: Any, progress: Progress, replicas: int = 1
) -> Layout:
    """Decides how a configuration's batches are laid out.

    Args:
        config: the configuration.
        policy: a CausalLM.
        reference: a model of its own, or the name of a kind, which needs none.
        progress: hears where packed rows were wanted and are not possible.
        replicas: that share a batch.

    Raises:
        InputError: if `training.batching: packed` is not possible.
    """
    from dpo_keras.training import choose_layout

    settings = config.training
    models = [policy] if isinstance(reference, str) else [policy, reference]
    with _keys_of_training():
        return choose_layout(
            models,
            settings.batching,
            buckets=settings.buckets,
            row_length=settings.row_length,
            replicas=replicas,
            note=progress.note,
        )


@contextlib.contextmanager
def _keys_of_training() -> Iterator[None]:
    # The arguments' names, as the configuration has them.
    try:
        yield
    except InputError as error:
        named = ("batching", "row_length")
        raise InputError(
            [f"training.{text}" if text.startswith(named) else text for text in error.problems]
        ) from error


def steps_per_epoch(context: Context, settings: Optimization, tokenized: TokenizedPairs) -> int:
    """Counts the steps of an epoch.

    Args:
        context: the run, its layout settled.
        settings: `warmup` or `training`.
        tokenized: the pairs that are laid out.

    Raises:
        InputError: if a pair is longer than `training.row_length`.
    """
    with _keys_of_training():
        return context.layout.steps(tokenized, settings.batch_size, context.config.seed)


def check_steps(context: Context, pairs: TokenizedPairs) -> None:
    """Refuses step counts that do not divide, before any time is spent.

    Args:
        context: the run.
        pairs: the training pairs.

    Raises:
        InputError: if `training.steps_per_execution` does not divide the steps, or a pair is longer
            than `training.row_length`.
    """
    settings = context.config.training
    per_epoch = steps_per_epoch(context, settings, pairs)
    steps, at_once = settings.epochs * per_epoch, settings.steps_per_execution
    every = settings.evaluate_every or per_epoch
    if steps % at_once or every % at_once:
        raise InputError(
            f"training.steps_per_execution must divide the {steps} steps of the run and the "
            f"{every} steps between evaluations, got {at_once}."
        )
    left = steps % settings.gradient_accumulation
    if left:
        context.progress.note(
            f"warning: the last {left} of {steps} steps do not fill an update of "
            f"{settings.gradient_accumulation} (training.gradient_accumulation) and change nothing."
        )
