"""Rankings are read from every source, checked, split, written, and turned into pairs."""

import json
from dataclasses import replace

import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    Message,
    PreferencePair,
    RankedResponses,
    Rankings,
    audit,
    build_preferences,
    read_preferences,
    write_preferences,
)
from dpo_keras.preferences.quickstart_data import judge, support_rankings

LINE = {"prompt": "2 + 2 =", "responses": [" 5", " 4", " four"], "ranking": [3, 1, 2]}


def read(tmp_path, *lines):
    path = tmp_path / "rankings.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return read_preferences(path)


def test_ranks_and_scores_put_the_best_response_first(tmp_path):
    scored = {"prompt": "2 + 3 =", "responses": [" 6", " 5", " 7"], "scores": [0.5, 9, 0.5]}
    found = read(tmp_path, {**LINE, "annotator": "ann", "weight": 2}, scored)
    assert isinstance(found, Rankings)
    assert found[0].responses == (" 4", " four", " 5")
    assert (found[0].annotator, found[0].weight, found[0].has_ties) == ("ann", 2.0, False)
    assert (found[1].responses, found[1].ranking) == ((" 5", " 6", " 7"), (1, 2, 2))
    assert found.report.layouts == {"responses/ranking": 1, "responses/scores": 1}


def test_messages_are_responses_too(tmp_path):
    said = [[{"role": "assistant", "content": text}] for text in ("Hello!", "What?")]
    prompt = [{"role": "user", "content": "Hi"}]
    found = read(tmp_path, {"prompt": prompt, "responses": said, "ranking": [1, 2]})
    assert [turns[0].content for turns in found[0].responses] == ["Hello!", "What?"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranking": [1, 1, 2]}, r"ranking must hold each rank from 1 to 3 once.*Ties need scores"),
        ({"ranking": [1, 2]}, "ranking must have a number for each of the 3 responses, got 2"),
        ({"ranking": [0, 1, 2]}, "ranking must hold each rank from 1 to 3 once"),
        ({"ranking": "best"}, "ranking must be a list"),
        ({"ranking": None}, "ranking must be given, or scores in its place, got neither"),
        ({"ranking": None, "scores": [1, 2, None]}, "scores must be finite numbers"),
        ({"scores": [1, 2, 3]}, "ranking must be given, or scores in its place, got both"),
        ({"responses": [" 4", " 4 ", " 5"]}, "responses 1 and 2 are the same text"),
        ({"responses": [" 4"], "ranking": [1]}, "responses must be 2 to 32 responses, got 1"),
        ({"responses": [" 4", " ", " 5"]}, "response 2 must hold text"),
        ({"prompt": ""}, "prompt must hold text"),
        ({"weight": -1}, "weight must be in"),
    ],
)
def test_a_wrong_ranking_is_named_with_its_line_and_the_others_are_kept(tmp_path, change, message):
    record = {name: value for name, value in {**LINE, **change}.items() if value is not None}
    found = read(tmp_path, LINE, record)
    assert len(found) == 1
    problem = found.report.problems[0]
    assert problem.line == 2
    with pytest.raises(InputError, match=message):
        raise InputError(problem.message)


def test_rankings_and_pairs_do_not_mix(tmp_path):
    pair = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    with pytest.raises(InputError, match=r"pairs \(choices\) and rankings.*line 2 holds a pair"):
        read(tmp_path, LINE, pair)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".csv.gz", ".parquet"])
def test_what_is_written_is_read_again(tmp_path, suffix):
    rankings = Rankings(
        [
            RankedResponses("=a", ("x", "=y", "z"), (2, 1, 3), annotator="ann"),
            RankedResponses("b", ("x", "y", "z"), scores=(1.0, 1.0, 0.0), weight=0.5),
        ]
    )
    write_preferences(rankings, tmp_path / f"out{suffix}")
    assert list(read_preferences(tmp_path / f"out{suffix}")) == list(rankings)


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_responses_that_call_tools_are_written_whole(tmp_path, suffix):
    def call(name):
        calls = [{"function": {"name": name, "arguments": {name: 1}}}]
        return (Message.from_dict({"role": "assistant", "tool_calls": calls}),)

    ranked = RankedResponses((Message("user", "Go"),), tuple(map(call, "fgh")), (3, 1, 2))
    write_preferences([ranked], tmp_path / f"out{suffix}")
    assert list(read_preferences(tmp_path / f"out{suffix}")) == [ranked]


def test_a_table_without_an_order_is_told_what_it_lacks(tmp_path):
    path = tmp_path / "rankings.csv"
    path.write_text('prompt,responses\na,"[""x"", ""y""]"\n')
    with pytest.raises(InputError, match="ranking must be given, or scores in its place"):
        read_preferences(path)


def test_a_ranking_with_scores_can_be_changed_in_part():
    scored = RankedResponses("b", ("x", "y", "z"), scores=(1, 2, 1))
    assert replace(scored, weight=2.0) == RankedResponses(
        "b", ("x", "y", "z"), scores=(1, 2, 1), weight=2.0
    )
    with pytest.raises(InputError, match="got both"):
        replace(scored, scores=(0.0, 1.0, 2.0))


def test_the_audit_of_rankings_is_that_of_all_their_pairs():
    rankings = support_rankings(20)
    assert audit(rankings) == audit(rankings.as_pairs())
    assert (audit(rankings).pairs, audit(rankings).prompts) == (120, 20)


def test_a_built_directory_refuses_rankings_by_name(tmp_path):
    with pytest.raises(InputError, match="holds preference pairs, and the data are rankings"):
        build_preferences([LINE], tmp_path / "built")


def test_the_sides_of_a_split_share_no_prompt():
    train, held_out = support_rankings(200).split(0.2, seed=1)
    assert isinstance(train, Rankings)
    assert {one.prompt for one in train}.isdisjoint(one.prompt for one in held_out)
    assert len(train) + len(held_out) == 200


def test_the_pairs_of_a_ranking_weigh_as_much_as_it_does():
    ranked = RankedResponses("a", ("w", "x", "y", "z"), (1, 2, 3, 4), weight=3.0, group="g")
    everything, against = ranked.pairs(), ranked.pairs("best_against_rest")
    assert [(p.chosen, p.rejected) for p in everything] == [
        ("w", "x"), ("w", "y"), ("w", "z"), ("x", "y"), ("x", "z"), ("y", "z"),
    ]  # fmt: skip
    assert [(p.chosen, p.rejected) for p in against] == [("w", "x"), ("w", "y"), ("w", "z")]
    for pairs in (everything, against):
        assert sum(pair.weight for pair in pairs) == pytest.approx(3.0)
        assert all(isinstance(p, PreferencePair) and p.group == "g" for p in pairs)
    with pytest.raises(InputError, match="expansion must be one of all_pairs, best_against_rest"):
        ranked.pairs("some")


def test_ties_are_pairs_of_an_even_preference():
    ranked = RankedResponses("a", ("x", "y", "z"), scores=(0, 1, 0))
    assert [(p.chosen, p.rejected, p.preference) for p in ranked.pairs()] == [
        ("y", "x", 1.0), ("y", "z", 1.0), ("x", "z", 0.5),
    ]  # fmt: skip


def test_the_bundled_rankings_are_by_virtues():
    for ranked in support_rankings(20, seed=3):
        virtues = [judge(ranked.prompt, text).virtues for text in ranked.responses]
        assert virtues == [3, 2, 1, 0]
    assert list(support_rankings(5)) == list(support_rankings(9))[:5]
