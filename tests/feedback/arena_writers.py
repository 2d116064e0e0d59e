"""Policies of the arena that write what they are told to, word by word, when they may."""

import contextlib
import threading

from feedback_browser import until

from dpo_keras.feedback import Settings, open_store
from dpo_keras.feedback.arena import Arena, Responder
from dpo_keras.feedback.arena_server import Turns


class Writer(Responder):
    """Answers `NAME: QUERY seed …`, a word at a time, while its gate is open."""

    def __init__(self, name="a", *, streams=True, varies=True, say=None):
        super().__init__({"policy": name, "temperature": 1.0}, streams=streams, varies=varies)
        self.name, self.say, self.batches = name, say or self.answer, []
        self.gate = threading.Event()
        self.gate.set()
        self.words = threading.Semaphore(0)  # a closed gate lets as many words through

    def answer(self, prompt, seed):
        return f"{self.name} says {seed if self.varies else 0} to {prompt[:40]}"

    def prepare(self, prompt):
        return prompt if isinstance(prompt, str) else " / ".join(turn.content for turn in prompt)

    def respond(self, prepared, seeds):
        self.batches.append(len(prepared))
        texts = [self.say(prompt, seed) for prompt, seed in zip(prepared, seeds, strict=True)]
        longest = max(len(text.split(" ")) for text in texts)
        for count in range(1, longest + 1):
            while not self.gate.wait(0.01):
                if self.words.acquire(timeout=0.01):
                    break
                yield 0, texts[0] and " ".join(texts[0].split(" ")[: count - 1]), False
            for number, text in enumerate(texts):
                words = text.split(" ")
                if count <= len(words):
                    yield number, " ".join(words[:count]), count == len(words)


@contextlib.contextmanager
def opened(folder, *writers, overlap=1, chance=None, **options):
    """A new arena, and its store."""
    settings = Settings(overlap=overlap, gold_share=0.0, repeat_share=0.0)
    store = open_store(folder / "arena.sqlite", settings, create=True, chance=chance)
    arena = Arena(store, writers, **options)
    try:
        yield arena
    finally:
        for writer in writers:
            writer.gate.set()
        arena.close()
        store.close()


def phase(arena, person, wanted):
    """Waits until a query is in a phase."""
    return until(lambda: (found := arena.snapshot(person)) and found.phase == wanted and found)


MESSAGES, FORM = Turns(messages=True), Turns(form="Q: {query}\nA:")
