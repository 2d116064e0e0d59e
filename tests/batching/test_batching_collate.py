import numpy as np
import pytest

from dpo_keras.batching import (
    Ragged,
    batch_from_strings,
    collate,
    collate_single,
    tokenize_pairs,
)
from dpo_keras.batching.ragged import places
from dpo_keras.errors import InputError


@pytest.fixture
def tokens(letters, pair):
    pairs = [
        pair("ab", "c", "de", preference=0.75, group="g", margin=2.0),
        pair("h", "ijklm", "n", weight=3.0),
    ]
    return tokenize_pairs(pairs, letters)


def test_one_row_by_hand(tokens):
    batch = collate(tokens, [0], length=8, slots=8)
    a, b, c, d, e = (ord(letter) for letter in "abcde")
    assert batch["token_ids"][0].tolist() == [[1, a, b, c, 2, 0, 0, 0], [1, a, b, d, e, 2, 0, 0]]
    assert batch["padding_mask"][0].tolist() == [[1] * 5 + [0] * 3, [1] * 6 + [0] * 2]
    # "c" (position 3) is predicted at position 2; the second sequence begins at place 8.
    assert batch["source"][0].tolist() == [2, 3, 10, 11, 12, 0, 0, 0]
    assert batch["target"][0].tolist() == [c, 2, d, e, 2, 0, 0, 0]
    assert batch["owner"][0].tolist() == [0, 0, 1, 1, 1, -1, -1, -1]
    assert batch["preference"].tolist() == [[0.75]] and batch["weight"].tolist() == [[1.0]]
    assert batch["group"].tolist() == [[0]] and batch["margin"].tolist() == [[2.0]]


def test_sources_point_at_the_token_before_each_target(tokens):
    batch = collate(tokens, [1, 0])
    rows, sequences, length = batch["token_ids"].shape
    flat = batch["token_ids"].reshape(rows, -1)
    for row in range(rows):
        filled = batch["owner"][row] >= 0
        source, target = batch["source"][row][filled], batch["target"][row][filled]
        assert (flat[row][source + 1] == target).all()
        assert (source // length == batch["owner"][row][filled]).all()
        assert batch["padding_mask"][row].reshape(-1)[source + 1].all()


def test_masks_and_indices_are_int32_and_labels_float32(tokens):
    batch = collate(tokens.with_reference(np.zeros((2, 2))), [0, 1])
    types = {name: value.dtype.name for name, value in batch.items()}
    floats = {"preference", "weight", "reference", "margin"}
    assert types == {name: "float32" if name in floats else "int32" for name in types}
    assert len({len(value) for value in batch.values()}) == 1


def test_reference_log_probs_follow_their_pairs(tokens):
    tokens = tokens.with_reference(np.array([[-1, -2], [-3, -4]]))
    batch = collate(tokens, [1, 0], batch_size=3)
    assert batch["reference"].tolist() == [[[-3, -4]], [[-1, -2]], [[0, 0]]]


def test_optional_keys_are_absent_where_no_pair_has_them(letters, pair):
    batch = collate(tokenize_pairs([pair("a", "b", "c")], letters), [0])
    assert not {"reference", "group", "margin"} & set(batch)


@pytest.mark.parametrize("indices", [[0], [0, -1, -1]])
def test_empty_rows_weigh_nothing_own_nothing_and_attend_to_one_place(tokens, indices):
    batch = collate(tokens, indices, length=8, slots=8, batch_size=3)
    assert batch["weight"].tolist() == [[1], [0], [0]]
    assert (batch["owner"][1:] == -1).all()
    assert batch["padding_mask"][1:, 0].tolist() == [[1] + [0] * 7] * 2
    assert batch["padding_mask"][1:, 1].tolist() == [[0] * 8] * 2
    assert (batch["token_ids"][1:] == 0).all()
    assert ((batch["preference"] >= 0.5) & (batch["preference"] <= 1)).all()


def test_pad_id_fills_and_default_shapes_are_multiples_of_eight(letters, pair):
    letters.pad_token_id = 9
    batch = collate(tokenize_pairs([pair("a", "bcdefgh", "i")], letters), [0])
    assert batch["token_ids"].shape == (1, 2, 16) and batch["owner"].shape == (1, 16)
    assert batch["token_ids"][0, 1].tolist() == [1, 97, 105, 2] + [9] * 12


def test_what_does_not_fit_is_an_error_with_the_needed_sizes(tokens):
    with pytest.raises(InputError) as error:
        collate(tokens, [0, 1], length=7, slots=7, batch_size=1)
    text = str(error.value)
    assert "length must be at least 8" in text
    assert "slots must be at least 8" in text
    assert "batch_size must be at least 2" in text


def test_single_responses_use_column_zero(tokens):
    batch = collate_single(tokens.prompt, tokens.chosen, pad=0, length=8, slots=8, batch_size=3)
    pairs = collate(tokens, [0, 1], length=8, slots=8)
    assert batch["token_ids"].shape == (3, 1, 8)
    assert (batch["token_ids"][:2, 0] == pairs["token_ids"][:, 0]).all()
    chosen = pairs["owner"] == 0
    assert (batch["source"][:2][chosen] == pairs["source"][chosen]).all()
    assert (batch["owner"][:2] == np.where(chosen, 0, -1)).all()
    assert batch["weight"].tolist() == [[1], [1], [0]]


def test_strings_are_laid_out_as_tokenized_pairs_are(letters, tokens):
    batch = batch_from_strings(letters, ["ab", "h"], ["c", "ijklm"], ["de", "n"])
    expected = collate(tokens, [0, 1])
    for name in ("token_ids", "padding_mask", "source", "target", "owner"):
        assert (batch[name] == expected[name]).all()
    single = batch_from_strings(letters, ["ab", "h"], ["c", "ijklm"], max_length=5)
    assert single["token_ids"][1, 0].tolist() == [1, ord("h"), *map(ord, "ijk"), 0, 0, 0]


def test_lists_of_different_length_are_refused(letters):
    with pytest.raises(InputError, match="got 2 prompts, 1 responses"):
        batch_from_strings(letters, ["a", "b"], ["c"])


def test_a_prompt_without_tokens_is_refused():
    with pytest.raises(InputError, match="prompt 1 has no token"):
        collate_single([[5], []], [[6], [6]])


def test_ragged_rows_survive_packing_slicing_and_picking():
    random = np.random.default_rng(1)
    rows = [random.integers(0, 99, n).tolist() for n in random.integers(0, 6, 40)]
    ragged = Ragged.from_lists(rows)
    assert ragged.tolist() == rows and ragged[-1].tolist() == rows[-1]
    starts = np.array([random.integers(0, len(row) + 1) for row in rows])
    stops = np.array([random.integers(a, len(r) + 1) for a, r in zip(starts, rows, strict=True)])
    assert ragged.slice(starts, stops).tolist() == [
        row[a:b] for row, a, b in zip(rows, starts, stops, strict=True)
    ]
    picked = random.integers(0, 40, 60)
    assert ragged.take(picked).tolist() == [rows[i] for i in picked]
    with pytest.raises(IndexError):
        ragged[40]
    assert Ragged.from_lists([]).tolist() == []


def test_places_are_runs_end_to_end():
    assert places(np.array([10, 20]), np.array([2, 3])).tolist() == [10, 11, 20, 21, 22]
    assert places(np.zeros(0, np.int64), np.zeros(0, np.int64)).tolist() == []
