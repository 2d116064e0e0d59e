"""The log of judgements only grows, and the last entry of a presentation holds."""

import sqlite3

import pytest
from feedback_rounds import check_books, judge_all, prefers

from dpo_keras.errors import InputError
from dpo_keras.feedback import Conflict, assess
from dpo_keras.feedback.judgements import BOTH_BAD, FIRST, SECOND, read_table


def judgements(store):
    return [dict(row) for row in store.database.rows("SELECT * FROM judgements ORDER BY id")]


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


def test_a_pair_whose_judgement_was_taken_back_is_held_for_its_annotator(make_store, people, clock):
    store = make_store(1, overlap=1, lease_seconds=60)
    ann, bob = people(store, "ann", "bob")
    shown = store.next(ann)[0]
    store.submit(ann, shown.id, "left", key="a")
    clock.now += 1000
    store.undo(ann, shown.id, key="b")
    clock.now += 59
    assert store.next(bob) == []
    clock.now += 2
    assert store.next(bob)[0].prompt == shown.prompt
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
        with (
            pytest.raises(sqlite3.IntegrityError, match="never"),
            store.database.writing() as connection,
        ):
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
    with pytest.raises(InputError) as error:
        store.submit(ann, 1, "tie", key="", strength=1)
    assert [problem.argument for problem in error.value.problems] == ["key", "strength"]
    assert judgements(store) == []


@pytest.mark.parametrize("reason", ["\ud800", "because \udfff"])
def test_half_a_character_is_no_reason(make_store, people, reason):
    store = make_store()
    (ann,) = people(store, "ann")
    shown = store.next(ann)[0]
    with pytest.raises(InputError, match="reason must be valid text"):
        store.submit(ann, shown.id, "tie", key="k", reason=reason)
    store.submit(ann, shown.id, "tie", key="k" * 100, reason="\ud7ff \ue000")
    with pytest.raises(InputError, match="key must be 1 to 100"):
        store.submit(ann, shown.id, "tie", key="k" * 101)


def test_a_store_is_read_by_response_not_by_side(make_store, people):
    store = make_store(30, overlap=2)
    ann, bob = people(store, "ann", "bob")
    judge_all(store, ann, prefers("one"))
    judge_all(store, bob, prefers("two"))
    table = read_table(store.database)
    assert set(table.label[table.annotator == 0]) == {FIRST}
    assert set(table.label[table.annotator == 1]) == {SECOND}
    quality = assess(store, resamples=20)
    assert quality.contradicted.value == 1.0 and quality.agreement["raw_agreement"].value == 0.0
    assert any("Agreement is low" in finding for finding in quality.findings())


def test_undone_and_skipped_judgements_do_not_count(make_store, people):
    store = make_store(3, overlap=1)
    (ann,) = people(store, "ann")
    first = store.next(ann)[0].id
    store.submit(ann, first, "left", key="a")
    store.undo(ann, first, key="b")
    store.submit(ann, first, "both_bad", key="c")
    store.submit(ann, store.next(ann)[0].id, "skip", key="d")
    table = read_table(store.database)
    assert table.label.tolist() == [BOTH_BAD] and table.skipped.tolist() == [1]


def test_a_value_that_is_nested_deeper_than_can_be_printed_is_refused_by_name(store, people):
    nested = []
    for _ in range(5_000):
        nested = [nested]
    (ann,) = people(store, "ann")
    with pytest.raises(InputError, match="seconds must be finite and >= 0, got list"):
        store.submit(ann, store.next(ann)[0].id, "left", key="k", seconds=nested)
