"""Comparison of versions: what becomes a choice, in stores and logs; verdicts; wrong input."""

import json

import pytest

from dpo_keras.errors import InputError
from dpo_keras.feedback import Candidates, Response
from dpo_keras.feedback.version_comparison import (
    Choice,
    Choices,
    choices_of_store,
    compare_versions,
    read_choices,
)


def asked(*makers, gold=None, prompt="2 + 2 ="):
    responses = tuple(Response(f" {n} by {maker}", maker) for n, maker in enumerate(makers))
    return Candidates(prompt, responses, gold=gold)


def judge(store, annotator, prefer, key="k"):
    """Judges all that is open; `prefer` gives the maker that wins, "tie" or "both_bad"."""
    while shown := store.next(annotator):
        choice = prefer(shown[0])
        for side in ("left", "right"):
            if getattr(shown[0], side).endswith(f"by {choice}"):
                choice = side
        choice = choice if choice in ("left", "right", "both_bad") else "tie"
        store.submit(annotator, shown[0].id, choice, key=f"{key}-{annotator}-{shown[0].id}")


@pytest.fixture
def log(tmp_path):
    """Writes a log of (versions, choice, thumbs), and gives its path."""

    def write(*lines, raw=()):
        path = tmp_path / "served.jsonl"
        texts = [
            json.dumps(
                {
                    "id": f"r{number}", "time": 1.0 + number, "prompt": "Hi",
                    "responses": [f" {n}" for n in range(len(versions))],
                    "versions": versions, "choice": choice, "thumbs": thumbs,
                }
            )
            for number, (versions, choice, thumbs) in enumerate(lines)
        ]  # fmt: skip
        path.write_text("\n".join([*texts, *raw]))
        return path

    return write


def test_a_prompt_of_a_store_is_one_choice(make_store, people):
    """Two responses of each version make four pairs of versions: their mean vote is one choice."""
    given = [asked("a", "a", "b", "b"), asked("a", "b", prompt="1 + 1 =")]
    store = make_store(given=given, overlap=1)
    judge(store, *people(store, "ann"), lambda shown: "a")
    found = choices_of_store(store)
    assert found.choices == [Choice(("a", "b"), 1.0)] * 2
    assert found.left_out == {"pairs without two versions": 2}


def test_votes_of_a_pair_are_averaged_once_all_are_there(make_store, people):
    store = make_store(given=[asked("b", "a")], overlap=2)
    ann, bob = people(store, "ann", "bob")
    judge(store, ann, lambda shown: "b")
    assert choices_of_store(store) == Choices([], {"prompts that wait for further judgements": 1})
    judge(store, bob, lambda shown: "tie")
    assert choices_of_store(store) == Choices([Choice(("a", "b"), 0.25)])
    assert choices_of_store(store, ["bob"]) == Choices([Choice(("a", "b"), 0.5)])


def test_both_bad_is_a_tie_and_hidden_checks_do_not_count(make_store, people):
    given = [asked("a", "b", "a", "b", gold=0), asked("a", None, prompt="n")]
    store = make_store(given=given, overlap=1)
    judge(store, *people(store, "ann"), lambda shown: "both_bad")
    assert choices_of_store(store).choices == [Choice(("a", "b"), 0.5)]


def test_choices_come_in_the_order_in_which_they_were_completed(make_store, people, tmp_path):
    given = [asked("a", "b", prompt=str(number)) for number in range(8)]
    store = make_store(given=given, overlap=1)
    order = []

    def prefer(shown):
        order.append("ab"[int(shown.prompt) % 2])
        return order[-1]

    judge(store, *people(store, "ann"), prefer)
    shares = [float(winner == "a") for winner in order]
    assert [choice.share for choice in choices_of_store(store).choices] == shares
    # The file gives the same as the open store.
    store.backup(tmp_path / "copy.sqlite")
    assert read_choices(tmp_path / "copy.sqlite") == choices_of_store(store)


def test_lines_of_a_log(log):
    path = log(
        (["v1", "v2"], 1, []),
        (["v2", "v1"], 1, []),
        (["v1", "v2"], "tie", []),
        (["v1", "v2"], None, [True, False]),
        (["v1", "v2"], None, [False, False]),
        (["v1", "v2"], None, [True, None]),
        (["v1", "v1"], 0, []),
        (["v3", "v2", "v1"], 1, []),
    )
    found = read_choices(path)
    v1_v2 = [choice.share for choice in found.choices if choice.versions == ("v1", "v2")]
    assert v1_v2 == [0.0, 1.0, 0.5, 1.0, 0.5, 0.0]
    # Of the three, v2 won: nothing is known of v1 against v3.
    assert found.choices[-1] == Choice(("v2", "v3"), 1.0) and len(found.choices) == 7
    assert found.left_out == {"requests without a choice between two versions": 2}


def test_a_request_that_is_logged_again_counts_once(log):
    path = log((["a", "b"], None, []), (["a", "b"], 0, []))
    text = path.read_text()
    path.write_text(
        text.replace('"r0"', '"r1"') + "\n" + text.splitlines()[1].replace(": 0", ": 1")
    )
    found = read_choices(path)
    assert found.choices == [Choice(("a", "b"), 1.0)]
    assert found.left_out["further lines of a request"] == 1


def test_verdicts_and_counts():
    choices = [Choice(("a", "b"), share) for share in [1.0] * 30 + [0.5] * 4 + [0.0] * 6]
    (found,) = compare_versions(Choices(choices))
    assert (found.version, found.against, found.better) == ("b", "a", "a")
    assert (found.wins, found.ties, found.losses, found.share) == (6, 4, 30, 8 / 40)
    assert found.decided_after == 8 and found.p_value < 0.05
    assert found.interval[0] < 0.2 < found.interval[1] < 0.5
    (other,) = compare_versions(Choices(choices), ["b", "a"])
    assert other.better == "a" and other.share == 1 - found.share
    assert other.as_dict()["verdict"] == "a is better, decided after 8 choices"
    (few,) = compare_versions(Choices(choices[:5]))
    assert (few.better, few.verdict) == (None, "not decided yet")


def test_several_comparisons_share_alpha():
    """Eight wins decide one comparison (9 > 20 / 2 bits), but not one of two."""
    choices = [Choice(("a", other), 1.0) for other in "bc"] * 8
    assert compare_versions(Choices(choices), ["a", "b"])[0].better == "a"
    both = compare_versions(Choices(choices))
    assert [(one.version, one.alpha, one.better) for one in both] == [
        ("b", 0.025, None), ("c", 0.025, None)
    ]  # fmt: skip


def test_the_path_ends_at_the_result_and_has_no_more_points_than_asked_for():
    choices = [Choice(("a", "b"), number % 2) for number in range(100)]
    (found,) = compare_versions(Choices(choices), looks=10)
    assert found.looks[0] == 1 and found.looks[-1] == 100 and len(found.looks) == 10
    assert found.intervals[-1] == (found.share, *found.interval)


SOME = Choices([Choice(("new", "old"), 1.0)])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: compare_versions(Choices()), "choices hold no choice between two versions"),
        (lambda: compare_versions(SOME, ["old", "newer"]), "versions must be among those compared "
         "(new, old), got 'newer'. did you mean 'new'?"),
        (lambda: compare_versions(SOME, ["old"]), "versions must be two or more different labels"),
        (lambda: compare_versions(SOME, ["old", "old"]), "must be two or more different"),
        (lambda: compare_versions(SOME, alpha=2), "alpha must be between 0 and 1, got 2"),
    ],
)  # fmt: skip
def test_wrong_arguments_are_named(call, says):
    with pytest.raises(InputError) as caught:
        call()
    assert says in str(caught.value) and len(caught.value.problems) == 1


def test_wrong_files_are_named(log, tmp_path, make_store):
    with pytest.raises(InputError, match="cannot be read: No such file"):
        read_choices(tmp_path / "none.jsonl")
    bad = log((["a", "b"], 0, []), (["a"], 1, []), raw=["[1]", "{"])
    with pytest.raises(InputError) as caught:
        read_choices(bad)
    lines = str(caught.value).splitlines()
    assert [line.partition(":")[0][-6:] for line in lines] == ["line 2", "line 3", "line 4"]
    with pytest.raises(InputError, match="annotators go with a store"):
        read_choices(log((["a", "b"], 0, [])), ["ann"])
    with pytest.raises(InputError, match="annotators must name annotators of the store"):
        choices_of_store(make_store(), ["nobody"])
    binary = tmp_path / "some.bin"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(InputError, match="neither a feedback store nor text"):
        read_choices(binary)
