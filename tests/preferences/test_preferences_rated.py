"""Rated responses are read from every source, by our names and TRL's, and written."""

import json

import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import (
    Message,
    PreferencePair,
    Preferences,
    RatedResponse,
    RatedResponses,
    audit_rated,
    build_preferences,
    judge,
    read_preferences,
    support_thumbs,
    write_preferences,
)

UP = {"prompt": "2 + 2 =", "response": " 4", "desirable": True}
DOWN = {"prompt": "2 + 2 =", "response": " 5", "desirable": False}
RATED = [RatedResponse("2 + 2 =", " 4", 1.0), RatedResponse("2 + 2 =", " 5", 0.0)]


def trl(record):
    return {
        "prompt": record["prompt"],
        "completion": record["response"],
        "label": record["desirable"],
    }


@pytest.mark.parametrize("rename", [lambda record: record, trl])
def test_our_names_and_those_of_trl_are_read_from_every_source(rename, tmp_path):
    pandas, arrow = pytest.importorskip("pandas"), pytest.importorskip("pyarrow")
    records = [rename(UP), rename(DOWN)]
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (tmp_path / "thumbs.jsonl").write_text(lines)
    (tmp_path / "thumbs.json").write_text(json.dumps(records))
    frame = pandas.DataFrame(records)
    frame.to_csv(tmp_path / "thumbs.csv", index=False)
    frame.to_parquet(tmp_path / "thumbs.parquet")
    columns = {name: [record[name] for record in records] for name in records[0]}
    for source in (
        *(tmp_path / f"thumbs.{suffix}" for suffix in ("jsonl", "json", "csv", "parquet")),
        *(records, frame, columns, arrow.table(columns)),
    ):
        found = read_preferences(source)
        assert isinstance(found, RatedResponses) and list(found) == RATED
        assert found.ratings == (1, 1) and not found.report.warnings


def test_conversations_are_split_and_messages_read():
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]
    explicit = {"prompt": turns[:1], "completion": turns[1:], "label": True}
    implicit = {"completion": turns, "label": True}
    repeated = {"prompt": turns[:1], "completion": turns, "label": True}
    text = {"completion": "\n\nHuman: Hi\n\nAssistant: Hello!", "label": False}
    found = list(read_preferences([explicit, implicit, repeated, text]))
    wanted = RatedResponse((Message("user", "Hi"),), (Message("assistant", "Hello!"),), True)
    assert found[:3] == [wanted] * 3
    assert found[3] == RatedResponse("\n\nHuman: Hi\n\nAssistant:", " Hello!", False)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"desirable": None}, "desirable has no value"),
        ({"desirable": "yes"}, "desirable must be true, false or a number in .0, 1., got 'yes'"),
        ({"desirable": float("nan")}, "desirable must be .* got nan"),
        ({"desirable": 2}, "desirable must be .* got 2"),
        ({"response": " "}, "response must hold text"),
        ({"prompt": ["a"]}, "prompt: message 1 must be a mapping"),
        ({"weight": -1}, "weight must be in .0, 1e6., got -1"),
        ({"group": 1.5}, "group must be text or a whole number"),
    ],
)
def test_each_broken_rule_is_named_and_good_records_stay(change, words):
    with pytest.raises(InputError, match=words):
        read_preferences([{**UP, **change}])
    found = read_preferences([{**UP, **change}, DOWN])
    assert list(found) == RATED[1:] and found.report.dropped == 1


def test_missing_columns_are_named_by_what_the_file_calls_them(tmp_path):
    (tmp_path / "thumbs.csv").write_text("prompt,completion\n2 + 2 =,4\n")
    with pytest.raises(InputError, match="column 'desirable' is missing"):
        read_preferences(tmp_path / "thumbs.csv")
    with pytest.raises(InputError, match="label must be true, false"):
        read_preferences([{**trl(UP), "label": "up"}])
    (tmp_path / "named.csv").write_text("question,answer,thumb\n2 + 2 =, 4,TRUE\n")
    names = {"prompt": "question", "response": "answer", "desirable": "thumb"}
    assert list(read_preferences(tmp_path / "named.csv", columns=names)) == RATED[:1]


def test_ratings_on_another_scale_are_not_misread():
    stars = [{**UP, "prompt": f"{n}", "desirable": n % 5 + 1} for n in range(50)]
    with pytest.raises(InputError, match="another scale"):
        read_preferences(stars)


def test_pairs_and_rated_responses_do_not_mix():
    pair = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5"}
    with pytest.raises(InputError, match="record 2 holds a rated response. Put them into files"):
        read_preferences([pair, UP])
    with pytest.raises(InputError, match="item 1 is a PreferencePair"):
        RatedResponses([RATED[0], PreferencePair(**pair)])


def test_a_pair_with_a_column_response_stays_a_pair():
    record = {"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "response": " 6"}
    found = read_preferences([record])
    assert isinstance(found, Preferences) and "column 'response'" in found.report.summary()


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet", "jsonl.gz"])
def test_what_is_written_is_read_again(suffix, tmp_path):
    more = RatedResponse("q", "a", 0.25, 2.0, annotator="ann", group="g", id="7")
    write_preferences([*RATED, more], tmp_path / f"out.{suffix}")
    assert list(read_preferences(tmp_path / f"out.{suffix}")) == [*RATED, more]
    with pytest.raises(InputError, match="records of one kind"):
        write_preferences([*RATED, PreferencePair("a", "b", "c")], tmp_path / "mixed.jsonl")


def test_no_prompt_is_on_both_sides_of_a_split():
    rated = support_thumbs(400)
    train, held_out = rated.split(0.2)
    assert isinstance(held_out, RatedResponses) and len(train) + len(held_out) == 400
    assert not {one.prompt for one in train} & {one.prompt for one in held_out}


def test_pairs_become_rated_responses():
    pair = PreferencePair("2 + 2 =", " 4", " 5", preference=0.75, weight=3.0, annotator="ann")
    up, down = Preferences([pair]).unpaired()
    assert (up.response, up.desirable, down.response, down.desirable) == (" 4", 0.75, " 5", 0.25)
    assert {up.weight, down.weight} == {3.0} and {up.annotator, down.annotator} == {"ann"}


def test_repeats_and_contradictions_are_found():
    found = read_preferences([UP, UP, {**UP, "desirable": False}, {**DOWN, "prompt": "3 + 2 ="}])
    assert [problem.rule for problem in found.report.warnings] == ["duplicate", "contradiction"]
    picture = audit_rated(found)
    assert picture.duplicates == ((1, 0),) and picture.contradictions == ((2, 0),)
    assert (picture.desirable, picture.undesirable, picture.prompts) == (2, 2, 2)


def test_a_built_directory_refuses_them(tmp_path):
    with pytest.raises(InputError, match="a built directory holds preference pairs"):
        build_preferences([UP, DOWN], tmp_path / "built")
    assert not (tmp_path / "built").exists()


def test_thumbs_of_the_bundled_replies_are_wrong_at_the_rate_of_noise():
    rated = support_thumbs(2000, noise=0.1)
    wrong = sum(judge(one.prompt, one.response).preferred != bool(one.desirable) for one in rated)
    assert 0.08 < wrong / 2000 < 0.12
    assert read_preferences("builtin:support-thumbs:0.1", limit=50) == rated[:50]
    for name in ("builtin:support-thumbs:0.7", "builtin:support-thumbs:much"):
        with pytest.raises(InputError, match=r"with a share of wrong thumbs in \[0, 0.5\)"):
            read_preferences(name)
