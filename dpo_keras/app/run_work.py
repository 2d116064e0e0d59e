"""The work of a run, counted before it begins: steps, tokens, places, and what each stage does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpo_keras.app.config_rules import keys_for_arguments
from dpo_keras.app.config_sections import Optimization
from dpo_keras.app.prediction import Stage
from dpo_keras.app.run_clock import TRAINING, WARM_UP
from dpo_keras.app.training_stages import Context, steps_in_all

if TYPE_CHECKING:
    import keras

    from dpo_keras.batching import TokenizedPairs
    from dpo_keras.training import Layout

_BACKWARD = 2  # forward passes that a backward pass costs


@dataclass(frozen=True)
class Work:
    """What the batches of a training hold.

    Args:
        steps: of the whole training.
        epoch_tokens: tokens of an epoch, without padding.
        step_places: token places of each step of the first epoch, padding included.
        shape: of the batches, in words.
        tokens_of: counts the tokens of the first steps of an epoch: (epoch, steps) -> tokens.
    """

    steps: int
    epoch_tokens: int
    step_places: np.ndarray
    shape: str
    tokens_of: Callable[[int, int], int]

    @property
    def per_epoch(self) -> int:
        """Steps of an epoch."""
        return len(self.step_places)

    @property
    def places(self) -> float:
        """Token places of all steps together; every epoch is taken to be like the first."""
        return float(self.step_places.mean()) * self.steps

    @property
    def fill(self) -> float:
        """Share of the places of an epoch that hold tokens."""
        return self.epoch_tokens / float(self.step_places.sum())

    @property
    def longest(self) -> int:
        """The first step with the most places."""
        return int(self.step_places.argmax())

    @property
    def tokens(self) -> int:
        """Tokens of all steps together, those of a part of the last epoch counted one by one."""
        epochs, rest = divmod(self.steps, self.per_epoch)
        return epochs * self.epoch_tokens + (self.tokens_of(epochs, rest) if rest else 0)


def work_of(context: Context, settings: Optimization, pairs: TokenizedPairs) -> Work:
    """Count the work of a section, `warmup` or `training`."""
    from dpo_keras.training.supervised_model import chosen_alone, worth_imitating

    layout, seed = context.layout, context.config.seed
    alone = settings is context.config.warmup
    pairs = worth_imitating(pairs) if alone else pairs
    laid_out = chosen_alone(pairs) if alone and layout.packed else pairs
    with keys_for_arguments():
        steps = steps_in_all(context, settings, laid_out)
        if layout.packed:
            return _packed_work(layout, laid_out, settings.batch_size, seed, steps)
        return _bucketed_work(layout, laid_out, settings.batch_size, seed, steps, alone)


def _packed_work(
    layout: Layout, pairs: TokenizedPairs, batch_size: int, seed: int, steps: int
) -> Work:
    from dpo_keras.batching import plan_packing

    plan = plan_packing(
        pairs,
        batch_size,
        length=layout.row_length,
        replicas=layout.replicas,
        seed=seed,
        share_prompts=layout.share_prompts,
    )
    places = np.full(plan.steps, plan.rows * plan.length)

    def tokens_of(epoch: int, count: int) -> int:
        start = epoch * plan.steps
        batches = layout.dataset(pairs, batch_size, seed=seed, epochs=None, start_step=start)
        return sum(int(batch["padding_mask"].numpy().sum()) for batch in batches.take(count))

    shape = f"{plan.rows} packed row{'s' if plan.rows > 1 else ''} of {plan.length:,} tokens"
    return Work(steps, round(plan.fill * int(places.sum())), places, shape, tokens_of)


def _bucketed_work(
    layout: Layout, pairs: TokenizedPairs, batch_size: int, seed: int, steps: int, alone: bool
) -> Work:
    from dpo_keras.batching import epoch_order, plan_buckets

    plan = plan_buckets(pairs, batch_size, layout.buckets)
    order = epoch_order(plan, batch_size, seed=seed)
    sequences = 1 if alone else len(pairs.responses)
    places = sequences * batch_size * np.array(plan.lengths)[order.bucket]
    of_pair = pairs.prompt.lengths + pairs.chosen.lengths
    if not alone:
        for response in pairs.responses[1:]:
            of_pair = of_pair + pairs.prompt.lengths + response.lengths

    def tokens_of(epoch: int, count: int) -> int:
        rows = epoch_order(plan, batch_size, seed=seed, epoch=epoch).rows[:count]
        return int(of_pair[rows[rows >= 0]].sum())

    shape = f"{batch_size} pairs, padded to {', '.join(map(str, plan.lengths))} tokens"
    return Work(steps, int(of_pair.sum()), places, shape, tokens_of)


def stages_of(
    context: Context,
    reference: keras.Model | str,
    pairs: TokenizedPairs,
    held_out: TokenizedPairs | None,
) -> list[Stage]:
    """List the stages of a run that count what they do, in order."""
    config = context.config
    scored = 1 if reference in ("none", "cached") else 2  # models that score a pair
    count = 0 if held_out is None else len(held_out)
    stages = []
    if config.warmup is not None:
        work = work_of(context, config.warmup, pairs)
        passes = work.places * (1 + _BACKWARD)
        stages.append(Stage(WARM_UP, work.steps, passes, work.per_epoch))
    work = work_of(context, config.training, pairs)
    pair = float(work.step_places.sum()) / len(pairs)  # places of a pair
    if reference == "cached":
        for name, size in (("train", len(pairs)), ("held_out", count)):
            title = f"Reference log-probs of the pairs ({name})"
            stages += [Stage(title, size, size * pair)] if size else []
    measured = count if context.run.writes else 0
    every = config.training.evaluate_every or work.per_epoch
    training = Stage(
        TRAINING,
        work.steps,
        work.places * (scored + _BACKWARD) + work.steps / every * count * pair * scored,
        every,
        count,
        _evaluation("before") if measured else None,
    )
    return [
        *stages,
        *_measuring(context, "before", held_out if measured else None, pair * scored),
        training,
        *_measuring(context, "after", held_out if measured else None, pair * scored),
    ]


def _measuring(
    context: Context, when: str, held_out: TokenizedPairs | None, pair: float
) -> list[Stage]:
    if held_out is None or not len(held_out):
        return []
    like = None if when == "before" else _evaluation("before")
    stages = [Stage(_evaluation(when), len(held_out), len(held_out) * pair, like=like)]
    settings = context.config.evaluation
    prompts = len(held_out) if held_out.prompt_hash is None else len(set(held_out.prompt_hash))
    prompts = 0 if context.config.trains_reward else min(settings.prompts, prompts)
    if prompts:
        like = None if when == "before" else _responses("before")
        # A pass for the prompt and one for each new token, which use the machine badly.
        tokens = float(held_out.prompt.lengths.mean()) + 4.0 * settings.max_new_tokens
        stages.append(Stage(_responses(when), prompts, prompts * tokens, like=like))
    return stages


def _evaluation(when: str) -> str:
    return f"Evaluation {when} preference training"


def _responses(when: str) -> str:
    return f"Responses {when} preference training"
