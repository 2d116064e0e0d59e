"""Packed rows or buckets: the one rule by which training, scoring and the command line choose."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, get_args

import keras
import tensorflow as tf

from dpo_keras.batching import (
    Batching,
    BatchingChoice,
    TokenizedPairs,
    UndecidedLayout,
    preference_dataset,
    steps_per_epoch,
)
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.packing_check import check_packing, packing_obstacle
from dpo_keras.scoring.scorer import ResponseScorer

READ_BY = {"packed": {"row_length", "rows"}, "buckets": {"buckets", "drop_remainder"}}


@dataclass(frozen=True)
class Layout:
    """How all datasets of a training lay out pairs; the options are `preference_dataset`'s.

    Args:
        batching: "buckets" or "packed".
        buckets: lengths that bucketed batches come in, or how many.
        row_length: tokens per packed row; None chooses.
        replicas: number of replicas that share a batch.
        rows: rows per packed batch; None chooses.
        drop_remainder: whether buckets leave the short last batch out.
        share_prompts: whether packed rows hold what several pairs have in common once.
    """

    batching: Batching = "buckets"
    buckets: int | Sequence[int] = 4
    row_length: int | None = None
    replicas: int = 1
    rows: int | None = None
    drop_remainder: bool = False
    share_prompts: bool = True

    @property
    def packed(self) -> bool:
        """Whether rows hold several pairs."""
        return self.batching == "packed"

    def dataset(
        self, tokenized: TokenizedPairs, batch_size: int, **options: Any
    ) -> tf.data.Dataset:
        """Make batches, with `options` as `preference_dataset` takes them."""
        return preference_dataset(tokenized, batch_size=batch_size, **asdict(self), **options)

    def steps(self, tokenized: TokenizedPairs, batch_size: int, seed: int = 0) -> int:
        """Count the steps of an epoch; with packing they depend on the order, so on its seed."""
        options = {name: value for name, value in asdict(self).items() if name != "buckets"}
        return steps_per_epoch(tokenized, batch_size, seed=seed, **options)


def scoring_models(model: Any) -> list[keras.Model]:
    """Return the models that score a batch in a step: the policy, and a reference of its own."""
    reference = getattr(getattr(model, "reference", None), "model", None)
    return [model.policy] if reference is None else [model.policy, reference]


def choose_layout(
    models: Sequence[keras.Model],
    batching: BatchingChoice = "auto",
    *,
    replicas: int = 1,
    images: bool = False,
    note: Callable[[str], object] = print,
    **given: Any,
) -> Layout:
    """Choose packed rows where every model that scores the pairs can run on them, else buckets.

    Args:
        models: the policy, and the reference where it is a model of its own.
        batching: "auto" falls back to buckets and says why; "packed" insists.
        replicas: as `Layout` takes.
        images: whether any pair has images, which run in buckets only.
        note: called with the reason for falling back, and with an option that has no effect then.
        **given: other arguments of `Layout`; None, or False, asks for nothing.

    Raises:
        InputError: an unknown name; "packed" where it is impossible; an option of the other layout.

    Example:
        >>> plain = keras.Sequential([keras.Input((2,)), keras.layers.Dense(2)])
        >>> choose_layout([plain], "auto", note=lambda line: None).batching
        'buckets'
    """
    if batching not in get_args(BatchingChoice):
        names = ", ".join(map(repr, get_args(BatchingChoice)))
        raise InputError(InputProblem("batching", f"must be one of {names}", batching))
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("drop_remainder") is False:
        del given["drop_remainder"]
    obstacles = [] if batching == "buckets" else map(packing_obstacle, models)
    reason = next((why for why in obstacles if why is not None), None)
    if images and batching != "buckets":
        reason = reason or "the pairs have images, and packed rows hold text only"
    if batching == "packed" and reason is not None:
        hint = "Choose 'auto' or 'buckets', which run with every model."
        raise InputError(InputProblem("batching", f"cannot be 'packed': {reason}", hint=hint))
    chosen: Batching = "packed" if batching != "buckets" and reason is None else "buckets"
    if chosen == "buckets" and batching == "auto":
        note(f"batching: buckets instead of packed rows, because {reason}.")
    unread = given.keys() - READ_BY[chosen]
    rule = f"has no effect with batching={chosen!r}"
    problems = [InputProblem(name, rule, given.pop(name), "Leave it out.") for name in unread]
    if problems and batching != "auto":
        raise InputError(problems)
    for problem in problems:  # it is for the layout that "auto" might have chosen
        note(f"warning: {problem}")
    return Layout(chosen, replicas=replicas, **given)


def laid_out(
    dataset: object,
    models: Sequence[keras.Model],
    replicas: int,
    check: Callable[[], object],
) -> object:
    """Return the batches that models run on: of `batching="auto"` packed rows, where they can.

    Args:
        dataset: of `preference_dataset`. Anything else is returned as it is.
        models: as `choose_layout` takes.
        replicas: number of replicas that share a batch of packed rows.
        check: raises InputError where the policy scores packed rows otherwise; called before any
            packed rows are returned.

    Warns:
        UserWarning: the models or the pairs need buckets, or an option has no effect.

    Raises:
        InputError: of `check`, on packed rows that the user insists on.
    """
    pairs = UndecidedLayout.of(dataset)
    if pairs is None:
        if "reach" in (getattr(dataset, "element_spec", None) or {}):
            check()
        return dataset
    replicas = math.lcm(pairs.replicas, replicas)
    images = pairs.tokenized.images is not None
    layout = choose_layout(models, replicas=replicas, images=images, note=_warn, **pairs.given)
    if not layout.packed:
        return dataset
    try:
        check()
    except InputError as error:
        _warn(f"buckets instead of packed rows: {error}")
        return dataset
    return pairs.packed(replicas)


def _warn(line: str) -> None:
    # By default Python shows the same warning of the same place once.
    hint = "" if line.startswith("warning: ") else " Pass batching='buckets' to choose them."
    warnings.warn(line.removeprefix("warning: ") + hint, stacklevel=2)


def scoring_layout(
    scorer: ResponseScorer,
    models: Sequence[keras.Model],
    tokenized: TokenizedPairs,
    batching: BatchingChoice,
) -> Batching:
    """Choose the layout of a pass that only scores. Results are equal, so nothing is said.

    Raises:
        InputError: "packed" where it is impossible, or the scorer scores packed rows otherwise.
    """
    images = tokenized.images is not None
    chosen = choose_layout(models, batching, images=images, note=lambda line: None).batching
    if chosen == "packed":
        try:
            check_packing(scorer)
        except InputError:
            if batching == "packed":
                raise
            return "buckets"
    return chosen
