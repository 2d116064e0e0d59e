"""The policy and what it is compared with, put together as the model to train."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from dpo_keras.app.config_sections import REFERENCES
from dpo_keras.app.models import load_reference, save_policy
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.app.training_stages import Context, optimizer_of

if TYPE_CHECKING:
    from dpo_keras.app.config import Config
    from dpo_keras.batching import TokenizedPairs
    from dpo_keras.losses import DPOLoss
    from dpo_keras.training import DPOModel


def given_reference(context: Context, policy: Any) -> Any:
    """Returns the reference that the configuration gives: its kind, or a model of its own.

    Args:
        context: the run.
        policy: the policy, whose vocabulary the reference must share.

    Raises:
        InputError: if the reference is no model, or has another vocabulary.
    """
    config = context.config
    if not context.loss.needs_reference:
        return "none"
    if config.reference in REFERENCES:
        return config.reference
    with context.strategy.scope():
        return load_reference(config.reference, policy, config.model.dtype)


def build_model(
    context: Context,
    policy: Any,
    reference: Any,
    train: TokenizedPairs,
    held_out: TokenizedPairs | None,
) -> tuple[DPOModel, tuple[TokenizedPairs, TokenizedPairs | None]]:
    """Makes the model that preference training trains, its reference included.

    Args:
        context: the run.
        policy: as it is after the warm-up.
        reference: from `given_reference`.
        train: the training pairs.
        held_out: the held-out pairs, or None.

    Returns:
        The compiled model, and the pairs, which carry reference log-probs where these are cached.
    """
    from dpo_keras.training import DPOModel

    config, run = context.config, context.run
    training = config.training
    kind = reference
    if kind == "cached":
        train = _with_reference(context, policy, train, "train")
        if held_out is not None:
            held_out = _with_reference(context, policy, held_out, "held_out")
    with context.strategy.scope():
        model = DPOModel(policy, reference=kind, remat=training.remat)
        if kind == "cached":
            # The cache was made of this very policy, so the first loss is known.
            model.reference.starts_as_policy = True
        model.compile(
            optimizer=optimizer_of(context, training, train, training.gradient_accumulation),
            loss=context.loss,
            jit_compile=training.jit_compile,
            steps_per_execution=training.steps_per_execution,
        )
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
        batching=context.layout.batching,
        on_batch=context.progress.advance,
    )
