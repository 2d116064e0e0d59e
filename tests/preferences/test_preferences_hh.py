"""Real data: the HH-RLHF sample of shared/data, beside the repository."""

import gzip
import json
import os
from pathlib import Path

import pytest

from dpo_keras.preferences import audit, read_preferences

SAMPLE = Path(__file__).parents[3] / "shared" / "data" / "hh_harmless_base_test.jsonl.gz"
ASSISTANT = "\n\nAssistant:"

pytestmark = pytest.mark.skipif(
    not SAMPLE.exists(), reason="needs ../shared/data/hh_harmless_base_test.jsonl.gz (CI has it)"
)


@pytest.fixture(scope="module")
def pairs():
    return read_preferences(SAMPLE)


@pytest.fixture(scope="module")
def lines():
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_all_lines_are_read_and_the_nine_bad_ones_are_named(pairs):
    report = pairs.report
    assert (report.read, report.kept, report.dropped) == (2312, 2303, 9)
    by_rule = {}
    for problem in report.problems:
        by_rule.setdefault(problem.rule, []).append(problem.line)
    assert by_rule == {
        "empty response": [87, 517, 926, 1104],
        "conversations differ": [1255, 1689, 1951, 1953, 2037],
    }
    assert report.warnings == []


def test_every_pair_joins_to_its_line(pairs, lines):
    bad = {problem.line for problem in pairs.report.problems}
    good = [line for number, line in enumerate(lines, 1) if number not in bad]
    for pair, line in zip(pairs, good, strict=True):
        assert pair.prompt.endswith(ASSISTANT)
        assert ASSISTANT not in pair.chosen + pair.rejected
        assert pair.prompt + pair.chosen == line["chosen"]
        assert pair.prompt + pair.rejected == line["rejected"]


def test_prompts_are_those_of_the_trl_benchmark(pairs, lines):
    """shared/bench/trl_baseline.py cuts at the last marker that both sides share."""
    theirs = set()
    for line in lines:
        shared = os.path.commonprefix([line["chosen"], line["rejected"]])
        cut = shared.rfind(ASSISTANT) + len(ASSISTANT)
        theirs.add((line["chosen"][:cut], line["chosen"][cut:], line["rejected"][cut:]))
    assert {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs} <= theirs


def test_the_split_holds_out_a_tenth_of_the_prompts(pairs):
    train, held_out = pairs.split(0.1, seed=0)
    assert len(held_out) == 230
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}


def test_the_audit_sees_no_length_bias_toward_long_answers(pairs):
    picture = audit(pairs)
    assert picture.pairs == 2303
    assert picture.first_wins is None
    assert 0.40 < picture.longer_wins.share < 0.50
