"""Text and conversations to token ids, through the model's own tokenizer."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np

from dpo_keras.batching.chat_templates import ChatTemplate
from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import PreferencePair, Text
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_hub_internals import fast_byte_pair_encoding, mend_word_splits

# Tokens at which `generate` of a family also stops, although no tokenizer attribute names them.
STOPS = {
    "Gemma3Tokenizer": "<end_of_turn>",
    "Gemma3nTokenizer": "<end_of_turn>",
    "Gemma4Tokenizer": "<turn|>",
    "Phi3Tokenizer": "<|end|>",
}
TEXTS_AT_ONCE = 4096  # bounds the memory of the tokenizer's intermediate lists

# A Unicode noncharacter, never part of text: marks where a message is cut before tokenization.
_CUT = "\ufdd0"

Pieces: TypeAlias = list[str]
"""A text cut so that each special token of the template is a piece of its own."""


class TextEncoder:
    r"""Tokenize prompts and responses separately, so that joined they are what the model sees.

    `prompt ids = [start] + tokenize(prompt)` and `response ids = tokenize(response) + [end]`. A
    start or end token that the text already contains (a template may write it) is not added again.

    * **Start token**: added where the KerasHub preprocessor adds it (`add_start_token` is true and
      the tokenizer has a `start_token_id`; Qwen, SmolLM3 and GPT-OSS have none).
    * **End token**: `tokenizer.end_token_id`, whatever `add_end_token` says, because a response
      without an end teaches the policy never to stop. Other tokens at which KerasHub's `generate`
      stops (`<|eot_id|>` of Llama 3, `<end_of_turn>` of Gemma 3, `<|end|>` of Phi 3) count as an
      end where the text ends with one. They are never added.
    * **Anchor**: SentencePiece tokenizers of Llama and Mistral put a word boundary before any text
      (`add_dummy_prefix`), before a response a space that nobody wrote. Responses are therefore
      tokenized behind a line feed, or another control character that is a byte token, and its ids
      are cut off again. Vocabularies without byte tokens keep the tokenizer's behavior.

    Args:
        preprocessor: a KerasHub `CausalLMPreprocessor`; a KerasHub tokenizer; or any object with
            `tokenize(list of str) -> rows of ids` (or callable like that), `end_token_id`,
            `pad_token_id` and, optionally, `start_token_id`.

    Attributes:
        tokenizer: the tokenizer.
        start: id of the start token; None where none is added.
        end: id of the end token that is added after each response.
        ends: ids that count as an end where a response already ends with them.
        pad: id that fills sequences up.
        anchor: text put before each response during tokenization; "" for most tokenizers.
        anchor_length: number of ids of the anchor.

    Raises:
        InputError: no tokenizer, no end or pad id, or a tokenizer that pads its output.

    Example:
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     def tokenize(self, texts):
        ...         return [[ord(letter) for letter in text] for text in texts]
        >>> encoder = TextEncoder(Letters())
        >>> encoder.prompts(["a ", ""]).tolist(), encoder.responses(["b", ""]).tolist()
        ([[1, 97, 32], [1]], [[98, 2], [2]])
    """

    def __init__(self, preprocessor: object):
        tokenizer: Any = getattr(preprocessor, "tokenizer", None) or preprocessor
        self.tokenizer = tokenizer
        mend_word_splits(tokenizer)
        self._tokenize: Callable[[list[str]], Tensor] = (
            fast_byte_pair_encoding(tokenizer) or getattr(tokenizer, "tokenize", None) or tokenizer
        )
        if problems := _tokenizer_problems(tokenizer, callable(self._tokenize)):
            raise InputError(problems)
        start = getattr(tokenizer, "start_token_id", None)
        self.start: int | None = start if getattr(preprocessor, "add_start_token", True) else None
        self.end = int(tokenizer.end_token_id)
        second = getattr(tokenizer, "end_token2_id", None)
        third = self.token_id(STOPS.get(type(tokenizer).__name__, ""))
        self.ends = frozenset({self.end, *(int(i) for i in (second, third) if i is not None)})
        self.pad = int(tokenizer.pad_token_id)
        self.anchor, self.anchor_length = self._find_anchor()

    def prompts(self, texts: Sequence[str]) -> Ragged:
        """Return the ids of each prompt, start token included. Equal texts are tokenized once."""
        distinct = dict.fromkeys(texts)
        number = {text: i for i, text in enumerate(distinct)}
        rows = [self.with_start(ids) for ids in self.tokenize(distinct)]
        return Ragged.from_lists(rows).take([number[text] for text in texts])

    def responses(self, texts: Sequence[str]) -> Ragged:
        """Return the ids of each response, end token included."""
        rows = self.tokenize(self.anchor + text for text in texts)
        return Ragged.from_lists(self.with_end(ids[self.anchor_length :]) for ids in rows)

    def with_start(self, ids: list[int]) -> list[int]:
        """Put the start token before ids, unless they begin with it."""
        if self.start is None or (ids and ids[0] == self.start):
            return ids
        return [self.start, *ids]

    def with_end(self, ids: list[int]) -> list[int]:
        """Put the end token after ids, unless they end with one."""
        return ids if ids and ids[-1] in self.ends else [*ids, self.end]

    def tokenize(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each text as it is: no start, no end, no anchor."""
        texts = list(texts)
        rows: list[list[int]] = []
        for begin in range(0, len(texts), TEXTS_AT_ONCE):
            rows.extend(_as_lists(self._tokenize(texts[begin : begin + TEXTS_AT_ONCE])))
        return rows

    @property
    def special_tokens(self) -> list[str]:
        """Texts that the tokenizer turns into one special token wherever they occur."""
        named = getattr(self.tokenizer, "special_tokens", None) or []
        unsplittable = getattr(self.tokenizer, "unsplittable_tokens", None) or []
        return list(dict.fromkeys([*named, *unsplittable]))

    def token_id(self, text: str) -> int | None:
        """Return the id of the token with this text; None where the vocabulary has none."""
        lookup = getattr(self.tokenizer, "token_to_id", None)
        back = getattr(self.tokenizer, "id_to_token", None)
        if not text or lookup is None or back is None:
            return None
        try:
            token = lookup(text)
            # SentencePiece returns the id of <unk> for a text that it does not know.
            return int(token) if token is not None and back(token) == text else None
        except (KeyError, ValueError):
            return None

    def _find_anchor(self) -> tuple[str, int]:
        # A byte token never merges with what follows, so its ids can be cut off cleanly.
        for anchor in "\n\x02":
            byte = self.token_id(f"<0x{ord(anchor):02X}>")
            if byte is None:
                continue
            plain, alone, joined = self.tokenize(["a", anchor, anchor + "a"])
            if not alone or alone[-1] != byte or joined[: len(alone)] != alone:
                continue
            # Equal ids: the tokenizer puts nothing before a text, so no anchor is needed.
            return ("", 0) if joined[len(alone) :] == plain else (anchor, len(alone))
        return "", 0


def _tokenizer_problems(tokenizer: object, usable: bool) -> list[InputProblem]:
    name, rules = type(tokenizer).__name__, []
    if not usable:
        rules.append(f"be a KerasHub preprocessor or tokenizer, or have `tokenize(texts)`: {name}")
    for attribute in ("end_token_id", "pad_token_id"):
        if getattr(tokenizer, attribute, None) is None:
            rules.append(f"have a tokenizer with `{attribute}`, the model's id: {name} has none")
    if getattr(tokenizer, "sequence_length", None):
        rules.append(
            "have a tokenizer whose `sequence_length` is None, or it pads and cuts by itself; the "
            "preprocessor's own sequence_length may stay"
        )
    for attribute in ("add_bos", "add_eos"):
        if getattr(tokenizer, attribute, False):
            rules.append(f"have a tokenizer whose `{attribute}` is False: it is added here, once")
    return [InputProblem("preprocessor", f"must {rule}") for rule in rules]


def _as_lists(rows: Tensor) -> list[list[int]]:
    if hasattr(rows, "to_list"):  # tf.RaggedTensor, from a tokenizer's TensorFlow path
        return list(rows.to_list())
    if hasattr(rows, "numpy"):
        rows = rows.numpy()
    return [row if isinstance(row, list) else np.asarray(row).tolist() for row in rows]


def encode_conversations(
    pairs: Sequence[PreferencePair], encoder: TextEncoder, template: ChatTemplate, first: int = 0
) -> tuple[Ragged, Ragged, Ragged, list[str]]:
    r"""Render and tokenize pairs with a chat template.

    The response is what the rendered conversation adds to the rendered prompt, less white space
    after its last special token. The template "plain" leaves strings as they are.

    Each special token of the template becomes one id. The same text inside a message is cut in two
    before tokenization, so that a user cannot forge a turn. Turn marks that are ordinary text to
    the tokenizer ("\n\nHuman:", "[INST]" of Llama 2) cannot be told from a user's words.

    Returns prompts, chosen, rejected and warnings. `first` is the first pair's number in errors.
    """
    conversations = _ConversationEncoder(encoder, template)
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
        conversations.warnings,
    )


class _ConversationEncoder:
    """Renders conversations, cuts them at special tokens, and tokenizes the pieces."""

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
        self._special = tuple(special)
        self._forgeable = _any_of(special)
        self._boundary = _any_of([_CUT, *self.special_ids])
        self._rendered: dict[Text, str] = {}
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
        self.warnings = [warning] if spelled else []

    def pair(self, pair: PreferencePair) -> tuple[Pieces, Pieces, Pieces]:
        """Render a pair: prompt, chosen, rejected."""
        prompt, chosen, rejected = pair.prompt, pair.chosen, pair.rejected
        if self.template.name == "plain" and (
            isinstance(prompt, str) and isinstance(chosen, str) and isinstance(rejected, str)
        ):
            return [prompt], [chosen], [rejected]
        if prompt not in self._rendered:
            self._rendered[prompt] = self._render(self._messages(prompt, "user"), True)
        rendered = self._rendered[prompt]
        responses = [self._response(prompt, rendered, text) for text in (chosen, rejected)]
        return self._split(rendered), responses[0], responses[1]

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

    def _messages(self, text: Text, role: str) -> list[dict[str, str]]:
        if isinstance(text, str):
            return [{"role": role, "content": self._guard(text)}]
        return [{"role": turn.role, "content": self._guard(turn.content)} for turn in text]

    def _render(self, messages: list[dict[str, str]], ask: bool) -> str:
        return self.template.render(messages, add_generation_prompt=ask, **self.variables)

    def _response(self, prompt: Text, rendered_prompt: str, response: Text) -> Pieces:
        messages = self._messages(prompt, "user") + self._messages(response, "assistant")
        whole = self._render(messages, False)
        if not whole.startswith(rendered_prompt):
            raise InputError(_prompt_changed(self.template.name, rendered_prompt, whole))
        text = whole[len(rendered_prompt) :]
        if text.rstrip().endswith(self._special):
            text = text.rstrip()
        return self._split(text)

    def _split(self, text: str) -> Pieces:
        return [piece for piece in self._boundary.split(text) if piece and piece != _CUT]

    def _guard(self, text: str) -> str:
        """Mark where special tokens in a message's own words must be cut."""
        text = text.replace(_CUT, "")
        return self._forgeable.sub(lambda found: found[0][:1] + _CUT + found[0][1:], text)


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
