"""Which pairs are held out: whole prompts (annotators, groups), drawn by a seeded hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence

from dpo_keras.errors import InputError
from dpo_keras.preferences.schema import PreferencePair, as_number

SPLIT_KEYS = ("prompt", "annotator", "group")


def split_indices(
    pairs: Sequence[PreferencePair], fraction: float, *, seed: int = 0, by: str = "prompt"
) -> list[int]:
    """Returns the indices of the pairs to hold out.

    Args:
        pairs: the pairs to split.
        fraction: share of them to hold out, in (0, 1).
        seed: seeds the hash.
        by: "prompt", "annotator" or "group": what is never on both sides, besides prompts.

    Returns:
        Ascending indices; their number is as near to `fraction * len(pairs)` as the units allow.

    Raises:
        InputError: as `Preferences.split` says.

    Example:
        >>> pairs = [PreferencePair(f"prompt {n // 2}", "yes", "no") for n in range(8)]
        >>> split_indices(pairs, 0.25, seed=1)  # the two pairs of one prompt
        [6, 7]
    """
    number = as_number(fraction)
    if number is None or not 0 < number < 1:
        raise InputError(f"fraction must be a number in (0, 1), got {fraction!r}.")
    if by not in SPLIT_KEYS:
        raise InputError(f"by must be one of {', '.join(SPLIT_KEYS)}, got {by!r}.")
    units = _units(pairs, by)
    target = number * len(pairs)
    held: list[int] = []
    passed_over: list[list[int]] = []
    for _, unit in sorted((_unit_hash(pairs, unit, seed), unit) for unit in units):
        if len(unit) <= target - len(held):
            held += unit
        else:
            passed_over.append(unit)
    for unit in passed_over:
        if len(unit) < 2 * (target - len(held)):  # too large, but nearer with it than without
            held += unit
    if not held or len(held) == len(pairs):
        raise InputError(_empty_side(pairs, number, by, len(units), not held))
    return sorted(held)


def _units(pairs: Sequence[PreferencePair], by: str) -> list[list[int]]:
    """Groups indices that must stay together: those with one prompt, or one value of `by`."""
    parent: dict[object, object] = {}

    def root(key: object) -> object:
        while (above := parent.setdefault(key, key)) != key:
            parent[key] = parent[above]
            key = above
        return key

    missing = 0
    for pair in pairs:
        prompt_root = root(("prompt", pair.prompt))
        if by != "prompt":
            value = getattr(pair, by)
            missing += value is None
            parent[root((by, value))] = prompt_root
    if missing:
        raise InputError(
            f"by={by!r} needs {by} set on every pair; {missing:,} of {len(pairs):,} have none."
        )
    units: dict[object, list[int]] = {}
    for index, pair in enumerate(pairs):
        units.setdefault(root(("prompt", pair.prompt)), []).append(index)
    return list(units.values())


def _unit_hash(pairs: Sequence[PreferencePair], unit: list[int], seed: int) -> str:
    # The least prompt stands for the unit, so the order of the pairs changes nothing.
    prompt = min(
        json.dumps(text if isinstance(text, str) else [m.as_dict() for m in text])
        for text in (pairs[index].prompt for index in unit)
    )
    return hashlib.sha256(f"{seed}:{prompt}".encode()).hexdigest()


def _empty_side(
    pairs: Sequence[PreferencePair], fraction: float, by: str, units: int, held_empty: bool
) -> str:
    count = f"{len(pairs):,} pair{'s' if len(pairs) != 1 else ''}"
    if units < 2:
        reason = (
            f"all {count} have one prompt"
            if by == "prompt"
            else f"every {by} shares prompts with the others; split by='prompt' instead"
        )
        return f"Cannot split {count} so that no prompt is on both sides: {reason}."
    side = "held-out" if held_empty else "training"
    return (
        f"fraction {fraction:g} of {count} in {units:,} units (pairs that share a prompt"
        f"{'' if by == 'prompt' else ' or ' + by} stay together) leaves the {side} side empty; "
        "choose another fraction."
    )
