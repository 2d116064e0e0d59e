"""Short hashes in place of texts: repeats and splits of pairs that no memory holds at once."""

from __future__ import annotations

import hashlib
import json
from array import array

import numpy as np

from dpo_keras.preferences.pair import PreferencePair, Text


def prompt_hash(prompt: Text) -> int:
    """Returns 64 bits that stand for a prompt: equal prompts always have equal ones.

    Example:
        >>> prompt_hash("Hi") == prompt_hash("Hi"), prompt_hash("Hi") == prompt_hash("Ho")
        (True, False)
    """
    return _hash(text_bytes(prompt))


def text_bytes(text: Text) -> bytes:
    """Returns a text or messages as bytes; two that differ never have the same.

    Example:
        >>> text_bytes("Hi")
        b'sHi'
    """
    if isinstance(text, str):
        return b"s" + text.encode()
    return b"m" + json.dumps([[turn.role, turn.content] for turn in text]).encode()


def held_out_rows(hashes: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Draws what is held out: every prompt by its own hash, so that order and size do not matter.

    held out where mix(hash XOR mix(seed)) < fraction · 2⁶⁴, mix being the finalizer of SplitMix64
    (Steele et al. 2014). A prompt that joins later changes nobody else's side.

    Args:
        hashes: uint64 `[N]` from `prompt_hash`.
        fraction: share of the prompts to hold out, in (0, 1).
        seed: another seed draws others.

    Returns:
        bool `[N]`, equal for equal hashes.

    Example:
        >>> held = held_out_rows(np.arange(10_000, dtype=np.uint64), 0.1)
        >>> bool(abs(held.mean() - 0.1) < 0.01)
        True
    """
    start = _mix(np.array([seed], np.uint64))
    return _mix(np.asarray(hashes, np.uint64) ^ start) < np.uint64(min(fraction, 1.0) * 2**64)


class RepeatFinder:
    """Finds what `find_repeats` finds, from 16 bytes per pair instead of the pairs.

    Two different comparisons count as one with a probability of 2⁻⁶⁴.

    Example:
        >>> finder = RepeatFinder()
        >>> one, other = PreferencePair("Hi", "Yes", "No"), PreferencePair("Hi", "No", "Yes")
        >>> for pair in (one, other, one):
        ...     finder.add(pair)
        >>> [list(map(tuple, found.tolist())) for found in finder.find()]
        [[(2, 0)], [(1, 0), (2, 1)]]
    """

    def __init__(self) -> None:
        self._said = array("Q")
        # The last bit tells which of the two is preferred.
        self._preferred = array("Q")
        self._ties: list[int] = []

    def add(self, pair: PreferencePair) -> None:
        """Notes the next pair."""
        prompt = text_bytes(pair.prompt)
        chosen, rejected = text_bytes(pair.chosen), text_bytes(pair.rejected)
        ordered = chosen < rejected
        sides = (chosen, rejected) if ordered else (rejected, chosen)
        comparison = _hash(prompt, *sides)
        tie = pair.preference == 0.5
        if tie:
            self._ties.append(len(self._said))
        direction = 2 if tie else int(ordered)
        annotator = (pair.annotator or "").encode()
        by = bytes([direction, pair.annotator is None]) + annotator
        self._said.append(
            _hash(comparison.to_bytes(8, "little"), repr(pair.preference).encode(), by)
        )
        self._preferred.append(comparison & ~1 | (direction & 1))

    def find(self) -> tuple[np.ndarray, np.ndarray]:
        """Returns `(duplicates, contradictions)`, int64 `[n, 2]`: index, index of the earlier."""
        places = np.arange(len(self._said))
        said = np.frombuffer(self._said, np.uint64) if self._said else np.zeros(0, np.uint64)
        _, first, number = np.unique(said, return_index=True, return_inverse=True)
        earlier = first[number] if len(said) else places
        repeated = np.flatnonzero(earlier != places)
        duplicates = np.stack([repeated, earlier[repeated]], axis=1)

        decided = np.ones(len(said), bool)
        decided[self._ties] = False
        places = places[decided]
        preferred = np.frombuffer(self._preferred, np.uint64)[decided] if len(said) else said
        values, first = np.unique(preferred, return_index=True)
        if not len(values):
            return duplicates, np.zeros((0, 2), np.int64)
        opposite = preferred ^ np.uint64(1)
        found = np.minimum(np.searchsorted(values, opposite), len(values) - 1)
        other = places[first[found]]
        against = np.flatnonzero((values[found] == opposite) & (other < places))
        return duplicates, np.stack([places[against], other[against]], axis=1)


def _hash(*parts: bytes) -> int:
    digest = hashlib.blake2b(digest_size=8)
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def _mix(values: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        values = values + np.uint64(0x9E3779B97F4A7C15)
        values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return values ^ (values >> np.uint64(31))
