"""The store: nobody judges twice, each pair gets its people, and the log only grows."""

import random
import sqlite3

import pytest
import scipy.stats
from feedback_rounds import candidates, check_books, judge_all, prefers

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Conflict, Response, Settings, open_store


def judgements(store):
    return [dict(row) for row in store.database.rows("SELECT * FROM judgements ORDER BY id")]


def test_every_pair_is_judged_by_exactly_as_many_people_as_wanted(make_store, people):
    store = make_store(5, overlap=2)
    ann, bob, eve = people(store, "ann", "bob", "eve")
    assert [judge_all(store, who, prefers("one")) for who in (ann, bob, eve)] == [5, 5, 0]
    counts = store.database.rows(
        "SELECT count(*), count(DISTINCT annotator) FROM presentations GROUP BY pair"
    )
    assert [tuple(row) for row in counts] == [(2, 2)] * 5
    check_books(store)


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


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_judgement_refers_to_the_response_whatever_its_side(make_store, people, side):
    store = make_store(30)
    (ann,) = people(store, "ann")
    chosen = {}
    while shown := store.next(ann):
        chosen[shown[0].id] = getattr(shown[0], side)
        store.submit(ann, shown[0].id, side, key=str(shown[0].id))
    rows = store.database.rows(
        "SELECT j.presentation, r.content FROM judgements j JOIN responses r ON r.id = j.winner"
    )
    assert {row[0]: row[1] for row in rows} == chosen
    first_words = {text.split()[0] for text in chosen.values()}
    assert first_words == {"one", "two"}, "the same side holds the one and the other"


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


def test_the_same_submission_twice_is_one_judgement(make_store, people):
    store = make_store()
    (ann,) = people(store, "ann")
    shown = store.next(ann)[0]
    receipt = store.submit(ann, shown.id, "left", key="k")
    again = store.submit(ann, shown.id, "left", key="k")
    assert (again.judgement, again.again, receipt.again) == (receipt.judgement, True, False)
    assert len(judgements(store)) == 1
    check_books(store)


def test_of_two_tabs_the_first_answer_holds(make_store, people):
    store = make_store()
    (ann,) = people(store, "ann")
    shown = store.next(ann)[0]
    store.submit(ann, shown.id, "left", key="tab one")
    with pytest.raises(Conflict, match="judged before"):
        store.submit(ann, shown.id, "right", key="tab two")
    assert len(judgements(store)) == 1


def test_undo_is_a_further_entry_and_shows_the_pair_again(make_store, people):
    store = make_store()
    (ann,) = people(store, "ann")
    shown = store.next(ann)[0]
    store.submit(ann, shown.id, "left", key="a")
    assert store.last_judged(ann) == shown.id
    undone = store.undo(ann, shown.id, key="b")
    assert store.undo(ann, shown.id, key="b").judgement == undone.judgement
    assert store.last_judged(ann) is None
    check_books(store)
    assert store.next(ann)[0] == shown
    store.submit(ann, shown.id, "right", key="c")
    assert [row["verdict"] for row in judgements(store)] == ["prefer", "undo", "prefer"]
    held = store.database.rows("SELECT r.content FROM current c JOIN responses r ON r.id=c.winner")
    assert [row[0] for row in held] == [shown.right]
    check_books(store)


def test_undo_goes_back_further_each_time(make_store, people):
    store = make_store(3)
    (ann,) = people(store, "ann")
    ids = []
    for turn in range(3):
        ids.append(store.next(ann)[0].id)
        store.submit(ann, ids[-1], "tie", key=f"j{turn}")
    undone = []
    while (last := store.last_judged(ann)) is not None:
        undone.append(last)
        store.undo(ann, last, key=f"u{last}")
    assert undone == ids[::-1]
    with pytest.raises(Conflict, match="no judgement"):
        store.undo(ann, ids[0], key="once more")


def test_the_log_cannot_be_changed(make_store, people):
    store = make_store()
    (ann,) = people(store, "ann")
    store.submit(ann, store.next(ann)[0].id, "left", key="k")
    for statement in ("UPDATE judgements SET verdict = 'tie'", "DELETE FROM judgements"):
        with pytest.raises(sqlite3.IntegrityError, match="never"):
            with store.database.writing() as connection:
                connection.execute(statement)
    assert len(judgements(store)) == 1


def test_all_faults_of_a_judgement_are_named_together(make_store, people):
    store = make_store()
    (ann,) = people(store, "ann")
    with pytest.raises(InputError) as error:
        store.submit(ann, True, "up", key="", strength=4, reason="x" * 2001, seconds=float("nan"))
    assert [p.split()[0] for p in error.value.problems] == [
        "presentation", "choice", "key", "strength", "reason", "seconds",
    ]  # fmt: skip
    with pytest.raises(InputError, match="left or right"):
        store.submit(ann, 1, "tie", key="k", strength=1)
    assert judgements(store) == []


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


def test_candidates_become_pairs_once(make_store):
    given = [
        Candidates(
            "p", (Response("x"), Response("y"), Response("z"), Response(" x "), Response(""))
        ),
        Candidates("alone", (Response("x"), Response("x"))),
    ]
    store = make_store(given=[])
    added = store.add(given)
    assert (added.pairs, added.known, added.identical, added.empty, added.alone) == (3, 0, 2, 1, 1)
    again = store.add(given)
    assert (again.pairs, again.known) == (0, 3)
    assert store.add([Candidates("p", (Response("y"), Response("x"), Response("w")))]).pairs == 2


def test_settings_are_kept_with_the_round(make_store, tmp_path):
    given = make_store(1, overlap=3, lease_seconds=5, repeat_share=0.2)
    given.close()
    store = open_store(tmp_path / "feedback.sqlite")
    assert store.settings == given.settings and store.settings.overlap == 3
    store.close()


def test_settings_name_every_fault():
    with pytest.raises(InputError) as error:
        Settings(overlap=0, lease_seconds=0, gold_share=0.6, repeat_share=-1, repeat_distance=0)
    assert len(error.value.problems) == 5


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
