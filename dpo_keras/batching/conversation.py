"""Conversations as token ids: rendered by a template, which alone places special tokens."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from dpo_keras.batching.encoding import TextEncoder
from dpo_keras.batching.ragged import Ragged
from dpo_keras.batching.templates import ChatTemplate
from dpo_keras.errors import InputError

if TYPE_CHECKING:
    from dpo_keras.preferences import PreferencePair

Messages = list[dict[str, str]]

# A Unicode noncharacter: never part of text, so it can mark where a message's own words must be
# cut before tokenization. It is taken out of messages that hold it nevertheless.
_CUT = "\ufdd0"


def encode_conversations(
    pairs: Sequence[PreferencePair], encoder: TextEncoder, template: ChatTemplate, first: int = 0
) -> tuple[Ragged, Ragged, Ragged, list[str]]:
    r"""Renders and tokenizes pairs: prompt with the generation prompt, responses as what follows.

    A string prompt is one user turn, a string response one assistant turn (with the template
    "plain" strings stay as they are). The response's text is the rendered conversation less the
    rendered prompt, which must be its exact beginning; white space after its last end-of-turn
    marker is cut off.

    The template's special tokens become one id each, looked up in the tokenizer. The same text
    inside a message does not: it is cut in two before tokenization, so that words of a user cannot
    forge a turn. Turn marks that are ordinary text for the tokenizer ("\n\nHuman:", "[INST]" of
    Llama 2) cannot be told from a user's words; nobody's tokenizer can.

    Args:
        pairs: the pairs.
        encoder: the tokenizer.
        template: the chat template.
        first: number of the first pair, for messages.

    Returns:
        prompt, chosen and rejected ids, and warnings.

    Raises:
        InputError: a conversation that the template refuses, or a template whose rendered
            conversation does not begin with the rendered prompt.
    """
    writer = _Writer(encoder, template)
    strings_stay = template.name == "plain"
    prompts: list[list[str]] = []
    responses: tuple[list[list[str]], list[list[str]]] = ([], [])
    rendered: dict[Any, str] = {}
    problems: list[str] = []
    for number, pair in enumerate(pairs, first):
        texts = (pair.chosen, pair.rejected)
        try:
            if strings_stay and isinstance(pair.prompt, str):
                strings = [text for text in texts if isinstance(text, str)]
                if len(strings) == 2:
                    prompts.append([pair.prompt])
                    responses[0].append(strings[:1])
                    responses[1].append(strings[1:])
                    continue
            if pair.prompt not in rendered:
                rendered[pair.prompt] = writer.render(writer.messages(pair.prompt, "user"), True)
            prompt = rendered[pair.prompt]
            parts = [writer.response(pair.prompt, prompt, text) for text in texts]
        except InputError as error:
            problems.append(f"pair {number}: {error}")
            continue
        prompts.append(writer.split(prompt))
        for side, part in zip(responses, parts, strict=True):
            side.append(part)
    if problems:
        more = [f"… and {len(problems) - 5} more."] if len(problems) > 5 else []
        raise InputError(problems[:5] + more)
    prompt_ids = writer.ids(prompts, first_plain=True)
    chosen_ids, rejected_ids = (writer.ids(side, first_plain=False) for side in responses)
    return (
        Ragged.from_lists(map(encoder.with_start, prompt_ids)),
        Ragged.from_lists(map(encoder.with_end, chosen_ids)),
        Ragged.from_lists(map(encoder.with_end, rejected_ids)),
        writer.warnings,
    )


class _Writer:
    def __init__(self, encoder: TextEncoder, template: ChatTemplate):
        self.encoder, self.template = encoder, template
        self.variables = {
            "bos_token": getattr(encoder.tokenizer, "start_token", None) or "",
            "eos_token": getattr(encoder.tokenizer, "end_token", None) or "",
        }
        special = [*template.markers, *encoder.special_tokens]
        # Longest first: a marker may begin with another.
        special = sorted(dict.fromkeys(filter(None, special)), key=len, reverse=True)
        self.special_ids = {
            text: token for text in special if (token := encoder.token_id(text)) is not None
        }
        self._forgeable = _any_of(special)
        self._boundary = _any_of([_CUT, *self.special_ids])
        self._ending = tuple(text for text in special)
        spelled = [
            text
            for text in template.markers
            if text not in self.special_ids and text in template.source and "|" in text
        ]
        self.warnings = (
            [
                f"the tokenizer has no token for {', '.join(spelled)}, which the template "
                f"{template.name!r} writes: they are spelled out in several tokens, as for a model "
                "that was not trained with this template."
            ]
            if spelled
            else []
        )

    def messages(self, text: Any, role: str) -> Messages:
        if isinstance(text, str):
            return [{"role": role, "content": self._guard(text)}]
        messages = [
            message.as_dict() if hasattr(message, "as_dict") else message for message in text
        ]
        return [{**message, "content": self._guard(message["content"])} for message in messages]

    def render(self, messages: Messages, ask: bool) -> str:
        return self.template.render(messages, add_generation_prompt=ask, **self.variables)

    def response(self, prompt: Any, rendered_prompt: str, response: Any) -> list[str]:
        messages = self.messages(prompt, "user") + self.messages(response, "assistant")
        whole = self.render(messages, False)
        if not whole.startswith(rendered_prompt):
            same = next(
                (i for i, (a, b) in enumerate(zip(whole, rendered_prompt, strict=False)) if a != b),
                len(whole),
            )
            raise InputError(
                f"template {self.template.name!r} cannot be used: the rendered conversation must "
                "begin with the rendered prompt, and they part after "
                f"{rendered_prompt[max(same - 40, 0) : same]!r}: the prompt goes on "
                f"{rendered_prompt[same : same + 40]!r}, the conversation "
                f"{whole[same : same + 40]!r}."
            )
        text = whole[len(rendered_prompt) :]
        if text.rstrip().endswith(self._ending):
            text = text.rstrip()
        return self.split(text)

    def split(self, text: str) -> list[str]:
        return [piece for piece in self._boundary.split(text) if piece and piece != _CUT]

    def ids(self, texts: Iterable[list[str]], first_plain: bool) -> list[list[int]]:
        """Ids of texts in pieces; each distinct piece is tokenized once."""
        texts = list(texts)
        anchor, length = self.encoder.anchor, self.encoder.anchor_length
        # The first piece of a prompt is tokenized as the tokenizer does it, all others exactly.
        keys = [
            [("" if first_plain and not i else anchor) + piece for i, piece in enumerate(pieces)]
            for pieces in texts
        ]
        distinct = dict.fromkeys(
            key
            for pieces, own in zip(texts, keys, strict=True)
            for piece, key in zip(pieces, own, strict=True)
            if piece not in self.special_ids
        )
        tokenized = dict(zip(distinct, self.encoder.tokenize(distinct), strict=True))
        rows = []
        for pieces, own in zip(texts, keys, strict=True):
            row: list[int] = []
            for i, (piece, key) in enumerate(zip(pieces, own, strict=True)):
                if piece in self.special_ids:
                    row.append(self.special_ids[piece])
                else:
                    row += tokenized[key][0 if first_plain and not i else length :]
            rows.append(row)
        return rows

    def _guard(self, text: str) -> str:
        if _CUT in text:
            text = text.replace(_CUT, "")
        return self._forgeable.sub(lambda found: found[0][:1] + _CUT + found[0][1:], text)


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else re.compile("(?!)")
