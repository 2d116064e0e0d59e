"""Pairs as a stream: the same pairs and the same report as at once, in bounded memory."""

import json

import numpy as np
import pytest
from preferences_samples import random_pairs, write_jsonl

from dpo_keras.errors import InputError
from dpo_keras.preferences import PreferencePair, PreferenceStream, read_preferences, reader
from dpo_keras.preferences.audit import RepeatFinder
from dpo_keras.preferences.read_report import InvalidPreferences, Problem, ReadReport, by_rule
from dpo_keras.preferences.record_stream import Reading

MESSY = [
    {"prompt": "p", "chosen": "a", "rejected": "b", "note": 1},
    {"prompt": "p", "chosen": "b", "rejected": "a"},
    {"prompt": "p", "chosen": "a", "rejected": "b"},
    {"prompt": "", "chosen": "a", "rejected": "b", "weight": -1},
    {"prompt": "q", "chosen": "a", "rejected": "a"},
    {"chosen": "a", "rejected": "b"},
    {"prompt": "p", "response_a": "a", "response_b": "c", "preference": 0.2},
    {"prompt": "long prompt that is repeated", "chosen": "long prompt that is repeated, yes",
     "rejected": "long prompt that is repeated, no"},
]  # fmt: skip


def without_values(report):
    values = report.as_dict()
    for problem in values["warnings"]:
        problem["value"] = None
    return values


def test_a_stream_gives_the_pairs_and_the_report_of_reading_at_once(tmp_path):
    one = write_jsonl(tmp_path / "a.jsonl", MESSY)
    other = write_jsonl(tmp_path / "b.jsonl.gz", MESSY[:2])
    whole = read_preferences([one, other])
    stream = PreferenceStream([one, other])
    assert list(stream) == list(whole)
    assert without_values(stream.report) == without_values(whole.report)
    assert ReadReport.from_dict(json.loads(json.dumps(stream.report.as_dict()))).summary() == (
        whole.report.summary()
    )


def test_a_stream_lists_the_first_problems_and_counts_the_others(tmp_path, monkeypatch):
    bad = [{"prompt": f"{n}", "chosen": "", "rejected": "b"} for n in range(50)]
    good = [{"prompt": f"{n % 2}", "chosen": "a", "rejected": "b"} for n in range(60)]
    path = write_jsonl(tmp_path / "a.jsonl", bad + good)
    whole = read_preferences(path)
    monkeypatch.setattr(reader, "LISTED", 7)
    stream = PreferenceStream(path)
    assert len(list(stream)) == 60
    assert len(stream.report.problems) == 7 and len(stream.report.warnings) == 7
    assert stream.report.summary() == whole.report.summary()
    with pytest.raises(InvalidPreferences, match="50 of 110 records are bad, by 50 problems"):
        list(PreferenceStream(path, on_error="fail"))


def test_a_stream_stops_at_its_limit_and_says_what_is_missing_everywhere(tmp_path, monkeypatch):
    monkeypatch.setattr(reader, "LISTED", 3)
    stream = PreferenceStream(write_jsonl(tmp_path / "a.jsonl", MESSY), limit=2)
    assert len(list(stream)) == 2 and stream.report.read == 2
    lacking = [{"prompt": "p", "chosen": "a", "rejectd": "b"}] * 9
    with pytest.raises(InvalidPreferences) as error:
        list(PreferenceStream(write_jsonl(tmp_path / "b.jsonl", lacking)))
    assert "in all 9 records column 'rejected' is missing" in str(error.value)
    assert len(error.value.problems) == 2


def repeats_by_texts(pairs):
    """What `RepeatFinder` finds by hashes, found by the texts themselves."""
    said, preferred = {}, {}
    duplicates, contradictions = [], []
    for index, pair in enumerate(pairs):
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        tie = pair.preference == 0.5
        sides = frozenset((chosen, rejected)) if tie else (chosen, rejected)
        earlier = said.setdefault((prompt, sides, pair.preference, pair.annotator), index)
        if earlier != index:
            duplicates.append((index, earlier))
        if tie:
            continue
        opposite = preferred.get((prompt, rejected, chosen))
        if opposite is not None:
            contradictions.append((index, opposite))
        preferred.setdefault((prompt, chosen, rejected), index)
    return duplicates, contradictions


def test_repeats_found_by_hashes_are_those_found_by_the_texts():
    draw = np.random.default_rng(0)
    pairs = []
    for _ in range(400):
        chosen, rejected = draw.permutation(list("abc"))[:2].tolist()
        preference = draw.choice([0.5, 0.75, 1.0])
        annotator = (None, "ann", "bob")[draw.integers(3)]
        pairs.append(PreferencePair(f"p{draw.integers(12)}", chosen, rejected, float(preference),
                                    annotator=annotator))  # fmt: skip
    finder = RepeatFinder()
    for pair in pairs:
        finder.add(pair)
    expected = repeats_by_texts(pairs)
    assert expected[0] and expected[1]
    assert finder.find() == expected
    assert RepeatFinder().find() == ([], [])


def test_a_preference_counts_by_its_value_not_by_its_type():
    finder = RepeatFinder()
    for preference in (1, 1.0, np.float32(1.0)):
        finder.add(PreferencePair("p", "a", "b", preference))
    assert finder.find() == ([(1, 0), (2, 0)], [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet", "records"])
def test_columns_of_any_source_can_have_other_names(tmp_path, name):
    rows = [{"question": f"q{n}", "answer_a": "a", "answer_b": "b", "prompt": "other"}
            for n in range(3)]  # fmt: skip
    path = tmp_path / name
    source = path
    if name == "records":
        source = rows
    elif name == "a.json":
        path.write_text(json.dumps(rows))
    elif name == "a.jsonl":
        write_jsonl(path, rows)
    else:
        pandas = pytest.importorskip("pandas")
        frame = pandas.DataFrame(rows)
        frame.to_csv(path, index=False) if name == "a.csv" else frame.to_parquet(path)
    columns = {"prompt": "question", "chosen": "answer_a", "rejected": "answer_b"}
    pairs = read_preferences(source, columns=columns)
    assert [(pair.prompt, pair.chosen, pair.rejected) for pair in pairs] == [
        (f"q{n}", "a", "b") for n in range(3)
    ]


def test_columns_that_make_no_sense_are_named_together():
    with pytest.raises(InputError) as error:
        read_preferences([{}], columns={"promt": "q", "chosen": "", "rejected": "q"})
    assert len(error.value.problems) == 3
    assert "'promt'" in error.value.problems[0]


def test_a_stream_of_records_needs_no_files():
    assert list(PreferenceStream(iter(random_pairs(5)))) == random_pairs(5)


def test_a_summary_has_one_line_for_each_rule():
    problems = [Problem("a.csv", n, "empty prompt", "prompt", "", "") for n in range(1, 9)]
    assert by_rule(problems, {}) == ["empty prompt: 8 (lines 1, 2, 3, 4, 5 and 3 more)"]
    assert by_rule(problems, {"empty prompt": 4}) == [
        "empty prompt: 12 (lines 1, 2, 3, 4, 5 and 7 more)"
    ]
    everywhere = [Problem("b.csv", None, "missing column", "chosen", None, "it is missing.")]
    assert by_rule(problems[:1] + everywhere, {}) == [
        "empty prompt: 1 (line a.csv:1)",
        "missing column: it is missing.",
    ]


def test_a_column_in_the_place_of_a_renamed_one_is_unused():
    reading = Reading(columns={"prompt": "question"})
    assert reading.renamed({"question": "Hi", "prompt": 7}) == {"prompt": "Hi", "unused prompt": 7}
    assert reading.renamed("no mapping") == "no mapping"


def test_arguments_are_named_in_the_problems():
    with pytest.raises(InputError) as caught:
        read_preferences([{}], format="xml", on_error="ignore", limit=True, columns={"q": "q"})
    assert [problem.argument for problem in caught.value.problems] == [
        "format", "columns", "on_error", "limit"
    ]  # fmt: skip
