"""Selected pairs in a store: which, in what order, and once."""

import numpy as np
import pytest

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Response
from dpo_keras.feedback.candidate_selection import add_selected
from dpo_keras.feedback.selection import Pool

PROMPTS = 9


def given(count=PROMPTS, *more):
    made = [Candidates(str(n), (Response("yes", "a"), Response("no", "b"))) for n in range(count)]
    return [*made, *more]


def by_number(pairs):
    """P nears 1/2 with the number of the prompt: the last ones are the most uncertain."""
    numbers = np.array([int(pair.prompt) for pair in pairs])
    return Pool(probabilities=0.5 + 0.4 / (1 + numbers)), range(len(pairs))


def shown_prompts(store, name="ann"):
    annotator = store.judge_annotator(name)
    order = []
    while shown := store.next(annotator):
        order.append(shown[0].prompt)
        store.submit(annotator, shown[0].id, "left", key=f"{name}-{shown[0].id}")
    return order


def test_the_most_uncertain_come_to_the_store_and_are_shown_best_first(make_store):
    store = make_store(given=[])
    added = add_selected(store, given(), "uncertain", 4, by_number)
    assert (added.pairs, added.known) == (4, 0)
    assert shown_prompts(store) == ["8", "7", "6", "5"]


def test_a_later_selection_takes_pairs_that_are_new_and_comes_first(make_store):
    store = make_store(given=[])
    add_selected(store, given(), "uncertain", 3, by_number, key="one")
    added = add_selected(store, given(), "uncertain", 2, by_number, key="two")
    assert (added.pairs, added.known) == (2, 3)
    assert shown_prompts(store) == ["5", "4", "8", "7", "6"]


def test_the_same_selection_again_adds_nothing_and_asks_no_model(make_store):
    store = make_store(given=[])
    add_selected(store, given(), "uncertain", 3, by_number, key="one")
    again = add_selected(store, given(), "uncertain", 3, lambda pairs: 1 / 0, key="one")
    assert again.pairs == 0
    assert store.progress().wanted // store.settings.overlap == 3


def test_without_a_count_all_come_in_order(make_store):
    store = make_store(given=[])
    assert add_selected(store, given(), "uncertain", None, by_number).pairs == PROMPTS
    assert shown_prompts(store) == [str(n) for n in reversed(range(PROMPTS))]


def test_pairs_that_a_policy_cannot_read_are_never_chosen(make_store):
    store = make_store(given=[])

    def some(pairs):
        pool, _ = by_number(pairs[4:])
        return pool, range(4, PROMPTS)

    assert add_selected(store, given(), "uncertain", 7, some).pairs == 5
    assert shown_prompts(store) == ["8", "7", "6", "5", "4"]


def test_what_makes_no_pair_is_counted_as_without_a_selection(make_store):
    odd = Candidates("odd", tuple(map(Response, ("yes", "yes", " "))))
    plain = make_store(given=[], name="plain.sqlite").add(given(3, odd))
    assert add_selected(make_store(given=[]), given(3, odd), "random", 9, by_number) == plain
    assert (plain.pairs, plain.identical, plain.empty, plain.alone) == (3, 1, 1, 1)


def test_random_asks_no_model(make_store):
    store = make_store(given=[])
    assert add_selected(store, given(), "random", 4, lambda pairs: 1 / 0).pairs == 4


def test_hidden_checks_are_all_added(make_store):
    check = Candidates("check", tuple(map(Response, ("yes", "no", "maybe"))), gold=0)
    store = make_store(given=[])
    # Of three pairs with the check's prompt one does not hold the known answer.
    added = add_selected(store, given(3, check), "random", 1, by_number)
    assert (added.pairs, added.gold) == (3, 2)


def test_nothing_new_is_an_error(make_store):
    store = make_store(given=given(2))
    with pytest.raises(InputError, match="candidates hold no pair that is new"):
        add_selected(store, given(2), "uncertain", 1, by_number)
