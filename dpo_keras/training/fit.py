"""Whole trainings from tokenized pairs: the supervised warm-up, and preference training.

Both run `fit` over one stream of batches in which batch k is a pure function of the data, the seed
and k. A stopped run therefore continues exactly where its checkpoint is, also in the middle of an
epoch, and ends with the weights of an undisturbed one.
"""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeAlias

import keras
import tensorflow as tf

from dpo_keras.batching import BatchingChoice, TokenizedPairs
from dpo_keras.cluster import StopRequest, Watchdog
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.batch_layout import Layout, choose_layout, scoring_models
from dpo_keras.training.callbacks import Progress, RunLog, StopOnNonFinite, SyncReference
from dpo_keras.training.checkpoints import RunCheckpoint, load_checkpoint
from dpo_keras.training.default_callbacks import StopTogether
from dpo_keras.training.distribution import Worker
from dpo_keras.training.dpo_model import DPOModel
from dpo_keras.training.fit_interface import check_counts, check_groups
from dpo_keras.training.policy_trainer import PolicyTrainer
from dpo_keras.training.supervised_model import (
    SupervisedModel,
    chosen_alone,
    supervised_dataset,
    worth_imitating,
)
from dpo_keras.utils import JSON

Stream: TypeAlias = Callable[[int], tf.data.Dataset]  # from a step to all batches from there on


def warm_up(
    model: SupervisedModel,
    tokenized: TokenizedPairs,
    *,
    epochs: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    buckets: int | None = None,
    batching: BatchingChoice | Layout = "auto",
    row_length: int | None = None,
    **options: Any,
) -> int:
    """Train on the chosen responses alone.

    Args:
        model: compiled.
        tokenized: the pairs.
        epochs: passes over them.
        batch_size: responses per step.
        seed: seed of the order.
        buckets: as `choose_layout` takes.
        row_length: as `choose_layout` takes.
        batching: as `choose_layout` takes, or a `Layout`.
        **options: see `RunOptions`.

    Returns:
        Steps taken in all, earlier runs included.
    """
    layout = _layout(model, tokenized, batching, buckets, row_length)
    tokenized = worth_imitating(tokenized)
    pairs = chosen_alone(tokenized) if layout.packed else tokenized
    change = None if layout.packed else supervised_dataset
    stream = _endless(model, layout, pairs, batch_size, seed, change)
    per_epoch = layout.steps(pairs, batch_size, seed)
    return _fit(model, stream, epochs * per_epoch, per_epoch, RunOptions(**options))


def train_preferences(
    model: DPOModel,
    tokenized: TokenizedPairs,
    *,
    epochs: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    buckets: int | None = None,
    batching: BatchingChoice | Layout = "auto",
    row_length: int | None = None,
    held_out: TokenizedPairs | None = None,
    evaluation_batch_size: int | None = None,
    **options: Any,
) -> int:
    """Train on preference pairs, with evaluation, checkpoints and resumption.

    Args:
        model: compiled.
        tokenized: the training pairs.
        epochs: passes over them.
        batch_size: pairs per step, over all replicas.
        seed: seed of the order.
        buckets: as `choose_layout` takes.
        row_length: as `choose_layout` takes.
        batching: as `choose_layout` takes, or a `Layout`.
        held_out: pairs to evaluate on, or None.
        evaluation_batch_size: pairs per batch in evaluation; `batch_size` by default.
        **options: see `RunOptions`.

    Returns:
        Steps taken in all, earlier runs included.

    Raises:
        InputError: options that do not fit together.
        RuntimeError: the loss became NaN or infinite, or did not start at policy = reference.
        RunStopped: the run was asked to stop; the step in progress has ended and is saved.
    """
    layout = _layout(model, tokenized, batching, buckets, row_length)
    stream = _endless(model, layout, tokenized, batch_size, seed)
    check_groups((model.preference_loss.group_robust or {}).get("groups", 0), tokenized, held_out)
    if held_out is not None and len(held_out):
        size = evaluation_batch_size or batch_size
        options["validation_data"] = layout.dataset(
            held_out, size, shuffle=False, worker=model.worker
        )
    per_epoch = layout.steps(tokenized, batch_size, seed)
    return _fit(model, stream, epochs * per_epoch, per_epoch, RunOptions(**options))


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """Options of `train_preferences` and `warm_up`.

    An epoch of Keras, `every` steps, ends with evaluation, a log record and a checkpoint.
    """

    max_steps: int | None = None  # end after this many steps, instead of after the epochs
    every: int | None = None  # by default one pass over the data
    checkpoints: str | os.PathLike[str] | None = None  # directory; None saves none
    checkpoint_every: int | None = None  # steps between further checkpoints
    keep: int = 2  # number of checkpoints
    resume: bool = False  # from the newest checkpoint
    first_step: int = 0  # where to begin in the stream, if there is no checkpoint: of a trial
    save: bool = True  # False on workers other than the chief
    log: str | os.PathLike[str] | None = None  # of `callbacks.RunLog`
    log_every: int = 1  # steps between its records
    progress: Callable[[dict[str, JSON]], object] | None = None  # see `callbacks.Progress`
    sync_reference: tuple[int, float] | None = None  # (every, alpha) of `callbacks.SyncReference`
    validation_data: tf.data.Dataset | None = None
    stop: StopRequest | None = None  # ends the run after the step in which it is requested
    watchdog: Watchdog | None = None  # of a cluster's run
    callbacks: Sequence[keras.callbacks.Callback] = ()
    verbose: int = 0
    note: Callable[[str], object] = print  # called with the step that a run goes on from

    def __post_init__(self) -> None:
        """Check the counts."""
        check_counts(max_steps=self.max_steps, log_every=self.log_every)


def _layout(
    model: PolicyTrainer,
    tokenized: TokenizedPairs,
    batching: BatchingChoice | Layout,
    buckets: int | None,
    row_length: int | None,
) -> Layout:
    if isinstance(batching, Layout):
        return batching
    return choose_layout(
        scoring_models(model),
        batching,
        buckets=buckets,
        row_length=row_length,
        replicas=model.replicas,
        images=tokenized.images is not None,
    )


def _endless(
    model: PolicyTrainer,
    layout: Layout,
    tokenized: TokenizedPairs,
    batch_size: int,
    seed: int,
    change: Callable[[tf.data.Dataset], tf.data.Dataset] | None = None,
) -> Stream:
    """Return the stream of all batches, each worker's own rows of them."""

    def stream(start: int) -> tf.data.Dataset:
        def make(worker: Worker | None) -> tf.data.Dataset:
            dataset = layout.dataset(
                tokenized, batch_size, seed=seed, epochs=None, start_step=start, worker=worker
            )
            return dataset if change is None else change(dataset)

        return model.own_rows(make)

    return stream


def _fit(
    model: PolicyTrainer, stream: Stream, steps: int, per_epoch: int, options: RunOptions
) -> int:
    steps = options.max_steps or steps
    every, at_once = options.every or per_epoch, model.steps_per_execution
    if every % at_once or steps % at_once:
        raise InputError(
            f"steps_per_execution ({at_once}) must divide the {steps} steps of the run and the "
            f"{every} steps between evaluations."
        )
    start = _first_step(model, options, steps)
    stop, checkpoint = options.stop or StopRequest(), None
    callbacks: list[keras.callbacks.Callback] = [StopOnNonFinite()]
    if options.log is not None and options.save:
        log = RunLog(options.log, start_step=start, every=options.log_every)
        callbacks.append(log)
        # Workers of a cluster do not see the log, and could not take part.
        again = options.resume and options.watchdog is None and not start % every
        if options.validation_data is not None and again:
            log.evaluate_again(model, start // every, options.validation_data)
    if options.progress is not None:
        callbacks.append(Progress(options.progress, start_step=start, steps=steps))
    if options.sync_reference is not None:
        callbacks.append(SyncReference(*options.sync_reference, start_step=start))
    callbacks += options.callbacks
    if options.checkpoints is not None:
        checkpoint = RunCheckpoint(
            options.checkpoints, options.checkpoint_every, options.keep, start, options.save
        )
        callbacks.append(checkpoint)
    counting = StopTogether(stop, start, checkpoint, options.watchdog)
    callbacks.append(counting)
    model.stop_training = False
    position = start
    with stop.at_step_end():
        while position < steps and not model.stop_training:
            number, offset = divmod(position, every)
            rounds = 0 if offset else (steps - position) // every
            taken = every if rounds else min(every - offset, steps - position)
            model.fit(
                stream(position),
                steps_per_epoch=taken // at_once * at_once,
                initial_epoch=number,
                epochs=number + max(rounds, 1),
                validation_data=options.validation_data,
                callbacks=list(callbacks),
                verbose=options.verbose,
            )
            position += taken * max(rounds, 1)
    if stop.requested:  # after the last step
        raise stop.stopped(None if checkpoint is None else counting.step)
    return counting.step


def _first_step(model: PolicyTrainer, options: RunOptions, steps: int) -> int:
    """Return the step to continue at, with the model as it was there."""
    start = options.first_step
    load = None
    if options.checkpoints is not None and options.resume:
        load = partial(load_checkpoint, model, options.checkpoints, options.note)
        start = load()
    elif options.checkpoints is not None and any(pathlib.Path(options.checkpoints).glob("step-*")):
        rule = f"directory {options.checkpoints} holds those of another run"
        hint = "Resume it, or give another directory."
        raise InputError(InputProblem("checkpoints", rule, hint=hint))
    if options.watchdog is not None:
        hint = "All workers must see the same run directory: put it on storage that they share."
        what = "newest checkpoint (its step)"
        start = options.watchdog.agree(what, start, hint=hint, again=load)
    if start and options.resume:
        options.note(f"resumed after step {start} of {steps}.")
    return start
