import math
import subprocess
import sys

import numpy as np
import pytest

from dpo_keras.errors import InputError
from dpo_keras.preferences import InvalidPair, Message, PreferencePair, plain_text


def rules(**fields):
    with pytest.raises(InvalidPair) as caught:
        PreferencePair(**{"prompt": "p", "chosen": "a", "rejected": "b"} | fields)
    return [fault.rule for fault in caught.value.faults]


def test_importing_the_package_does_not_import_tensorflow():
    code = (
        "import sys, dpo_keras.preferences as p; p.support_pairs(10);"
        "assert not {'tensorflow', 'keras', 'pyarrow'} & set(sys.modules), sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pair_has_the_defaults_of_a_certain_unweighted_comparison():
    pair = PreferencePair("p", "a", "b")
    assert (pair.preference, pair.weight, pair.margin, pair.swapped) == (1.0, 1.0, None, False)
    assert (pair.annotator, pair.group, pair.id) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "rule"),
    [
        ({"prompt": ""}, "empty prompt"),
        ({"prompt": " \n"}, "empty prompt"),
        ({"chosen": "\t"}, "empty response"),
        ({"rejected": ""}, "empty response"),
        ({"chosen": "b"}, "identical responses"),
        ({"chosen": " b\n"}, "identical responses"),
        ({"chosen": None}, "wrong type"),
        ({"chosen": ("b",)}, "wrong type"),
        ({"chosen": "\ud83d"}, "not UTF-8"),
        ({"preference": 1.7}, "preference out of range"),
        ({"preference": 0.3}, "preference out of range"),
        ({"preference": math.nan}, "preference out of range"),
        ({"preference": "1"}, "wrong type"),
        ({"preference": True}, "wrong type"),
        ({"weight": -1.0}, "weight out of range"),
        ({"weight": math.inf}, "weight out of range"),
        ({"margin": math.nan}, "margin out of range"),
        ({"margin": -0.5}, "margin out of range"),
        ({"weight": 1e308}, "weight out of range"),
        ({"weight": 1_000_001}, "weight out of range"),
        ({"margin": 1e300}, "margin out of range"),
        ({"annotator": "\ud83d"}, "not UTF-8"),
        ({"group": "a\udcff"}, "not UTF-8"),
        ({"id": "\udfff"}, "not UTF-8"),
        ({"annotator": 7}, "wrong type"),
        ({"chosen": (Message("assistant", "a"),)}, "mixed forms"),
        ({"prompt": (Message("human", "a"),)}, "unknown role"),
    ],
)
def test_each_broken_rule_is_named(fields, rule):
    assert rules(**fields) == [rule]


def test_all_broken_rules_of_a_pair_are_told_at_once_with_the_values():
    with pytest.raises(InputError) as caught:
        PreferencePair("", " ", "b", preference=1.7, weight=math.nan, margin=-2.0)
    assert caught.value.problems == [
        "prompt must hold text, got ''.",
        "chosen must hold text, got ' '.",
        "preference must be in [0.5, 1], got 1.7.",
        "weight must be in [0, 1e6], got nan.",
        "margin must be in [0, 1e6], got -2.0.",
    ]


@pytest.mark.parametrize("preference", [0.5, 0.75, 1, np.float32(0.75)])
def test_ties_votes_and_numpy_numbers_are_preferences(preference):
    assert PreferencePair("p", "a", "b", preference=preference).preference == preference


def test_responses_in_messages_are_the_assistants_from_first_to_last():
    prompt = (Message("user", "p"),)
    tool = (
        Message("assistant", ""),
        Message("tool", "42"),
        Message("assistant", "It is 42."),
    )
    PreferencePair(prompt, tool, (Message("assistant", "No."),))
    for wrong in [(Message("user", "a"),), tool[:2], (*tool, Message("user", "x"), tool[0])]:
        faults = rules(prompt=prompt, chosen=wrong, rejected=(Message("assistant", "b"),))
        assert faults == ["not the assistant's turn"]


def test_a_long_value_is_cut_in_messages():
    with pytest.raises(InputError) as caught:
        PreferencePair("p", "word " * 1000, "word " * 1000)
    assert len(str(caught.value)) < 300


def test_plain_text_joins_the_contents():
    assert plain_text((Message("user", "a"), Message("assistant", "b"))) == "a\nb"
    assert plain_text("a") == "a"


def test_a_pair_is_a_record_for_files_without_its_defaults():
    pair = PreferencePair("Hi", "Hello!", "Go away.", weight=2.0)
    assert pair.as_dict() == {
        "prompt": "Hi", "chosen": "Hello!", "rejected": "Go away.", "preference": 1.0,
        "weight": 2.0,
    }  # fmt: skip
    one, other = (Message("assistant", "a"),), (Message("assistant", "b"),)
    messages = PreferencePair((Message("user", "Hi"),), one, other, 0.5, margin=0.0, swapped=True)
    assert messages.as_dict() == {
        "prompt": [{"role": "user", "content": "Hi"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
        "preference": 0.5,
        "margin": 0.0,
        "swapped": True,
    }


def test_wrong_arguments_carry_their_names():
    with pytest.raises(InvalidPair) as caught:
        PreferencePair("", "a", "b", preference=2, weight=-1)
    arguments = [problem.argument for problem in caught.value.problems]
    assert arguments == ["prompt", "preference", "weight"]
