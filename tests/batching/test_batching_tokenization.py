import json

import numpy as np
import pytest

from dpo_keras.batching import Ragged, tokenize_pairs
from dpo_keras.batching.tokenized_pairs import truncate
from dpo_keras.errors import InputError
from dpo_keras.preferences import Message


def parts(tokens, row=0):
    return [part[row].tolist() for part in (tokens.prompt, tokens.chosen, tokens.rejected)]


def ids(text):
    return [ord(letter) for letter in text]


def test_a_pair_that_fits_is_start_prompt_and_response_end(letters, pair):
    tokens = tokenize_pairs([pair("ab", "c", "de")], letters)
    assert parts(tokens) == [[1, *ids("ab")], [*ids("c"), 2], [*ids("de"), 2]]
    assert tokens.lengths.tolist() == [6] and tokens.response_tokens.tolist() == [5]


def test_the_prompt_is_cut_first_from_its_left_keeping_the_start_token(letters, pair):
    tokens = tokenize_pairs([pair("abcdef", "xy", "z")], letters, max_length=6)
    assert parts(tokens) == [[1, *ids("ef")], [*ids("xy"), 2], [*ids("z"), 2]]
    assert (tokens.report.truncated_prompts, tokens.report.truncated_responses) == (1, 0)


def test_then_only_the_response_that_is_too_long_is_cut_and_has_no_end(letters, pair):
    tokens = tokenize_pairs([pair("abc", "vwxyz", "u")], letters, max_length=5)
    assert parts(tokens) == [[1, *ids("c")], ids("vwx"), [*ids("u"), 2]]
    assert (tokens.report.truncated_prompts, tokens.report.truncated_responses) == (1, 1)


def test_without_a_start_token_one_prompt_token_stays(letters, pair):
    letters.start_token_id = None
    tokens = tokenize_pairs([pair("abc", "vwxyz", "u")], letters, max_length=4)
    assert parts(tokens) == [ids("c"), ids("vwx"), [*ids("u"), 2]]


@pytest.mark.parametrize("max_length", range(4, 16))
def test_no_sequence_exceeds_max_length_and_none_is_cut_needlessly(letters, pair, max_length):
    pairs = [pair("p" * n, "c" * c, "r" * r) for n in (1, 4, 9) for c in (1, 5) for r in (2, 12)]
    tokens = tokenize_pairs(pairs, letters, max_length=max_length)
    whole = [len(p.prompt) + 2 + max(len(p.chosen), len(p.rejected)) for p in pairs]
    assert tokens.lengths.tolist() == [min(n, max_length) for n in whole]


@pytest.mark.parametrize("least", [1, 4])
def test_truncation_equals_the_rule_row_by_row(least):
    random = np.random.default_rng(0)
    rows = [[[1, *range(10, 10 + k)] for k in random.integers(0, 9, 60)]]
    rows += [[list(range(50, 50 + k)) for k in random.integers(1, 9, 60)] for _ in range(2)]
    cut = truncate(*map(Ragged.from_lists, rows), max_length=7, start=1, min_prompt_tokens=least)
    for row in range(60):
        prompt, *responses = (part[row] for part in rows)
        room = max(7 - max(map(len, responses)), 2, least)
        expected = prompt if len(prompt) <= room else [1, *prompt[len(prompt) - room + 1 :]]
        assert cut[0][row].tolist() == expected
        for part, response in zip(cut[1:], responses, strict=True):
            assert part[row].tolist() == response[: 7 - len(expected)]


def test_long_responses_leave_a_quarter_of_max_length_to_the_prompt(letters, pair):
    long = pair("abcdefgh", "v" * 30, "w" * 20)
    tokens = tokenize_pairs([long, pair("ab", "v" * 30, "w")], letters, max_length=20)
    assert parts(tokens) == [[1, *ids("efgh")], ids("v" * 15), ids("w" * 15)]
    assert parts(tokens, 1) == [[1, *ids("ab")], ids("v" * 17), [*ids("w"), 2]]
    more = tokenize_pairs([long], letters, max_length=20, min_prompt_tokens=9)
    assert parts(more) == [[1, *ids("abcdefgh")], ids("v" * 11), ids("w" * 11)]
    # The prompt takes what responses leave, however little it is promised.
    room = tokenize_pairs([pair("abcdefgh", "v", "w")], letters, max_length=10, min_prompt_tokens=1)
    assert parts(room)[0] == [1, *ids("bcdefgh")]


def test_truncation_of_more_than_a_few_pairs_is_a_warning_with_the_length_to_set(letters, pair):
    def warnings(cut, max_length=24):
        pairs = [pair("p" * 20, "c" * 28, "r")] * cut + [pair("p", "c", "r")] * (20 - cut)
        return tokenize_pairs(pairs, letters, max_length=max_length).report.warnings

    assert warnings(0) == warnings(1) == []  # 95 % are whole
    assert warnings(2) == [
        "max_length=24 cuts 2 of 20 pairs: 2 prompts (6 of 21 tokens are left on average), and the "
        "responses of 2 pairs. max_length=50 would leave 95% of the pairs whole."
    ]
    assert warnings(20, max_length=49)[0].startswith(
        "max_length=49 cuts 20 of 20 pairs: 20 prompts (20 of 21 tokens are left on average), and "
        "the responses of 0 pairs."
    )
    assert warnings(20, max_length=50) == []


def test_prompts_are_told_apart_by_their_text_before_truncation(letters, pair):
    pairs = [pair("one and the same end", "cc", "r"), pair("another and the same end", "cc", "r")]
    tokens = tokenize_pairs([*pairs, pairs[0]], letters, max_length=8)
    assert tokens.prompt[0].tolist() == tokens.prompt[1].tolist()
    first, second, third = tokens.prompt_hash.tolist()
    assert first == third != second
    assert tokens.take([2, 1]).prompt_hash.tolist() == [first, second]


def test_overlength_drop_leaves_long_pairs_out_and_names_them(letters, pair):
    pairs = [pair("a", "b", "c"), pair("abcdef", "xy", "z", id="long")]
    tokens = tokenize_pairs(pairs, letters, max_length=6, overlength="drop")
    assert len(tokens) == 1 and tokens.source.tolist() == [0]
    (dropped,) = tokens.report.dropped
    assert (dropped.index, dropped.id, dropped.rule) == (1, "long", "overlength")


def test_overlength_error_names_every_long_pair(letters, pair):
    pairs = [pair("a", "b", "c"), pair("abcdef", "xy", "z", id="long"), pair("a" * 9, "x", "y")]
    with pytest.raises(InputError) as error:
        tokenize_pairs(pairs, letters, max_length=6, overlength="error")
    assert "2 of 3 pairs are longer than max_length=6" in str(error.value)
    assert "pair 1 (id 'long'): 10 tokens" in str(error.value)
    assert "pair 2: 12 tokens" in str(error.value)
    assert error.value.problems[0].argument == "overlength"


def test_a_response_without_tokens_drops_its_pair_by_name(letters, pair):
    letters.tokenize = lambda texts: [ids(text.strip("~")) for text in texts]
    pairs = [pair("a", "b", "~", id="mute"), pair("a", "b", "c")]
    tokens = tokenize_pairs(pairs, letters)
    assert len(tokens) == 1
    (dropped,) = tokens.report.dropped
    assert (dropped.index, dropped.id, dropped.rule) == (0, "mute", "empty_response")
    assert "rejected 1 tokens" in dropped.detail


def test_nothing_predicts_a_response_after_a_prompt_without_tokens(letters, pair):
    letters.start_token_id = None
    letters.tokenize = lambda texts: [ids(text.strip("~")) for text in texts]
    tokens = tokenize_pairs([pair("~", "b", "c"), pair("a", "b", "c")], letters)
    assert [dropped.rule for dropped in tokens.report.dropped] == ["empty_prompt"]


def test_a_start_token_alone_is_prompt_enough(letters, pair):
    letters.tokenize = lambda texts: [ids(text.strip("~")) for text in texts]
    assert parts(tokenize_pairs([pair("~", "b", "c")], letters))[0] == [1]


def test_nothing_left_is_an_error_that_says_why(letters, pair):
    with pytest.raises(InputError, match="(?s)None of the 1 pairs is left.*max_length"):
        tokenize_pairs([pair("abcdef", "x", "y")], letters, max_length=4, overlength="drop")


def test_responses_made_identical_by_truncation_are_counted(letters, pair):
    tokens = tokenize_pairs([pair("a", "xxxy", "xxxz")], letters, max_length=5)
    assert tokens.report.identical_responses == 1


def test_labels_weights_groups_and_margins_come_along(letters, pair):
    pairs = [
        pair("a", "b", "c", preference=0.75, weight=2.0, group="north", margin=1.5),
        pair("a", "b", "c"),
        pair("a", "b", "c", group="east"),
    ]
    tokens = tokenize_pairs(pairs, letters)
    assert tokens.preference.tolist() == [0.75, 1, 1] and tokens.weight.tolist() == [2, 1, 1]
    assert tokens.group.tolist() == [1, -1, 0] and tokens.group_names == ("east", "north")
    assert tokens.margin.tolist() == [1.5, 0, 0]
    plain = tokenize_pairs(pairs[1:2], letters)
    assert plain.group is None and plain.margin is None


def test_the_report_adds_up_and_is_json(letters, pair):
    pairs = [pair("abc", "xy", "z"), pair("a" * 40, "b", "c"), pair("a", "b", "c")]
    report = tokenize_pairs(pairs, letters, max_length=20, overlength="drop").report
    values = json.loads(json.dumps(report.as_dict()))
    assert values["pairs"] == 3 and values["kept"] == 2 and values["longest"] == 7
    assert values["dropped_by_rule"] == {"overlength": 1}
    assert values["prompt_tokens"] == 6 and values["response_tokens"] == 9
    assert "3 pairs, 2 kept" in report.summary() and "pair 1" in report.summary()


def test_equal_tokens_have_equal_fingerprints_and_any_change_shows(letters, pair):
    pairs = [pair("abc", "xy", "z"), pair("a", "b", "c")]
    base = tokenize_pairs(pairs, letters).fingerprint
    assert tokenize_pairs(list(pairs), letters).fingerprint == base
    assert tokenize_pairs([pair("abc", "xy", "z", weight=3.0), pairs[1]], letters).fingerprint == (
        base
    )
    assert tokenize_pairs(pairs[::-1], letters).fingerprint != base
    assert tokenize_pairs(pairs, letters, max_length=5).fingerprint != base
    assert tokenize_pairs([pairs[0], pair("a", "b", "d")], letters).fingerprint != base
    # The same letters, divided differently between prompt and response.
    assert tokenize_pairs([pair("ab", "cxy", "z"), pairs[1]], letters).fingerprint != base


def test_mappings_are_read_as_files_are(letters):
    tokens = tokenize_pairs([{"prompt": "a", "chosen": "b", "rejected": "c"}], letters)
    assert parts(tokens) == [[1, 97], [98, 2], [99, 2]]


def test_reference_log_probs_must_fit_and_be_finite(letters, pair):
    tokens = tokenize_pairs([pair("a", "b", "c")], letters)
    assert tokens.with_reference(np.array([[-1.0, -2.0]])).reference.tolist() == [[-1, -2]]
    assert tokens.reference is None
    for wrong in (np.zeros((2, 2)), np.zeros(2), np.array([[0.0, np.nan]])):
        with pytest.raises(InputError, match="reference must be finite"):
            tokens.with_reference(wrong)


def test_messages_without_a_template_are_refused_with_advice(letters, pair):
    chat = pair((Message("user", "Hi"),), *((Message("assistant", text),) for text in "bc"))
    with pytest.raises(InputError, match="template is needed to turn chat") as error:
        tokenize_pairs([chat], letters)
    assert "Give a name such as 'chatml'" in str(error.value)
    assert error.value.problems[0].renamed("data.template").startswith("data.template is needed")


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *[("max_length", 3), ("max_length", 8.0), ("overlength", "cut")],
        *[("min_prompt_tokens", n) for n in (0, True, 2.0, 1023)],
    ],
)
def test_wrong_options_are_named(letters, pair, option, value):
    with pytest.raises(InputError, match=f"{option} must be") as error:
        tokenize_pairs([pair("a", "b", "c")], letters, **{option: value})
    assert [problem.argument for problem in error.value.problems] == [option]


def test_prompt_tokens_are_only_promised_where_pairs_are_cut(letters, pair):
    options = {"overlength": "drop", "min_prompt_tokens": 9}
    with pytest.raises(InputError, match="min_prompt_tokens has no effect with overlength='drop'"):
        tokenize_pairs([pair("a", "b", "c")], letters, **options)


def test_real_tokenizers_give_pairs_that_share_their_prompt(gpt2, pair):
    tokens = tokenize_pairs([pair("How do I bake bread? ", "Mix flour.", "No idea.")], gpt2)
    end = gpt2.tokenizer.end_token_id
    prompt, chosen, rejected = parts(tokens)
    assert prompt[0] == end and prompt.count(end) == 1  # GPT-2's start token is its end token
    assert chosen[-1] == end == rejected[-1] and chosen.count(end) == 1 == rejected.count(end)
    assert gpt2.tokenizer.detokenize([prompt[1:]]) == ["How do I bake bread? "]
    assert gpt2.tokenizer.detokenize([chosen[:-1]]) == ["Mix flour."]
