"""Whole trainings from tokenized pairs: the supervised warm-up, and preference training.

Both run `fit` over one stream of batches in which batch k is a pure function of the data, the seed
and k. A stopped run therefore goes on exactly where its checkpoint is, in the middle of an epoch
too, and ends with the weights that it would have had.
"""

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import keras
import tensorflow as tf

from dpo_keras.batching import TokenizedPairs
from dpo_keras.cluster import StopRequest, Watchdog
from dpo_keras.errors import InputError
from dpo_keras.training.batch_layout import BatchingChoice, Layout, choose_layout
from dpo_keras.training.callbacks import (
    Progress,
    RunCheckpoint,
    RunLog,
    StopOnNonFinite,
    SyncReference,
)
from dpo_keras.training.checkpoints import load_checkpoint
from dpo_keras.training.default_callbacks import StopTogether
from dpo_keras.training.distribution import Worker, per_worker
from dpo_keras.training.dpo_model import DPOModel
from dpo_keras.training.optimizers import make_optimizer
from dpo_keras.training.supervised_model import SupervisedModel, chosen_alone, supervised_dataset
from dpo_keras.training.tensorflow_trainer import PolicyTrainer

__all__ = ["make_optimizer", "train_preferences", "warm_up"]

Report = Callable[[dict[str, Any]], None]
Path = str | os.PathLike[str]


def warm_up(
    model: SupervisedModel,
    tokenized: TokenizedPairs,
    *,
    epochs: int = 1,
    batch_size: int = 16,
    seed: int = 0,
    buckets: int = 4,
    batching: BatchingChoice | Layout = "auto",
    row_length: int | None = None,
    **options: Any,
) -> int:
    """Supervised training on the chosen responses.

    Args:
        model: compiled.
        tokenized: the pairs.
        epochs: passes over them.
        batch_size: responses per step.
        seed: of the order.
        buckets: lengths that batches come in, where they are not packed.
        batching: "packed", "buckets", or "auto": packed where the policy can be run so, see
            `dpo_keras.training.batch_layout.choose_layout`; or a `Layout`.
        row_length: tokens per packed row; by default chosen.
        **options: as `train_preferences`: `every`, `checkpoints`, `checkpoint_every`, `keep`,
            `resume`, `log`, `progress`, `stop`, `watchdog`, `callbacks`, `verbose`.

    Returns:
        Steps taken in all, earlier runs included.
    """
    layout = _layout(model, batching, buckets, row_length)
    pairs = chosen_alone(tokenized) if layout.packed else tokenized
    change = None if layout.packed else supervised_dataset
    stream = _endless(model, layout, pairs, batch_size, seed, change)
    per_epoch = layout.steps(pairs, batch_size, seed)
    return _fit(model, stream, epochs * per_epoch, per_epoch, **options)


def train_preferences(
    model: DPOModel,
    tokenized: TokenizedPairs,
    *,
    epochs: int = 1,
    batch_size: int = 8,
    seed: int = 0,
    buckets: int = 4,
    batching: BatchingChoice | Layout = "auto",
    row_length: int | None = None,
    held_out: TokenizedPairs | None = None,
    evaluation_batch_size: int | None = None,
    **options: Any,
) -> int:
    """Preference training, with evaluation, checkpoints and resumption.

    Args:
        model: compiled.
        tokenized: the training pairs.
        epochs: passes over them.
        batch_size: pairs per step, over all replicas.
        seed: of the order.
        buckets: lengths that batches come in, where they are not packed.
        batching: "packed", "buckets", or "auto": packed where the policy can be run so, see
            `dpo_keras.training.batch_layout.choose_layout`; or a `Layout`.
        row_length: tokens per packed row; by default chosen.
        held_out: pairs to evaluate on, or None.
        evaluation_batch_size: pairs at a time in evaluation; `batch_size` by default.
        **options: `every` (steps per Keras epoch, at the end of which evaluation, epoch logs and
            a checkpoint come; by default one pass over the data), `checkpoints` (directory),
            `checkpoint_every` (steps, besides), `keep` (how many), `resume` (go on from the newest
            checkpoint), `save` (False on workers that are not chief), `log` (JSONL path),
            `progress` (function, see `callbacks.Progress`), `sync_reference` (every, alpha: see
            `callbacks.SyncReference`), `stop` (a `dpo_keras.cluster.StopRequest`: the run ends
            behind the step in which it is asked to), `watchdog` (of a cluster's run), `callbacks`,
            `verbose`.

    Returns:
        Steps taken in all, earlier runs included.

    Raises:
        InputError: options that do not fit together.
        RuntimeError: the loss is no number any more, or does not start where it must.
        RunStopped: `stop` was asked; the step in progress has ended and is saved.
    """
    reference = getattr(model.reference, "model", None)
    layout = _layout(model, batching, buckets, row_length, reference)
    stream = _endless(model, layout, tokenized, batch_size, seed)
    _check_groups(model, tokenized, held_out)
    if held_out is not None and len(held_out):
        options["validation_data"] = layout.dataset(
            held_out, evaluation_batch_size or batch_size, shuffle=False
        )
    per_epoch = layout.steps(tokenized, batch_size, seed)
    return _fit(model, stream, epochs * per_epoch, per_epoch, **options)


def _layout(
    model: PolicyTrainer,
    batching: BatchingChoice | Layout,
    buckets: int,
    row_length: int | None,
    reference: Any = None,
) -> Layout:
    if isinstance(batching, Layout):
        return batching
    return choose_layout(
        [model.policy] if reference is None else [model.policy, reference],
        batching,
        buckets=buckets,
        row_length=row_length,
        replicas=model.distribute_strategy.num_replicas_in_sync,
    )


def _endless(
    model: PolicyTrainer,
    layout: Layout,
    tokenized: TokenizedPairs,
    batch_size: int,
    seed: int,
    change: Callable[[tf.data.Dataset], tf.data.Dataset] | None = None,
) -> Callable[[int], tf.data.Dataset]:
    """The stream of all batches, changed or as they are, from any step on."""

    def stream(start: int) -> tf.data.Dataset:
        def make(worker: Worker | None) -> tf.data.Dataset:
            dataset = layout.dataset(
                tokenized, batch_size, seed=seed, epochs=None, start_step=start, worker=worker
            )
            return dataset if change is None else change(dataset)

        return per_worker(model.distribute_strategy, make)

    return stream


class _Steps(keras.callbacks.Callback):
    """Counts steps, micro-batches included: a callback may end the run before its time."""

    def __init__(self, step: int):
        super().__init__()
        self.step = step

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.step += self.model.steps_per_execution


def _check_groups(model: DPOModel, *sides: TokenizedPairs | None) -> None:
    assert model.preference_loss is not None
    groups = int((model.preference_loss.options.get("group_robust") or {}).get("groups", 0))
    for tokenized in sides if groups else ():
        if tokenized is None or tokenized.group is None or not len(tokenized):
            continue
        # In the graph a group beyond the last would just have no weight.
        if int(tokenized.group.max()) >= groups or int(tokenized.group.min()) < 0:
            raise InputError(
                f"group_robust has groups={groups}, and the pairs have "
                f"{len(tokenized.group_names)} ({', '.join(tokenized.group_names[:10])}) or pairs "
                "without a group. Every pair needs one of that many."
            )


def _fit(
    model: PolicyTrainer,
    stream: Callable[[int], tf.data.Dataset],
    steps: int,
    per_epoch: int,
    *,
    every: int | None = None,
    checkpoints: Path | None = None,
    checkpoint_every: int | None = None,
    keep: int = 2,
    resume: bool = False,
    save: bool = True,
    log: Path | None = None,
    progress: Report | None = None,
    callbacks: Sequence[keras.callbacks.Callback] = (),
    sync_reference: tuple[int, float] | None = None,
    validation_data: tf.data.Dataset | None = None,
    stop: StopRequest | None = None,
    watchdog: Watchdog | None = None,
    verbose: int = 0,
) -> int:
    every = every or per_epoch
    at_once = model.steps_per_execution
    if every % at_once or steps % at_once:
        raise InputError(
            f"steps_per_execution ({at_once}) must divide the {steps} steps of the run and the "
            f"{every} steps between evaluations."
        )
    position = 0
    if checkpoints is not None and resume:
        position = load_checkpoint(model, checkpoints)
    elif checkpoints is not None and any(pathlib.Path(checkpoints).glob("step-*")):
        raise InputError(
            f"checkpoints directory {checkpoints} holds those of another run. Resume it, or give "
            "another directory."
        )
    if watchdog is not None:
        watchdog.agree("newest checkpoint (its step)", position, hint=_SHARED)
    stop = stop or StopRequest()
    ours: list[keras.callbacks.Callback] = [StopOnNonFinite()]
    if log is not None and save:
        ours.append(RunLog(log, start_step=position))
    if progress is not None:
        ours.append(Progress(progress, start_step=position, steps=steps))
    if sync_reference is not None:
        ours.append(SyncReference(*sync_reference, start_step=position))
    ours += callbacks
    checkpoint = None
    if checkpoints is not None:
        checkpoint = RunCheckpoint(checkpoints, checkpoint_every, keep, position, save)
        ours.append(checkpoint)
    counter = _Steps(position)
    ours += [counter, StopTogether(stop, position, checkpoint, watchdog)]
    model.stop_training = False
    with stop.at_step_end():
        _run(model, stream, position, steps, every, ours, validation_data, verbose)
    if stop.requested:  # behind the last step
        raise stop.stopped(None if checkpoint is None else counter.step)
    return counter.step


_SHARED = "All workers must see the same run directory: put it on storage that they share."


def _run(
    model: PolicyTrainer,
    stream: Callable[[int], tf.data.Dataset],
    position: int,
    steps: int,
    every: int,
    callbacks: list[keras.callbacks.Callback],
    validation_data: tf.data.Dataset | None,
    verbose: int,
) -> None:
    at_once = model.steps_per_execution
    while position < steps and not model.stop_training:
        number, offset = divmod(position, every)
        rounds = 0 if offset else (steps - position) // every
        taken = every if rounds else min(every - offset, steps - position)
        model.fit(
            stream(position),
            steps_per_epoch=taken // at_once * at_once,
            initial_epoch=number,
            epochs=number + max(rounds, 1),
            validation_data=validation_data,
            callbacks=list(callbacks),
            verbose=verbose,
        )
        position += taken * max(rounds, 1)
