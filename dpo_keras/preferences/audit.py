"""What a set of pairs looks like before anybody trains on it: sizes, repeats, biases."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.collection import (
    Preferences,
    Rankings,
    RatedResponses,
    hash64,
    prompt_bytes,
    text_bytes,
)
from dpo_keras.preferences.pair import PreferencePair, Text, plain_text
from dpo_keras.preferences.ranked_responses import RankedResponses
from dpo_keras.preferences.rated_response import RatedResponse
from dpo_keras.utils import JSON
from dpo_keras.utils.intervals import Estimate, wilson

PERCENTILES = (0, 10, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Audit:
    """The picture of a set of pairs; made by `audit`.

    Attributes:
        pairs: number of pairs.
        prompts: number of distinct prompts.
        ties: pairs with preference exactly 0.5.
        soft: pairs with a preference strictly between 0.5 and 1.
        zero_weight: pairs without influence on the loss.
        lengths: percentiles {"prompt" | "chosen" | "rejected": {"characters" | "words":
            {"mean": ..., "0": ..., "10": ..., "50": ...}}}.
        duplicates: (index, earlier index) of pairs that say the same again.
        contradictions: (index, earlier index) of pairs that say the opposite.
        longer_wins: share of pairs whose response with more characters is chosen, of those with
            different lengths that are no ties. About a half is unbiased; where it is far more,
            training learns length.
        first_wins: share of pairs whose response shown first is chosen; None where the source does
            not say which was first (`chosen`, `rejected` columns).
        annotators: pairs by annotator, most first; pairs without one are not counted.
        groups: pairs by group.
        with_images: pairs whose prompt has images.
    """

    pairs: int
    prompts: int
    ties: int
    soft: int
    zero_weight: int
    lengths: dict[str, dict[str, dict[str, float]]]
    duplicates: tuple[tuple[int, int], ...]
    contradictions: tuple[tuple[int, int], ...]
    longer_wins: Estimate
    first_wins: Estimate | None
    annotators: dict[str, int]
    groups: dict[str, int]
    with_images: int = 0

    def as_dict(self) -> dict[str, JSON]:
        """Return everything as plain values, for JSON.

        Shares have the keys `count` (successes), `total`, `share`, `low` and `high`.
        """
        values = asdict(self)
        for name in ("duplicates", "contradictions"):
            values[name] = [list(both) for both in values[name]]
        values["longer_wins"] = _share_dict(self.longer_wins)
        values["first_wins"] = self.first_wins and _share_dict(self.first_wins)
        return values

    def summary(self) -> str:
        """Return the picture as plain text."""
        lines = [
            f"{self.pairs:,} pairs on {self.prompts:,} prompts; {self.ties:,} ties, "
            f"{self.soft:,} soft preferences, {self.zero_weight:,} of weight 0"
        ]
        lines += [
            f"{name} {unit}: median {values['50']:.0f}, 90 % up to {values['90']:.0f}, "
            f"longest {values['100']:.0f}"
            for name, units in self.lengths.items()
            for unit, values in units.items()
        ]
        if self.with_images:
            lines.append(f"with images: {self.with_images:,}")
        lines.append(f"duplicates: {len(self.duplicates):,}")
        lines.append(f"contradictions: {len(self.contradictions):,}")
        lines.append(f"the longer response wins: {share_text(self.longer_wins)}")
        if self.first_wins is not None:
            lines.append(f"the first response wins: {share_text(self.first_wins)}")
        for name, counts in (("annotators", self.annotators), ("groups", self.groups)):
            if counts:
                listed = ", ".join(f"{key} {count:,}" for key, count in list(counts.items())[:10])
                more = f" and {len(counts) - 10:,} more" if len(counts) > 10 else ""
                lines.append(f"{name}: {listed}{more}")
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class RatedAudit:
    """The picture of a set of rated responses; made by `audit_rated`.

    Attributes:
        responses: number of rated responses.
        prompts: number of distinct prompts.
        desirable: responses with P(good) above 0.5.
        undesirable: responses with P(good) below 0.5.
        soft: responses with a P(good) strictly between 0 and 1.
        zero_weight: responses without influence on the loss.
        lengths: as in `Audit`, of `prompt` and `response`.
        duplicates: (index, earlier index) of responses that are rated the same again.
        contradictions: (index, earlier index) of responses that are rated the other way.
        median_characters: of the desirable and of the undesirable responses.
        annotators: responses by annotator, most first.
        groups: responses by group.
    """

    responses: int
    prompts: int
    desirable: int
    undesirable: int
    soft: int
    zero_weight: int
    lengths: dict[str, dict[str, dict[str, float]]]
    duplicates: tuple[tuple[int, int], ...]
    contradictions: tuple[tuple[int, int], ...]
    median_characters: tuple[float, float]
    annotators: dict[str, int]
    groups: dict[str, int]

    def as_dict(self) -> dict[str, JSON]:
        """Return everything as plain values, for JSON."""
        return asdict(self)


def audit_rated(rated: RatedResponses) -> RatedAudit:
    """Count and measure rated responses, and search them for what spoils training.

    Example:
        >>> one = RatedResponse("2 + 2 =", " 4", True)
        >>> picture = audit_rated(RatedResponses([one, RatedResponse("2 + 2 =", " 4", False)]))
        >>> picture.desirable, picture.undesirable, picture.contradictions
        (1, 1, ((1, 0),))
    """
    finder = RepeatFinder()
    for one in rated:
        finder.add(one)
    duplicates, contradictions = finder.find()
    desirable, undesirable = rated.ratings
    sides = ([one for one in rated if (one.desirable > 0.5) == good] for good in (True, False))
    medians = (
        float(np.median([len(plain_text(one.response)) for one in side] or [0])) for side in sides
    )
    return RatedAudit(
        responses=len(rated),
        prompts=len({(one.prompt, one.images) for one in rated}),
        desirable=desirable,
        undesirable=undesirable,
        soft=sum(0 < one.desirable < 1 for one in rated),
        zero_weight=sum(one.weight == 0 for one in rated),
        lengths={
            name: _lengths([getattr(one, name) for one in rated]) for name in ("prompt", "response")
        },
        duplicates=tuple(duplicates),
        contradictions=tuple(contradictions),
        median_characters=(next(medians), next(medians)),
        annotators=_counts(one.annotator for one in rated),
        groups=_counts(one.group for one in rated),
    )


def _successes(share: Estimate) -> int:
    return round((share.value or 0.0) * share.count)


def _share_dict(share: Estimate) -> dict[str, JSON]:
    shares = {"share": share.value, "low": share.low, "high": share.high}
    return {"count": _successes(share), "total": share.count, **shares}


def share_text(share: Estimate) -> str:
    """Return a share for people, with its counts and its interval."""
    if share.value is None or share.low is None or share.high is None:
        return "none to count"
    low, high = 100 * share.low, 100 * share.high
    interval = f"95 % interval {low:.1f} to {high:.1f} %"
    return f"{_successes(share):,} of {share.count:,} ({100 * share.value:.1f} %, {interval})"


def audit(pairs: Iterable[PreferencePair] | Rankings) -> Audit:
    """Count and measure pairs, and search them for what spoils training.

    Args:
        pairs: `Preferences`, or any pairs. `Rankings` are taken as all their pairs.

    Returns:
        An `Audit`; its indices are those of the pairs.

    Raises:
        InputError: if there are no pairs.

    Example:
        >>> longer, shorter = PreferencePair("Q", "Yes", "No"), PreferencePair("Q", "No", "Yes")
        >>> picture = audit([longer, shorter])
        >>> picture.contradictions, picture.longer_wins.value
        (((1, 0),), 0.5)
    """
    if isinstance(pairs, Rankings):
        pairs = pairs.as_pairs()
    known = pairs if isinstance(pairs, Preferences) else Preferences(pairs)
    if not known:
        raise InputError(InputProblem("pairs", "must hold at least one pair to audit, got none."))
    decided = [pair for pair in known if pair.preference > 0.5]
    sizes = [(len(plain_text(p.chosen)), len(plain_text(p.rejected))) for p in decided]
    unequal = [chosen > rejected for chosen, rejected in sizes if chosen != rejected]
    finder = RepeatFinder()
    for pair in known:
        finder.add(pair)
    duplicates, contradictions = finder.find()
    ordered = known.report.layouts["response_a/response_b"] or any(p.swapped for p in known)
    return Audit(
        pairs=len(known),
        prompts=len({(pair.prompt, pair.images) for pair in known}),
        ties=len(known) - len(decided),
        soft=sum(pair.preference < 1 for pair in decided),
        zero_weight=sum(pair.weight == 0 for pair in known),
        lengths={
            name: _lengths([getattr(pair, name) for pair in known])
            for name in ("prompt", "chosen", "rejected")
        },
        duplicates=tuple(duplicates),
        contradictions=tuple(contradictions),
        longer_wins=wilson(sum(unequal), len(unequal)),
        first_wins=wilson(sum(not p.swapped for p in decided), len(decided)) if ordered else None,
        annotators=_counts(pair.annotator for pair in known),
        groups=_counts(pair.group for pair in known),
        with_images=sum(bool(pair.images) for pair in known),
    )


class RepeatFinder:
    """Find duplicates and contradictions, from 16 bytes per pair instead of the pairs.

    A duplicate repeats all of an earlier pair. A contradiction prefers the other response, whoever
    the annotators were; a tie contradicts nothing. Two comparisons collide with probability 2⁻⁶⁴.
    """

    def __init__(self) -> None:
        self._said = array("Q")
        # The last bit tells which of the two is preferred.
        self._preferred = array("Q")
        self._ties: list[int] = []

    def add(self, pair: PreferencePair | RatedResponse | RankedResponses) -> None:
        """Note the next pair, rated response or ranking."""
        texts = list(map(text_bytes, pair.responses))
        comparison = hash64(prompt_bytes(pair), *sorted(texts))
        if isinstance(pair, RatedResponse):
            says, direction = pair.desirable, int(pair.desirable > 0.5)
        elif isinstance(pair, RankedResponses):
            # The order is what is said: another one of the same responses is no opposite.
            comparison = hash64(prompt_bytes(pair), *texts)
            says, direction = 0.5, 2
        else:
            says, direction = pair.preference, int(texts[0] < texts[1])
        if says == 0.5:
            self._ties.append(len(self._said))
            direction = 2
        preference = repr(float(says)).encode()
        by = bytes([direction, pair.annotator is None]) + (pair.annotator or "").encode()
        self._said.append(hash64(comparison.to_bytes(8, "little"), preference, by))
        self._preferred.append(comparison & ~1 | (direction & 1))

    def find(self) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
        """Return `(duplicates, contradictions)`, each as (index, index of the earlier pair)."""
        places = np.arange(len(self._said))
        said = np.array(self._said, np.uint64)
        _, first, number = np.unique(said, return_index=True, return_inverse=True)
        earlier = first[number]
        repeated = earlier != places
        duplicates = _tuples(places[repeated], earlier[repeated])

        decided = np.ones(len(said), bool)
        decided[self._ties] = False
        places = places[decided]
        preferred = np.array(self._preferred, np.uint64)[decided]
        values, first = np.unique(preferred, return_index=True)
        if not len(values):
            return duplicates, []
        opposite = preferred ^ np.uint64(1)
        found = np.minimum(np.searchsorted(values, opposite), len(values) - 1)
        other = places[first[found]]
        against = (values[found] == opposite) & (other < places)
        return duplicates, _tuples(places[against], other[against])


def _tuples(index: np.ndarray, earlier: np.ndarray) -> list[tuple[int, int]]:
    return list(zip(index.tolist(), earlier.tolist(), strict=True))


def _lengths(texts: Sequence[Text]) -> dict[str, dict[str, float]]:
    plain = [plain_text(text) for text in texts]
    counts = {"characters": list(map(len, plain)), "words": [len(text.split()) for text in plain]}
    return {
        unit: {"mean": float(np.mean(values))}
        | {str(place): float(np.percentile(values, place)) for place in PERCENTILES}
        for unit, values in counts.items()
    }


def _counts(names: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None).most_common())
