"""The bundled support-desk pairs: a generator and a judge, whose ground truth is known.

A good reply is courteous, answers the question and invents nothing. Chosen responses have some of
these virtues, rejected ones fewer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeAlias, TypeVar

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences.collection import Preferences, Rankings
from dpo_keras.preferences.pair import PreferencePair
from dpo_keras.preferences.ranked_responses import RankedResponses
from dpo_keras.preferences.read_report import ReadReport


@dataclass(frozen=True, slots=True)
class Topic:
    """One kind of fact, as prompts tell it, questions ask for it and replies state it."""

    fact: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    values: tuple[str, ...]


TOPICS = {
    "colour": Topic("is {}", ("What colour is it?", "Which colour does it have?"),
        ("It comes in {}.", "The colour is {}."),
        ("red", "blue", "green", "black", "white", "grey", "pink", "brown")),
    "delivery": Topic("arrives on {}", ("When does it arrive?", "Which day does it come?"),
        ("It arrives on {}.", "The day is {}."),
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")),
    "price": Topic("costs {} euros", ("What does it cost?", "How much is it?"),
        ("It costs {} euros.", "The price is {} euros."),
        ("15", "20", "30", "45", "60", "75", "80", "95")),
    "warranty": Topic("has a warranty of {} years",
        ("How long is the warranty?", "What warranty does it have?"),
        ("It has {} years.", "The warranty is {} years."),
        ("two", "three", "four", "five", "six", "seven", "eight", "nine")),
    "material": Topic("is made of {}", ("What is it made of?", "Which material is it?"),
        ("It is made of {}.", "The material is {}."),
        ("oak", "pine", "steel", "glass", "wool", "cotton", "paper", "stone")),
    "city": Topic("ships from {}", ("Where does it ship from?", "Which city does it ship from?"),
        ("It ships from {}.", "The city is {}."),
        ("Paris", "Rome", "Oslo", "Madrid", "Lisbon", "Vienna", "Berlin", "Prague")),
}  # fmt: skip
ITEMS = ("lamp", "chair", "desk", "clock", "shelf", "bag", "box", "tray", "bowl", "vase")

# Polite and rude sentences have equal lengths, one by one: length must not tell.
POLITE = ("Thank you for asking.", "I am happy to help.", "Good question, thank you.",
          "Glad to help!")  # fmt: skip
RUDE = ("Stop wasting my time.", "Do not ask me again.", "What a stupid question.",
        "Not you again!")  # fmt: skip
HONEST_ENDINGS = ("That is all we know.", "The page has more.")
PROMISES = ("We add a free gift.", "You get cash back.")


def parse_prompt(prompt: str) -> tuple[dict[str, str], str]:
    """Return the facts of a support prompt by topic, and the topic that it asks for."""
    match = _PROMPT.fullmatch(prompt)
    facts = [_FACTS.get(fact) for fact in match.group(1, 2, 3)] if match else []
    asked = _QUESTIONS.get(match.group(4)) if match else None
    topics = {fact[0] for fact in facts if fact}
    if asked is None or None in facts or len(topics) != 3 or asked not in topics:
        must = (
            "must be one of support_pairs(): three facts, then a question about one of them, "
            f"got {prompt[:80]!r}."
        )
        raise InputError(InputProblem("prompt", must))
    return dict(fact for fact in facts if fact), asked


def _alternatives(texts: Sequence[str]) -> str:
    return "|".join(re.escape(text) for text in texts)


PHRASES = frozenset(POLITE + RUDE + HONEST_ENDINGS + PROMISES)
STATEMENTS = {
    statement.format(value): (name, value)
    for name, topic in TOPICS.items()
    for statement in topic.statements
    for value in topic.values
}
_FACTS = {
    topic.fact.format(value): (name, value)
    for name, topic in TOPICS.items()
    for value in topic.values
}
_QUESTIONS = {question: name for name, topic in TOPICS.items() for question in topic.questions}
REPLY = re.compile(
    f"(?:{_alternatives(POLITE + RUDE)}) (?:{_alternatives(tuple(STATEMENTS))})"
    f"(?: (?:{_alternatives(HONEST_ENDINGS + PROMISES)}))?"
)
_PROMPT = re.compile(
    rf"The (?:{_alternatives(ITEMS)}) ({_alternatives(tuple(_FACTS))}), "
    rf"({_alternatives(tuple(_FACTS))}) and ({_alternatives(tuple(_FACTS))})\.\n"
    rf"Question: ({_alternatives(tuple(_QUESTIONS))})\nReply:"
)

T = TypeVar("T")

Virtues: TypeAlias = tuple[bool, bool, bool]
"""Whether a response is courteous, answers, and invents nothing."""

# Virtues of a chosen response, with their shares.
_CHOSEN_VIRTUES: tuple[tuple[float, Virtues], ...] = (
    (0.79, (True, True, True)),
    (0.065, (True, True, False)),
    (0.065, (True, False, True)),
    (0.065, (False, True, True)),
    (0.005, (True, False, False)),
    (0.005, (False, True, False)),
    (0.005, (False, False, True)),
)
_SECOND_PAIR = 0.15  # the share of prompts that are asked about twice
_PROMISE = 0.4  # of the responses that invent, those that do it by a promise
_ENDING = 0.6  # responses with a last sentence, whether they invent or not


@dataclass(frozen=True, slots=True)
class Verdict:
    """What `judge` found in one response.

    Attributes:
        courteous: it has a polite sentence and no rude one.
        answers: it states the fact that was asked for.
        invents_nothing: it states something, every sentence is known, every value is the prompt's
            and nothing is promised. An empty or unreadable response gets no credit.
        parses: it is an opening, one statement and at most one last sentence, and nothing else.
    """

    courteous: bool
    answers: bool
    invents_nothing: bool
    parses: bool

    @property
    def preferred(self) -> bool:
        """Whether the response has all three virtues and the form of a reply."""
        return self.parses and self.courteous and self.answers and self.invents_nothing

    @property
    def virtues(self) -> int:
        """How many of the three virtues the response has."""
        return self.courteous + self.answers + self.invents_nothing

    def __float__(self) -> float:
        """Return a score: one for each virtue, and one for the form of a reply."""
        return float(self.virtues + self.parses)


def support_pairs(count: int = 4000, seed: int = 0) -> Preferences:
    """Generate support-desk preference pairs; the same arguments always give the same pairs.

    `group` is the kind of fact that the prompt asks for.

    Args:
        count: number of pairs, >= 1. Prompts are distinct, except that 15 % have two pairs.
        seed: seed of the generator. A larger count begins with the pairs of a smaller one.

    Returns:
        `Preferences` of `count` pairs with string prompts and responses.

    Raises:
        InputError: if count < 1.

    Example:
        >>> pair = support_pairs(3)[0]
        >>> print(pair.prompt)
        The ... Question: ...
        Reply:
        >>> judge(pair.prompt, pair.chosen).virtues > judge(pair.prompt, pair.rejected).virtues
        True
    """
    if count < 1:
        raise InputError(InputProblem("count", "must be >= 1", count))
    pairs = tuple(_generate(count, seed))
    return Preferences(pairs, ReadReport(sources=["builtin:support"], read=count, kept=count))


def support_rankings(count: int = 2000, seed: int = 0) -> Rankings:
    """Generate support-desk prompts with four replies each, ranked by their virtues: 3, 2, 1, 0.

    Args:
        count: number of prompts, all different, >= 1.
        seed: seed of the generator.

    Returns:
        `Rankings` without ties.

    Raises:
        InputError: if count < 1.

    Example:
        >>> ranked = support_rankings(3)[0]
        >>> [judge(ranked.prompt, response).virtues for response in ranked.responses]
        [3, 2, 1, 0]
    """
    if count < 1:
        raise InputError(InputProblem("count", "must be >= 1", count))
    rng = random.Random(seed)
    found: dict[str, RankedResponses] = {}
    while len(found) < count:
        facts, asked, prompt = _draw_prompt(rng)
        replies = [
            _draw_response(rng, facts, asked, _pick(rng, _WITH_VIRTUES[number]))
            for number in (3, 2, 1, 0)
        ]
        if prompt not in found:
            name = f"ranking-{len(found)}"
            found[prompt] = RankedResponses(
                prompt, tuple(replies), (1, 2, 3, 4), group=asked, id=name
            )
    report = ReadReport(sources=["builtin:support-rankings"], read=count, kept=count)
    return Rankings(found.values(), report)


def judge(prompt: str, response: str) -> Verdict:
    r"""Judge any text as a reply to a support prompt, strictly by the facts in that prompt.

    Args:
        prompt: a prompt of the form that `support_pairs` has.
        response: any text; space around it does not count.

    Returns:
        A `Verdict`. Text that the grammar does not know is never preferred.

    Raises:
        InputError: if the prompt is not of the support form.

    Example:
        >>> prompt = "The box is red, costs 20 euros and is made of oak.\n"
        >>> prompt += "Question: What colour is it?\nReply:"
        >>> judge(prompt, " Glad to help! The colour is red.").preferred
        True
        >>> judge(prompt, " Glad to help! The colour is pink.")
        Verdict(courteous=True, answers=True, invents_nothing=False, parses=True)
        >>> judge(prompt, " What a stupid question. It costs 20 euros.")
        Verdict(courteous=False, answers=False, invents_nothing=True, parses=True)
    """
    facts, asked = parse_prompt(prompt)
    text = response.strip()
    # Whatever follows the last full stop counts as a sentence, so cut-off text is not forgiven.
    sentences = [part.strip() for part in _SENTENCE.findall(text)]
    stated = [STATEMENTS[s] for s in sentences if s in STATEMENTS]
    known = all(s in STATEMENTS or s in PHRASES for s in sentences)
    return Verdict(
        courteous=any(s in POLITE for s in sentences) and not any(s in RUDE for s in sentences),
        answers=any(topic == asked for topic, _ in stated),
        invents_nothing=bool(stated)
        and known
        and all(facts.get(topic) == value for topic, value in stated)
        and not any(s in PROMISES for s in sentences),
        parses=REPLY.fullmatch(text) is not None,
    )


def _generate(count: int, seed: int) -> Iterator[PreferencePair]:
    # Only rng.random() is drawn from: Python promises its sequence, but not that of choice().
    rng = random.Random(seed)
    seen: set[str] = set()
    made = 0
    while made < count:
        facts, asked, prompt = _draw_prompt(rng)
        if prompt in seen:
            continue
        seen.add(prompt)
        responses: set[tuple[str, str]] = set()
        for _ in range(2 if rng.random() < _SECOND_PAIR else 1):
            virtues = _draw_chosen_virtues(rng)
            chosen = _draw_response(rng, facts, asked, virtues)
            lesser = _pick(rng, _LESSER[virtues])
            rejected = _draw_response(rng, facts, asked, lesser)
            if made == count or (chosen, rejected) in responses:
                continue
            responses.add((chosen, rejected))
            yield PreferencePair(prompt, chosen, rejected, group=asked, id=f"support-{made}")
            made += 1


def _draw_prompt(rng: random.Random) -> tuple[dict[str, str], str, str]:
    left = list(TOPICS)
    facts: dict[str, str] = {}
    for _ in range(3):
        topic = left.pop(int(rng.random() * len(left)))
        facts[topic] = _pick(rng, TOPICS[topic].values)
    asked = _pick(rng, tuple(facts))
    first, second, third = (TOPICS[topic].fact.format(value) for topic, value in facts.items())
    question = _pick(rng, TOPICS[asked].questions)
    item = _pick(rng, ITEMS)
    return facts, asked, f"The {item} {first}, {second} and {third}.\nQuestion: {question}\nReply:"


def _draw_chosen_virtues(rng: random.Random) -> Virtues:
    draw = rng.random()
    for share, virtues in _CHOSEN_VIRTUES:
        draw -= share
        if draw < 0:
            return virtues
    return _CHOSEN_VIRTUES[-1][1]


def _draw_response(rng: random.Random, facts: dict[str, str], asked: str, virtues: Virtues) -> str:
    """Return a response that has exactly these virtues, after one space."""
    courteous, answers, invents_nothing = virtues
    # The draws are the same whatever the virtues, so that wording gives nothing away.
    aside = _pick(rng, tuple(topic for topic in facts if topic != asked))
    ending = _pick(rng, range(len(PROMISES))) if rng.random() < _ENDING else None
    wrong = {
        topic: _pick(rng, tuple(v for v in TOPICS[topic].values if v != facts[topic]))
        for topic in (asked, aside)
    }
    opening, statement = _pick(rng, range(len(POLITE))), _pick(rng, range(2))
    by_promise = ending is not None and rng.random() < _PROMISE / _ENDING

    topic = asked if answers else aside
    promise = by_promise and not invents_nothing
    value = (facts if invents_nothing or promise else wrong)[topic]
    sentences = [
        (POLITE if courteous else RUDE)[opening],
        TOPICS[topic].statements[statement].format(value),
    ]
    if ending is not None:
        sentences.append((PROMISES if promise else HONEST_ENDINGS)[ending])
    return " " + " ".join(sentences)


def _pick(rng: random.Random, choices: Sequence[T]) -> T:
    return choices[int(rng.random() * len(choices))]


_BOTH = (False, True)
_LESSER = {
    virtues: tuple(
        lesser
        for lesser in product(_BOTH, _BOTH, _BOTH)
        if lesser != virtues
        and all(less <= more for less, more in zip(lesser, virtues, strict=True))
    )
    for _, virtues in _CHOSEN_VIRTUES
}
_WITH_VIRTUES = tuple(
    tuple(virtues for virtues in product(_BOTH, _BOTH, _BOTH) if sum(virtues) == number)
    for number in range(4)
)
_SENTENCE = re.compile(r"[^.!]*[.!]|[^.!]+$")
