import pytest

from dpo_keras.preferences import Message, read_preferences

START = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: How are you?\n\nAssistant:"


def problem(chosen, rejected):
    good = {"prompt": "p", "chosen": "a", "rejected": "b"}
    pairs = read_preferences([good, {"chosen": chosen, "rejected": rejected}])
    (found,) = pairs.report.problems
    return found.rule, found.field


def test_text_is_split_after_the_last_assistant_marker():
    (pair,) = read_preferences([{"chosen": START + " Well.", "rejected": START + " Bad."}])
    assert (pair.prompt, pair.chosen, pair.rejected) == (START, " Well.", " Bad.")


def test_responses_with_the_same_beginning_stay_whole():
    (pair,) = read_preferences([{"chosen": START + " I am well", "rejected": START + " I am"}])
    assert (pair.prompt, pair.chosen, pair.rejected) == (START, " I am well", " I am")


def test_prompt_and_response_join_to_the_conversation():
    for response in (" Well.", "Well.", "\nWell.\n\nYes."):
        (pair,) = read_preferences([{"chosen": START + response, "rejected": START + " No."}])
        assert pair.prompt + pair.chosen == START + response


def test_a_and_b_may_be_conversations_too():
    record = {"response_a": START + " A", "response_b": START + " B", "preference": 0}
    (pair,) = read_preferences([record])
    assert (pair.prompt, pair.chosen) == (START, " B")


@pytest.mark.parametrize(
    ("chosen", "rejected", "rule"),
    [
        (START + " a", START.replace("Hello", "Ho") + " b", "conversations differ"),
        (START + " a", START + " b\n\nHuman: c\n\nAssistant: d", "conversations differ"),
        (START + " a", START + " b\n\nHuman: c", "not the assistant's turn"),
        (START + " a", START + " ", "empty response"),
        ("\n\nAssistant: a", "\n\nAssistant: b", "empty prompt"),
        ("\n\nHuman: \n\nAssistant: a", "\n\nHuman: \n\nAssistant: b", "empty prompt"),
        (START + " a", "no conversation", "missing column"),
    ],
)
def test_text_conversations_that_cannot_be_split_are_named(chosen, rejected, rule):
    if rule == "empty prompt":  # both sides lack it, and each is told
        good = {"prompt": "p", "chosen": "a", "rejected": "b"}
        pairs = read_preferences([good, {"chosen": chosen, "rejected": rejected}])
        assert [(p.line, p.rule) for p in pairs.report.problems] == [(2, rule)] * 2
    else:
        assert problem(chosen, rejected)[0] == rule


def turns(*roles_and_contents):
    return [{"role": role, "content": content} for role, content in roles_and_contents]


def test_messages_are_split_at_the_last_assistant_turn():
    shared = [("system", "s"), ("user", "u"), ("assistant", "a"), ("user", "v")]
    record = {
        "chosen": turns(*shared, ("assistant", "x")),
        "rejected": turns(*shared, ("assistant", "y")),
    }
    (pair,) = read_preferences([record])
    assert pair.prompt == tuple(Message(*turn) for turn in shared)
    assert pair.rejected == (Message("assistant", "y"),)


def test_tool_calls_belong_to_the_response():
    calls = [("assistant", "ask"), ("tool", "4"), ("assistant", "It is 4.")]
    record = {
        "chosen": turns(("user", "u"), *calls),
        "rejected": turns(("user", "u"), ("assistant", "5")),
    }
    (pair,) = read_preferences([record])
    assert [message.role for message in pair.chosen] == ["assistant", "tool", "assistant"]
    assert pair.prompt == (Message("user", "u"),)


@pytest.mark.parametrize(
    ("chosen", "rejected", "rule"),
    [
        ([("user", "u"), ("assistant", "x")], [("user", "w"), ("assistant", "y")],
         "conversations differ"),
        ([("user", "u"), ("assistant", "x")], [("user", "u")], "not the assistant's turn"),
        ([("user", "u"), ("assistant", "x")], [("assistant", "y")], "empty prompt"),
        ([("user", "u"), ("assistant", "x")], [("user", "u"), ("assistant", " ")],
         "empty response"),
    ],
)  # fmt: skip
def test_message_conversations_that_cannot_be_split_are_named(chosen, rejected, rule):
    assert problem(turns(*chosen), turns(*rejected))[0] == rule
