"""The store: nobody judges twice, the books balance, and stores of earlier releases open."""

import random
import sqlite3

import pytest
from feedback_rounds import candidates, check_books, judge_all, prefers, store_of_version_1

from dpo_keras.feedback import Candidates, Conflict, Response, assess, open_store, to_pairs


def test_the_store_itself_refuses_a_pair_twice_for_one_person(make_store, people):
    store = make_store(1)
    (ann,) = people(store, "ann")
    store.next(ann)
    with pytest.raises(sqlite3.IntegrityError), store.database.writing() as connection:
        connection.execute(
            "INSERT INTO presentations (pair, annotator, first_on_left, state, shown, expires) "
            "VALUES (1, ?, 1, 'leased', 0, 0)",
            (ann,),
        )


def test_settings_are_kept_with_the_round(make_store, tmp_path):
    given = make_store(1, overlap=3, lease_seconds=5, repeat_share=0.2)
    given.close()
    store = open_store(tmp_path / "feedback.sqlite")
    assert store.settings == given.settings and store.settings.overlap == 3
    store.close()


def test_tokens_and_sessions_are_stored_as_hashes_and_end(make_store, clock, tmp_path):
    store = make_store()
    ann, token = store.add_annotator("ann", "experts", days=1)
    person, secret = store.start_session(token, days=2)
    assert person == ann and store.session(secret) == ann and ann.group == "experts"
    store.close()
    content = b"".join(path.read_bytes() for path in tmp_path.iterdir())
    assert token.encode() not in content and secret.encode() not in content
    assert store.start_session(token[:-1]) is None and store.session("forged") is None
    clock.now += 86_401
    assert store.start_session(token) is None, "expired"
    assert store.session(secret) == ann
    clock.now += 86_400
    assert store.session(secret) is None


def test_a_new_token_ends_the_old_one_and_keeps_the_person(make_store):
    store = make_store()
    ann, old = store.add_annotator("ann", "experts")
    again, new = store.add_annotator("ann")
    assert again == ann
    assert store.start_session(old) is None and store.start_session(new)[0] == ann


def random_actions(store, who, seed):
    chance = random.Random(seed)
    for turn in range(150):
        person = chance.choice(who)
        store.clock.now += chance.choice([1, 1, 1, 40])
        shown = store.next(person, chance.randint(1, 3))
        action = chance.random()
        try:
            if action < 0.2 and (last := store.last_judged(person)) is not None:
                store.undo(person, last, key=f"u{turn}")
            elif shown and action < 0.9:
                picked = chance.choice(shown)
                choice = chance.choice(["left", "right", "tie", "both_bad", "skip"])
                store.submit(person, picked.id, choice, key=f"j{turn}")
        except Conflict:
            pass
        check_books(store)


@pytest.mark.parametrize("seed", range(4))
def test_the_books_balance_whatever_people_do(make_store, people, seed):
    gold = [Candidates("Check?", (Response("good"), Response("bad")), gold=0)]
    store = make_store(
        given=candidates(12) + gold, overlap=2, lease_seconds=60, gold_share=0.2,
        repeat_share=0.2, repeat_distance=2,
    )  # fmt: skip
    random_actions(store, people(store, "ann", "bob", "eve", "joe"), seed)


def test_a_store_of_an_earlier_release_opens_and_goes_on(tmp_path):
    path = store_of_version_1(tmp_path / "feedback.sqlite")
    store = open_store(path, create=True)
    check_books(store)
    assert (store.settings.overlap, store.settings.gold_share) == (2, 0.0)
    assert (store.progress().judged, store.progress().wanted) == (4, 4)
    assert [(person.name, person.group) for person in store.annotators()] == [
        ("ann", "experts"), ("bob", None),
    ]  # fmt: skip
    pairs = to_pairs(store).pairs
    assert [(p.id, p.group, p.chosen, p.preference, p.margin) for p in pairs[:1]] == [
        ("q1", "law", "one 1", 0.75, 2.0)
    ]
    assert assess(store, resamples=5).counts["judgements"] == 4
    assert store.add(candidates(1)).pairs == 1
    assert judge_all(store, store.add_annotator("eve")[0].id, prefers("one")) == 1
    check_books(store)
    store.close()
