"""Who is shown what: overlap, sides, checks, repeats; pairs that people hold, skip and abandon."""

import pytest
import scipy.stats
from feedback_rounds import candidates, check_books, judge_all, prefers

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Conflict, Response, Settings


def test_every_pair_is_judged_by_exactly_as_many_people_as_wanted(make_store, people):
    store = make_store(5, overlap=2)
    ann, bob, eve = people(store, "ann", "bob", "eve")
    assert [judge_all(store, who, prefers("one")) for who in (ann, bob, eve)] == [5, 5, 0]
    counts = store.database.rows(
        "SELECT count(*), count(DISTINCT annotator) FROM presentations GROUP BY pair"
    )
    assert [tuple(row) for row in counts] == [(2, 2)] * 5
    check_books(store)


def test_pairs_that_were_begun_come_first(make_store, people):
    store = make_store(20, overlap=2)
    ann, bob = people(store, "ann", "bob")
    begun = store.next(ann)[0]
    store.submit(ann, begun.id, "tie", key="k")
    assert store.next(bob)[0].prompt == begun.prompt


def test_what_is_held_is_shown_again_after_a_reload_with_the_same_sides(make_store, people):
    store = make_store(5)
    (ann,) = people(store, "ann")
    assert store.next(ann, 2) == store.next(ann, 2) == store.next(ann, 3)[:2]
    assert len({p.id for p in store.next(ann, 3)}) == 3


def test_sides_are_balanced_over_2000_presentations(make_store, people):
    store = make_store(2000, overlap=1)
    (ann,) = people(store, "ann")
    left = 0
    for turn in range(2000):
        shown = store.next(ann)[0]
        left += shown.left.startswith("one")
        store.submit(ann, shown.id, "tie", key=str(turn))
    low, high = scipy.stats.binom.interval(0.999, 2000, 0.5)
    assert low <= left <= high


def test_checks_are_shown_to_everybody_and_do_not_count_as_work(make_store, people):
    gold = [
        Candidates(f"Check {n}?", (Response("good"), Response("bad")), gold=0) for n in range(4)
    ]
    store = make_store(given=candidates(40) + gold, overlap=1, gold_share=0.1)
    ann, bob = people(store, "ann", "bob")
    judge_all(store, ann, lambda shown: "tie", limit=20)
    judge_all(store, bob, lambda shown: "tie")
    seen = store.database.rows(
        "SELECT annotator, count(*) FROM presentations JOIN pairs ON pairs.id = pair "
        "WHERE gold IS NOT NULL GROUP BY annotator"
    )
    assert {row[0] for row in seen} == {ann, bob}
    progress = store.progress()
    assert progress.judged == progress.wanted == 40
    check_books(store)


def test_repeats_come_after_a_distance_once_and_do_not_count(make_store, people):
    store = make_store(60, overlap=1, repeat_share=0.3, repeat_distance=5)
    (ann,) = people(store, "ann")
    done = judge_all(store, ann, prefers("one"))
    order = [
        (row["pair"], row["repeat"])
        for row in store.database.rows("SELECT pair, repeat FROM presentations ORDER BY id")
    ]
    repeats = [pair for pair, repeat in order if repeat]
    assert done == len(order) == 60 + len(repeats) and len(repeats) >= 5
    assert len(set(repeats)) == len(repeats)
    for pair in repeats:
        assert order.index((pair, 1)) - order.index((pair, 0)) > 5
    assert store.progress().judged == 60
    check_books(store)


def test_settings_name_every_fault():
    with pytest.raises(InputError) as error:
        Settings(overlap=0, lease_seconds=0, gold_share=0.6, repeat_share=-1, repeat_distance=0)
    assert len(error.value.problems) == 5


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
