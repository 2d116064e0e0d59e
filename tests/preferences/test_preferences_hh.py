"""Conversations in the layout of HH-RLHF, whose prompts stand only inside the two columns."""

import gzip
import json
import os

import pytest
from hh_sample import DIFFERING_OPENINGS, EMPTY_REPLY, write_hh_sample

from dpo_keras.preferences import audit, read_preferences

ASSISTANT = "\n\nAssistant:"
COUNT = 2312


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return write_hh_sample(tmp_path_factory.mktemp("hh") / "sample.jsonl.gz", COUNT)


@pytest.fixture(scope="module")
def pairs(sample):
    return read_preferences(sample)


@pytest.fixture(scope="module")
def lines(sample):
    with gzip.open(sample, "rt", encoding="utf-8") as stream:
        return [json.loads(line) for line in stream]


def test_all_lines_are_read_and_the_bad_ones_are_named(pairs):
    empty = list(range(EMPTY_REPLY, COUNT + 1, EMPTY_REPLY))
    differing = [n for n in range(DIFFERING_OPENINGS, COUNT + 1, DIFFERING_OPENINGS)
                 if n not in empty]  # fmt: skip
    report = pairs.report
    assert (len(empty), len(differing)) == (10, 6)
    assert (report.read, report.kept, report.dropped) == (COUNT, COUNT - 16, 16)
    by_rule = {}
    for problem in report.problems:
        by_rule.setdefault(problem.rule, []).append(problem.line)
    assert by_rule == {"empty response": empty, "conversations differ": differing}
    assert report.warnings == []


def test_every_pair_joins_to_its_line(pairs, lines):
    bad = {problem.line for problem in pairs.report.problems}
    good = [line for number, line in enumerate(lines, 1) if number not in bad]
    for pair, line in zip(pairs, good, strict=True):
        assert pair.prompt.endswith(ASSISTANT)
        assert ASSISTANT not in pair.chosen + pair.rejected
        assert pair.prompt + pair.chosen == line["chosen"]
        assert pair.prompt + pair.rejected == line["rejected"]


def test_prompts_end_at_the_last_marker_that_both_sides_share(pairs, lines):
    """As TRL's own reader of this layout cuts them."""
    theirs = set()
    for line in lines:
        shared = os.path.commonprefix([line["chosen"], line["rejected"]])
        cut = shared.rfind(ASSISTANT) + len(ASSISTANT)
        theirs.add((line["chosen"][:cut], line["chosen"][cut:], line["rejected"][cut:]))
    assert {(pair.prompt, pair.chosen, pair.rejected) for pair in pairs} <= theirs


def test_responses_that_begin_alike_stay_whole(pairs):
    alike = [pair for pair in pairs if pair.chosen[:8] == pair.rejected[:8] == " I am gl"]
    assert len(alike) > 100


def test_the_split_holds_out_a_tenth_of_the_prompts(pairs):
    train, held_out = pairs.split(0.1, seed=0)
    # 2,296 prompts drawn with probability 0.1: standard deviation 14.
    assert abs(len(held_out) - 230) < 45
    assert not {pair.prompt for pair in train} & {pair.prompt for pair in held_out}


def test_the_audit_sees_no_length_bias_toward_long_answers(pairs):
    picture = audit(pairs)
    assert picture.pairs == COUNT - 16
    assert picture.first_wins is None
    assert 0.40 < picture.longer_wins.value < 0.50
