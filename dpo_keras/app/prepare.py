"""The first stages of a run: pairs are read and split, tokenized; prompts are chosen."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

from dpo_keras.app.progress import Progress
from dpo_keras.errors import InputError
from dpo_keras.preferences import Preferences, read_preferences
from dpo_keras.preferences.schema import plain_text

if TYPE_CHECKING:
    from dpo_keras.app.config import Config
    from dpo_keras.batching import TokenizedPairs


class Sides(NamedTuple):
    """Pairs to train on, and pairs to measure on.

    Args:
        train: the training pairs.
        held_out: the others; None where nothing is held out.
        dropped: records that were read and not kept.
    """

    train: Preferences
    held_out: Preferences | None
    dropped: int


def read_sides(config: Config, progress: Progress) -> Sides:
    """Reads the pairs that a configuration names, says what was dropped, and splits them.

    Args:
        config: the configuration.
        progress: hears the reports.

    Raises:
        InputError: if a file can not be read, or holds no good pair.
    """
    data = config.data
    assert data.path is not None
    pairs = read_preferences(
        data.path, format=data.format, on_error=data.on_error, limit=data.limit
    )
    progress.note(pairs.report.summary())
    if data.held_out_path is not None:
        held_out = read_preferences(data.held_out_path, format=data.format, on_error=data.on_error)
        progress.note(held_out.report.summary())
        _warn_of_shared_prompts(pairs, held_out, progress)
        return Sides(pairs, held_out, pairs.report.dropped + held_out.report.dropped)
    if not data.held_out:
        return Sides(pairs, None, pairs.report.dropped)
    train, held_out = pairs.split(data.held_out, seed=config.seed, by=data.split_by)
    progress.note(f"{len(train):,} pairs to train on, {len(held_out):,} held out.")
    return Sides(train, held_out, pairs.report.dropped)


def _warn_of_shared_prompts(train: Preferences, held_out: Preferences, progress: Progress) -> None:
    known = {pair.prompt for pair in train}
    shared = sum(pair.prompt in known for pair in held_out)
    if shared:
        progress.note(
            f"warning: the prompts of {shared:,} of {len(held_out):,} held-out pairs are in the "
            "training data too; the figures on them flatter."
        )


def texts_of(pairs: Preferences) -> Iterator[str]:
    """Yields the texts that a tokenizer from scratch learns from.

    Args:
        pairs: the training pairs, never the held-out ones.
    """
    for pair in pairs:
        yield from map(plain_text, (pair.prompt, pair.chosen, pair.rejected))


def tokenize(
    config: Config, pairs: Preferences, policy: Any, name: str, progress: Progress
) -> TokenizedPairs:
    """Tokenizes pairs as the configuration says, and says what was cut and dropped.

    Args:
        config: the configuration.
        pairs: the pairs.
        policy: a CausalLM, for its preprocessor.
        name: of these pairs, in messages.
        progress: hears the report.

    Raises:
        InputError: if a pair is too long and that is an error, or none is left.
    """
    from dpo_keras.batching import tokenize_pairs

    data = config.data
    try:
        tokenized = tokenize_pairs(
            pairs,
            policy.preprocessor,
            max_length=data.max_length,
            template=data.template,
            overlength=data.overlength,
        )
    except InputError as error:
        # The arguments' names, as the configuration has them.
        texts = [p.replace("template=", "data.template=") for p in error.problems]
        raise InputError([f"{name} pairs: {text}" for text in texts]) from error
    progress.note(f"{name}: {tokenized.report.summary()}")
    return tokenized


def choose_rows(tokenized: TokenizedPairs, pairs: Preferences, count: int, seed: int) -> list[int]:
    """Draws pairs with different prompts, to sample responses to.

    Args:
        tokenized: the tokenized pairs.
        pairs: the pairs that they were made of.
        count: how many at most.
        seed: of the draw; the same seed and pairs give the same rows.

    Returns:
        Rows of `tokenized`, in its order.
    """
    sources = range(len(tokenized)) if tokenized.source is None else tokenized.source
    rows: dict[Any, int] = {}
    for row, source in enumerate(sources):
        rows.setdefault(pairs[int(source)].prompt, row)
    distinct = list(rows.values())
    return sorted(random.Random(seed).sample(distinct, min(count, len(distinct))))


def replicas_share(batch_size: int, replicas: int, key: str) -> None:
    """Refuses a batch that replicas can not share evenly.

    Args:
        batch_size: rows of a batch over all replicas.
        replicas: their number.
        key: the configuration's key, for the message.

    Raises:
        InputError: if there is a remainder.
    """
    if batch_size % replicas:
        raise InputError(
            f"{key} must be a multiple of the {replicas} replicas that share it, got {batch_size}."
        )
