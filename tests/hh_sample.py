"""Invented conversations in the layout of HH-RLHF: prompts stand only inside the two columns.

Tests of several stages read them in place of the real data, and meet the same traits: several
turns, lengths from a few words to thousands of characters, replies that begin alike, and two kinds
of broken lines at known places.
"""

import gzip
import json
import random

# Line numbers that these divide are broken; lines that both divide have an empty reply.
EMPTY_REPLY, DIFFERING_OPENINGS = 211, 331

THINGS = (
    "a bicycle", "sourdough bread", "a garden shed", "the night train", "a paper kite", "tomatoes",
    "an old radio", "a chess club", "my bookshelf", "a rain barrel", "the school play", "a canoe",
    "wool socks", "a birthday cake", "the town library", "a bird feeder", "a guitar", "porridge",
    "a tent", "the tram", "an apple tree", "a wooden spoon", "a puzzle", "the harbour", "a lantern",
)  # fmt: skip
WAYS = (
    "on a Sunday", "without any tools", "for ten people", "in winter", "with my sister", "by hand",
    "before noon", "for less than twenty euros", "in a small flat", "near the sea", "with children",
    "after the holidays", "for the first time", "on a wet day", "in half an hour", "with a friend",
)  # fmt: skip
QUESTIONS = (
    "How do I look after {} {}?", "What should I know about {} {}?", "Can you help me with {} {}?",
    "Is it hard to share {} {}?", "Why do people like {} {}?", "Where would I find {} {}?",
    "Which mistakes do people make with {} {}?", "How would you explain {} {}?",
)  # fmt: skip
ADVICE = (
    "You could start with {} {}.", "Many people begin with {} {}, and it goes well.",
    "I would not worry about {} {}.", "It helps to write down what you need for {} {}.",
    "Ask a neighbour who knows about {} {}.", "Take your time with {} {}.",
    "There is a good book on {} {} in most libraries.", "Try it once, then think of {} {} again.",
    "That depends on {} {}.", "Measure twice before you touch {} {}.",
)  # fmt: skip


def hh_conversations(count: int, seed: int = 0) -> list[dict[str, str]]:
    """Return `count` records with the columns `chosen` and `rejected`, no prompt twice."""
    rng = random.Random(seed)
    opened: set[str] = set()
    records: list[dict[str, str]] = []
    while len(records) < count:
        opening = _opening(rng)
        if opening in opened:
            continue
        opened.add(opening)
        records.append(_record(rng, opening, line=len(records) + 1))
    return records


def write_hh_sample(path, count: int = 2312, seed: int = 0):
    """Write conversations as gzipped JSON Lines and return the path."""
    lines = (json.dumps(record) + "\n" for record in hh_conversations(count, seed))
    path.write_bytes(gzip.compress("".join(lines).encode(), mtime=0))
    return path


def _record(rng: random.Random, opening: str, line: int) -> dict[str, str]:
    # The better reply is a little shorter on average, as in the real data.
    chosen, rejected = _reply(rng, 0.74), _reply(rng, 0.78)
    while chosen == rejected:
        rejected = _reply(rng, 0.78)
    if rng.random() < 0.1:
        chosen, rejected = (f" I am glad that you ask.{reply}" for reply in (chosen, rejected))
    other_opening = opening
    if line % EMPTY_REPLY == 0:
        rejected = ""
    elif line % DIFFERING_OPENINGS == 0:
        other_opening = f"\n\nHuman: {_question(rng)} Please.\n\nAssistant:"
    return {"chosen": opening + chosen, "rejected": other_opening + rejected}


def _opening(rng: random.Random) -> str:
    turns = [f"\n\nHuman: {_question(rng)}"]
    while rng.random() < 0.6 and len(turns) < 8:
        turns.append(f"\n\nAssistant:{_reply(rng, 0.6)}\n\nHuman: {_question(rng)}")
    return "".join(turns) + "\n\nAssistant:"


def _question(rng: random.Random) -> str:
    return _filled(rng, QUESTIONS)


def _reply(rng: random.Random, more: float) -> str:
    """Return sentences; each is followed by another with the probability `more`."""
    sentences = [_filled(rng, ADVICE)]
    while rng.random() < more and len(sentences) < 30:
        sentences.append(_filled(rng, ADVICE))
    return " " + " ".join(sentences)


def _filled(rng: random.Random, sentences: tuple[str, ...]) -> str:
    return rng.choice(sentences).format(rng.choice(THINGS), rng.choice(WAYS))
