"""Packing: rows of one fixed length hold whole trees, each of one pair or of several.

A tree holds a prompt once with all responses to it, and with the turns that continue it
(`prompt_trees.py`). Each epoch packs its own shuffled stream of trees by best fit, so that hardly
any place is empty and every batch of a run has one static shape.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from dpo_keras.batching.collate import prompt_without_tokens
from dpo_keras.batching.prompt_trees import PromptTrees, lone_pairs, prompt_trees
from dpo_keras.batching.ragged import round_up
from dpo_keras.batching.tokenized_pairs import TokenizedPairs
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.bin_packing import Capacity, Rows, Sizes, best_fit, split_rows, squeeze_rows

ROW_LENGTH = 1024  # tokens that rows have at least, unless a step needs fewer
_TREE_LENGTH = 2048  # tokens of a tree of several pairs, unless rows are shorter
_FILL = 0.98  # share of the places that best fit fills on ordinary data
_SAMPLE = 8192  # trees that the length of rows is tried on
_GROUP = 16  # steps whose rows are dealt together, so that they hold similar numbers of pairs
_LISTED = 20  # pairs that an error lists


@dataclass(frozen=True)
class PackingPlan:
    """The one static shape of all batches, and everything that the order of an epoch depends on.

    Args:
        length: tokens per row.
        rows: rows per batch.
        slots: response tokens per row.
        pairs: pair slots per row.
        steps: batches per epoch, the same for every epoch.
        seed: seed of the order.
        shuffle: whether each epoch has its own order.
        forest: the trees that pairs form, and their sizes.
        partition: the trees of each of the `steps * rows` rows in epoch 0.
    """

    length: int
    rows: int
    slots: int
    pairs: int
    steps: int
    seed: int
    shuffle: bool
    forest: PromptTrees = field(repr=False)
    partition: Rows = field(repr=False)

    @property
    def trees(self) -> np.ndarray:
        """The tree of each pair, int32 `[N]`, as `collate_packed` takes it."""
        return self.forest.of_pairs

    @property
    def sizes(self) -> Sizes:
        """What each of the trees takes of a row."""
        return self.forest.sizes

    @property
    def capacity(self) -> Capacity:
        """What a row holds at most."""
        return Capacity(self.length, self.slots, self.pairs)

    @property
    def fill(self) -> float:
        """Share of the places of an epoch that hold tokens."""
        return float(self.sizes.tokens.sum()) / (self.steps * self.rows * self.length)


@dataclass(frozen=True)
class PackedOrder:
    """All batches of one epoch.

    Args:
        pairs: int `[steps, rows, pairs]`, the pair in each pair slot, or -1. Results of a step,
            `[rows * pairs]`, belong to the pairs `order.pairs[step].reshape(-1)`.
    """

    pairs: np.ndarray

    def __len__(self) -> int:
        return len(self.pairs)


def plan_packing(
    tokenized: TokenizedPairs,
    batch_size: int = 8,
    *,
    length: int | None = None,
    rows: int | None = None,
    replicas: int = 1,
    seed: int = 0,
    shuffle: bool = True,
    share_prompts: bool = True,
) -> PackingPlan:
    """Choose the shape of packed batches and pack the first epoch.

    Steps hold `batch_size` pairs on average. The number of rows is chosen first, so that rows are
    about 1,024 tokens long. Their length, a multiple of 64 tokens (of 8 below 512), is the one that
    comes nearest to `batch_size`. The longest tree always fits, even if that makes a step larger.
    A tree holds at most the pairs that a replica has in a step.

    Args:
        tokenized: the pairs.
        batch_size: pairs per step, on average.
        length: tokens per row; None chooses.
        rows: rows per step, over all replicas; None chooses.
        replicas: number that `rows` is a multiple of.
        seed: any integer >= 0.
        shuffle: False packs in file order, each epoch the same.
        share_prompts: whether pairs of one prompt, and turns that continue it, share a tree. They
            are then in one step. False makes each pair a tree, in the order of versions before.

    Returns:
        The plan.

    Raises:
        InputError: no pairs; a pair longer than a row; rows that the replicas cannot share.

    Example:
        >>> from dpo_keras.batching.ragged import Ragged
        >>> prompts = Ragged.from_lists([[n] * n for n in (4, 20, 6, 8)])
        >>> chosen, rejected = (Ragged.from_lists([[end]] * 4) for end in (2, 3))
        >>> ones = np.ones(4, np.float32)
        >>> pairs = TokenizedPairs(prompts, chosen, rejected, ones, ones)
        >>> plan = plan_packing(pairs, batch_size=2, shuffle=False)
        >>> plan.length, plan.rows, plan.steps, plan.partition
        (24, 1, 2, [[0, 2, 3], [1]])
    """
    if problems := _plan_problems(tokenized, batch_size, length, rows, replicas):
        raise InputError(problems)
    # A run plans to count its steps and again to make them, and each plan reads all tokens.
    plans: dict[object, PackingPlan] = vars(tokenized).setdefault("packing_plans", {})
    key = (batch_size, length, rows, replicas, seed, shuffle, share_prompts)
    if key not in plans:
        plans[key] = _plan(tokenized, *key)
    return plans[key]


def _plan(
    tokenized: TokenizedPairs,
    batch_size: int,
    length: int | None,
    rows: int | None,
    replicas: int,
    seed: int,
    shuffle: bool,
    share_prompts: bool,
) -> PackingPlan:
    forest = lone_pairs(tokenized, share_prompts)
    if share_prompts:
        most = max(_TREE_LENGTH, int(forest.sizes.tokens.max())) if length is None else length
        forest = prompt_trees(tokenized, most, batch_size // replicas, forest)
    sizes = forest.sizes
    if length is not None and (sizes.tokens > length).any():
        raise InputError(_too_long(forest, length))
    stream = _stream(len(sizes.tokens), seed, 0, shuffle)
    length, rows = _shape(stream, sizes, batch_size, length, rows, replicas)
    packed = best_fit(stream, sizes, _widest(sizes, length))
    # The other epochs are held to what this one needed, and a little more.
    most_pairs = max(int(sizes.pairs[row].sum()) for row in packed)
    most_slots = max(int(sizes.responses[row].sum()) for row in packed)
    spare_slots = round_up(most_slots + most_slots // 16, _step(most_slots))
    steps = -(-len(packed) // rows)
    return PackingPlan(
        length=length,
        rows=rows,
        slots=min(spare_slots, max(length, most_slots)),
        pairs=min(most_pairs + max(most_pairs // 4, 1), len(tokenized)),
        steps=steps,
        seed=seed,
        shuffle=shuffle,
        forest=forest,
        partition=split_rows(packed, steps * rows),
    )


def packed_order(plan: PackingPlan, epoch: int = 0) -> PackedOrder:
    """Pack one epoch and deal its rows into batches: a pure function of its arguments.

    Each epoch packs its own shuffled stream into the same number of rows. If there are fewer, rows
    are split. If there are more, the emptiest are dissolved into the others; where that fails, the
    rows of epoch 0 are used again. Rows are dealt so that neighboring steps hold similar numbers of
    pairs, because a mean over a step weighs each pair by one over that number.

    Args:
        plan: from `plan_packing`.
        epoch: number of the epoch, from 0.

    Returns:
        `plan.steps` batches, which hold each pair once.

    Example:
        >>> from dpo_keras.batching.ragged import Ragged
        >>> prompts = Ragged.from_lists([[n] * n for n in (4, 20, 6, 8)])
        >>> chosen, rejected = (Ragged.from_lists([[end]] * 4) for end in (2, 3))
        >>> ones = np.ones(4, np.float32)
        >>> pairs = TokenizedPairs(prompts, chosen, rejected, ones, ones)
        >>> order = packed_order(plan_packing(pairs, batch_size=2, shuffle=False))
        >>> order.pairs.tolist()
        [[[0, 2, 3, -1]], [[1, -1, -1, -1]]]
    """
    rows = plan.partition
    if plan.shuffle and epoch:
        stream = _stream(len(plan.sizes.tokens), plan.seed, epoch, True)
        rows = _same_number_of_rows(plan, stream) or plan.partition
    grid = np.full((len(rows), plan.pairs), -1, np.int64)
    counts = np.array([int(plan.sizes.pairs[row].sum()) for row in rows])
    trees = np.concatenate(rows, dtype=np.int64, casting="unsafe")  # empty rows are floats
    grid[np.arange(plan.pairs) < counts[:, None]] = plan.forest.pairs_of(trees)
    if plan.shuffle:
        # Independent of the random numbers that shuffled the pairs.
        random = np.random.default_rng([plan.seed, epoch, 1])
        grid = grid[_deal(counts, plan.rows, random)]
    return PackedOrder(grid.reshape(plan.steps, plan.rows, plan.pairs))


def _same_number_of_rows(plan: PackingPlan, stream: np.ndarray) -> Rows | None:
    rows = best_fit(stream, plan.sizes, plan.capacity)
    count = plan.steps * plan.rows
    if len(rows) > count:
        if (squeezed := squeeze_rows(rows, count, plan.sizes, plan.capacity)) is None:
            return None
        place = np.argsort(stream)
        rows = sorted(squeezed, key=lambda row: int(place[row].min()))
    return split_rows(rows, count)


def _deal(counts: np.ndarray, rows: int, random: np.random.Generator) -> np.ndarray:
    """Return an order of rows in which those of one step are together."""
    order = []
    for begin in range(0, len(counts), _GROUP * rows):
        group = begin + random.permutation(min(_GROUP * rows, len(counts) - begin))
        rounds = group[np.argsort(-counts[group], kind="stable")].reshape(rows, -1)
        steps = np.zeros((rounds.shape[1], rows), np.int64)
        total = np.zeros(rounds.shape[1], np.int64)
        for number, dealt in enumerate(rounds):
            poorest = np.argsort(total, kind="stable")
            steps[poorest, number] = dealt
            total[poorest] += counts[dealt]
        order.append(random.permuted(random.permutation(steps), axis=1).reshape(-1))
    return np.concatenate(order)


def _stream(count: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(count) if shuffle else np.arange(count)


def _step(tokens: float) -> int:
    return 32 if tokens >= 512 else 8


def _shape(
    stream: np.ndarray,
    sizes: Sizes,
    batch_size: int,
    length: int | None,
    rows: int | None,
    replicas: int,
) -> tuple[int, int]:
    """Choose the length and the number of rows."""
    longest = int(sizes.tokens.max())
    together = min(batch_size, int(sizes.pairs.sum()))
    wanted = together * float(sizes.tokens.sum() / sizes.pairs.sum()) / _FILL
    if rows is None:
        usual = max(ROW_LENGTH, longest) if length is None else length
        rows = replicas * max(round(wanted / usual / replicas), 1)
    if length is not None:
        return length, rows
    step = _step(max(wanted / rows, longest))
    shortest = round_up(longest, step)
    near = max(round(wanted / rows / step) * step, shortest)
    sample = stream[:_SAMPLE]

    def missed(length: int) -> float:
        packed = best_fit(sample, sizes, _widest(sizes, length))
        return abs(float(sizes.pairs[sample].sum()) * rows / len(packed) - together)

    tried = [near + by * step for by in (0, -1, 1, 2) if near + by * step >= shortest]
    return min(tried, key=missed), rows


def _widest(sizes: Sizes, length: int) -> Capacity:
    """Return the capacity of rows that only their length limits."""
    return Capacity(length, int(sizes.responses.sum()), int(sizes.pairs.sum()))


def _too_long(forest: PromptTrees, length: int) -> list[InputProblem | str]:
    sizes = forest.sizes.tokens
    long = np.flatnonzero(sizes > length)
    rule = (
        f"must hold the longest pair, {int(sizes.max())} tokens of prompt and both "
        f"responses, got {length}; {len(long)} pairs are longer."
    )
    hint = "Raise it, leave it out, or tokenize with a smaller max_length."
    pairs = forest.pairs_of(long[:_LISTED])  # a tree longer than a row is of one pair
    listed = [f"pair {pair}: {sizes[tree]} tokens" for pair, tree in zip(pairs, long, strict=False)]
    return [InputProblem("row_length", rule, hint=hint), *listed]


def not_integers(least: int, **arguments: object) -> list[InputProblem]:
    """Return the problems of arguments that are not integers of at least `least`."""
    return [
        InputProblem(name, f"must be an integer >= {least}", value)
        for name, value in arguments.items()
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or value < least
    ]


def _plan_problems(
    tokenized: TokenizedPairs, batch_size: int, length: int | None, rows: int | None, replicas: int
) -> list[str]:
    optional = {"row_length": length, "rows": rows}
    given = {name: value for name, value in optional.items() if value is not None}
    problems: list[str] = [*not_integers(1, batch_size=batch_size, replicas=replicas, **given)]
    if not problems and rows is not None and rows % replicas:
        rule = f"must be a multiple of the {replicas} replicas that share them"
        problems.append(InputProblem("rows", rule, rows))
    if tokenized.images is not None:
        rule = "must be 'buckets' for pairs with images: packed rows hold text only"
        problems.append(InputProblem("batching", rule, "packed"))
    if not len(tokenized):
        problems.append("there is no pair to pack; give at least one.")
    elif (tokenized.prompt.lengths == 0).any():
        problems.append(prompt_without_tokens(int(np.argmin(tokenized.prompt.lengths))))
    return problems
