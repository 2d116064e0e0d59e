"""Stores with a clock that tests turn, and a seeded order; people at their page."""

import random

import pytest
from feedback_browser import Page, browsing, served
from feedback_http import Person
from feedback_rounds import Clock, candidates

from dpo_keras.feedback import Candidates, Response, Settings, open_store
from dpo_keras.feedback.quality import overview

GUIDELINES = "# What counts\n\nPrefer the response that is **right**, then the clearer one."


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


@pytest.fixture
def store(make_store):
    """A store of four pairs."""
    return make_store(4)


@pytest.fixture
def ann(store):
    """Somebody who is signed in there."""
    return Person(store, "ann", guidelines="Be **kind**.")


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as driver:
        yield driver


@pytest.fixture
def questions(make_store):
    """A store of questions whose answers are in Markdown."""
    given = [
        Candidates(
            f"Question {n}: what is **{n}** + 1?",
            (
                Response(f"The answer is {n + 1}.\n\n- one\n- two"),
                Response(f"The answer is surely {n + 2}, I *think*.\n\n```\nprint({n} + 2)\n```"),
            ),
        )
        for n in range(12)
    ]
    return make_store(given=given)


@pytest.fixture
def page(driver, questions):
    """The page of one person who judges those questions."""
    with served(questions, guidelines=GUIDELINES, assess=overview) as address:
        yield Page(driver, address, questions)
        driver.get("about:blank")
