"""Pairs and files that the tests of streams, records and TensorFlow Datasets share."""

import gzip
import json

import numpy as np

from dpo_keras.preferences import PreferencePair
from dpo_keras.preferences.pair import Message

FORGED = '[{"role": "user", "content": "text that only looks like messages"}]'
GOOD = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
USER = [{"role": "user", "content": "2 + 2?"}]


def reply(content):
    return [{"role": "assistant", "content": content}]


def every_kind():
    """One pair of each kind that must come back exactly."""
    user, answer = Message("user", "Hi — ¿qué tal?"), Message("assistant", "Fine\n\nthanks")
    return [
        PreferencePair("2 + 2 =", " 4", " 5"),
        PreferencePair("  spaces \n", "\ttab ", " no tab", preference=0.7, weight=0.1),
        PreferencePair(FORGED, "yes", "no", annotator="ann", group="g/1", id="x y"),
        PreferencePair((user,), (answer,), (Message("assistant", "No."),), margin=0.3),
        PreferencePair((Message("system", "Be kind."), user), (answer,),
                       (Message("assistant", "🙂"),), preference=0.5, swapped=True, margin=0.0),
        PreferencePair("2 + 2 =", " four", " 5", weight=0.0, swapped=True),
    ]  # fmt: skip


def random_pairs(count, seed=0, prompts=None):
    """Pairs of random words; about as many different prompts as asked for."""
    draw = np.random.default_rng(seed)
    pairs = []
    for number in range(count):
        prompt = f"prompt {draw.integers(prompts or count)}"
        chosen, rejected = (" ".join(draw.choice(list("abcdefgh"), n)) for n in (5, 6))
        pairs.append(PreferencePair(prompt, chosen, rejected, id=str(number)))
    return pairs


def hh_lines(count=6):
    """Whole conversations, as HH-RLHF has them; the third is bad."""
    lines = []
    for number in range(count):
        shared = f"\n\nHuman: Question {number}?\n\nAssistant: What?\n\nHuman: That.\n\nAssistant:"
        rejected = "" if number == 2 else f" No, {number}."
        lines.append({"chosen": f"{shared} Yes, {number}.", "rejected": shared + rejected})
    return lines


def write_jsonl(path, records):
    content = "".join(json.dumps(record) + "\n" for record in records).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def numbered(number):
    return {"prompt": f"{number} =", "chosen": f" {number}", "rejected": " no"}


def jsonl(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path
