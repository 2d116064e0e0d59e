"""Conversations to token ids: rendered by a chat template, special tokens told from words."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Sequence
from typing import TypeAlias

from dpo_keras.batching.chat_templates import MARKERS, ChatTemplate
from dpo_keras.batching.encoders import STOPS, TextEncoder
from dpo_keras.batching.image_preprocessing import ImagePreprocessor, filled
from dpo_keras.batching.ragged import Ragged
from dpo_keras.batching.tokenized_pairs import TokenizationReport
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import Record, Text
from dpo_keras.utils import JSON

# A Unicode noncharacter, never part of text: marks where a message is cut before tokenization.
CUT = "\ufdd0"
# A private use character: stands for the words of a message while a template is read.
_WORDS = "\ue000"
# Marks of a turn's end that templates write for tool calls only.
OTHER_DELIMITERS = ("<|eom_id|>",)

Pieces: TypeAlias = list[str]
"""A text cut so that each special token of the template is a piece of its own."""


Turns: TypeAlias = list[dict[str, JSON]]
"""Messages as a template sees them."""


def encode_conversations(
    pairs: Sequence[Record],
    encoder: TextEncoder,
    template: ChatTemplate,
    first: int = 0,
    images: ImagePreprocessor | None = None,
) -> tuple[Ragged, Ragged, Ragged, TokenizationReport]:
    r"""Render and tokenize pairs with a chat template.

    The response is what the rendered conversation adds to the rendered prompt, less white space
    after its last special token. The template "plain" leaves strings as they are.

    Each special token of the template becomes one id. The same text inside a message is cut in two
    before tokenization, so that a user cannot forge a turn. In an assistant's message only marks
    of a turn and of the text are cut; others (`<think>`, `<tool_call>`) stay what the model writes.
    Turn marks that are ordinary text to the tokenizer ("\n\nHuman:", "[INST]" of Llama 2) cannot be
    told from a user's words.

    Returns prompts, chosen and rejected, and a report with warnings and counts of special tokens.
    `first` is the first pair's number in errors. `images` writes the images of prompts.
    """
    conversations = _ConversationEncoder(encoder, template, images)
    rendered: list[tuple[Pieces, Pieces, Pieces]] = []
    problems: list[str] = []
    for number, pair in enumerate(pairs, first):
        try:
            rendered.append(conversations.pair(pair))
        except InputError as error:
            place = f"This is pair {number}."
            problems += [InputProblem(p.argument, p.rule, hint=place) for p in error.problems]
    if problems:
        more = [f"… and {len(problems) - 5} more."] if len(problems) > 5 else []
        raise InputError(problems[:5] + more)
    prompts, chosen, rejected = (
        conversations.ids([pieces[part] for pieces in rendered], first_plain=part == 0)
        for part in range(3)
    )
    return (
        Ragged.from_lists(map(encoder.with_start, prompts)),
        Ragged.from_lists(map(encoder.with_end, chosen)),
        Ragged.from_lists(map(encoder.with_end, rejected)),
        conversations.report,
    )


def kept_tokens(encoder: TextEncoder, template: ChatTemplate) -> dict[str, int]:
    """Return the special tokens, and their ids, that stay one token in an assistant's message.

    Not kept are the tokenizer's start, end and pad tokens, and all that the template writes around
    a message: with one of those a response would end, or begin a turn that nobody had.
    """
    special = special_texts(encoder, template)
    delimiters = {*OTHER_DELIMITERS, *STOPS.values(), *template.variables.values()}
    delimiters.update(*MARKERS.values())
    prompt = [{"role": "user", "content": _WORDS}]
    talk = [*prompt, {"role": "assistant", "content": _WORDS}, *prompt]
    try:
        asked = template.render(prompt, add_generation_prompt=True, **variables_of(encoder))
        whole = template.render(talk, **variables_of(encoder))
    except InputError:
        return {}  # a template that takes no such conversation: nothing is known of its marks
    parts = whole.split(_WORDS)
    # Before an assistant's words there may be its own tokens: Qwen 3's empty <think></think>.
    around = asked + (parts[2] if len(parts) == 4 else whole)
    ids = {text: token for text in special if (token := encoder.token_id(text)) is not None}
    limits = {encoder.start, encoder.pad, *encoder.ends}
    return {
        text: token
        for text, token in ids.items()
        if token not in limits and text not in delimiters and text not in around
    }


def special_texts(encoder: TextEncoder, template: ChatTemplate) -> list[str]:
    """Return the special tokens of template and tokenizer, longest first."""
    special = dict.fromkeys(filter(None, [*template.markers, *encoder.special_tokens]))
    return sorted(special, key=len, reverse=True)  # one may begin with another


def variables_of(encoder: TextEncoder) -> dict[str, JSON]:
    """Return the tokenizer's own values of a template's variables."""
    return {
        "bos_token": getattr(encoder.tokenizer, "start_token", None) or "",
        "eos_token": getattr(encoder.tokenizer, "end_token", None) or "",
    }


class _ConversationEncoder:
    """Renders conversations, cuts them at special tokens, and tokenizes the pieces."""

    def __init__(
        self, encoder: TextEncoder, template: ChatTemplate, images: ImagePreprocessor | None = None
    ):
        self.encoder, self.template, self.images = encoder, template, images
        self.variables = variables_of(encoder)
        special = special_texts(encoder, template)
        self.special_ids = {
            text: token for text in special if (token := encoder.token_id(text)) is not None
        }
        self._special = tuple(special)
        self._forgeable = _any_of(special)
        self._kept = kept_tokens(encoder, template)
        self._boundary = _any_of([CUT, *self.special_ids])
        self._rendered: dict[Text, tuple[Turns, list[JSON], str]] = {}
        self.report = TokenizationReport()
        spelled = ", ".join(
            text
            for text in template.markers
            if text not in self.special_ids and text in template.source and "|" in text
        )
        warning = (
            f"the tokenizer has no token for {spelled}, which the template {template.name!r} "
            "writes: they are spelled out in several tokens, as for a model that was not trained "
            "with this template."
        )
        self.report.warnings += [warning] if spelled else []

    def pair(self, pair: Record) -> tuple[Pieces, Pieces, Pieces]:
        """Render a pair: prompt, chosen, rejected."""
        prompt, chosen, rejected = pair.prompt, pair.responses[0], pair.responses[-1]
        images = self.images.texts(pair.images) if self.images is not None else []
        if (
            self.template.name == "plain"
            and not pair.tools
            and (isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str))
        ):
            return [filled(prompt, images)], [chosen], [rejected]
        if prompt not in self._rendered:
            messages = self._messages(prompt, "user")
            tools = self._guarded("system", pair.tools)
            self._rendered[prompt] = messages, tools, self._render(messages, True, tools)
        messages, tools, rendered = self._rendered[prompt]
        responses = [self._response(messages, tools, rendered, text) for text in (chosen, rejected)]
        return self._split(rendered, images), responses[0], responses[1]

    def ids(self, texts: list[Pieces], first_plain: bool) -> list[list[int]]:
        """Return the ids of each text. Each distinct piece is tokenized once.

        With `first_plain` the first piece of a text is tokenized without the anchor, as a prompt.
        """
        anchor, length = self.encoder.anchor, self.encoder.anchor_length

        def anchored(place: int, piece: str) -> str:
            return piece if first_plain and place == 0 else anchor + piece

        distinct = dict.fromkeys(
            anchored(place, piece)
            for pieces in texts
            for place, piece in enumerate(pieces)
            if piece not in self.special_ids
        )
        tokenized = dict(zip(distinct, self.encoder.tokenize(distinct), strict=True))

        def ids_of(place: int, piece: str) -> list[int]:
            if piece in self.special_ids:
                return [self.special_ids[piece]]
            own = tokenized[anchored(place, piece)]
            return own if first_plain and place == 0 else own[length:]

        return [
            [token for place, piece in enumerate(pieces) for token in ids_of(place, piece)]
            for pieces in texts
        ]

    def _messages(self, text: Text, role: str) -> Turns:
        turns: Turns = [{"role": role, "content": text}]
        if not isinstance(text, str):
            turns = [turn.as_dict() for turn in text]
        return [
            {
                key: value if key == "role" else self._guarded(turn["role"], _arguments(key, value))
                for key, value in turn.items()
                if key != "tools"
            }
            for turn in turns
        ]

    def _render(self, messages: Turns, ask: bool, tools: list[JSON]) -> str:
        return self.template.render(
            messages, add_generation_prompt=ask, tools=tools, **self.variables
        )

    def _response(
        self, prompt: Turns, tools: list[JSON], rendered_prompt: str, response: Text
    ) -> Pieces:
        messages = prompt + self._messages(response, "assistant")
        whole = self._render(messages, False, tools)
        if not whole.startswith(rendered_prompt):
            raise InputError(_prompt_changed(self.template.name, rendered_prompt, whole))
        text = whole[len(rendered_prompt) :]
        if text.rstrip().endswith(self._special):
            text = text.rstrip()
        return self._split(text)

    def _split(self, text: str, images: Sequence[str] = ()) -> Pieces:
        # The marks of an image come after the guard, which cuts those that somebody wrote.
        text = filled(text, images)
        return [piece for piece in self._boundary.split(text) if piece and piece != CUT]

    def _guarded(self, role: str, value: JSON) -> JSON:
        """Guard every text in a message's value."""
        if isinstance(value, str):
            return self._guard(role, value)
        if isinstance(value, list):
            return [self._guarded(role, item) for item in value]
        if isinstance(value, dict):
            return {self._guard(role, k): self._guarded(role, v) for k, v in value.items()}
        return value

    def _guard(self, role: str, text: str) -> str:
        """Mark where special tokens in a message's own words must be cut."""
        kept = self._kept if role == "assistant" else {}

        def mark(found: re.Match[str]) -> str:
            counts = self.report.special_kept if found[0] in kept else self.report.special_cut
            counts[found[0]] = counts.get(found[0], 0) + 1
            return found[0] if found[0] in kept else found[0][:1] + CUT + found[0][1:]

        return self._forgeable.sub(mark, text.replace(CUT, ""))


def _arguments(key: str, value: JSON) -> JSON:
    """Parse arguments that are JSON text, as OpenAI writes them: templates want objects."""
    if key != "tool_calls":
        return value
    calls = [{**call, "function": {**call.get("function", call)}} for call in value]
    for call in calls:
        function = call["function"]
        if isinstance(function.get("arguments"), str):
            with contextlib.suppress(ValueError):
                parsed = json.loads(function["arguments"])
                function["arguments"] = (
                    parsed if isinstance(parsed, dict) else function["arguments"]
                )
    return calls


def _prompt_changed(template: str, prompt: str, whole: str) -> InputProblem:
    letters = enumerate(zip(whole, prompt, strict=False))
    same = next((i for i, (a, b) in letters if a != b), len(whole))
    return InputProblem(
        "template",
        f"{template!r} cannot be used: the rendered conversation must begin with the rendered "
        f"prompt, and they part after {prompt[max(same - 40, 0) : same]!r}: the prompt goes on "
        f"{prompt[same : same + 40]!r}, the conversation {whole[same : same + 40]!r}",
    )


def _any_of(texts: Sequence[str]) -> re.Pattern[str]:
    return re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else re.compile("(?!)")
