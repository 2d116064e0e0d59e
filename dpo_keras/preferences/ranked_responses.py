"""The record of a ranking: several responses to one prompt, from the best to the worst."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.images import Image
from dpo_keras.preferences.pair import (
    Fault,
    InvalidPair,
    PreferencePair,
    Text,
    as_number,
    broken,
    form_faults,
    name_faults,
    number_faults,
    offered_tools,
    plain_text,
    shown,
)
from dpo_keras.utils import JSON

MOST = 32  # responses of a ranking
EXPANSIONS = ("all_pairs", "best_against_rest")


@dataclass(frozen=True, slots=True)
class RankedResponses:
    """Responses to a prompt, ranked; they are kept in the order from the best to the worst.

    Args:
        prompt: text, or the conversation so far as messages.
        responses: 2 to 32 texts, or messages of the assistant, in any order.
        ranking: the rank of each response, 1 for the best: the numbers 1 to K, each once.
        scores: in its place, a number for each response, higher for better. Equal scores tie.
        weight: how much the ranking counts in the loss, in [0, 1e6].
        annotator: who ranked.
        group: what the ranking belongs to.
        id: name of the ranking in reports.

    Raises:
        InvalidPair: (an `InputError`) with every broken rule.

    Example:
        >>> ranked = RankedResponses("2 + 2 =", (" 5", " 4", " four"), ranking=(3, 1, 2))
        >>> ranked.responses, ranked.ranking
        ((' 4', ' four', ' 5'), (1, 2, 3))
        >>> RankedResponses("2 + 2 =", (" 4", " 5"), ranking=(1, 1))
        Traceback (most recent call last):
        ...
        dpo_keras.preferences.pair.InvalidPair: ranking must hold each rank from 1 to 2 once...
    """

    prompt: Text
    responses: tuple[Text, ...]
    ranking: tuple[int, ...] = ()
    scores: tuple[float, ...] | None = None
    weight: float = 1.0
    annotator: str | None = None
    group: str | None = None
    id: str | None = None

    def __post_init__(self) -> None:
        ranking, scores = self.ranking or None, self.scores
        if ranking and isinstance(scores, tuple) and all(isinstance(s, float) for s in scores):
            # `dataclasses.replace` gives both.
            ranking = None if ranking == _ranks(scores) else ranking
        faults = ranking_faults(self.prompt, self.responses, ranking, self.scores)
        faults += number_faults(1.0, self.weight, None, lowest=0.5)
        for name in ("annotator", "group", "id"):
            faults += name_faults(name, getattr(self, name))
        if faults:
            raise InvalidPair(faults)
        goodness = [-float(rank) for rank in self.ranking]
        if self.scores is not None:
            goodness = [float(score) for score in self.scores]
        order = sorted(range(len(goodness)), key=lambda place: -goodness[place])
        ranks = _ranks(goodness)
        object.__setattr__(self, "responses", tuple(self.responses[place] for place in order))
        object.__setattr__(self, "ranking", tuple(ranks[place] for place in order))
        if self.scores is not None:
            object.__setattr__(self, "scores", tuple(goodness[place] for place in order))

    @property
    def has_ties(self) -> bool:
        """Whether two responses have the same rank."""
        return len(set(self.ranking)) < len(self.ranking)

    @property
    def preference(self) -> float:
        """1: the first response is better than the second, as far as the order tells."""
        return 1.0

    @property
    def margin(self) -> None:
        """No margin: a ranking has an order only."""

    @property
    def images(self) -> tuple[Image, ...]:
        """No images: rankings are of text."""
        return ()

    @property
    def tools(self) -> list[JSON]:
        """The tools that the prompt offers, as JSON schemas."""
        return offered_tools(self.prompt)

    def pairs(self, expansion: str = "all_pairs") -> list[PreferencePair]:
        """Return the ranking as pairs, whose weights add up to that of the ranking.

        The loss of the ranking is then the mean of the pairs' losses. Ties have preference 0.5.

        Args:
            expansion: "all_pairs", every two responses; or "best_against_rest".

        Example:
            >>> ranked = RankedResponses("2 + 2 =", (" 4", " 5", " 6"), scores=(1, 0, 0))
            >>> [(p.chosen, p.rejected, p.preference) for p in ranked.pairs()]
            [(' 4', ' 5', 1.0), (' 4', ' 6', 1.0), (' 5', ' 6', 0.5)]
        """
        if expansion not in EXPANSIONS:
            rule = f"must be one of {', '.join(EXPANSIONS)}"
            raise InputError(InputProblem("expansion", rule, expansion))
        places = list(itertools.combinations(range(len(self.responses)), 2))
        if expansion == "best_against_rest":
            places = [(0, other) for other in range(1, len(self.responses))]
        return [
            PreferencePair(
                self.prompt,
                self.responses[one],
                self.responses[other],
                preference=0.5 if self.ranking[one] == self.ranking[other] else 1.0,
                weight=self.weight / len(places),
                annotator=self.annotator,
                group=self.group,
                id=self.id,
            )
            for one, other in places
        ]

    def as_dict(self) -> dict[str, JSON]:
        """Return the ranking as a record for files: messages as dicts, defaults left out."""

        def written(text: Text) -> JSON:
            return text if isinstance(text, str) else [turn.as_dict() for turn in text]

        record: dict[str, JSON] = {"prompt": written(self.prompt)}
        if self.tools:
            record["tools"] = record["prompt"][0].pop("tools")
        record["responses"] = [written(response) for response in self.responses]
        kept = "ranking" if self.scores is None else "scores"
        record[kept] = list(getattr(self, kept))
        for field in fields(self):
            given = field.name not in ("ranking", "scores", *record)
            if given and (value := getattr(self, field.name)) != field.default:
                record[field.name] = value
        return record


def as_pairs(
    rankings: Iterable[RankedResponses], expansion: str = "all_pairs"
) -> list[PreferencePair]:
    """Return rankings as pairs, for objectives of pairs; see `RankedResponses.pairs`."""
    return [pair for ranked in rankings for pair in ranked.pairs(expansion)]


def ranking_faults(
    prompt: Text, responses: Sequence[Text], ranking: object, scores: object
) -> list[Fault]:
    """Check a prompt, its responses and their ranking or scores; return the broken rules."""
    count = len(responses)
    names = ["prompt", *(f"response {number + 1}" for number in range(count))]
    faults = form_faults((prompt, *responses), names)
    if not 2 <= count <= MOST:
        must = f"must be 2 to {MOST} responses, got {count}."
        faults.append(broken("number of responses", "responses", count, must))
    faults += _repeats(responses)
    if (ranking is None) == (scores is None):
        got = "neither" if ranking is None else "both"
        must = f"must be given, or scores in its place, got {got}."
        return [*faults, broken("ranking or scores", "ranking", None, must)]
    name, values = ("ranking", ranking) if scores is None else ("scores", scores)
    if not isinstance(values, Sequence) or isinstance(values, str) or len(values) != count:
        length = len(values) if isinstance(values, Sequence) and not isinstance(values, str) else 0
        got = f"{length} numbers" if length else shown(values)
        must = f"must have a number for each of the {count} responses, got {got}."
        return [*faults, broken("another length", name, values, must)]
    numbers = [as_number(value) for value in values]
    if name == "ranking" and sorted(numbers, key=lambda n: n or 0) != list(range(1, count + 1)):
        must = f"must hold each rank from 1 to {count} once, got {shown(list(values))}."
        hint = " Ties need scores." if len(set(numbers)) < count else ""
        faults.append(broken("no ranking", name, values, must + hint))
    if name == "scores" and not all(n is not None and math.isfinite(n) for n in numbers):
        must = f"must be finite numbers, got {shown(list(values))}."
        faults.append(broken("no numbers", name, values, must))
    return faults


def _ranks(goodness: Sequence[float]) -> tuple[int, ...]:
    """Return the rank of each number, 1 for the largest."""
    return tuple(1 + sum(other > one for other in goodness) for one in goodness)


def _repeats(responses: Sequence[Text]) -> list[Fault]:
    """Return a fault where two responses are the same text."""
    seen: dict[object, int] = {}
    for number, response in enumerate(responses, 1):
        text = response.strip() if isinstance(response, str) else response
        if text in seen:
            what = f"{seen[text]} and {number} are the same text, {shown(plain_text(response))}"
            must = f"{what}, so neither can be better."
            return [broken("identical responses", "responses", response, must)]
        seen[text] = number
    return []
