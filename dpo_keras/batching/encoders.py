"""Text to token ids, through the model's own tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers

from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON, Tensor
from dpo_keras.utils.keras_hub_tokenizers import (
    RULES_FILE,
    checkpoint_rules,
    fast_byte_pair_encoding,
    follow_rules,
    mend_word_splits,
    python_tokenizer,
    rules_digest,
    saving_obstacle,
)
from dpo_keras.utils.text import shortened

# Tokens at which `generate` of a family also stops, although no tokenizer attribute names them.
STOPS = {
    "Gemma3Tokenizer": "<end_of_turn>",
    "Gemma3nTokenizer": "<end_of_turn>",
    "Gemma4Tokenizer": "<turn|>",
    "Phi3Tokenizer": "<|end|>",
}
# Texts on which tokenizers differ: case, digits, runs of spaces, line ends, scripts, NUL, specials.
PROBES = (
    "Hello, world! It's 12345 o'clock.",
    "  two  spaces   and a tab\t\tend ",
    "line\n\nbreaks \r\n and more\n",
    "naïve café ½ 東京 你好 🙂 e\u0301",
    "\u00a0odd\u2003spaces\u3000here",
    "I'LL don'T 's (\"quoted\") $1,000.50 a_b-c",
    "nul\x00inside",
    "",
)
TEXTS_AT_ONCE = 4096  # bounds the memory of the tokenizer's intermediate lists


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


def follow_checkpoint(tokenizer: object, directory: Path) -> None:
    """Let the tokenizer.json of a Hugging Face directory decide how its tokenizer cuts text.

    KerasHub reads vocabulary and merges from it. Normalizer, words, added tokens and fallbacks are
    those of the model's family otherwise.
    """
    try:
        rules = checkpoint_rules(directory)
        if rules is None:
            return
        follows = python_tokenizer(tokenizer) is not None
        if reason := saving_obstacle(tokenizer):
            raise InputError(f"{directory}: its tokenizer cannot be used: {reason}.")
        if follows:
            follow_rules(tokenizer, rules)
        written_here = (directory / RULES_FILE).is_file()
        other = None if written_here else _other_tokens(tokenizer, directory / "tokenizer.json")
    except InputError:
        raise
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = shortened(f"{type(error).__name__}: {error}", 200)
        raise InputError(f"{directory}: its tokenizer cannot be read: {reason}") from error
    if other is not None and follows:
        hint = "Its vocab.json and merges.txt belong to another tokenizer: remove the wrong files."
        raise InputError(f"{directory}: its tokenizer.json gives other tokens: {other}. {hint}")
    if other is not None:
        warnings.warn(
            f"{directory}: the SentencePiece model is used, and tokenizer.json gives other tokens: "
            f"{other}.",
            stacklevel=3,
        )


def _other_tokens(tokenizer: object, path: Path) -> str | None:
    """Return the first text to which a tokenizer.json gives other ids than a tokenizer."""
    theirs = tokenizers.Tokenizer.from_file(str(path))
    texts = [text for text in PROBES if text]
    for text, ids in zip(texts, TextEncoder(tokenizer).tokenize(texts), strict=True):
        expected = theirs.encode(text, add_special_tokens=False).ids
        if ids != expected:
            return f"for {text!r} {expected} instead of {ids}"
    return None


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


def tokenizer_key(encoder: TextEncoder) -> dict[str, JSON]:
    """Return everything that tells a tokenizer from another."""
    parts: dict[str, str | None] = {}
    for name in ("get_vocabulary", "merges", "proto"):
        value = getattr(encoder.tokenizer, name, None)
        with contextlib.suppress(Exception):  # a custom tokenizer may have anything here
            value = value() if callable(value) else value
            value = sorted(value) if isinstance(value, set) else value
            parts[name] = None if value is None else text_digest(repr(value))
    rules = rules_digest(encoder.tokenizer)
    return {
        "class": type(encoder.tokenizer).__name__,
        "ids": [encoder.start, encoder.end, sorted(encoder.ends), encoder.pad],
        "anchor": encoder.anchor,
        **({} if rules is None else {"rules": rules}),
        **parts,
    }


def text_digest(text: str) -> str:
    """Return the SHA-256 of a text."""
    return hashlib.sha256(text.encode()).hexdigest()
