"""The mismatched responses that rated responses are laid out with."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import RatedResponse, Record


def check_one_kind(records: Sequence[Record]) -> bool:
    """Tell whether records are rated responses; refuse a mixture with pairs."""
    rated = sum(isinstance(record, RatedResponse) for record in records)
    if rated and rated < len(records):
        rule = f"must be of one kind, got {rated} rated responses among {len(records)} records"
        raise InputError(InputProblem("pairs", rule, hint="Preferences.unpaired() rates pairs."))
    return rated > 0


def mismatched(
    prompt: Ragged, response: Ragged, prompt_hash: np.ndarray, max_length: int
) -> Ragged:
    """Return a response to another prompt for each row, cut to the room that its prompt leaves.

    KTO's reference point is the mean log-ratio of such pairs (arXiv 2402.01306, section 4.1). The
    choice depends on the prompts alone: rows are sorted by the hash of their prompt, and each takes
    the response of a row behind its own prompt's.

    Raises:
        InputError: all rows have one prompt.
    """
    other = rows_of_other_prompts(prompt_hash)
    taken = response.take(other)
    room = max_length - prompt.lengths
    return taken.slice(np.zeros(len(taken), np.int64), np.minimum(taken.lengths, room))


def rows_of_other_prompts(prompt_hash: np.ndarray) -> np.ndarray:
    """Return for each row one of another prompt, int64 `[N]`; raise where there is none.

    Where every prompt has one row, each row is returned once.
    """
    count = len(prompt_hash)
    if not count:
        return np.zeros(0, np.int64)
    order = np.argsort(prompt_hash, kind="stable")
    _, begin, size = np.unique(prompt_hash[order], return_index=True, return_counts=True)
    if len(begin) == 1:
        rule = "must have two prompts at least: KTO compares responses with those to other prompts"
        raise InputError(InputProblem("pairs", rule, hint="Add rated responses to other prompts."))
    first, rows = np.repeat(begin, size), np.repeat(size, size)
    # From the end of the prompt's own rows on, and round again: never one of them.
    place = first + rows + (np.arange(count) - first) % (count - rows)
    other = np.zeros(count, np.int64)
    other[order] = order[place % count]
    return other
