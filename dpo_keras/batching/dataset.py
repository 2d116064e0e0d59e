"""Pairs as a `tf.data.Dataset` of batches: few shapes, and one order per seed."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np
import tensorflow as tf

from dpo_keras.batching.batch_stream import Source, dynamic_dimensions, signature_of, stream
from dpo_keras.batching.bucketing import epoch_order, plan_buckets
from dpo_keras.batching.chat_templates import ChatTemplate
from dpo_keras.batching.collate import Batch, collate
from dpo_keras.batching.forests import collate_packed
from dpo_keras.batching.packing import PackingPlan, not_integers, packed_order, plan_packing
from dpo_keras.batching.tokenization import Overlength, tokenize_pairs
from dpo_keras.batching.tokenized_pairs import TokenizedPairs
from dpo_keras.errors import InputError, InputProblem

Batching = Literal["buckets", "packed"]
"""A layout of batches: responses padded to a few lengths, or whole trees in rows of one length."""
BatchingChoice = Literal["auto", "packed", "buckets"]
"""What `batching` takes: a layout, or `"auto"` for packed rows wherever they are exact."""

AHEAD = 32  # batches that disks are told of before they are needed


def steps_per_epoch(
    pairs: int | TokenizedPairs,
    batch_size: int,
    drop_remainder: bool = False,
    *,
    batching: Batching = "buckets",
    row_length: int | None = None,
    rows: int | None = None,
    replicas: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    share_prompts: bool = True,
) -> int:
    """Count the batches of one epoch, the same for every epoch.

    Args:
        pairs: the tokenized pairs. For buckets their number is enough.
        batch_size: pairs per batch.
        drop_remainder: whether the short last batch is left out.
        batching: as in `preference_dataset`, like the rest, which matter only when packed.
        row_length: tokens per row.
        rows: rows per batch.
        replicas: number of replicas that share a batch.
        seed: seed of the order.
        shuffle: whether the order is random.
        share_prompts: as `plan_packing` takes.

    Returns:
        With buckets `ceil(pairs / batch_size)`, or the floor; packed, what the first epoch needs.

    Raises:
        InputError: packed, and `pairs` is only a number; or as `plan_packing`.

    Example:
        >>> steps_per_epoch(10, 4), steps_per_epoch(10, 4, drop_remainder=True)
        (3, 2)
    """
    if batching == "packed":
        if not isinstance(pairs, TokenizedPairs):
            rule = "must be TokenizedPairs to count packed batches"
            raise InputError(InputProblem("pairs", rule, pairs))
        shape: dict[str, Any] = {"length": row_length, "rows": rows, "replicas": replicas}
        shape["share_prompts"] = share_prompts
        return plan_packing(pairs, batch_size, **shape, seed=seed, shuffle=shuffle).steps
    count = pairs if isinstance(pairs, int) else len(pairs)
    return count // batch_size if drop_remainder else -(-count // batch_size)


@dataclass(frozen=True, eq=False, kw_only=True)
class UndecidedLayout:
    """What a dataset of `batching="auto"` carries, so that a model can have its pairs packed.

    Args:
        tokenized: the pairs.
        given: the options that only one of the layouts reads.
        replicas: number that the rows of a batch shall be a multiple of.
        order: the other options of `preference_dataset`.
    """

    tokenized: TokenizedPairs
    given: Mapping[str, Any]
    replicas: int
    order: Mapping[str, Any]
    _made: dict[int, tf.data.Dataset] = field(default_factory=dict)

    @staticmethod
    def of(dataset: object) -> UndecidedLayout | None:
        """Return what a dataset carries; None of any other, and of what tf.data made of one."""
        return getattr(dataset, "undecided_layout", None)

    def attached_to(self, dataset: tf.data.Dataset) -> tf.data.Dataset:
        """Let a dataset of the same pairs in buckets carry this."""
        dataset.undecided_layout = self
        return dataset

    def packed(self, replicas: int) -> tf.data.Dataset:
        """Return the pairs as packed rows, planned once, so that each iteration continues."""
        if replicas not in self._made:
            options = {name: self.given[name] for name in ("row_length", "rows")}
            self._made[replicas] = preference_dataset(
                self.tokenized, batching="packed", replicas=replicas, **options, **self.order
            )
        return self._made[replicas]

    def with_pairs(self, tokenized: TokenizedPairs) -> UndecidedLayout:
        """Return the same options for other pairs."""
        return replace(self, tokenized=tokenized, _made={})


def preference_dataset(  # noqa: PLR0913 -- the options of a public call, all by name
    pairs: Iterable[Any] | TokenizedPairs,
    preprocessor: object = None,
    *,
    batch_size: int = 8,
    max_length: int = 1024,
    template: str | ChatTemplate | None = None,
    overlength: Overlength = "truncate",
    min_prompt_tokens: int | None = None,
    shuffle: bool = True,
    seed: int = 0,
    epochs: int | None = 1,
    start_step: int = 0,
    buckets: int | Sequence[int] | None = None,
    drop_remainder: bool = False,
    batching: BatchingChoice = "auto",
    row_length: int | None = None,
    rows: int | None = None,
    replicas: int = 1,
    share_prompts: bool = True,
    worker: tuple[int, int] | None = None,
) -> tf.data.Dataset:
    """Make the batches that `DPOModel.fit` and `evaluate` take. An epoch has each pair once.

    * `"auto"`: `fit` and `evaluate` of a `DPOModel` or a `SupervisedModel` run packed rows where
      policy, reference and pairs allow it, else buckets, with a warning that says why. For anyone
      else (iteration, `predict`, `take`, `map`) the dataset holds buckets.

    * `"buckets"`, for any model: every batch has exactly `batch_size` rows, one pair each as two
      padded sequences, in one of a few static shapes. Only the last batch of an epoch may hold
      empty rows.
    * `"packed"`, for models without a packing obstacle: rows hold several pairs, each prompt once,
      in one static shape and almost without padding. A batch holds `batch_size` pairs on average.

    Batch k over all epochs is a pure function of the arguments and k, so that `start_step=k`
    resumes a stopped run exactly. Iterating the same object again, as `fit(epochs=3)` does,
    continues with the following epochs. `dpo_keras/batching/README.md` has order and distribution.

    Args:
        pairs: `Preferences` or any pairs that `tokenize_pairs` takes, or `TokenizedPairs`.
        preprocessor: the policy's KerasHub preprocessor, or what else `tokenize_pairs` takes.
            `TokenizedPairs` need none, nor the next four.
        batch_size: pairs per batch, over all replicas.
        max_length: see `tokenize_pairs`, like the next three.
        template: how chat messages become text.
        overlength: what happens to a pair that is too long.
        min_prompt_tokens: tokens that truncation leaves of a prompt at least.
        shuffle: False keeps file order as far as buckets, or rows, allow.
        seed: any integer >= 0.
        epochs: epochs in one iteration; None never ends.
        start_step: number of the first batch, over all epochs, from 0.
        buckets: maximum number of static lengths, or the lengths (see `plan_buckets`). 1 gives one
            static shape; None means 4. Packed batches ignore it.
        drop_remainder: leave out the short last batch of each epoch. Packed batches have none.
        batching: "auto", "buckets" or "packed".
        row_length: tokens per row of packed batches; None chooses (see `plan_packing`).
        rows: rows per packed batch, over all replicas; None chooses.
        replicas: number of replicas that share a packed batch in equal numbers of rows. "auto"
            also knows those of the model's strategy.
        share_prompts: whether packed rows hold what several pairs have in common once, such as
            their prompt. Those pairs are then in one step.
        worker: (index, count): make the rows of this worker only; None makes all.

    Warns:
        UserWarning: pairs were dropped, or more than 5 % of them were cut; `TokenizedPairs` bring
            that in their report.

    Returns:
        A dataset of `Batch` dicts, of known cardinality, deterministic, prefetching.

    Raises:
        InputError: wrong arguments, all of them together; or as `tokenize_pairs`.

    Example:
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [list(map(ord, t)) for t in texts])
        >>> from dpo_keras.preferences import PreferencePair
        >>> pairs = [PreferencePair("2+2=", "4", wrong) for wrong in ("5", "6", "seven")]
        >>> dataset = preference_dataset(pairs, Letters(), batch_size=2)
        >>> int(dataset.cardinality()), [batch["weight"].numpy().sum() for batch in dataset]
        (2, [np.float32(2.0), np.float32(1.0)])
    """
    problems = not_integers(1, batch_size=batch_size, epochs=1 if epochs is None else epochs)
    problems += not_integers(0, seed=seed, start_step=start_step)
    if not isinstance(pairs, TokenizedPairs) and preprocessor is None:
        hint = "Pass policy.preprocessor."
        problems.append(InputProblem("preprocessor", "is needed to tokenize the pairs.", hint=hint))
    only_packed = {"row_length": row_length, "rows": rows}
    problems += _batching_problems(batching, batch_size, drop_remainder, only_packed, worker)
    if problems:
        raise InputError(problems)
    if not isinstance(pairs, TokenizedPairs):
        pairs = tokenize_pairs(
            pairs,
            preprocessor,
            max_length=max_length,
            template=template,
            overlength=overlength,
            min_prompt_tokens=min_prompt_tokens,
        )
        # The report is not returned, so what it has to say is said here.
        for notice in pairs.report.notices():
            warnings.warn(notice, stacklevel=2)
    if batching == "packed":
        shape: dict[str, Any] = {"length": row_length, "rows": rows, "replicas": replicas}
        shape["share_prompts"] = share_prompts
        plan = plan_packing(pairs, batch_size, **shape, seed=seed, shuffle=shuffle)
        source = _packed(pairs, plan, worker)
    else:
        order = {"seed": seed, "shuffle": shuffle, "drop_remainder": drop_remainder}
        source = _bucketed(pairs, batch_size, 4 if buckets is None else buckets, order, worker)
    if source.steps == 0:
        rule = f"leaves no batch: {len(pairs)} pairs, batch_size {batch_size}"
        raise InputError(InputProblem("drop_remainder", rule))
    dataset = stream(source, start_step, _total(source.steps, epochs, start_step, batching))
    if batching != "auto":
        return dataset
    return UndecidedLayout(
        tokenized=pairs,
        given={"buckets": buckets, "drop_remainder": drop_remainder, **only_packed},
        replicas=replicas,
        order={"batch_size": batch_size, "shuffle": shuffle, "seed": seed, "epochs": epochs}
        | {"start_step": start_step, "worker": worker, "share_prompts": share_prompts},
    ).attached_to(dataset)


def _total(steps: int, epochs: int | None, start_step: int, batching: str) -> int | None:
    """Return the number of batches in all epochs, of `steps` each; None never ends."""
    total = None if epochs is None else epochs * steps
    if total is not None and start_step >= total:
        rule = f"must be less than the {total} batches of {epochs} epochs"
        hint = "Counted in buckets; for packed rows pass batching='packed'."
        hint = hint if batching == "auto" else ""
        raise InputError(InputProblem("start_step", rule, start_step, hint))
    return total


def _batching_problems(
    batching: str,
    batch_size: int,
    drop_remainder: bool,
    only_packed: Mapping[str, int | None],
    worker: tuple[int, int] | None,
) -> list[InputProblem]:
    problems = []
    if batching not in get_args(BatchingChoice):
        rule = "must be 'auto', 'packed' or 'buckets'"
        problems.append(InputProblem("batching", rule, batching))
    rule = "has no effect {} batching='packed'"
    if batching == "buckets":
        problems += [
            InputProblem(name, rule.format("without"), value, "Leave it out.")
            for name, value in only_packed.items()
            if value is not None
        ]
    elif batching == "packed" and drop_remainder:
        problems.append(InputProblem("drop_remainder", rule.format("with"), hint="Leave it out."))
    if worker is not None and not 0 <= worker[0] < worker[1]:
        rule = "must be (index, count) with 0 <= index < count"
        problems.append(InputProblem("worker", rule, worker))
    elif worker is not None and batching != "packed" and batch_size % worker[1]:
        rule = f"must be a multiple of the {worker[1]} workers"
        problems.append(InputProblem("batch_size", rule, batch_size))
    return problems


def _bucketed(
    tokenized: TokenizedPairs,
    batch_size: int,
    buckets: int | Sequence[int],
    options: Mapping[str, Any],
    worker: tuple[int, int] | None,
) -> Source:
    plan = plan_buckets(tokenized, batch_size, buckets)
    order = functools.lru_cache(maxsize=2)(
        lambda epoch: epoch_order(plan, batch_size, epoch=epoch, **options)
    )

    def make(epoch: int, step: int) -> Batch:
        rows = _share(tokenized, order(epoch).rows, step, worker)
        bucket = order(epoch).bucket[step]
        return collate(tokenized, rows, plan.lengths[bucket], plan.slots[bucket], len(rows))

    rows = batch_size // (1 if worker is None else worker[1])
    sample = collate(tokenized, [0], plan.lengths[-1], plan.slots[-1], rows)
    # Batches of one bucket are static throughout. Else only lengths and slots are left open.
    signature = signature_of(sample, {} if len(plan.lengths) == 1 else dynamic_dimensions(sample))
    steps = steps_per_epoch(tokenized, batch_size, options["drop_remainder"])
    return Source(steps, make, signature)


def _packed(tokenized: TokenizedPairs, plan: PackingPlan, worker: tuple[int, int] | None) -> Source:
    if worker is not None and plan.rows % worker[1]:
        rule = f"cannot share batches of {plan.rows} packed rows among {worker[1]} workers."
        hint = f"To make rows a multiple of them, pass replicas={worker[1]}."
        raise InputError(InputProblem("worker", rule, hint=hint))
    order = functools.lru_cache(maxsize=2)(lambda epoch: packed_order(plan, epoch))

    def make(epoch: int, step: int) -> Batch:
        grid = _share(tokenized, order(epoch if plan.shuffle else 0).pairs, step, worker)
        return collate_packed(tokenized, grid, plan.length, plan.slots, trees=plan.trees)

    return Source(plan.steps, make, signature_of(make(0, 0), {}))


def _share(
    tokenized: TokenizedPairs, batches: np.ndarray, step: int, worker: tuple[int, int] | None
) -> np.ndarray:
    """Return a worker's rows of a batch, and announce those of a later batch to the disk."""
    index, count = worker or (0, 1)
    size = batches.shape[1]
    mine = batches[:, index * size // count : (index + 1) * size // count]
    soon = mine[0 if step == 0 else step + AHEAD : step + AHEAD + 1]
    tokenized.expect(soon[soon >= 0])
    return mine[step]
