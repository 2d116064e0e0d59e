"""Which pairs share a tree of a packed row: those of one prompt, and later turns that continue it.

Prompts are compared by 64-bit hashes of all their beginnings, two passes over their tokens in file
order, so that pairs on disk take a few bytes each in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dpo_keras.batching.forests import SortedTexts
from dpo_keras.batching.ragged import Ragged, places
from dpo_keras.batching.tokenized_pairs import TokenizedPairs
from dpo_keras.utils.bin_packing import Sizes

_LEAST_PREFIX = 8  # tokens; a shorter prompt, such as a start token alone, is continued by anything
_LEAST_SAVING = 1 / 8  # of the tokens of its pairs, or pairs are packed apart
_CHUNK = 1024  # pairs whose tokens are in memory at a time
_BASE = 0x9E3779B97F4A7C15


@dataclass(frozen=True)
class PromptTrees:
    """The trees that pairs form.

    Args:
        of_pairs: int32 `[N]`, the tree of each pair, numbered by their first pairs.
        sizes: what each of the trees takes of a row.
    """

    of_pairs: np.ndarray
    sizes: Sizes

    def pairs_of(self, trees: np.ndarray) -> np.ndarray:
        """Return the pairs of some trees, end to end, in file order within a tree."""
        order = np.argsort(self.of_pairs, kind="stable")
        counts = self.sizes.pairs
        return order[places((np.cumsum(counts) - counts)[trees], counts[trees])]


def lone_pairs(tokenized: TokenizedPairs, share: bool = True) -> PromptTrees:
    """Return a tree for each pair; with `share`, what its responses have in common counts once."""
    numbers = np.arange(len(tokenized))
    tokens, responses = tokenized.tree_tokens, tokenized.response_tokens
    for rows in _chunks(numbers) if share else ():
        parts = [part.take(rows) for part in tokenized.parts]
        if tokenized.others:
            texts = SortedTexts.of(parts, 0, np.arange(len(rows)))
            tokens[rows] = np.bincount(texts.tree, texts.added, len(rows))
            responses[rows] = np.bincount(texts.tree, texts.scored, len(rows))
            continue
        _, chosen, rejected = parts
        shared = _common_prefix(chosen, rejected)
        same = (shared == chosen.lengths) & (shared == rejected.lengths)
        tokens[rows] -= shared
        responses[rows] -= np.where(same, shared, 0)
    return PromptTrees(numbers.astype(np.int32), Sizes(tokens, responses, np.ones_like(tokens)))


def prompt_trees(
    tokenized: TokenizedPairs, most_tokens: int, most_pairs: int, lone: PromptTrees
) -> PromptTrees:
    """Put pairs together whose prompts are equal, or continue another pair's prompt.

    Trees of more than `most_tokens` tokens or `most_pairs` pairs are halved, until they are not.
    Pairs that save hardly any token stay alone.

    Args:
        tokenized: N pairs.
        most_tokens: tokens of a tree.
        most_pairs: pairs of a tree.
        lone: from `lone_pairs`.

    Returns:
        The trees, the same for the same arguments.
    """
    if most_pairs < 2:
        return lone
    first = lone.of_pairs.astype(np.int64)  # the first pair of each pair's tree
    tokens, responses = lone.sizes.tokens.copy(), lone.sizes.responses.copy()
    waiting = _groups(_shortest_beginnings(tokenized.prompt))
    while waiting:
        halves = []
        for groups in _together(waiting):
            pairs = np.concatenate(groups)
            number = np.repeat(np.arange(len(groups)), list(map(len, groups)))
            texts = SortedTexts.of([part.take(pairs) for part in tokenized.parts], 0, number)
            size = np.bincount(texts.tree, texts.added, len(groups)).astype(np.int64)
            scored = np.bincount(texts.tree, texts.scored, len(groups)).astype(np.int64)
            for group, most, answers in zip(groups, size, scored, strict=True):
                if len(group) > most_pairs or most > most_tokens:
                    half = (len(group) + 1) // 2
                    halves += [part for part in (group[:half], group[half:]) if len(part) > 1]
                elif most <= (1 - _LEAST_SAVING) * lone.sizes.tokens[group].sum():
                    first[group] = group.min()
                    tokens[group.min()], responses[group.min()] = most, answers
        waiting = halves
    begins, of_pairs, counts = np.unique(first, return_inverse=True, return_counts=True)
    return PromptTrees(of_pairs.astype(np.int32), Sizes(tokens[begins], responses[begins], counts))


def _chunks(numbers: np.ndarray) -> Iterator[np.ndarray]:
    return (numbers[begin : begin + _CHUNK] for begin in range(0, len(numbers), _CHUNK))


def _together(groups: list[np.ndarray]) -> Iterator[list[np.ndarray]]:
    """Divide groups of pairs into lists of about `_CHUNK` pairs."""
    found: list[np.ndarray] = []
    for group in groups:
        if found and sum(map(len, found)) + len(group) > _CHUNK:
            yield found
            found = []
        found.append(group)
    yield found


def _groups(keys: np.ndarray) -> list[np.ndarray]:
    """Return the pairs of each key that several have, at most `_CHUNK` of them."""
    order = np.argsort(keys, kind="stable")
    ends = np.flatnonzero(np.diff(keys[order])) + 1
    begins = np.concatenate([[0], ends])
    ends = np.append(ends, len(keys))
    several = ends - begins > 1
    groups = (order[b:e] for b, e in zip(begins[several], ends[several], strict=True))
    parts = (part for group in groups for part in _chunks(group))
    return [part for part in parts if len(part) > 1]


def _shortest_beginnings(prompts: Ragged) -> np.ndarray:
    """Hash of the shortest prompt of any pair that each prompt begins with: uint64 `[N]`."""
    numbers = np.arange(len(prompts))
    whole = np.zeros(len(prompts), np.uint64)
    for rows in _chunks(numbers):
        hashes, taken = _prefix_hashes(prompts, rows)
        whole[rows] = hashes[taken.row_splits[1:] - 1]
    known = np.unique(whole)
    # Most beginnings are nobody's prompt, which a table of a few bits of the hash tells at once.
    shift = np.uint64(64 - max(len(known) * 16 - 1, 1).bit_length())
    table = np.zeros(1 << (64 - int(shift)), bool)
    table[known >> shift] = True
    shortest = whole.copy()
    for rows in _chunks(numbers):
        hashes, taken = _prefix_hashes(prompts, rows)
        maybe = np.flatnonzero(table[hashes >> shift])
        found = np.searchsorted(known, hashes[maybe])
        maybe = maybe[known[np.minimum(found, len(known) - 1)] == hashes[maybe]]
        owner = np.searchsorted(taken.row_splits, maybe, side="right") - 1
        long = maybe - taken.row_splits[owner] >= _LEAST_PREFIX - 1
        owners, at = np.unique(owner[long], return_index=True)
        shortest[rows[owners]] = hashes[maybe[long][at]]
    return shortest


def _prefix_hashes(prompts: Ragged, rows: np.ndarray) -> tuple[np.ndarray, Ragged]:
    """Return a hash of each token with all before it in its prompt, uint64, and the prompts."""
    taken = prompts.take(rows)
    depth = np.arange(len(taken.flat_values)) - np.repeat(taken.row_splits[:-1], taken.lengths)
    # Sums modulo 2^64 of numbers that stand for (token, place); wrapping around is intended.
    mixed = (taken.flat_values.astype(np.uint64) << np.uint64(32)) + depth.astype(np.uint64)
    for shift in (30, 27, 31):
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(_BASE)
    sums = np.concatenate([np.zeros(1, np.uint64), np.cumsum(mixed, dtype=np.uint64)])
    return sums[1:] - np.repeat(sums[taken.row_splits[:-1]], taken.lengths), taken


def _common_prefix(one: Ragged, other: Ragged) -> np.ndarray:
    """Return how many tokens two rows have in common at their beginning, int64 `[rows]`."""
    least, zeros = np.minimum(one.lengths, other.lengths), np.zeros(len(one), np.int64)
    left, right = one.slice(zeros, least), other.slice(zeros, least)
    begins = left.row_splits[:-1]
    differs = np.flatnonzero(left.flat_values != right.flat_values)
    first = np.append(differs, left.row_splits[-1])[np.searchsorted(differs, begins)]
    return np.minimum(first - begins, least)
