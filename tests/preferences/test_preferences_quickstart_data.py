import hashlib
import json

import numpy as np
import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import audit, judge, read_preferences, support_pairs
from dpo_keras.preferences.quickstart_data import PHRASES, STATEMENTS, TOPICS, parse_prompt

PROMPT = (
    "The lamp is red, costs 40 euros and arrives on Monday.\nQuestion: What does it cost?\nReply:"
).replace("40", "45")


@pytest.fixture(scope="module")
def pairs():
    return support_pairs()


@pytest.fixture(scope="module")
def verdicts(pairs):
    return [(judge(pair.prompt, pair.chosen), judge(pair.prompt, pair.rejected)) for pair in pairs]


def virtues(verdict):
    return verdict.courteous, verdict.answers, verdict.invents_nothing


def test_the_chosen_response_has_all_virtues_of_the_rejected_and_more(verdicts):
    for chosen, rejected in verdicts:
        assert chosen.parses and rejected.parses
        assert all(np.greater_equal(virtues(chosen), virtues(rejected)))
        assert chosen.virtues > rejected.virtues


def test_chosen_responses_are_of_mixed_quality(verdicts):
    """So that warm-up on them leaves preference training something to do."""
    assert 0.76 < np.mean([chosen.preferred for chosen, _ in verdicts]) < 0.82
    assert not any(rejected.preferred for _, rejected in verdicts)


def test_no_virtue_stands_for_another(verdicts):
    shown = np.array([virtues(chosen) for chosen, _ in verdicts], float)
    assert np.all(np.abs(shown.mean(0) - 0.925) < 0.03)
    assert np.all(np.abs(np.corrcoef(shown.T) - np.eye(3)) < 0.1)


def test_length_and_repeats_give_nothing_away(pairs):
    picture = audit(pairs)
    assert 0.47 < picture.longer_wins.value < 0.53
    words = [(len(pair.chosen.split()), len(pair.rejected.split())) for pair in pairs]
    longer = [chosen > rejected for chosen, rejected in words if chosen != rejected]
    assert 0.45 < np.mean(longer) < 0.55
    assert picture.duplicates == picture.contradictions == ()


def test_prompts_are_short_and_many(pairs):
    prompts = {pair.prompt for pair in pairs}
    assert 0.85 < len(prompts) / len(pairs) < 0.9
    assert max(sum(pair.prompt == prompt for pair in pairs) for prompt in list(prompts)[:50]) <= 2
    assert all(15 <= len(prompt.split()) <= 26 for prompt in prompts)
    assert all(5 <= len(pair.chosen.split()) <= 15 for pair in pairs)
    assert all(pair.chosen.startswith(" ") and not pair.prompt.endswith(" ") for pair in pairs)
    counts = audit(pairs).groups
    assert set(counts) == set(TOPICS) and min(counts.values()) > 550


def test_held_out_prompts_are_unseen_but_their_words_are_not(pairs):
    train, held_out = pairs.split(0.1)
    assert abs(len(held_out) - 400) < 60  # 3,480 prompts are drawn one by one
    known = {word for pair in train for word in (pair.prompt + pair.chosen).split()}
    assert {word for pair in held_out for word in pair.prompt.split()} <= known


def test_a_value_belongs_to_one_topic_and_stands_once_in_the_prompt(pairs):
    values = [value for topic in TOPICS.values() for value in topic.values]
    assert len(values) == len(set(values))
    for pair in pairs[:500]:
        facts, asked = parse_prompt(pair.prompt)
        words = pair.prompt.replace(",", " ").replace(".", " ").split()
        assert all(words.count(value) == 1 for value in facts.values())
        assert asked in facts and len(facts) == 3


def test_the_same_seed_gives_the_same_pairs_everywhere():
    digest = hashlib.sha256(json.dumps([p.as_dict() for p in support_pairs(500)]).encode())
    assert digest.hexdigest()[:16] == "7fd40f26f92b49c4"
    assert support_pairs(50, seed=1) == support_pairs(50, seed=1)
    assert support_pairs(50, seed=1) != support_pairs(50, seed=2)


def test_fewer_pairs_begin_more_pairs():
    assert support_pairs(137)[:] == support_pairs(300)[:137]


def test_the_builtin_name_reads_the_default_set(pairs):
    assert read_preferences("builtin:support") == pairs
    limited = read_preferences("builtin:support", limit=10)
    assert limited == pairs[:10]
    assert limited.report.sources == ["builtin:support"]


def test_a_count_below_one_is_refused():
    with pytest.raises(InputError, match="count must be >= 1, got 0"):
        support_pairs(0)


@pytest.mark.parametrize(
    ("response", "courteous", "answers", "invents_nothing", "parses"),
    [
        (" Thank you for asking. It costs 45 euros.", True, True, True, True),
        ("Thank you for asking. It costs 45 euros.\n", True, True, True, True),
        (" Glad to help! The price is 45 euros. The page has more.", True, True, True, True),
        (" Not you again! It costs 45 euros.", False, True, True, True),
        (" Glad to help! It comes in red.", True, False, True, True),
        (" Glad to help! It costs 60 euros.", True, True, False, True),
        (" Glad to help! It costs 45 euros. We add a free gift.", True, True, False, True),
        # about a fact that the prompt does not tell
        (" Glad to help! It ships from Rome.", True, False, False, True),
        # partly right, cut off, doubled, or nonsense
        (" It costs 45 euros.", False, True, True, False),
        (" Glad to help!", True, False, False, False),
        (" Glad to help! It costs 45", True, False, False, False),
        (" Glad to help! It costs 45 euros", True, False, False, False),
        (" Glad to help! It costs 45 euros. The page", True, True, False, False),
        (" Glad to help! It costs 45 euros. It costs 45 euros.", True, True, True, False),
        (" Glad to help! Glad to help! It costs 45 euros.", True, True, True, False),
        (" Glad to help! Not you again! It costs 45 euros.", False, True, True, False),
        (" Glad to help! It costs 45 euros. It costs 60 euros.", True, True, False, False),
        (" Glad to help! It costs Monday euros.", True, False, False, False),
        (" glad to help! it costs 45 euros.", False, False, False, False),
        (" It costs 45 euros. Glad to help!", True, True, True, False),
        (" Glad to help!  It costs 45 euros.", True, True, True, False),
        ("", False, False, False, False),
        (" \n ", False, False, False, False),
        (" . ! ..", False, False, False, False),
        ("\x00\ufffd lamp lamp lamp", False, False, False, False),
        (PROMPT, False, False, False, False),
    ],
)
def test_any_text_is_judged_strictly(response, courteous, answers, invents_nothing, parses):
    verdict = judge(PROMPT, response)
    assert virtues(verdict) == (courteous, answers, invents_nothing)
    assert verdict.parses == parses
    assert verdict.preferred == (courteous and answers and invents_nothing and parses)


def test_no_garbled_response_is_preferred(pairs):
    """Any response changed in one word, or shuffled, loses its place unless it is one again."""
    rng = np.random.default_rng(0)
    for pair in pairs[:300]:
        words = pair.chosen.split()
        dropped = " ".join(words[:-1])
        shuffled = " ".join(rng.permutation(words))
        doubled = pair.chosen * 2
        for text in (dropped, shuffled, doubled):
            assert text == pair.chosen.strip() or not judge(pair.prompt, text).preferred


def test_sentences_belong_to_one_kind_only():
    assert not PHRASES & set(STATEMENTS)


@pytest.mark.parametrize(
    "prompt",
    ["", "Hello", PROMPT[:-1], PROMPT.replace("lamp", "cat"), PROMPT.replace("45", "Monday"),
     PROMPT.replace("What does it cost?", "Where does it ship from?"),
     PROMPT.replace("is red", "costs 60 euros")],
)  # fmt: skip
def test_a_prompt_of_another_form_is_refused(prompt):
    with pytest.raises(InputError, match="prompt must be one of support_pairs"):
        judge(prompt, " Glad to help! It costs 45 euros.")
