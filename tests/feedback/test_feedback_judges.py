"""Functions as judges, and what judges are to the store, to people and to the report."""

import random
import sys

import pytest
from feedback_rounds import candidates, check_books, judge_all, prefers

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Response, assess, to_pairs
from dpo_keras.feedback.function_judge import FunctionJudge, load_function
from dpo_keras.feedback.judges import Comparison, Erring, Judge, NoVerdict, Verdict, ask_judge
from dpo_keras.preferences.quickstart_data import judge as truth
from dpo_keras.preferences.quickstart_data import support_pairs


def judge(name):
    return FunctionJudge.named(f"judge_functions:{name}", name)


def choices(store):
    """How often each verdict fell, by who was on the left."""
    rows = store.database.rows(
        "SELECT c.verdict, c.winner = q.first AS first, c.preference FROM current c "
        "JOIN presentations p ON p.id = c.presentation JOIN pairs q ON q.id = p.pair"
    )
    return [tuple(row) for row in rows]


def test_a_function_judges_every_pair_once_and_leaves_peoples_places_free(make_store, people):
    store = make_store(150, overlap=1)
    seen = []
    assert ask_judge(store, judge("one"), on_verdict=seen.append) == 150
    assert seen == list(range(1, 151))
    assert choices(store) == [("prefer", 1, 1.0)] * 150
    assert ask_judge(store, judge("one")) == 0, "nothing is judged twice"
    assert ask_judge(store, judge("length")) == 150, "another judge has all pairs before it"
    check_books(store)
    assert (store.progress().judged, store.progress().wanted) == (0, 150)
    (ann,) = people(store, "ann")
    assert judge_all(store, ann, prefers("one"), limit=3) == 3
    assert store.progress().judged == 3
    check_books(store)


def test_a_limit_takes_first_what_people_have_judged(make_store, people):
    store = make_store(30, overlap=1)
    (ann,) = people(store, "ann")
    judge_all(store, ann, prefers("one"), limit=5)
    assert ask_judge(store, judge("one"), limit=5) == 5
    agreement = assess(store, resamples=20).agreement["raw_agreement"]
    assert (agreement.value, agreement.count) == (1.0, 5)
    assert ask_judge(store, judge("one")) == 25


def test_hidden_checks_are_judged_and_no_pair_is_repeated(make_store):
    gold = [Candidates("Check?", (Response("one good"), Response("two bad")), gold=0)]
    store = make_store(given=candidates(5) + gold, repeat_share=0.5, gold_share=0.5)
    assert ask_judge(store, judge("one")) == 6
    counts = assess(store, resamples=20).counts
    assert (counts["judgements"], counts["checks"], counts["repeats"]) == (5, 1, 0)
    assert store.progress().judged == 0


def test_a_soft_preference_becomes_the_vote_share_and_people_vote_whole(make_store, people):
    store = make_store(2, overlap=1)
    ask_judge(store, judge("unsure"))
    assert [(p.chosen[:3], p.preference) for p in to_pairs(store).pairs] == [("one", 0.75)] * 2
    assert to_pairs(store, label="each").pairs[0].preference == 0.75
    assert to_pairs(store, label="majority").pairs[0].preference == 1.0
    (ann,) = people(store, "ann")
    judge_all(store, ann, prefers("two"))
    # One whole vote for two and a quarter of another one: 1.25 / 2.
    assert [(p.chosen[:3], p.preference) for p in to_pairs(store).pairs] == [("two", 0.625)] * 2


def test_ties_and_scores():
    asked = [Comparison("?", "aa", "b"), Comparison("?", "a", "bb"), Comparison("?", "a", "b")]
    found = [verdict.preference for _, verdict in judge("length").judge(asked)]
    assert found == [1.0, 0.0, 0.5]


def test_the_bundled_truth_judges_the_bundled_pairs(make_store):
    pairs = support_pairs(40)
    given = [Candidates(p.prompt, (Response(p.chosen), Response(p.rejected))) for p in pairs]
    store = make_store(given=given)
    judge = FunctionJudge.named("dpo_keras.preferences.quickstart_data:judge")
    ask_judge(store, judge)
    for pair in to_pairs(store).pairs:
        better, worse = (float(truth(pair.prompt, text)) for text in (pair.chosen, pair.rejected))
        assert better > worse or (better == worse and pair.preference == 0.5)


def test_an_erring_judge_is_wrong_about_the_same_pairs_in_both_orders():
    asked = [Comparison(f"Question {n}?", f"one {n}", f"two {n}") for n in range(2000)]
    erring = Erring(judge("one"), 0.2)
    wrong = [verdict.preference == 0.0 for _, verdict in erring.judge(asked)]
    assert 0.17 < sum(wrong) / 2000 < 0.23
    swapped = [v.preference == 1.0 for _, v in erring.judge([a.swapped() for a in asked])]
    assert swapped == wrong
    other = [v.preference == 0.0 for _, v in Erring(judge("one"), 0.2, seed=1).judge(asked)]
    assert other != wrong


def test_a_function_that_raises_is_named_with_its_pair_and_earlier_verdicts_stay(make_store):
    store = make_store(8)
    with pytest.raises(InputError) as error:
        ask_judge(store, judge("raises_at_2"))
    assert str(error.value) == (
        "function: raises_at_2 raised RuntimeError: no idea; at the prompt 'Question 2?'."
    )
    kept = len(choices(store))
    assert ask_judge(store, judge("one"), limit=8) == 8
    with pytest.raises(InputError):
        ask_judge(store, judge("raises_at_2"))
    assert len(choices(store)) == kept + 8
    check_books(store)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("judge_functions:too_large", r"too_large must return a number in \[0, 1\], got 3; at the"),
        ("judge_functions:text", "text must return a finite number, got 'good'; at the prompt"),
        ("judge_functions:alone", r"function must take \(prompt, first, second\)"),
        ("judge_functions:constant", "must name something that can be called"),
        ("judge_functions:frist_shown", "has no frist_shown.*did you mean 'first_shown'"),
        ("judge_functions", "must be module:function, got 'judge_functions'"),
        ("no_such_module.at_all:f", "there is no no_such_module, got"),
    ],
)
def test_what_is_wrong_with_a_function_is_said_in_one_line(make_store, name, words):
    with pytest.raises(InputError, match=words) as error:
        ask_judge(make_store(2), FunctionJudge.named(name))
    assert "\n" not in str(error.value)


def test_modules_of_the_current_folder_are_found_and_their_faults_told(tmp_path, monkeypatch):
    (tmp_path / "my_own_judge.py").write_text("def f(prompt, response): return 1\n")
    (tmp_path / "my_broken_judge.py").write_text("import surely_missing\n")
    monkeypatch.chdir(tmp_path)
    before = list(sys.path)
    assert load_function("my_own_judge:f")("", "") == 1
    with pytest.raises(InputError, match="import of my_broken_judge failed.*surely_missing"):
        load_function("my_broken_judge:f")
    assert sys.path == before


class Sometimes(Judge):
    """Cannot judge what a set names."""

    def __init__(self, refuses):
        super().__init__("sometimes")
        self.refuses = refuses

    def judge(self, comparisons):
        for place, asked in enumerate(comparisons):
            refused = asked.prompt in self.refuses
            yield place, NoVerdict("not today") if refused else Verdict(0.5)


def test_pairs_that_cannot_be_judged_are_named_and_asked_about_again(make_store):
    store = make_store(100)
    refuses = {"Question 3?", "Question 70?"}
    with pytest.raises(InputError) as error:
        ask_judge(store, Sometimes(refuses))
    problems = sorted(str(problem) for problem in error.value.problems)
    assert problems == [
        "judge: the responses to 'Question 3?' were not compared: not today.",
        "judge: the responses to 'Question 70?' were not compared: not today.",
    ]
    assert len(choices(store)) == 98
    told = []
    assert ask_judge(store, Sometimes({"Question 3?"}), on_failure=told.append) == 1
    assert len(told) == 1 and len(choices(store)) == 99
    check_books(store)


def test_a_judge_that_fails_on_everything_stops_early(make_store):
    store = make_store(200)
    with pytest.raises(InputError) as error:
        ask_judge(store, Sometimes({f"Question {n}?" for n in range(200)}))
    assert len(error.value.problems) == 64


def test_a_judge_has_a_name_of_its_own_and_never_signs_in(make_store, people):
    store = make_store(2)
    people(store, "ann")
    with pytest.raises(InputError, match="must not be a person's, got 'ann'"):
        store.judge_annotator("ann")
    number = store.judge_annotator("robot")
    assert store.judge_annotator("robot") == number
    with pytest.raises(InputError, match="must not be a judge's, got 'robot'"):
        store.add_annotator("robot")
    assert store.names_with_links() == ["ann"]
    assert [one.judge for one in store.annotators()] == [False, True]


def test_what_a_judge_holds_does_not_keep_people_waiting(make_store, people):
    store = make_store(2, overlap=1)
    robot = store.judge_annotator("robot")
    ann, bob = people(store, "ann", "bob")
    shown = store.next(robot, 2)
    judge_all(store, ann, prefers("one"))
    assert store.next(bob) == [] and not store.may_return(bob)
    store.clock.now += 10_000  # the judge was slow: its leases end, and people have finished
    assert store.next(bob) == []
    states = store.database.rows("SELECT DISTINCT state FROM presentations WHERE annotator = 1")
    assert [row[0] for row in states] == ["released"]
    store.submit(robot, shown[0].id, "left", key="late")
    check_books(store)


def long_and_short(count):
    return [
        Candidates(
            f"Question {n}?", (Response(f"one {n}" + "!" * (n % 3)), Response(f"two {n} and on"))
        )
        for n in range(count)
    ]


def test_biases_of_judges_are_reported_as_those_of_people(make_store, people):
    store = make_store(given=long_and_short(60), overlap=2)
    ask_judge(store, judge("first_shown"))
    ask_judge(store, judge("length"))
    chance = random.Random(1)
    right = {n: chance.random() < 0.5 for n in range(60)}
    for name in people(store, "ann", "bob"):
        judge_all(store, name, lambda s: prefers("one" if right[number(s)] else "two")(s))
    quality = assess(store, resamples=20)
    biased = [finding for finding in quality.findings() if "bias" in finding]
    assert len(biased) == 2, biased
    assert "first_shown has a position bias: chose the left response in 100%" in biased[0]
    assert "length has a length bias: chose the longer response in 100%" in biased[1]
    assert [person.judge for person in quality.people] == [True, True, False, False]


def number(shown):
    return int(shown.prompt.split()[1].rstrip("?"))
