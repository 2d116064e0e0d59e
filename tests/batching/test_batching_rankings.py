"""Rankings in batches: K columns, the prompt once in packed rows, fewer responses padded."""

import numpy as np
import pytest
from tiny import Letters

from dpo_keras.batching import collate, collate_packed, preference_dataset, tokenize_pairs
from dpo_keras.batching.packing import packed_order, plan_packing
from dpo_keras.errors import InputError
from dpo_keras.preferences.ranked_responses import RankedResponses

RANKED = [
    RankedResponses("ask", ("best", "good one", "bad"), ranking=(1, 2, 3)),
    RankedResponses("why", ("no", "yes"), ranking=(2, 1)),
]


@pytest.fixture(scope="module")
def tokenized():
    return tokenize_pairs(RANKED, Letters(), max_length=32)


def texts(parts, row):
    return ["".join(chr(32 + token - 3) for token in part[row][:-1]) for part in parts]


def test_the_best_response_is_the_first_column_and_shorter_rankings_have_empty_ones(tokenized):
    assert texts(tokenized.responses, 0) == ["best", "good one", "bad"]
    assert texts(tokenized.responses[:2], 1) == ["yes", "no"]
    assert [len(part[1]) for part in tokenized.responses] == [4, 3, 0]
    assert tokenized.report.kept == 2
    assert tokenized.lengths.tolist() == [4 + 9, 4 + 4]


def test_a_row_of_a_bucket_has_a_sequence_for_each_response(tokenized):
    batch = collate(tokenized, [0, 1], 16, 24)
    assert batch["token_ids"].shape == (2, 3, 16)
    counts = [[(row == column).sum() for column in range(3)] for row in batch["owner"]]
    assert counts == [[5, 9, 4], [4, 3, 0]]


def test_a_packed_row_has_the_prompt_once_and_each_response_once(tokenized):
    batch = collate_packed(tokenized, [[0, 1]], trees=np.arange(2))
    assert batch["responses"].shape == (1, 2, 3)
    used = int(batch["padding_mask"].sum())
    # 4 prompt tokens and 18 of three responses; 4 and 7 of two. "best" and "bad" share their b.
    assert used == (4 + 18 - 1) + (4 + 7)
    assert (batch["owner"] >= 0).sum() == 18 + 7


def test_every_ranking_is_packed_once_in_an_epoch(tokenized):
    many = tokenized.take(np.tile([0, 1], 20))
    plan = plan_packing(many, 6, seed=3)
    for epoch in (0, 1):
        pairs = packed_order(plan, epoch).pairs
        assert sorted(pairs[pairs >= 0].tolist()) == list(range(40))
    assert all(
        batch["responses"].shape[-1] == 3
        for batch in preference_dataset(many, batch_size=6, batching="packed").take(2)
    )


def test_taking_rows_and_log_probs_keep_all_columns(tokenized):
    taken = tokenized.take([1])
    assert [len(part) for part in taken.responses] == [1, 1, 1]
    assert tokenized.with_reference(np.zeros((2, 3))).reference.shape == (2, 3)
    with pytest.raises(InputError, match=r"shape \(2, 3\)"):
        tokenized.with_reference(np.zeros((2, 2)))


def test_rankings_with_ties_have_no_order_to_train_on():
    tied = RankedResponses("ask", ("a", "b", "c"), scores=(1.0, 0.0, 0.0))
    with pytest.raises(InputError, match=r"1 of 3 have ties \(the first is ranking 2\).*as_pairs"):
        tokenize_pairs([*RANKED, tied], Letters())


def test_the_lengths_of_a_dropped_ranking_are_all_named():
    empty = RankedResponses("ask", ("a", "b", "\u200b"), ranking=(1, 2, 3))

    class Blank(Letters):
        def tokenize(self, texts):
            return [
                [] if text == "\u200b" else row
                for text, row in zip(
                    texts, super().tokenize([t.replace("\u200b", "") for t in texts]), strict=True
                )
            ]

    kept = tokenize_pairs([RANKED[0], empty], Blank(), max_length=32)
    assert [str(dropped) for dropped in kept.report.dropped] == [
        "pair 1: no token of a response is left "
        "(prompt 4, chosen 2, rejected 2, response 3 1 tokens)"
    ]
