"""The inputs of a run: pairs are read and split, then tokenized."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import numpy as np

from dpo_keras.app.config import Config
from dpo_keras.app.config_rules import keys_for_arguments
from dpo_keras.app.config_sections import Data
from dpo_keras.app.console import Progress
from dpo_keras.app.run_directory import RunDirectory
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import (
    Preferences,
    Rankings,
    RatedResponses,
    StoredPreferences,
    is_built,
    read_preferences,
)
from dpo_keras.preferences.collection import earlier_split
from dpo_keras.preferences.pair import plain_text
from dpo_keras.utils.atomic_files import replaced

if TYPE_CHECKING:
    import keras

    from dpo_keras.batching import TokenizedPairs

Pairs: TypeAlias = Preferences | RatedResponses | Rankings | StoredPreferences
_PROMPTS = "trained_prompts.npy"
TOKENIZER_PAIRS = 20_000  # of a built directory, which a tokenizer from scratch learns from


class Sides(NamedTuple):
    """Pairs to train on, pairs to measure on (or None), and the number of records left out."""

    train: Pairs
    held_out: Pairs | None
    dropped: int


def read_sides(config: Config, progress: Progress, run: RunDirectory | None = None) -> Sides:
    """Read the pairs that a configuration names, report what was dropped, and split them."""
    data = config.data
    assert data.path is not None
    pairs = read_pairs(data.path, data, progress, data.limit)
    check_kind(config, pairs)
    if data.held_out_path is not None:
        held_out = read_pairs(data.held_out_path, data, progress, key="data.held_out_path")
        check_kind(config, held_out)
        shared = int(np.isin(held_out.prompt_hashes, pairs.prompt_hashes).sum())
        if shared:
            progress.note(
                f"warning: the prompts of {shared:,} of {len(held_out):,} held-out pairs are in "
                "the training data too; the figures on them flatter."
            )
        dropped = pairs.report.dropped + held_out.report.dropped
        return Sides(compared(pairs, config), compared(held_out, config, measured=True), dropped)
    if not data.held_out:
        return Sides(compared(pairs, config), None, pairs.report.dropped)
    begun = None if run is None else run.read("data.json")
    if begun is not None and "split" not in begun and isinstance(pairs, Preferences):
        sides: tuple[Pairs, Pairs] = earlier_split(pairs, data.held_out, config.seed, data.split_by)
    else:
        with keys_for_arguments():
            sides = pairs.split(data.held_out, seed=config.seed, by=data.split_by)
    train, held_out = compared(sides[0], config), compared(sides[1], config, measured=True)
    kinds = {RatedResponses: "rated responses", Rankings: "rankings"}
    kind = kinds.get(type(train), "pairs")
    progress.note(f"{len(train):,} {kind} to train on, {len(held_out):,} held out.")
    return Sides(train, held_out, pairs.report.dropped)


def compared(pairs: Pairs, config: Config, *, measured: bool = False) -> Pairs:
    """Return rankings as pairs, unless they are to be trained on as a whole.

    Figures are of pairs, so rankings that are measured become all their pairs.
    """
    from dpo_keras.losses import OBJECTIVES

    if not isinstance(pairs, Rankings):
        return pairs
    as_a_whole = all(OBJECTIVES[name].ranks for name in config.loss.type)
    if as_a_whole and not measured:
        return pairs
    return pairs.as_pairs("all_pairs" if measured else config.data.rankings)


def check_kind(config: Config, pairs: Pairs) -> None:
    """Refuse pairs for an objective on rated responses, and the other way round."""
    from dpo_keras.losses import OBJECTIVES

    types = config.loss.type
    unpaired = any(OBJECTIVES[name].unpaired for name in types)
    if unpaired == isinstance(pairs, RatedResponses):
        return
    named = "+".join(types)
    if unpaired:
        rule = (
            f"{named} takes rated responses (prompt, response, desirable), and the data are pairs"
        )
        hint = "Set data.unpair: true to rate their responses: chosen good, rejected bad."
    else:
        rule = f"{named} takes pairs, and the data are rated responses"
        hint = "Choose loss.type: kto."
    raise InputError(InputProblem("loss.type", rule, hint=hint))


def read_pairs(
    paths: Sequence[str],
    data: Data,
    progress: Progress,
    limit: int | None = None,
    key: str = "data.path",
) -> Pairs:
    """Read pairs as a configuration says; those of one built directory stay on disk."""
    if len(paths) == 1 and is_built(paths[0]):
        if data.columns:
            rule = f"has no effect on {paths[0]}, whose columns were named when it was built;"
            raise InputError(InputProblem("data.columns", f"{rule} set it to null."))
        if data.allow_truncated:
            rule = f"has no effect on {paths[0]}: the files of a built directory must be whole."
            raise InputError(InputProblem("data.allow_truncated", rule))
        if data.unpair:
            rule = f"has no effect on {paths[0]}: a built directory holds pairs; name their files"
            raise InputError(InputProblem("data.unpair", rule))
        stored = StoredPreferences.open(paths[0])
        progress.note(f"{len(stored):,} pairs in {len(stored.shards)} shards, built from:")
        progress.note(stored.report.summary())
        return stored if limit is None else stored.first(limit)
    with keys_for_arguments(paths=key):
        pairs = read_preferences(
            paths,
            format=data.format,
            on_error=data.on_error,
            limit=limit,
            columns=data.columns,
            data_dir=data.data_dir,
            allow_truncated=data.allow_truncated,
            feedback=data.feedback,
        )
    progress.note(pairs.report.summary())
    if data.unpair:
        if not isinstance(pairs, Preferences):
            kind = "rankings" if isinstance(pairs, Rankings) else "rated responses already"
            rule = f"has no effect: the data are {kind}; set it to false"
            raise InputError(InputProblem("data.unpair", rule))
        pairs = pairs.unpaired()
    if isinstance(pairs, RatedResponses):
        progress.note("{:,} desirable, {:,} undesirable responses.".format(*pairs.ratings))
    return pairs


def record_prompts(run: RunDirectory, pairs: Pairs) -> None:
    """Record which prompts a run trains on, by their hashes."""
    if run.writes and not (run.path / _PROMPTS).is_file():
        with replaced(run.path / _PROMPTS) as partial:
            np.save(partial, np.unique(pairs.prompt_hashes))


def count_trained_on(run: RunDirectory, pairs: Pairs) -> int:
    """Count the pairs whose prompts a run trained on; runs of earlier versions know of none."""
    if not (run.path / _PROMPTS).is_file():
        return 0
    return int(np.isin(pairs.prompt_hashes, np.load(run.path / _PROMPTS)).sum())


def texts_of(pairs: Pairs) -> Iterator[str]:
    """Yield what a tokenizer from scratch learns from: training pairs, of many on disk a sample."""
    if isinstance(pairs, StoredPreferences) and len(pairs) > TOKENIZER_PAIRS:
        pairs = pairs.select(np.linspace(0, len(pairs) - 1, TOKENIZER_PAIRS).astype(np.int64))
    for pair in pairs:
        yield from map(plain_text, (pair.prompt, *pair.responses))


def tokenize(
    data: Data,
    pairs: Pairs,
    policy: keras.Model,
    name: str,
    progress: Progress,
    run: RunDirectory,
) -> TokenizedPairs:
    """Tokenize pairs as the configuration says, and report what was cut and dropped.

    The run keeps the tokens of a built directory that cannot be written into; a trial always does.
    """
    from dpo_keras.batching import tokenize_pairs

    with keys_for_arguments(f"{name} pairs:"):
        tokenized = tokenize_pairs(
            pairs,
            policy.preprocessor,
            max_length=data.max_length,
            template=data.template,
            overlength=data.overlength,
            min_prompt_tokens=data.min_prompt_tokens,
            cache=_token_folder(pairs, data, run),
        )
    progress.note(f"{name}: {tokenized.report.summary()}")
    return tokenized


def _token_folder(pairs: Pairs, data: Data, run: RunDirectory) -> str | Path | None:
    if not isinstance(pairs, StoredPreferences):
        return None
    if run.temporary:
        return run.path / "tokens"
    kept_there = data.tokens is not None or os.access(pairs.path, os.W_OK)
    return data.tokens if kept_there else run.path / "tokens"
