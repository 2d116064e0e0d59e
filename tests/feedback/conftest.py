"""Stores with a clock that tests turn, and a seeded order."""

import random

import pytest
from feedback_rounds import Clock, candidates

from dpo_keras.feedback import Settings, open_store


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def make_store(tmp_path, clock):
    """A store of `count` pairs; options are those of `Settings`."""
    opened = []

    def make(count=4, *, name="feedback.sqlite", given=None, **options):
        options = {"gold_share": 0.0, "repeat_share": 0.0, **options}
        store = open_store(
            tmp_path / name, Settings(**options), create=True, clock=clock, chance=random.Random(0)
        )
        store.add(candidates(count) if given is None else given)
        opened.append(store)
        return store

    yield make
    for store in opened:
        store.close()


@pytest.fixture
def people():
    """Adds people by name and gives their ids."""
    return lambda store, *names: [store.add_annotator(name)[0].id for name in names]
