"""How a run lays out its batches, and how many steps come of it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_keras.app.config_rules import build_loss
from dpo_keras.app.progress import Progress
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.app.run_inputs import replicas_share
from dpo_keras.app.training_sections import Optimization
from dpo_keras.cluster import StopRequest, Watchdog
from dpo_keras.errors import InputError

if TYPE_CHECKING:
    from dpo_keras.app.config import Config
    from dpo_keras.batching import TokenizedPairs
    from dpo_keras.losses import DPOLoss
    from dpo_keras.training import DPOModel, Layout


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


@dataclass
class Context:
    """What every stage of a run needs.

    Args:
        config: the configuration.
        run: the run's directory.
        resume: whether the run may go on where it was stopped.
        progress: hears what happens.
        strategy: the `tf.distribute.Strategy`.
        stop: whether the run was asked to stop.
        watchdog: of a cluster's run.

    Attributes:
        loss: the objective.
        layout: how batches are laid out; from `settle_layout`, once the models are there.
    """

    config: Config
    run: RunDirectory
    resume: bool
    progress: Progress
    strategy: Any
    stop: StopRequest = field(default_factory=StopRequest)
    watchdog: Watchdog | None = None
    loss: DPOLoss = field(init=False)
    layout: Layout = field(init=False)

    def __post_init__(self) -> None:
        """Makes the objective, and checks what the number of replicas asks of batches."""
        self.loss = build_loss(self.config.loss)
        replicas = self.strategy.num_replicas_in_sync
        sizes = {"training.batch_size": self.config.training.batch_size}
        sizes["evaluation.batch_size"] = self.config.evaluation.batch_size
        if self.config.warmup is not None:
            sizes["warmup.batch_size"] = self.config.warmup.batch_size
        for key, size in sizes.items():
            replicas_share(size, replicas, key)

    def settle_layout(self, policy: Any, reference: Any) -> None:
        """Decides between packed rows and buckets.

        Args:
            policy: a CausalLM.
            reference: from `given_reference`.

        Raises:
            InputError: if `training.batching: packed` is not possible.
        """
        self.layout = layout_of(
            self.config, policy, reference, self.progress, self.strategy.num_replicas_in_sync
        )

    def stepping(self) -> Callable[[dict[str, Any]], None]:
        """Returns what `dpo_keras.training`'s recipes report their steps to."""

        def show(report: dict[str, Any]) -> None:
            figures = {name: v for name, v in report.items() if name not in ("step", "steps")}
            self.progress.advance(report["step"], report.get("steps"), **figures)

        return show


def leave_together(strategy: Any) -> None:
    """Waits until every worker has come to this place.

    A worker that leaves while the chief still writes would be taken for one that crashed.

    Args:
        strategy: of the run; one of a single worker does not wait.
    """
    import tensorflow as tf

    @tf.function
    def count_workers() -> tf.Tensor:
        ones = strategy.run(lambda: tf.constant(1.0))
        return strategy.reduce(tf.distribute.ReduceOp.SUM, ones, axis=None)

    if isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        count_workers()


def optimizer_of(
    context: Context, settings: Optimization, tokenized: TokenizedPairs, accumulation: int = 1
) -> Any:
    """Makes the optimizer of a section.

    Args:
        context: the run, its layout settled.
        settings: `warmup` or `training`.
        tokenized: the pairs that are laid out, which the schedule's length follows from.
        accumulation: steps per update.
    """
    from dpo_keras.training import make_optimizer

    return make_optimizer(
        settings.epochs * steps_per_epoch(context, settings, tokenized),
        learning_rate=settings.learning_rate,
        schedule=settings.schedule,
        warmup_fraction=settings.warmup_fraction,
        weight_decay=settings.weight_decay,
        clip_norm=settings.clip_norm,
        gradient_accumulation=accumulation,
    )


def warm_up_policy(context: Context, policy: Any, tokenized: TokenizedPairs) -> None:
    """Trains the policy on the chosen responses, if the configuration has a warm-up.

    Args:
        context: the run.
        policy: trained in place.
        tokenized: the training pairs.
    """
    settings, run = context.config.warmup, context.run
    if settings is None:
        return
    from dpo_keras.training import SupervisedModel
    from dpo_keras.training.fit import warm_up
    from dpo_keras.training.supervised_model import chosen_alone

    context.progress.stage("Supervised warm-up")
    laid_out = chosen_alone(tokenized) if context.layout.packed else tokenized
    with context.strategy.scope():
        remat = context.config.training.remat
        model = SupervisedModel(policy, dropout=not remat, remat=remat)
        model.compile(
            optimizer=optimizer_of(context, settings, laid_out),
            jit_compile=context.config.training.jit_compile,
        )
    warm_up(
        model,
        tokenized,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=context.config.seed,
        batching=context.layout,
        checkpoints=run.checkpoints / "warmup",
        checkpoint_every=context.config.training.checkpoint_every,
        keep=1,
        resume=context.resume,
        save=run.writes,
        log=run.path / "metrics.warmup.jsonl",
        stop=context.stop,
        watchdog=context.watchdog,
        progress=context.stepping(),
    )


def train_policy(
    context: Context, model: DPOModel, train: TokenizedPairs, held_out: TokenizedPairs | None
) -> int:
    """Preference training, with evaluation, logs and checkpoints.

    Args:
        context: the run.
        model: from `build_model`.
        train: the training pairs.
        held_out: the held-out pairs, or None.

    Returns:
        Steps taken in all.
    """
    import keras

    from dpo_keras.training.fit import train_preferences

    config, run, sync = context.config, context.run, context.config.training.sync_reference
    context.progress.stage("Preference training")
    callbacks: list[Any] = []
    if run.writes:
        callbacks.append(keras.callbacks.TensorBoard(run.path / "tensorboard", write_graph=False))
    return train_preferences(
        model,
        train,
        epochs=config.training.epochs,
        batch_size=config.training.batch_size,
        seed=config.seed,
        batching=context.layout,
        held_out=held_out,
        evaluation_batch_size=config.evaluation.batch_size,
        every=config.training.evaluate_every,
        checkpoints=run.checkpoints / "training",
        checkpoint_every=config.training.checkpoint_every,
        keep=config.training.keep_checkpoints,
        resume=context.resume,
        save=run.writes,
        log=run.path / "metrics.jsonl",
        stop=context.stop,
        watchdog=context.watchdog,
        progress=context.stepping(),
        callbacks=callbacks,
        sync_reference=None if sync is None else (sync.every, sync.alpha),
    )


def respond(
    config: Config,
    policy: Any,
    prompts: Sequence[Any],
    progress: Progress,
    **changes: Any,
) -> list[str]:
    """Samples one response to each prompt, as the evaluation section says.

    Args:
        config: the configuration.
        policy: a CausalLM.
        prompts: strings, or token ids.
        progress: hears how many are done.
        **changes: options of `dpo_keras.generate_responses` that differ.
    """
    from dpo_keras.training import generate_responses

    settings = config.evaluation
    options = {
        "max_new_tokens": settings.max_new_tokens,
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "seed": config.seed,
        "batch_size": settings.batch_size,
        "max_length": config.data.max_length,
        "on_batch": progress.advance,
        **changes,
    }
    return generate_responses(policy, prompts, **options) if len(prompts) else []
