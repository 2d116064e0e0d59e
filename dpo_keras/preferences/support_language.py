"""The words of the bundled support-desk data: what prompts and replies are made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from dpo_keras.errors import InputError


@dataclass(frozen=True, slots=True)
class Topic:
    """One kind of fact: how a prompt tells it, how it is asked for, how a reply states it."""

    fact: str
    questions: tuple[str, ...]
    statements: tuple[str, ...]
    values: tuple[str, ...]


TOPICS: dict[str, Topic] = {
    "colour": Topic(
        "is {}",
        ("What colour is it?", "Which colour does it have?"),
        ("It comes in {}.", "The colour is {}."),
        ("red", "blue", "green", "black", "white", "grey", "pink", "brown"),
    ),
    "delivery": Topic(
        "arrives on {}",
        ("When does it arrive?", "Which day does it come?"),
        ("It arrives on {}.", "The day is {}."),
        ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ),
    "price": Topic(
        "costs {} euros",
        ("What does it cost?", "How much is it?"),
        ("It costs {} euros.", "The price is {} euros."),
        ("15", "20", "30", "45", "60", "75", "80", "95"),
    ),
    "warranty": Topic(
        "has a warranty of {} years",
        ("How long is the warranty?", "What warranty does it have?"),
        ("It has {} years.", "The warranty is {} years."),
        ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    ),
    "material": Topic(
        "is made of {}",
        ("What is it made of?", "Which material is it?"),
        ("It is made of {}.", "The material is {}."),
        ("oak", "pine", "steel", "glass", "wool", "cotton", "paper", "stone"),
    ),
    "city": Topic(
        "ships from {}",
        ("Where does it ship from?", "Which city does it ship from?"),
        ("It ships from {}.", "The city is {}."),
        ("Paris", "Rome", "Oslo", "Madrid", "Lisbon", "Vienna", "Berlin", "Prague"),
    ),
}
ITEMS = ("lamp", "chair", "desk", "clock", "shelf", "bag", "box", "tray", "bowl", "vase")

# The two sides of each virtue stand in equal lengths, sentence by sentence: length must not tell.
POLITE = (
    "Thank you for asking.",
    "I am happy to help.",
    "Good question, thank you.",
    "Glad to help!",
)
RUDE = (
    "Stop wasting my time.",
    "Do not ask me again.",
    "What a stupid question.",
    "Not you again!",
)
HONEST_ENDINGS = ("That is all we know.", "The page has more.")
PROMISES = ("We add a free gift.", "You get cash back.")


def parse_prompt(prompt: str) -> tuple[dict[str, str], str]:
    r"""Reads a support prompt.

    Args:
        prompt: a prompt of `support_pairs`.

    Returns:
        The facts by topic, and the topic that is asked for.

    Raises:
        InputError: if the prompt is not of the support form.

    Example:
        >>> parse_prompt(
        ...     "The box is red, costs 20 euros and is made of oak.\nQuestion: What colour is it?"
        ...     "\nReply:"
        ... )
        ({'colour': 'red', 'price': '20', 'material': 'oak'}, 'colour')
    """
    match = _PROMPT.fullmatch(prompt)
    facts = [_FACTS.get(fact) for fact in match.group(1, 2, 3)] if match else []
    asked = _QUESTIONS.get(match.group(4)) if match else None
    topics = {fact[0] for fact in facts if fact}
    if asked is None or None in facts or len(topics) != 3 or asked not in topics:
        raise InputError(
            "prompt must be one of support_pairs(): three facts, then a question about one of "
            f"them, got {prompt[:80]!r}."
        )
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
