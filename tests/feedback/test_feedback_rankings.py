"""Rankings of up to five responses: handed out whole, kept as pairs, taken back, exported."""

import pytest
from feedback_http import Person
from feedback_rounds import check_books

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Conflict, Response, assess, to_pairs, to_rankings
from dpo_keras.feedback.pair_export import write_rankings
from dpo_keras.preferences import read_preferences

WORDS = ("best", "good", "fair", "poor", "worst")


def prompts(count, responses=4):
    return [
        Candidates(
            f"Question {n}?", tuple(Response(f"{w} {n}") for w in WORDS[:responses]), id=f"q{n}"
        )
        for n in range(count)
    ]


def ranks_of(shown):
    """Rank by the words, as somebody would who knows."""
    return [1 + WORDS.index(text.split()[0]) for text in shown.responses]


@pytest.fixture
def store(make_store):
    return make_store(given=prompts(3), overlap=1, ranking=True)


def test_a_ranking_is_kept_as_the_judgements_of_its_pairs(store, people):
    ann = people(store, "ann")[0]
    shown = store.next(ann)[0]
    assert len(shown.responses) == 4
    store.submit_ranking(ann, shown.id, ranks_of(shown), key="one", seconds=12.0, reason="because")
    pairs = to_pairs(store).pairs
    assert len(pairs) == 6
    assert all(
        WORDS.index(pair.chosen.split()[0]) < WORDS.index(pair.rejected.split()[0])
        for pair in pairs
    )
    times = store.database.rows("SELECT sum(seconds), count(reason) FROM judgements")[0]
    assert tuple(times) == (12.0, 1)
    assert store.progress().judged == 6
    check_books(store)


def test_what_comes_back_is_the_ranking_that_was_made(store, people):
    ann = people(store, "ann")[0]
    made = []
    for turn, ranks in enumerate(([2, 1, 3, 4], [1, 1, 3, 3], [4, 2, 2, 1])):
        shown = store.next(ann)[0]
        made.append((list(shown.responses), ranks))
        store.submit_ranking(ann, shown.id, ranks, key=f"k{turn}")
    assert store.next(ann) == []
    found = [
        (record["responses"], record.get("ranking") or [-score for score in record["scores"]])
        for record in to_rankings(store)
    ]
    assert sorted(found) == sorted(made)
    assert {record["id"] for record in to_rankings(store)} == {"q0", "q1", "q2"}


def test_the_order_shown_is_random_and_stays_while_the_person_holds_it(store, people):
    ann = people(store, "ann")[0]
    first, second = store.next(ann, 2)
    assert [one.responses for one in store.next(ann, 2)] == [first.responses, second.responses]
    orders = {tuple(text.split()[0] for text in one.responses) for one in store.next(ann, 3)}
    assert len(orders) > 1


def test_undo_takes_the_whole_ranking_back_and_the_same_key_counts_once(store, people):
    ann = people(store, "ann")[0]
    shown = store.next(ann)[0]
    receipt = store.submit_ranking(ann, shown.id, [1, 2, 3, 4], key="one")
    again = store.submit_ranking(ann, shown.id, [1, 2, 3, 4], key="one")
    assert (again.judgement, again.again) == (receipt.judgement, True)
    store.undo(ann, store.last_judged(ann), key="back")
    assert to_rankings(store) == []
    assert store.progress().judged == 0
    back = store.next(ann)[0]
    assert (back.id, back.responses) == (shown.id, shown.responses)
    store.submit_ranking(ann, shown.id, [4, 3, 2, 1], key="two")
    assert to_rankings(store)[0]["ranking"] == [4, 3, 2, 1]
    check_books(store)


def test_skipped_and_all_bad_rankings_are_no_rankings(store, people):
    ann = people(store, "ann")[0]
    for key, choice in (("a", "skip"), ("b", "both_bad")):
        store.submit_ranking(ann, store.next(ann)[0].id, None, key=key, choice=choice)
    assert to_rankings(store) == []
    verdicts = store.database.rows("SELECT verdict, count(*) FROM judgements GROUP BY verdict")
    assert {tuple(row) for row in verdicts} == {("skip", 6), ("both_bad", 6)}
    bob = people(store, "bob")[0]
    assert len(store.next(bob, 3)) == 2, "what was skipped goes to others"
    check_books(store)


def test_two_people_rank_the_same_prompts_and_agreement_is_measured(make_store, people):
    store = make_store(given=prompts(8), overlap=2, ranking=True)
    for person in people(store, "ann", "bob"):
        for turn in range(8):
            shown = store.next(person)[0]
            ranks = ranks_of(shown)
            store.submit_ranking(person, shown.id, ranks, key=f"{person}-{turn}")
    assert store.next(people(store, "cat")[0]) == []
    quality = assess(store, resamples=20)
    assert quality.counts["judgements"] == 96
    assert quality.agreement["raw_agreement"].value == pytest.approx(1.0)
    assert quality.cycles.value == 0.0
    check_books(store)


def test_an_abandoned_ranking_goes_to_others_whole(make_store, people, clock):
    store = make_store(given=prompts(1), overlap=1, ranking=True, lease_seconds=60)
    ann, bob = people(store, "ann", "bob")
    held = store.next(ann)[0]
    assert store.next(bob) == []
    clock.now += 61
    taken = store.next(bob)[0]
    assert sorted(taken.responses) == sorted(held.responses)
    store.submit_ranking(bob, taken.id, [1, 2, 3, 4], key="bob")
    with pytest.raises(Conflict, match="others have judged it"):
        store.submit_ranking(ann, held.id, [1, 2, 3, 4], key="ann")
    check_books(store)


def test_prompts_of_two_or_six_responses_are_judged_pair_by_pair(make_store, people):
    six = Candidates("Six?", tuple(Response(f"text {n}") for n in range(6)))
    two = Candidates("Two?", (Response("yes"), Response("no")))
    store = make_store(given=[two, six, *prompts(1, 5)], overlap=1, ranking=True)
    ann = people(store, "ann")[0]
    assert len(store.next(ann)[0].responses) == 5
    store.submit_ranking(ann, store.next(ann)[0].id, [1, 2, 3, 4, 5], key="k")
    assert {len(one.responses) for one in store.next(ann, 20)} == {2}
    assert len(store.next(ann, 20)) == 1 + 15


def test_a_judge_gets_pairs_in_a_round_of_rankings(store):
    judge = store.judge_annotator("model")
    assert {len(one.responses) for one in store.next(judge, 30)} == {2}


@pytest.mark.parametrize(
    ("ranks", "message"),
    [
        ([1, 2, 3], "ranks must be 4 whole numbers from 1 to 4"),
        ([1, 2, 3, 9], "ranks must be 4 whole numbers"),
        ([1, 2, 3, True], "ranks must be 4 whole numbers"),
        ("best", "ranks must be 4 whole numbers"),
        (None, "ranks must be 4 whole numbers"),
    ],
)
def test_ranks_that_are_none_are_refused_and_nothing_is_kept(store, people, ranks, message):
    ann = people(store, "ann")[0]
    shown = store.next(ann)[0]
    with pytest.raises(InputError, match=message):
        store.submit_ranking(ann, shown.id, ranks, key="k")
    assert store.database.rows("SELECT count(*) FROM judgements")[0][0] == 0
    with pytest.raises(Conflict, match="no ranking that was given to you"):
        store.submit_ranking(people(store, "bob")[0], shown.id, [1, 2, 3, 4], key="k")


def test_the_page_gets_and_sends_rankings(store):
    ann = Person(store, "ann")
    shown = ann.next()["presentations"][0]
    assert len(shown["responses"]) == 4 and "left" not in shown
    body = {"presentation": shown["id"], "ranks": [2, 1, 4, 3], "key": "k", "seconds": 4}
    answer = ann.post("/api/rankings", body)
    assert answer.status_code == 200
    assert answer.json()["judged"] == 6
    assert to_rankings(store)[0]["ranking"] == [2, 1, 4, 3]
    refused = ann.post("/api/rankings", {**body, "presentation": "x", "key": "l"})
    assert refused.status_code == 409


def test_rankings_are_written_as_json_lines(store, people, tmp_path):
    with pytest.raises(InputError, match="store has no rankings"):
        write_rankings(store, tmp_path / "rankings.jsonl")
    with pytest.raises(InputError, match="must end in .jsonl"):
        write_rankings(store, tmp_path / "rankings.csv")
    ann = people(store, "ann")[0]
    shown = [store.next(ann)[0], None]
    store.submit_ranking(ann, shown[0].id, [4, 2, 3, 1], key="k")
    shown[1] = store.next(ann)[0]
    store.submit_ranking(ann, shown[1].id, [1, 2, 3, 3], key="l")
    assert write_rankings(store, tmp_path / "rankings.jsonl") == 2
    strict, tied = read_preferences(tmp_path / "rankings.jsonl")
    one = shown[0].responses
    assert strict.responses == (one[3], one[1], one[2], one[0])
    assert (tied.responses[:2], tied.ranking) == (shown[1].responses[:2], (1, 2, 3, 3))
