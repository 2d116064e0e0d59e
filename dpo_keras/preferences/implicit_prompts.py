r"""Prompts that stand only inside their responses are split off.

A prompt may stand only inside `chosen` and `rejected`, as in HH-RLHF: both columns then hold the
whole conversation. It is split by turn: everything before the last assistant turn is the prompt,
and must be the same in both. The longest common beginning is no substitute: it would also swallow
the words with which two responses happen to start.

Text is split after the last "\n\nAssistant:". The prompt ends with that marker, and the response
begins with whatever follows it, usually a space: byte-pair tokenizers have " Sure" as one token.
"""

from __future__ import annotations

from dpo_keras.preferences.pair import Fault, Text, broken, shown

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def is_conversation(text: Text) -> bool:
    """Return whether a text can hold a prompt and its response."""
    return ASSISTANT in text if isinstance(text, str) else True


def split_conversations(
    chosen: Text, rejected: Text, names: tuple[str, str]
) -> tuple[Text, Text, Text] | list[Fault]:
    """Return the shared prompt of two conversations and their responses, or the broken rules."""
    one, other = split_conversation(names[0], chosen), split_conversation(names[1], rejected)
    if isinstance(one, Fault) or isinstance(other, Fault):
        return [part for part in (one, other) if isinstance(part, Fault)]
    if one[0] != other[0]:
        difference = _difference(one[0], other[0])
        must = (
            f"and {names[1]} must be the same up to the last assistant turn; "
            f"they part at {shown(difference)}."
        )
        return [broken("conversations differ", names[0], difference, must)]
    return one[0], one[1], other[1]


def split_conversation(name: str, conversation: Text) -> tuple[Text, Text] | Fault:
    """Return a conversation's prompt and its response, or the broken rule."""
    if isinstance(conversation, str):
        start = conversation.rfind(ASSISTANT)
        if conversation.rfind(HUMAN) > start:
            return _last_turn(name, conversation[-60:])
        start += len(ASSISTANT)
        has_prompt = bool(conversation[:start].replace(ASSISTANT, "").replace(HUMAN, "").strip())
    else:
        if not conversation or conversation[-1].role != "assistant":
            return _last_turn(name, conversation[-1].role if conversation else conversation)
        # A turn may be several messages: tool calls and their results up to the answer.
        start = len(conversation) - 1
        while start and conversation[start - 1].role in ("assistant", "tool"):
            start -= 1
        has_prompt = start > 0
    if not has_prompt:
        must = f"must hold a human turn before the response, got {shown(conversation)}."
        return broken("empty prompt", name, conversation, must)
    return conversation[:start], conversation[start:]


def _last_turn(name: str, value: object) -> Fault:
    must = f"must end with the assistant's turn, got {shown(value)} last."
    return broken("not the assistant's turn", name, value, must)


def _difference(one: Text, other: Text) -> Text:
    different = (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    place = next(different, min(len(one), len(other)))
    longer = one if len(one) > place else other
    return longer[place : place + 40]
