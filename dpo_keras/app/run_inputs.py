"""The first stages of a run: pairs are read and split, tokenized; prompts are chosen."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

import numpy as np

from dpo_keras.app.progress import Progress
from dpo_keras.errors import InputError
from dpo_keras.preferences import Preferences, StoredPreferences, is_built, read_preferences
from dpo_keras.preferences.collection import earlier_split
from dpo_keras.preferences.pair import plain_text

if TYPE_CHECKING:
    from dpo_keras.app.config import Config
    from dpo_keras.app.config_sections import Data
    from dpo_keras.app.run_directory import RunDirectory
    from dpo_keras.batching import TokenizedPairs

Pairs: TypeAlias = Preferences | StoredPreferences
TOKENIZER_PAIRS = 20_000  # of a built directory, which a tokenizer from scratch learns from


class Sides(NamedTuple):
    """Pairs to train on, and pairs to measure on.

    Args:
        train: the training pairs.
        held_out: the others; None where nothing is held out.
        dropped: records that were read and not kept.
    """

    train: Pairs
    held_out: Pairs | None
    dropped: int


def read_sides(config: Config, progress: Progress, run: RunDirectory | None = None) -> Sides:
    """Read the pairs that a configuration names, report what was dropped, and split them.

    Args:
        config: the configuration.
        progress: hears the reports.
        run: the run that goes on; one begun before 'data.json' named its split keeps that one.

    Raises:
        InputError: if a file can not be read, or holds no good pair.
    """
    data = config.data
    assert data.path is not None
    pairs = read_pairs(data.path, data, progress, data.limit)
    if data.held_out_path is not None:
        held_out = read_pairs(data.held_out_path, data, progress)
        _warn_of_shared_prompts(pairs, held_out, progress)
        return Sides(pairs, held_out, pairs.report.dropped + held_out.report.dropped)
    if not data.held_out:
        return Sides(pairs, None, pairs.report.dropped)
    begun = None if run is None else run.read("data.json")
    if begun is not None and "split" not in begun and isinstance(pairs, Preferences):
        train, held_out = earlier_split(pairs, data.held_out, config.seed, data.split_by)
    else:
        train, held_out = pairs.split(data.held_out, seed=config.seed, by=data.split_by)
    progress.note(f"{len(train):,} pairs to train on, {len(held_out):,} held out.")
    return Sides(train, held_out, pairs.report.dropped)


def read_pairs(
    paths: Sequence[str], data: Data, progress: Progress, limit: int | None = None
) -> Pairs:
    """Reads pairs as a configuration says; those of one built directory stay on disk.

    Args:
        paths: files, or other sources.
        data: how to read them.
        progress: hears the report.
        limit: read this many at most.

    Raises:
        InputError: as `read_preferences`; or a built directory is damaged.
    """
    if len(paths) == 1 and is_built(paths[0]):
        if data.columns:
            raise InputError(
                f"data.columns has no effect on {paths[0]}, whose columns were named when it was "
                "built; set it to null."
            )
        stored = StoredPreferences.open(paths[0])
        progress.note(f"{len(stored):,} pairs in {len(stored.shards)} shards, built from:")
        progress.note(stored.report.summary())
        return stored if limit is None else stored.first(limit)
    pairs = read_preferences(
        paths,
        format=data.format,
        on_error=data.on_error,
        limit=limit,
        columns=data.columns,
        data_dir=data.data_dir,
    )
    progress.note(pairs.report.summary())
    return pairs


def _warn_of_shared_prompts(train: Pairs, held_out: Pairs, progress: Progress) -> None:
    shared = int(np.isin(held_out.prompt_hashes, train.prompt_hashes).sum())
    if shared:
        progress.note(
            f"warning: the prompts of {shared:,} of {len(held_out):,} held-out pairs are in the "
            "training data too; the figures on them flatter."
        )


def texts_of(pairs: Pairs) -> Iterator[str]:
    """Yields the texts that a tokenizer from scratch learns from; of pairs on disk, of a sample.

    Args:
        pairs: the training pairs, never the held-out ones.
    """
    if isinstance(pairs, StoredPreferences) and len(pairs) > TOKENIZER_PAIRS:
        pairs = pairs.select(np.linspace(0, len(pairs) - 1, TOKENIZER_PAIRS).astype(np.int64))
    for pair in pairs:
        yield from map(plain_text, (pair.prompt, pair.chosen, pair.rejected))


def tokenize(
    config: Config,
    pairs: Pairs,
    policy: Any,
    name: str,
    progress: Progress,
    run: RunDirectory | None = None,
) -> TokenizedPairs:
    """Tokenizes pairs as the configuration says, and says what was cut and dropped.

    Args:
        config: the configuration.
        pairs: the pairs.
        policy: a CausalLM, for its preprocessor.
        name: of these pairs, in messages.
        progress: hears the report.
        run: keeps the tokens of a built directory that cannot be written into.

    Raises:
        InputError: if a pair is too long and that is an error, or none is left.
    """
    from dpo_keras.batching import tokenize_pairs

    data = config.data
    stored = isinstance(pairs, StoredPreferences)
    try:
        tokenized = tokenize_pairs(
            pairs,
            policy.preprocessor,
            max_length=data.max_length,
            template=data.template,
            overlength=data.overlength,
            cache=_token_folder(pairs, data, run) if stored else None,
        )
    except InputError as error:
        keys = {key: f"data.{key}" for key in ("template", "overlength", "max_length")}
        keys["cache"] = "data.tokens"
        texts = [p.renamed(keys.get(p.argument, p.argument)) for p in error.problems]
        raise InputError([f"{name} pairs: {text}" for text in texts]) from error
    progress.note(f"{name}: {tokenized.report.summary()}")
    return tokenized


def _token_folder(pairs: Any, data: Data, run: RunDirectory | None) -> str | Path | None:
    if data.tokens is not None or run is None or os.access(pairs.path, os.W_OK):
        return data.tokens
    return run.path / "tokens"


def choose_rows(tokenized: TokenizedPairs, pairs: Pairs, count: int, seed: int) -> list[int]:
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
    keys = pairs.prompt_hashes.tolist()
    rows: dict[int, int] = {}
    for row, source in enumerate(sources):
        rows.setdefault(keys[int(source)], row)
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
