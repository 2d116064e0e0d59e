"""A rated response stands beside a response to another prompt, cut to the room that is left."""

import numpy as np
import pytest
from tiny import Letters

from dpo_keras.batching import Ragged, tokenize_pairs
from dpo_keras.batching.mismatches import mismatched, rows_of_other_prompts
from dpo_keras.errors import InputError
from dpo_keras.preferences import PreferencePair, RatedResponse


@pytest.mark.parametrize("sizes", [[1, 1], [1, 1, 1, 1], [3, 1], [1, 2, 5], [2, 2], [7, 1, 1]])
def test_no_row_gets_a_response_to_its_own_prompt(sizes):
    random = np.random.default_rng(0)
    prompts = random.permutation(np.repeat(random.integers(0, 2**63, len(sizes)), sizes))
    other = rows_of_other_prompts(prompts.astype(np.uint64))
    assert (prompts[other] != prompts).all()
    if set(sizes) == {1}:
        assert sorted(other) == list(range(len(prompts)))


def test_one_prompt_alone_is_refused():
    with pytest.raises(InputError, match="must have two prompts at least"):
        rows_of_other_prompts(np.array([7, 7, 7], np.uint64))


def test_a_longer_mismatched_response_is_cut_and_the_prompt_is_not():
    prompt, response = Ragged.from_lists([[1] * 6, [1]]), Ragged.from_lists([[5, 2], [6] * 9])
    found = mismatched(prompt, response, np.array([1, 2], np.uint64), 10)
    assert found.tolist() == [[6] * 4, [5, 2]]


def rated(count=6, **changes):
    return [
        RatedResponse(f"{n} {'ab'[n % 2] * 3}", "cd"[n % 2] * (n + 1), n % 3 == 0, **changes)
        for n in range(count)
    ]


def test_rated_responses_use_the_layout_of_pairs():
    records = rated(weight=2.0, group="g")
    tokens = tokenize_pairs(records, Letters(), max_length=32)
    alone = tokenize_pairs(
        [PreferencePair(one.prompt, one.response, "zz") for one in records],
        Letters(),
        max_length=32,
    )
    assert tokens.prompt.tolist() == alone.prompt.tolist()
    assert tokens.chosen.tolist() == alone.chosen.tolist()
    assert tokens.preference.tolist() == [1.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    assert tokens.weight.tolist() == [2.0] * 6 and tokens.rated.tolist() == [1.0] * 6
    assert sorted(tokens.rejected.tolist()) == sorted(tokens.chosen.tolist())
    assert all(
        a != b for a, b in zip(tokens.chosen.tolist(), tokens.rejected.tolist(), strict=True)
    )
    again = tokenize_pairs(records, Letters(), max_length=32)
    assert again.fingerprint == tokens.fingerprint
    assert tokens.take(np.array([1])).rated.tolist() == [1.0] and alone.rated is None


def test_a_dropped_response_is_nobodys_mismatch():
    records = [*rated(), RatedResponse("x", "y" * 40, True)]
    tokens = tokenize_pairs(records, Letters(), max_length=32, overlength="drop")
    assert [pair.rule for pair in tokens.report.dropped] == ["overlength"]
    assert max(tokens.rejected.lengths) <= max(tokens.chosen.lengths)


def test_pairs_among_rated_responses_are_refused():
    with pytest.raises(InputError, match="must be of one kind, got 6 rated responses among 7"):
        tokenize_pairs([*rated(), PreferencePair("a", "b", "c")], Letters())
