import numpy as np
import pytest

from dpo_keras.batching import collate, collate_packed, tokenize_pairs
from dpo_keras.errors import InputError


@pytest.fixture
def tokens(letters, pair):
    pairs = [
        pair("ab", "c", "de", preference=0.75, group="g", margin=2.0),
        pair("h", "ijklm", "n", weight=3.0),
        pair("opqrs", "t", "u"),
    ]
    return tokenize_pairs(pairs, letters)


def test_two_trees_in_a_row_by_hand(tokens):
    batch = collate_packed(tokens, [[0, 1]], length=32, slots=16, pairs=3)
    a, b, c, d, e, h, i, j, k, l, m, n = (ord(letter) for letter in "abcdehijklmn")  # noqa: E741
    ids = [1, a, b, c, 2, d, e, 2, 1, h, i, j, k, l, m, 2, n, 2]
    assert batch["token_ids"][0, 0].tolist() == ids + [0] * 14
    assert batch["padding_mask"][0, 0].tolist() == [1] * 18 + [0] * 14
    assert batch["positions"][0, 0].tolist() == [
        *(0, 1, 2, 3, 4, 3, 4, 5),
        *(0, 1, 2, 3, 4, 5, 6, 7, 2, 3),
        *[0] * 14,
    ]
    assert batch["reach"][0, 0].tolist() == [
        *(8, 7, 6, 2, 1, 3, 2, 1),
        *(10, 9, 6, 5, 4, 3, 2, 1, 2, 1),
        *[1] * 14,
    ]
    assert batch["responses"].tolist() == [[[0, 1], [2, 3], [-1, -1]]]
    # Both responses' first tokens are predicted at their prompt's last token, places 2 and 9.
    sources = [2, 3, 2, 5, 6, 9, 10, 11, 12, 13, 14, 9, 16]
    assert batch["source"][0].tolist() == sources + [0] * 3
    assert batch["target"][0].tolist() == [c, 2, d, e, 2, i, j, k, l, m, 2, n, 2] + [0] * 3
    assert batch["owner"][0].tolist() == [0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2, 3, 3] + [-1] * 3
    assert batch["preference"].tolist() == [[0.75, 1.0, 0.5]]
    assert batch["weight"].tolist() == [[1.0, 3.0, 0.0]]
    assert batch["group"].tolist() == [[0, -1, -1]] and batch["margin"].tolist() == [[2, 0, 0]]


def test_pairs_keep_the_tokens_that_the_bucketed_batch_gives_them(tokens):
    """Per response: prompt and response ids as the model reads them, and its targets, in order."""
    plain = collate(tokens, [2, 0, 1])
    packed = collate_packed(tokens, [[2, 0], [1]])
    for number, (row, slot) in enumerate([(0, 0), (0, 1), (1, 0)]):
        for kind in (0, 1):
            filled = plain["padding_mask"][number, kind].astype(bool)
            expected = plain["token_ids"][number, kind][filled]
            owned = packed["owner"][row] == packed["responses"][row, slot, kind]
            last = packed["source"][row][owned][-1]
            seen = np.flatnonzero(np.arange(last + 1) + packed["reach"][row, 0, : last + 1] > last)
            assert packed["token_ids"][row, 0][seen].tolist() == expected[:-1].tolist()
            assert packed["positions"][row, 0][seen].tolist() == list(range(len(expected) - 1))
            theirs = plain["owner"][number] == kind
            assert packed["target"][row][owned].tolist() == plain["target"][number][theirs].tolist()
            # The token that predicts, and its position in the text, are the same too.
            place = plain["source"][number][theirs] % plain["token_ids"].shape[2]
            found = packed["source"][row][owned]
            assert packed["positions"][row, 0][found].tolist() == place.tolist()


def test_no_index_leaves_its_row_so_halves_of_a_batch_are_batches(tokens):
    whole = collate_packed(tokens, [[0, 1], [2], [1], [2, 0]], length=40, slots=20, pairs=2)
    assert whole["source"].min() >= 0 and whole["source"].max() < 40
    for begin, rows in ((0, [[0, 1], [2]]), (2, [[1], [2, 0]])):
        half = collate_packed(tokens, rows, length=40, slots=20, pairs=2)
        assert all((whole[name][begin : begin + 2] == half[name]).all() for name in whole)


def test_empty_rows_weigh_nothing_and_show_attention_one_token(tokens):
    batch = collate_packed(tokens, np.array([[-1, -1], [-1, 1]]))
    assert batch["weight"].tolist() == [[0, 0], [0, 3]]
    assert batch["padding_mask"].sum(axis=(1, 2)).tolist() == [1, 10]
    assert (batch["reach"][0] == 1).all() and (batch["owner"][0] == -1).all()
    # Pairs need not stand in the first slots.
    assert batch["responses"].tolist() == [[[-1, -1], [-1, -1]], [[-1, -1], [0, 1]]]


def test_types_are_those_of_the_bucketed_batch(tokens):
    tokens = tokens.with_reference(np.array([[-1, -2], [-3, -4], [-5, -6]]))
    batch = collate_packed(tokens, [[2], [0, 1]])
    plain = {name: value.dtype for name, value in collate(tokens, [0]).items()}
    int32 = np.dtype(np.int32)
    assert {name: value.dtype for name, value in batch.items()} == {
        **plain,
        "positions": int32,
        "reach": int32,
        "responses": int32,
    }
    assert batch["reference"].tolist() == [[[-5, -6], [0, 0]], [[-1, -2], [-3, -4]]]


def test_what_does_not_fit_is_named(tokens):
    with pytest.raises(InputError, match="length must be at least 10 for pair 1 of row 0, got 9"):
        collate_packed(tokens, [[1]], length=9)
    with pytest.raises(InputError) as error:
        collate_packed(tokens, [[0], [1, 2]], length=16, slots=8)
    assert error.value.problems == [
        "length must be at least 20 for the pairs of row 1, got 16.",
        "slots must be at least 12 for the pairs of row 1, got 8.",
    ]
    with pytest.raises(InputError, match="pairs must be at least 2"):
        collate_packed(tokens, [[0, 1]], pairs=1)


def test_what_texts_of_a_tree_have_in_common_is_there_once(letters, pair):
    """Three responses in all pairs of one prompt, and a later turn that continues one of them."""
    texts = [("ab", "cd", "ce"), ("ab", "cd", "f"), ("ab", "ce", "f"), ("abcdg", "h", "i")]
    tokens = tokenize_pairs([pair(*text) for text in texts], letters)
    tree = collate_packed(tokens, [range(4)], length=24, slots=16, trees=np.zeros(4, int))
    a, b, c, d, e, f, g, h, i = map(ord, "abcdefghi")
    ids = [1, a, b, c, d, 2, g, h, 2, i, 2, e, 2, f, 2]
    assert tree["token_ids"][0, 0].tolist() == ids + [0] * 9
    reach = [15, 14, 13, 10, 7, 1, 5, 2, 1, 2, 1, 2, 1, 2, 1]
    assert tree["reach"][0, 0].tolist() == reach + [1] * 9
    assert tree["positions"][0, 0, :15].tolist() == [0, 1, 2, 3, 4, 5, 5, 6, 7, 6, 7, 4, 5, 3, 4]
    # Each response is scored once, and named by its pairs.
    cd, first, second, ce, last = range(5)
    assert tree["responses"][0].tolist() == [[cd, ce], [cd, last], [ce, last], [first, second]]
    assert tree["target"][0, :14].tolist() == [c, d, 2, h, 2, i, 2, c, e, 2, f, 2, 0, 0]
    assert tree["source"][0, :12].tolist() == [2, 3, 4, 6, 7, 6, 9, 2, 3, 11, 2, 13]
    with pytest.raises(InputError, match="length must be at least 15 for the pairs of row 0"):
        collate_packed(tokens, [range(4)], length=14, trees=np.zeros(4, int))
