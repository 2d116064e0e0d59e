r"""Prompts that stand only inside `chosen` and `rejected`, as in HH-RLHF: split by turn.

Both columns then hold the whole conversation. Everything before the last assistant turn is the
prompt, and must be the same in both. It is never found by the longest common beginning: that would
also swallow the words with which two responses happen to start.

Text is split after the last "\n\nAssistant:": the prompt ends with that marker, the response
begins with whatever follows it, as a rule a space. Joining them gives the conversation back, and
" Sure" after ":" is what byte-pair tokenizers have as one token.
"""

from __future__ import annotations

from dpo_keras.preferences.schema import Fault, Message, Text, shown

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"


def is_conversation(text: object) -> bool:
    r"""Whether a value holds a conversation: messages, or text with an assistant marker.

    Example:
        >>> is_conversation("\n\nHuman: Hi\n\nAssistant: Hello!"), is_conversation("Hello!")
        (True, False)
    """
    return ASSISTANT in text if isinstance(text, str) else isinstance(text, tuple)


def split_conversations(
    chosen: Text, rejected: Text, names: tuple[str, str]
) -> tuple[Text, Text, Text] | list[Fault]:
    r"""Takes the shared prompt out of two conversations.

    Args:
        chosen: a conversation for which `is_conversation` holds.
        rejected: another of the same form.
        names: the columns they come from, for messages.

    Returns:
        `(prompt, chosen, rejected)`, or the broken rules.

    Example:
        >>> split_conversations(
        ...     "\n\nHuman: Hi\n\nAssistant: I am well", "\n\nHuman: Hi\n\nAssistant: I", ("c", "r")
        ... )
        ('\n\nHuman: Hi\n\nAssistant:', ' I am well', ' I')
    """
    faults = []
    parts: list[tuple[Text, Text]] = []
    for name, conversation in zip(names, (chosen, rejected), strict=True):
        if isinstance(conversation, str):
            part: tuple[Text, Text] | Fault = _split_text(name, conversation)
        else:
            part = _split_messages(name, conversation)
        if isinstance(part, Fault):
            faults.append(part)
        else:
            parts.append(part)
    if faults:
        return faults
    (prompt, chosen), (other, rejected) = parts
    if prompt != other:
        return [
            Fault(
                "conversations differ",
                names[0],
                _difference(prompt, other),
                f"{names[0]} and {names[1]} must be the same up to the last assistant turn; "
                f"they part at {shown(_difference(prompt, other))}.",
            )
        ]
    return prompt, chosen, rejected


def strip_prompt(prompt: tuple[Message, ...], response: tuple[Message, ...]) -> tuple[Message, ...]:
    """Drops the prompt's messages from a response that repeats them, as UltraFeedback's do."""
    return response[len(prompt) :] if response[: len(prompt)] == prompt else response


def _split_text(name: str, text: str) -> tuple[str, str] | Fault:
    cut = text.rfind(ASSISTANT)
    if text.rfind(HUMAN) > cut:
        return _last_turn(name, text[-60:])
    cut += len(ASSISTANT)
    prompt = text[:cut]
    if not prompt.replace(ASSISTANT, "").replace(HUMAN, "").strip():
        return _no_prompt(name, text)
    return prompt, text[cut:]


def _split_messages(
    name: str, messages: tuple[Message, ...]
) -> tuple[tuple[Message, ...], tuple[Message, ...]] | Fault:
    if not messages or messages[-1].role != "assistant":
        return _last_turn(name, messages[-1].role if messages else messages)
    # A turn may be several messages: tool calls and their results up to the answer.
    start = len(messages) - 1
    while start and messages[start - 1].role in ("assistant", "tool"):
        start -= 1
    if not start:
        return _no_prompt(name, messages)
    return messages[:start], messages[start:]


def _last_turn(name: str, value: object) -> Fault:
    rule = f"{name} must end with the assistant's turn, got {shown(value)} last."
    return Fault("not the assistant's turn", name, value, rule)


def _no_prompt(name: str, value: object) -> Fault:
    rule = f"{name} must hold a human turn before the response, got {shown(value)}."
    return Fault("empty prompt", name, value, rule)


def _difference(one: Text, other: Text) -> Text:
    place = next(
        (n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b),
        min(len(one), len(other)),
    )
    longer = one if len(one) > place else other
    return longer[place : place + 40]
