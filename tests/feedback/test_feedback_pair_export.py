"""Judgements become pairs that training reads as they were meant."""

import numpy as np
import pytest
from feedback_rounds import candidates, judge_all, prefers

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Response, to_pairs
from dpo_keras.preferences import Message, read_preferences, write_preferences


def judged(store, *choices):
    """One judgement of each person, `choices` by name, on each pair, as the words are."""
    for name, choose in choices:
        person, _ = store.add_annotator(name, "experts" if name == "ann" else "crowd")
        judge_all(store, person.id, choose)


def same(choice):
    return lambda shown: choice


THREE = (("ann", prefers("one")), ("bob", prefers("one")), ("eve", prefers("two")))


@pytest.fixture
def three(make_store):
    store = make_store(6, overlap=3)
    judged(store, *THREE)
    return store


def test_vote_share(three):
    pairs = to_pairs(three).pairs
    assert len(pairs) == 6
    for pair in pairs:
        assert pair.chosen.startswith("one") and pair.preference == pytest.approx(2 / 3)
        assert pair.annotator == "ann+bob+eve" and pair.group is None


def test_majority(three):
    assert {pair.preference for pair in to_pairs(three, label="majority").pairs} == {1.0}


def test_the_posterior_is_surer_than_the_share(three):
    for pair in to_pairs(three, label="dawid_skene").pairs:
        assert pair.chosen.startswith("one") and 0.9 < pair.preference <= 1


def test_each_keeps_annotators_and_their_groups_so_that_they_can_be_held_out(three, tmp_path):
    pairs = to_pairs(three, label="each").pairs
    assert len(pairs) == 18
    for pair in pairs:
        assert pair.chosen.startswith("two" if pair.annotator == "eve" else "one")
        assert pair.group == ("experts" if pair.annotator == "ann" else "crowd")
    write_preferences(pairs, tmp_path / "pairs.jsonl")
    assert list(read_preferences(tmp_path / "pairs.jsonl")) == pairs


def test_annotators_with_prompts_of_their_own_can_be_held_out(make_store):
    store = make_store(30, overlap=1)
    for name in ("ann", "bob", "eve"):
        person, _ = store.add_annotator(name)
        judge_all(store, person.id, prefers("one"), limit=10)
    pairs = read_preferences([pair.as_dict() for pair in to_pairs(store, label="each").pairs])
    train, held_out = pairs.split(0.34, by="annotator")
    assert {p.annotator for p in train}.isdisjoint({p.annotator for p in held_out})
    assert len(held_out) == 10


def test_sides_are_kept_so_that_position_bias_can_be_seen(make_store):
    store = make_store(40, overlap=1)
    judged(store, ("lee", same("left")))
    pairs = to_pairs(store, label="each").pairs
    assert {pair.swapped for pair in pairs} == {False}
    assert {pair.chosen.split()[0] for pair in pairs} == {"one", "two"}
    other = make_store(40, overlap=1, name="right.sqlite")
    judged(other, ("rex", same("right")))
    assert {pair.swapped for pair in to_pairs(other, label="each").pairs} == {True}


@pytest.mark.parametrize("label", ["each", "majority", "vote_share", "dawid_skene"])
def test_ties_are_half_or_dropped(make_store, label):
    store = make_store(4, overlap=1)
    person, _ = store.add_annotator("ann")
    choices = iter(["tie", "left", "tie", "right"])
    judge_all(store, person.id, lambda shown: next(choices))
    kept = to_pairs(store, label=label).pairs
    assert len(kept) == 4
    if label != "dawid_skene":
        assert sorted(pair.preference for pair in kept) == [0.5, 0.5, 1.0, 1.0]
        dropped = to_pairs(store, label=label, ties="drop")
        assert len(dropped.pairs) == 2 and dropped.dropped == {"ties": 2}


def test_both_bad_is_dropped_unless_taken_as_a_tie(make_store):
    store = make_store(3, overlap=1)
    choices = iter(["both_bad", "left", "skip"])
    person, _ = store.add_annotator("ann")
    judge_all(store, person.id, lambda shown: next(choices))
    exported = to_pairs(store)
    assert len(exported.pairs) == 1 and exported.dropped == {"both bad": 1}
    assert sorted(p.preference for p in to_pairs(store, both_bad="half").pairs) == [0.5, 1.0]


def test_weights_by_quality_count_guessing_for_nothing(make_store):
    store = make_store(60, overlap=4)
    flips = iter(np.random.default_rng(0).random(1000) < 0.5)
    judged(
        store,
        *THREE[:2],
        ("joe", prefers("one")),
        ("mia", lambda s: "left" if next(flips) else "right"),
    )
    weights = {}
    for pair in to_pairs(store, label="each", weights="quality").pairs:
        weights[pair.annotator] = pair.weight
    assert weights["mia"] < 0.1 and min(weights[n] for n in ("ann", "bob", "joe")) > 1
    mean = np.mean([p.weight for p in to_pairs(store, label="each", weights="quality").pairs])
    assert mean == pytest.approx(1.0)
    assert {p.weight for p in to_pairs(store).pairs} == {1.0}


def test_checks_and_repeats_are_not_exported(make_store):
    gold = [Candidates("Check?", (Response("good"), Response("bad")), gold=0)]
    store = make_store(
        given=candidates(20) + gold, overlap=1, gold_share=0.3, repeat_share=0.3, repeat_distance=2
    )
    person, _ = store.add_annotator("ann")
    assert judge_all(store, person.id, same("tie")) > 21
    pairs = to_pairs(store, label="each").pairs
    assert len(pairs) == 20 and all(pair.prompt != "Check?" for pair in pairs)


def test_strength_becomes_the_margin_and_names_are_kept(make_store):
    store = make_store(1, overlap=1)
    person, _ = store.add_annotator("ann")
    store.submit(person.id, store.next(person.id)[0].id, "left", key="k", strength=3)
    (pair,) = to_pairs(store).pairs
    assert pair.margin == 3.0 and pair.id == "q0"


def test_groups_of_candidates_come_before_those_of_people(make_store):
    store = make_store(given=candidates(1, group="law"), overlap=1)
    judged(store, ("ann", prefers("one")))
    assert to_pairs(store).pairs[0].group == "law"


def test_conversations_and_strange_texts_go_round(make_store, tmp_path):
    prompt = (Message("system", "Be brief."), Message("user", "مرحبا 👩‍👩‍👧"))
    given = [
        Candidates(prompt, (Response("a\r\n\tb "), Response("</script>\u2028"))),
        Candidates("plain", (Response("x,\"'\n"), Response("=1+1"))),
    ]
    store = make_store(given=given, overlap=1)
    judged(store, ("ann", same("left")))
    pairs = to_pairs(store).pairs
    write_preferences(pairs, tmp_path / "pairs.jsonl")
    read = list(read_preferences(tmp_path / "pairs.jsonl"))
    assert read == pairs
    assert read[0].prompt == prompt and read[0].chosen[0].role == "assistant"


def test_what_cannot_be_exported_is_said(make_store):
    store = make_store(2)
    with pytest.raises(InputError) as error:
        to_pairs(store, label="x", ties="y", weights="z", both_bad="w")
    assert len(error.value.problems) == 4
    with pytest.raises(InputError, match="no judgement"):
        to_pairs(store)
    judged(store, ("ann", same("tie")))
    with pytest.raises(InputError, match="every pair is a tie"):
        to_pairs(store, ties="drop")
