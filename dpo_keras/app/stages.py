"""The stages of a run that touch models: warm-up, reference, preference training, measuring."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dpo_keras.app.checks import build_loss
from dpo_keras.app.models import load_reference, save_policy
from dpo_keras.app.prepare import replicas_share
from dpo_keras.app.progress import Progress
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.app.sections import REFERENCES, Optimization

if TYPE_CHECKING:
    from dpo_keras.app.config import Config
    from dpo_keras.batching import TokenizedPairs
    from dpo_keras.losses import DPOLoss
    from dpo_keras.training import DPOModel


@dataclass
class Context:
    """What every stage of a run needs.

    Args:
        config: the configuration.
        run: the run's directory.
        resume: whether the run may go on where it was stopped.
        progress: hears what happens.
        strategy: the `tf.distribute.Strategy`.
    """

    config: Config
    run: RunDirectory
    resume: bool
    progress: Progress
    strategy: Any
    loss: DPOLoss = field(init=False)

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

    def stepping(self) -> Callable[[dict[str, Any]], None]:
        """Returns what `dpo_keras.training`'s recipes report their steps to."""

        def show(report: dict[str, Any]) -> None:
            figures = {name: v for name, v in report.items() if name not in ("step", "steps")}
            self.progress.advance(report["step"], report.get("steps"), **figures)

        return show


def is_chief() -> bool:
    """Says whether this process writes the run's files: worker 0, or the only one."""
    try:
        task = json.loads(os.environ.get("TF_CONFIG") or "{}").get("task", {})
    except ValueError:
        return True
    return task.get("type", "worker") in ("chief", "worker") and int(task.get("index", 0)) == 0


def _optimizer(settings: Optimization, pairs: int, accumulation: int = 1) -> Any:
    from dpo_keras.batching import steps_per_epoch
    from dpo_keras.training import make_optimizer

    return make_optimizer(
        settings.epochs * steps_per_epoch(pairs, settings.batch_size),
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
    from dpo_keras.training.recipes import warm_up

    context.progress.stage("Supervised warm-up")
    with context.strategy.scope():
        model = SupervisedModel(policy)
        model.compile(
            optimizer=_optimizer(settings, len(tokenized)),
            jit_compile=context.config.training.jit_compile,
        )
        # Its variables belong to the strategy, and resuming fills them before the first step.
        model.optimizer.build(model.trainable_variables)
    warm_up(
        model,
        tokenized,
        epochs=settings.epochs,
        batch_size=settings.batch_size,
        seed=context.config.seed,
        buckets=context.config.training.buckets,
        checkpoints=run.checkpoints / "warmup",
        checkpoint_every=context.config.training.checkpoint_every,
        keep=1,
        resume=context.resume,
        save=run.writes,
        log=run.path / "metrics.warmup.jsonl",
        progress=context.stepping(),
    )


def build_model(
    context: Context, policy: Any, train: TokenizedPairs, held_out: TokenizedPairs | None
) -> tuple[DPOModel, tuple[TokenizedPairs, TokenizedPairs | None]]:
    """Makes the model that preference training trains, its reference included.

    Args:
        context: the run.
        policy: as it is after the warm-up.
        train: the training pairs.
        held_out: the held-out pairs, or None.

    Returns:
        The compiled model, and the pairs, which carry reference log-probs where these are cached.
    """
    from dpo_keras.training import DPOModel

    config, run = context.config, context.run
    training = config.training
    kind: Any = config.reference if context.loss.needs_reference else "none"
    if kind == "cached":
        train = _with_reference(context, policy, train, "train")
        if held_out is not None:
            held_out = _with_reference(context, policy, held_out, "held_out")
    with context.strategy.scope():
        if kind not in REFERENCES:
            kind = load_reference(kind, policy, config.model.dtype)
        model = DPOModel(policy, reference=kind)
        if kind == "cached":
            # The cache was made of this very policy, so the first loss is known.
            model.reference.starts_as_policy = True
        model.compile(
            optimizer=_optimizer(training, len(train), training.gradient_accumulation),
            loss=context.loss,
            jit_compile=training.jit_compile,
            steps_per_execution=training.steps_per_execution,
        )
        model.optimizer.build(model.trainable_variables)
    if run.writes and keeps_reference(config, context.loss) and not run.reference.exists():
        _keep_reference(run, policy)
    context.progress.note(f"reference: {model.reference.mode}")
    return model, (train, held_out)


def keeps_reference(config: Config, loss: DPOLoss) -> bool:
    """Says whether the reference can be had again only from the run's own directory.

    Args:
        config: the configuration.
        loss: its objective.
    """
    if not loss.needs_reference or config.reference not in REFERENCES:
        return False
    return config.model.path is None or config.warmup is not None


def _keep_reference(run: RunDirectory, policy: Any) -> None:
    partial = run.path / ".reference.partial"
    save_policy(policy, partial)
    os.replace(partial, run.reference)


def _with_reference(
    context: Context, policy: Any, tokenized: TokenizedPairs, name: str
) -> TokenizedPairs:
    from dpo_keras.scoring import cache_reference

    context.progress.stage(f"Reference log-probs of the pairs ({name})")
    return cache_reference(
        policy,
        tokenized,
        context.run.path / "reference_cache" / f"{name}.npz" if context.run.writes else None,
        template=context.config.data.template,
        batch_size=context.config.evaluation.batch_size,
        on_batch=context.progress.advance,
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

    from dpo_keras.training.recipes import train_preferences

    config, run = context.config, context.run
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
        buckets=config.training.buckets,
        held_out=held_out,
        evaluation_batch_size=config.evaluation.batch_size,
        every=config.training.evaluate_every,
        checkpoints=run.checkpoints / "training",
        checkpoint_every=config.training.checkpoint_every,
        keep=config.training.keep_checkpoints,
        resume=context.resume,
        save=run.writes,
        log=run.path / "metrics.jsonl",
        progress=context.stepping(),
        callbacks=callbacks,
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
