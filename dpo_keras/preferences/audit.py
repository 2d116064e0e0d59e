"""What a set of pairs looks like before anybody trains on it: sizes, repeats, biases."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from dpo_keras.errors import InputError
from dpo_keras.preferences.collection import Preferences
from dpo_keras.preferences.pair import PreferencePair, Text, plain_text

PERCENTILES = (0, 10, 50, 90, 99, 100)


@dataclass(frozen=True, slots=True)
class Share:
    """How often something was so: `count` of `total`, with the 95 % Wilson interval.

    Example:
        >>> print(Share.of(80, 100))
        80 of 100 (80.0 %, 95 % interval 71.1 to 86.7 %)
    """

    count: int
    total: int
    share: float | None
    low: float | None
    high: float | None

    @classmethod
    def of(cls, count: int, total: int) -> Share:
        """Computes share and interval; None where there is nothing to count.

        centre = (p + z²/2n) / (1 + z²/n), half width = z·sqrt(p(1−p)/n + z²/4n²) / (1 + z²/n),
        z = 1.96 (Wilson 1927).
        """
        if not total:
            return cls(count, total, None, None, None)
        p, z = count / total, 1.959964
        shrink = 1 + z * z / total
        centre = (p + z * z / (2 * total)) / shrink
        half = z * math.sqrt(p * (1 - p) / total + z * z / (4 * total * total)) / shrink
        return cls(count, total, p, max(0.0, centre - half), min(1.0, centre + half))

    def __str__(self) -> str:
        """Returns the share as people read it."""
        if self.share is None or self.low is None or self.high is None:
            return "none to count"
        return (
            (
                f"{self.count:,} of {self.total:,} ({self.share:.1%}, "
                f"95 % interval {100 * self.low:.1f} to {self.high:.1%})"
            )
            .replace("%", " %")
            .replace("95  %", "95 %")
        )


@dataclass(frozen=True, slots=True)
class Audit:
    """The picture of a set of pairs; made by `audit`.

    Attributes:
        pairs: number of pairs.
        prompts: number of distinct prompts.
        ties: pairs with preference exactly 0.5.
        soft: pairs with a preference strictly between 0.5 and 1.
        zero_weight: pairs that do not count in the loss.
        lengths: percentiles {"prompt" | "chosen" | "rejected": {"characters" | "words":
            {"mean": ..., "0": ..., "10": ..., "50": ...}}}.
        duplicates: (index, earlier index) of pairs that say the same again.
        contradictions: (index, earlier index) of pairs that say the opposite.
        longer_wins: how often the response with more characters is chosen, where they differ and
            the pair is no tie. About a half is unbiased; far more, and length is what is learnt.
        first_wins: how often the response shown first is chosen; None where the source says
            nothing about who was first (`chosen`, `rejected` columns).
        annotators: pairs by annotator, most first; "none" has no key.
        groups: pairs by group.
    """

    pairs: int
    prompts: int
    ties: int
    soft: int
    zero_weight: int
    lengths: dict[str, dict[str, dict[str, float]]]
    duplicates: tuple[tuple[int, int], ...]
    contradictions: tuple[tuple[int, int], ...]
    longer_wins: Share
    first_wins: Share | None
    annotators: dict[str, int]
    groups: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        """Returns everything as plain values, for JSON."""
        values = asdict(self)
        for name in ("duplicates", "contradictions"):
            values[name] = [list(both) for both in values[name]]
        return values

    def summary(self) -> str:
        """Returns the picture as plain text."""
        lines = [
            f"{self.pairs:,} pairs on {self.prompts:,} prompts; {self.ties:,} ties, "
            f"{self.soft:,} soft preferences, {self.zero_weight:,} of weight 0"
        ]
        for name, units in self.lengths.items():
            for unit, values in units.items():
                lines.append(
                    f"{name} {unit}: median {values['50']:.0f}, "
                    f"90 % up to {values['90']:.0f}, longest {values['100']:.0f}"
                )
        lines.append(f"duplicates: {len(self.duplicates):,}")
        lines.append(f"contradictions: {len(self.contradictions):,}")
        lines.append(f"the longer response wins: {self.longer_wins}")
        if self.first_wins is not None:
            lines.append(f"the first response wins: {self.first_wins}")
        for name, counts in (("annotators", self.annotators), ("groups", self.groups)):
            if counts:
                listed = ", ".join(f"{key} {count:,}" for key, count in list(counts.items())[:10])
                more = f" and {len(counts) - 10:,} more" if len(counts) > 10 else ""
                lines.append(f"{name}: {listed}{more}")
        return "\n".join(lines)


def audit(pairs: Iterable[PreferencePair]) -> Audit:
    """Counts, measures and looks for what spoils training.

    Args:
        pairs: `Preferences`, or any pairs.

    Returns:
        An `Audit`; indices in it are those of the pairs.

    Raises:
        InputError: if there are no pairs.

    Example:
        >>> longer, shorter = PreferencePair("Q", "Yes", "No"), PreferencePair("Q", "No", "Yes")
        >>> picture = audit([longer, shorter])
        >>> picture.contradictions, picture.longer_wins.count
        (((1, 0),), 1)
    """
    known = pairs if isinstance(pairs, Preferences) else Preferences(pairs)
    if not known:
        raise InputError("pairs must hold at least one pair to audit, got none.")
    decided = [pair for pair in known if pair.preference > 0.5]
    sizes = [(len(plain_text(p.chosen)), len(plain_text(p.rejected))) for p in decided]
    unequal = [chosen > rejected for chosen, rejected in sizes if chosen != rejected]
    duplicates, contradictions = find_repeats(known)
    ordered = known.report.layouts["response_a/response_b"] or any(p.swapped for p in known)
    return Audit(
        pairs=len(known),
        prompts=len({pair.prompt for pair in known}),
        ties=len(known) - len(decided),
        soft=sum(pair.preference < 1 for pair in decided),
        zero_weight=sum(pair.weight == 0 for pair in known),
        lengths={
            name: _lengths([getattr(pair, name) for pair in known])
            for name in ("prompt", "chosen", "rejected")
        },
        duplicates=tuple(duplicates),
        contradictions=tuple(contradictions),
        longer_wins=Share.of(sum(unequal), len(unequal)),
        first_wins=Share.of(sum(not p.swapped for p in decided), len(decided)) if ordered else None,
        annotators=_counts(pair.annotator for pair in known),
        groups=_counts(pair.group for pair in known),
    )


def find_repeats(
    pairs: Sequence[PreferencePair],
) -> tuple[list[tuple[int, int]], list[tuple[int, int]]]:
    """Finds duplicates and contradictions.

    A duplicate has prompt, both responses, preference and annotator of an earlier pair. A
    contradiction has the prompt and responses of an earlier pair and prefers the other response,
    whoever the annotators were. A tie contradicts nothing.

    Args:
        pairs: the pairs, in order.

    Returns:
        `(duplicates, contradictions)`, each as (index, index of the earlier pair).

    Example:
        >>> one, other = PreferencePair("Hi", "Yes", "No"), PreferencePair("Hi", "No", "Yes")
        >>> find_repeats([one, other, one])
        ([(2, 0)], [(1, 0), (2, 1)])
    """
    said: dict[tuple[Any, ...], int] = {}
    preferred: dict[tuple[Text, Text, Text], int] = {}
    duplicates, contradictions = [], []
    for index, pair in enumerate(pairs):
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        tie = pair.preference == 0.5
        # The two sides of a tie have no order.
        sides = frozenset((chosen, rejected)) if tie else (chosen, rejected)
        earlier = said.setdefault((prompt, sides, pair.preference, pair.annotator), index)
        if earlier != index:
            duplicates.append((index, earlier))
        if tie:
            continue
        opposite = preferred.get((prompt, rejected, chosen))
        if opposite is not None:
            contradictions.append((index, opposite))
        preferred.setdefault((prompt, chosen, rejected), index)
    return duplicates, contradictions


def _lengths(texts: Sequence[Text]) -> dict[str, dict[str, float]]:
    plain = [plain_text(text) for text in texts]
    counts = {"characters": list(map(len, plain)), "words": [len(text.split()) for text in plain]}
    return {
        unit: {
            "mean": float(np.mean(values)),
            **{
                str(percentile): float(value)
                for percentile, value in zip(
                    PERCENTILES, np.percentile(values, PERCENTILES), strict=True
                )
            },
        }
        for unit, values in counts.items()
    }


def _counts(names: Iterable[str | None]) -> dict[str, int]:
    return dict(Counter(name for name in names if name is not None).most_common())
