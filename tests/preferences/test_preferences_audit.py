import json

import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import Message, PreferencePair, Preferences, audit, read_preferences
from dpo_keras.preferences.audit import share_text
from dpo_keras.utils.intervals import wilson


def ab(preference, first="aa", second="b", **fields):
    fields = {"prompt": "p"} | fields
    return fields | {"response_a": first, "response_b": second, "preference": preference}


def test_counts_by_hand():
    picture = audit(
        [
            PreferencePair("p", "long one", "short", annotator="x", group="g"),
            PreferencePair("p", "no", "longer", annotator="x", preference=0.75),
            PreferencePair("q", "same", "size", annotator="y", weight=0.0),
            PreferencePair("q", "tie long", "tie", preference=0.5),
        ]
    )
    assert (picture.pairs, picture.prompts, picture.ties, picture.soft) == (4, 2, 1, 1)
    assert picture.zero_weight == 1
    # Equal lengths and ties say nothing about who wins.
    assert (picture.longer_wins.value, picture.longer_wins.count) == (0.5, 2)
    assert picture.annotators == {"x": 2, "y": 1}
    assert picture.groups == {"g": 1}
    assert picture.first_wins is None
    chosen = picture.lengths["chosen"]
    assert chosen["characters"]["100"] == 8 and chosen["characters"]["0"] == 2
    assert chosen["words"]["mean"] == 1.5 and chosen["words"]["50"] == 1.5


def test_how_often_the_first_response_wins():
    records = [ab(1.0, prompt=str(n)) for n in range(3)] + [ab(0.2), ab(0.5)]
    picture = audit(read_preferences(records))
    assert (picture.first_wins.value, picture.first_wins.count) == (0.75, 4)


def test_the_first_always_winning_is_seen_though_nothing_was_swapped():
    assert audit(read_preferences([ab(1.0)])).first_wins.value == 1.0


@pytest.mark.parametrize(
    ("count", "total", "low", "high"),
    # Wilson intervals from the closed form: k = 0 gives [0, z²/(n+z²)], k = n its mirror image.
    [(0, 10, 0.0, 0.27753), (10, 10, 0.72247, 1.0), (80, 100, 0.71117, 0.86663)],
)
def test_shares_are_json_with_wilsons_interval(count, total, low, high):
    sides = [("longer", "no")] * count + [("no", "longer")] * (total - count)
    pairs = [PreferencePair(f"p{n}", *both) for n, both in enumerate(sides)]
    share = audit(pairs).as_dict()["longer_wins"]
    assert list(share) == ["count", "total", "share", "low", "high"]
    assert (share["count"], share["total"], share["share"]) == (count, total, count / total)
    assert share["low"] == pytest.approx(low, abs=1e-5)
    assert share["high"] == pytest.approx(high, abs=1e-5)


def test_shares_are_text_with_their_counts():
    assert share_text(wilson(80, 100)) == "80 of 100 (80.0 %, 95 % interval 71.1 to 86.7 %)"
    assert share_text(wilson(1234, 2468)).startswith("1,234 of 2,468 (50.0 %, ")


def test_nothing_to_count_has_no_share():
    picture = audit([PreferencePair("p", "a", "b", preference=0.5)])
    assert picture.as_dict()["longer_wins"] == {
        "count": 0, "total": 0, "share": None, "low": None, "high": None
    }  # fmt: skip
    assert "none to count" in picture.summary()


def test_duplicates_need_the_same_annotator_and_preference():
    one = PreferencePair("p", "a", "b", annotator="x")
    other = PreferencePair("p", "a", "b", annotator="y")
    softer = PreferencePair("p", "a", "b", 0.75, annotator="x")
    assert audit([one, other, softer, one]).duplicates == ((3, 0),)


def test_contradictions_cross_annotators_and_spare_ties():
    one = PreferencePair("p", "a", "b", annotator="x")
    opposite = PreferencePair("p", "b", "a", annotator="y")
    tie = PreferencePair("p", "b", "a", 0.5)
    elsewhere = PreferencePair("q", "b", "a")
    assert audit([one, tie, elsewhere, opposite]).contradictions == ((3, 0),)
    # A tie has no order: the same tie the other way round is a duplicate.
    assert audit([tie, PreferencePair("p", "a", "b", 0.5)]).duplicates == ((1, 0),)


def test_messages_are_measured_by_their_contents():
    pair = PreferencePair(
        (Message("user", "how so"),), (Message("assistant", "four"),), (Message("assistant", "5"),)
    )
    picture = audit([pair])
    assert picture.lengths["prompt"]["words"]["50"] == 2
    assert picture.longer_wins.count == picture.longer_wins.value == 1


def test_the_audit_is_json_and_text():
    pairs = Preferences([PreferencePair("p", "a", "bb", annotator="x", group="g")] * 2)
    values = json.loads(json.dumps(audit(pairs).as_dict()))
    assert values["duplicates"] == [[1, 0]]
    assert values["longer_wins"]["share"] == 0.0
    summary = audit(pairs).summary()
    assert "2 pairs on 1 prompts" in summary and "annotators: x 2" in summary


def test_no_pairs_are_refused():
    with pytest.raises(InputError, match="at least one pair"):
        audit([])
