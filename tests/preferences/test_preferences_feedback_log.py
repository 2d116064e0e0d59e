"""The log of a served policy: choices become pairs, thumbs become rated responses."""

import json
import multiprocessing

import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    FeedbackLog,
    PreferencePair,
    Preferences,
    RatedResponse,
    RatedResponses,
    read_preferences,
)
from dpo_keras.preferences.feedback_log import read_log_record

LINE = {"prompt": "2 + 2 =", "responses": [" 4", " 5"], "versions": ["7", "8"]}


def test_a_choice_becomes_a_pair_and_keeps_what_was_shown_first():
    found = read_preferences([{**LINE, "choice": 1, "id": "r1"}, {**LINE, "choice": "tie"}])
    assert isinstance(found, Preferences)
    assert list(found) == [
        PreferencePair("2 + 2 =", " 5", " 4", id="r1", swapped=True),
        PreferencePair("2 + 2 =", " 4", " 5", preference=0.5),
    ]


def test_a_choice_among_three_beats_each_of_the_others():
    found = read_log_record({"prompt": "q", "responses": ["a", "b", "c"], "choice": 1}).pairs()
    assert [(p.chosen, p.rejected, p.swapped) for p in found] == [
        ("b", "a", True),
        ("b", "c", False),
    ]


def test_thumbs_become_rated_responses():
    found = read_preferences([{**LINE, "thumbs": [True, None]}, {**LINE, "thumbs": [None, False]}])
    assert isinstance(found, RatedResponses)
    assert list(found) == [
        RatedResponse("2 + 2 =", " 4", True),
        RatedResponse("2 + 2 =", " 5", False),
    ]


def test_a_log_of_both_asks_which_to_take(tmp_path):
    path = tmp_path / "log.jsonl"
    lines = [{**LINE, "choice": 0, "thumbs": [True, False]}, {**LINE, "choice": None}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(InputError, match="feedback='choices' or 'thumbs'"):
        read_preferences(path)
    choices = read_preferences(path, feedback="choices")
    assert list(choices) == [PreferencePair("2 + 2 =", " 4", " 5")]
    thumbs = read_preferences(path, feedback="thumbs")
    assert thumbs.ratings == (1, 1) and thumbs.report.read == 2
    assert "lines of a feedback log without thumbs (1)" in thumbs.report.summary()
    with pytest.raises(InputError, match="feedback must be one of choices, thumbs"):
        read_preferences(path, feedback="stars")


def test_feedback_without_a_log_has_no_effect_and_an_empty_log_says_why():
    record = {"prompt": "q", "response": "a", "desirable": True}
    with pytest.raises(InputError, match="feedback has no effect: records is no feedback log"):
        read_preferences([record], feedback="thumbs")
    with pytest.raises(InputError, match="without choices or thumbs .1."):
        read_preferences([LINE])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"choice": 2}, "choice must be the number of a response .0 to 1., 'tie' or null, got 2"),
        ({"choice": True}, "choice must be the number of a response"),
        ({"responses": ["a", "b", "c"], "versions": None, "choice": "tie"}, "a tie of two"),
        ({"thumbs": [True]}, "thumbs must have a value for each of the 2 responses, got 1"),
        ({"thumbs": ["up", None]}, "thumbs must be a list of true, false or null"),
        ({"versions": ["7"], "choice": 0}, "versions must have a value for each"),
        ({"responses": "a", "choice": 0}, "responses must be a list of responses"),
        ({"responses": [" 4", ""], "choice": 0}, r"responses\[1\] must hold text"),
        ({"responses": [" 4", " 4"], "versions": None, "choice": 0}, "are the same text"),
        ({"time": [1], "choice": 0}, "time must be ISO 8601"),
    ],
)
def test_each_broken_rule_of_a_line_is_named_with_its_number(change, words, tmp_path):
    path = tmp_path / "log.jsonl"
    good = {**LINE, "choice": 0, "prompt": "good"}
    path.write_text("".join(json.dumps(line) + "\n" for line in (good, {**LINE, **change})))
    with pytest.raises(InputError, match=words):
        read_preferences(path, on_error="fail")
    kept = read_preferences(path)
    assert len(kept) == 1 and kept.report.problems[0].line == 2


def write(path, process):
    log = FeedbackLog(path)
    for number in range(200):
        log.write(f"{process} {number}", ["é" * 3000, "b"], choice=number % 2)


def test_processes_write_whole_lines_at_the_same_time(tmp_path):
    path = tmp_path / "log.jsonl"
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write, args=(path, number)) for number in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    found = read_preferences(path)
    assert len(found) == 800 and not found.report.problems
    assert len({pair.prompt for pair in found}) == 800


def test_a_line_that_breaks_a_rule_is_not_written(tmp_path):
    log = FeedbackLog(tmp_path / "log.jsonl")
    with pytest.raises(InputError, match="choice must be"):
        log.write("q", ["a", "b"], choice=5)
    assert not log.path.exists()
    with pytest.raises(InputError, match=r"nowhere/log.jsonl: cannot be written: No such file"):
        FeedbackLog(tmp_path / "nowhere/log.jsonl").write("q", ["a"], thumbs=[True])
    log.write("q", ["a", "b"], versions=["1", "2"], choice=0, time=17.5, id="x")
    line = json.loads(log.path.read_text())
    assert line["time"] == 17.5 and line["versions"] == ["1", "2"] and line["id"] == "x"
