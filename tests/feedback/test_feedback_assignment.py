"""Pairs that people hold, skip, abandon and come back to."""

import pytest
from feedback_rounds import check_books, judge_all, prefers

from dpo_keras.feedback import Conflict


def test_a_skipped_pair_goes_to_somebody_else_and_never_back(make_store, people):
    store = make_store(1, overlap=1)
    ann, bob = people(store, "ann", "bob")
    store.submit(ann, store.next(ann)[0].id, "skip", key="s")
    assert store.next(ann) == []
    check_books(store)
    assert judge_all(store, bob, prefers("one")) == 1
    assert store.progress().judged == store.progress().wanted == 1
    check_books(store)


def test_the_undo_of_a_skip_fails_where_others_have_judged_in_the_meantime(make_store, people):
    store = make_store(1, overlap=1)
    ann, bob = people(store, "ann", "bob")
    skipped = store.next(ann)[0].id
    store.submit(ann, skipped, "skip", key="s")
    store.undo(ann, skipped, key="u")
    store.submit(ann, skipped, "skip", key="s2")
    judge_all(store, bob, prefers("one"))
    with pytest.raises(Conflict, match="others have judged"):
        store.undo(ann, skipped, key="u2")
    check_books(store)


def test_an_abandoned_pair_returns_when_its_lease_ends(make_store, people, clock):
    store = make_store(1, overlap=1, lease_seconds=60)
    ann, bob = people(store, "ann", "bob")
    held = store.next(ann)[0]
    clock.now += 59
    assert store.next(bob) == [] and store.may_return(bob)
    clock.now += 2
    assert store.next(bob)[0].prompt == held.prompt
    check_books(store)
    with pytest.raises(Conflict, match="waited too long"):
        store.submit(ann, held.id, "left", key="late")
    check_books(store)


def test_a_late_judgement_counts_where_the_place_is_still_free(make_store, people, clock):
    store = make_store(2, overlap=2, lease_seconds=60)
    ann, bob = people(store, "ann", "bob")
    held = store.next(ann)[0]
    clock.now += 61
    store.next(bob)  # ends ann's lease
    store.submit(ann, held.id, "left", key="late")
    check_books(store)
    assert judge_all(store, bob, prefers("one")) == 2


def test_whoever_is_there_keeps_their_lease(make_store, people, clock):
    store = make_store(1, overlap=1, lease_seconds=60)
    ann, bob = people(store, "ann", "bob")
    held = store.next(ann)
    for _ in range(5):
        clock.now += 50
        assert store.next(ann) == held and store.next(bob) == []


def test_a_person_comes_back_to_a_released_pair_as_they_saw_it(make_store, people, clock):
    store = make_store(1, overlap=1, lease_seconds=60)
    ann, bob = people(store, "ann", "bob")
    held = store.next(ann)
    clock.now += 61
    taken = store.next(bob)
    clock.now += 61
    assert store.next(ann) == held and taken
    check_books(store)


def test_nobody_judges_what_was_shown_to_another(make_store, people):
    store = make_store()
    ann, bob = people(store, "ann", "bob")
    shown = store.next(ann)[0]
    with pytest.raises(Conflict, match="not given to you"):
        store.submit(bob, shown.id, "left", key="k")
    store.submit(ann, shown.id, "left", key="k")
    with pytest.raises(Conflict, match="not given to you"):
        store.undo(bob, shown.id, key="u")
    with pytest.raises(Conflict, match="another judgement"):
        store.submit(ann, store.next(ann)[0].id, "left", key="k")
