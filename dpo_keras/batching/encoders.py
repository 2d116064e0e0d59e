"""From text to token ids, by the model's own tokenizer: start token, end token, boundaries."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from dpo_keras.batching.chat_templates import ChatTemplate
from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError
from dpo_keras.utils.keras_hub_internals import mend_word_splits

if TYPE_CHECKING:
    from dpo_keras.preferences import PreferencePair


# Further tokens at which a family's own `generate` stops, without an attribute of the tokenizer.
STOPS = {
    "Gemma3Tokenizer": "<end_of_turn>",
    "Gemma3nTokenizer": "<end_of_turn>",
    "Gemma4Tokenizer": "<turn|>",
    "Phi3Tokenizer": "<|end|>",
}
CHUNK = 4096  # texts handed to the tokenizer at a time: bounds the memory of its intermediate lists


class TextEncoder:
    r"""Tokenizes prompts and responses apart, so that joined they are what the model will see.

    `prompt ids = [start] + tokenize(prompt)` and `response ids = tokenize(response) + [end]`, each
    special token exactly once: none is added where the text already brought it (a template that
    writes its own beginning of text, or its own end of turn).

    * **Start token**: added where the KerasHub preprocessor adds it (`add_start_token`, and the
      tokenizer has a `start_token_id`; Qwen, SmolLM3 and GPT-OSS have none).
    * **End token**: `tokenizer.end_token_id`, whatever `add_end_token` says, because a response
      without an end teaches the policy never to stop. The other tokens at which KerasHub's
      `generate` stops (Llama 3's `<|eot_id|>`, Gemma 3's `<end_of_turn>`, Phi 3's `<|end|>`) count
      as an end where the text ends with one, and are never added.
    * **SentencePiece** tokenizers of the Llama and Mistral kind put a word boundary in front of any
      text they are given (`add_dummy_prefix`). In front of a response that would be a space that
      nobody wrote, so responses are tokenized behind an `anchor`, a line feed, whose ids are cut
      off again. The line feed is a byte token there, which never merges. (A vocabulary that has
      the line feed as an ordinary piece gets another control character.) Where the vocabulary has
      no byte tokens the tokenizer's own habit stays.

    Args:
        preprocessor: a KerasHub `CausalLMPreprocessor`; or a KerasHub tokenizer; or any object with
            `tokenize(list of str) -> rows of ids` (or that is called so), `end_token_id`,
            `pad_token_id` and, optionally, `start_token_id`.

    Attributes:
        start: id of the start token, or None where none is added.
        end: id of the end token that is added after each response.
        ends: ids that count as an end when a response already ends with them.
        pad: id that fills sequences up.
        anchor: text put before each response while it is tokenized ("" for most tokenizers).
        anchor_length: number of ids that the anchor stands for, cut off again.

    Raises:
        InputError: no tokenizer, no end or pad id, or a tokenizer set to pad its output.

    Example:
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     def tokenize(self, texts):
        ...         return [[ord(letter) for letter in text] for text in texts]
        >>> encoder = TextEncoder(Letters())
        >>> encoder.prompts(["a "]).tolist(), encoder.responses(["b"]).tolist()
        ([[1, 97, 32]], [[98, 2]])
    """

    def __init__(self, preprocessor: Any):
        tokenizer = getattr(preprocessor, "tokenizer", None) or preprocessor
        self.tokenizer = tokenizer
        mend_word_splits(tokenizer)
        self._tokenize = _without_offsets(tokenizer) or getattr(tokenizer, "tokenize", None)
        if self._tokenize is None:
            self._tokenize = tokenizer if callable(tokenizer) else None
        problems = []
        if self._tokenize is None:
            problems.append(
                "preprocessor must be a KerasHub preprocessor or tokenizer, or have "
                f"`tokenize(texts)`; got {type(preprocessor).__name__}."
            )
        for name in ("end_token_id", "pad_token_id"):
            if getattr(tokenizer, name, None) is None:
                problems.append(
                    f"the tokenizer {type(tokenizer).__name__} has no `{name}`; set it to the id "
                    "that the model uses (every response needs an end, every batch a pad)."
                )
        if getattr(tokenizer, "sequence_length", None):
            problems.append(
                "the tokenizer's `sequence_length` must be None, or it pads and cuts by itself; "
                f"got {tokenizer.sequence_length}. The preprocessor's own sequence_length may stay."
            )
        for name in ("add_bos", "add_eos"):
            if getattr(tokenizer, name, False):
                problems.append(
                    f"the tokenizer's `{name}` must be False: start and end tokens are added here, "
                    "once; got True."
                )
        if problems:
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
        """Tokenizes prompts; each distinct text once.

        Args:
            texts: prompts.

        Returns:
            One row of ids per text, start token included.

        Example:
            >>> class Letters:
            ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
            ...     tokenize = staticmethod(lambda texts: [list(map(ord, t)) for t in texts])
            >>> TextEncoder(Letters()).prompts(["ab", ""]).tolist()
            [[1, 97, 98], [1]]
        """
        distinct = dict.fromkeys(texts)
        number = {text: i for i, text in enumerate(distinct)}
        rows = [self.with_start(ids) for ids in self.tokenize(distinct)]
        return Ragged.from_lists(rows).take([number[text] for text in texts])

    def responses(self, texts: Sequence[str]) -> Ragged:
        """Tokenizes responses.

        Args:
            texts: responses.

        Returns:
            One row of ids per text, end token included.

        Example:
            >>> class Letters:
            ...     end_token_id, pad_token_id = 2, 0
            ...     tokenize = staticmethod(lambda texts: [list(map(ord, t)) for t in texts])
            >>> TextEncoder(Letters()).responses(["ab", ""]).tolist()
            [[97, 98, 2], [2]]
        """
        return Ragged.from_lists(
            self.with_end(ids[self.anchor_length :])
            for ids in self.tokenize(self.anchor + text for text in texts)
        )

    def with_start(self, ids: list[int]) -> list[int]:
        """Puts the start token before ids, unless they begin with it."""
        if self.start is None or (ids and ids[0] == self.start):
            return ids
        return [self.start, *ids]

    def with_end(self, ids: list[int]) -> list[int]:
        """Puts the end token after ids, unless they end with one."""
        return ids if ids and ids[-1] in self.ends else [*ids, self.end]

    def tokenize(self, texts: Iterable[str]) -> list[list[int]]:
        """Tokenizes texts as they are: no start, no end, no anchor.

        Args:
            texts: any number of texts.

        Returns:
            A list of token ids per text.
        """
        texts = list(texts)
        rows: list[list[int]] = []
        for begin in range(0, len(texts), CHUNK):
            rows.extend(_as_lists(self._tokenize(texts[begin : begin + CHUNK])))  # type: ignore[misc]
        return rows

    @property
    def special_tokens(self) -> list[str]:
        """Texts that the tokenizer takes for one special token wherever they stand."""
        named = getattr(self.tokenizer, "special_tokens", None) or []
        return list(
            dict.fromkeys([*named, *(getattr(self.tokenizer, "unsplittable_tokens", None) or [])])
        )

    def token_id(self, text: str) -> int | None:
        """Looks one token up.

        Args:
            text: the token's text.

        Returns:
            Its id, or None where the vocabulary has no such token.
        """
        lookup = getattr(self.tokenizer, "token_to_id", None)
        back = getattr(self.tokenizer, "id_to_token", None)
        if not text or lookup is None or back is None:
            return None
        try:
            token = lookup(text)
            # SentencePiece answers with the id of <unk> for whatever it does not know.
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
            # Nothing was put in front of the letter either way: there is nothing to avoid.
            return ("", 0) if joined[len(alone) :] == plain else (anchor, len(alone))
        return "", 0


def _without_offsets(tokenizer: Any) -> Callable[[list[str]], list[list[int]]] | None:
    """The batch encoding of a KerasHub byte-pair tokenizer, less what it computes and throws away.

    KerasHub asks the `tokenizers` library for each token's place in the text too, which takes a
    fifth of the time and is not used.
    """
    method = getattr(type(tokenizer), "tokenize", None)
    # A family with a `tokenize` of its own may do more than to encode.
    if getattr(method, "__qualname__", "") != "BytePairTokenizer.tokenize":
        return None
    encode = getattr(getattr(tokenizer, "_tokenizer", None), "encode_batch_fast", None)
    in_python = getattr(tokenizer, "_use_tf_workflow", lambda: True)() is False
    if encode is None or not in_python or "int" not in str(tokenizer.compute_dtype):
        return None
    return lambda texts: [encoding.ids for encoding in encode(texts)]


def _as_lists(rows: Any) -> list[list[int]]:
    if hasattr(rows, "to_list"):  # tf.RaggedTensor: the tokenizer's TensorFlow path
        return rows.to_list()
    if hasattr(rows, "numpy"):
        rows = rows.numpy()
    return [row if isinstance(row, list) else np.asarray(row).tolist() for row in rows]


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
