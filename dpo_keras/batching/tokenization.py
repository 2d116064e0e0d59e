"""Preference pairs to token ids: tokenized once, cut to length, unusable pairs reported."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, get_args

import numpy as np

from dpo_keras.batching.chat_templates import ChatTemplate, get_template
from dpo_keras.batching.conversations import encode_conversations, kept_tokens
from dpo_keras.batching.encoders import TextEncoder, text_digest, tokenizer_key
from dpo_keras.batching.image_families import image_preprocessor
from dpo_keras.batching.image_preprocessing import (
    ImagePreprocessor,
    PairImages,
    any_images,
    expanded,
)
from dpo_keras.batching.mismatches import check_one_kind, mismatched
from dpo_keras.batching.ragged import Ragged
from dpo_keras.batching.token_cache import FORMAT, Chunk, cached_tokens
from dpo_keras.batching.tokenized_pairs import (
    UNCUT,
    DroppedPair,
    TokenizationReport,
    TokenizedPairs,
    first_tokens,
    longest_of,
    prompt_share,
    truncate,
)
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.preferences import (
    RatedResponse,
    Record,
    StoredPreferences,
    read_preferences,
)
from dpo_keras.preferences.collection import hash64, prompt_bytes
from dpo_keras.preferences.ranked_responses import RankedResponses
from dpo_keras.utils import JSON

Overlength = Literal["truncate", "drop", "error"]
PAIRS_AT_ONCE = 2048  # of a built directory
PROBE = 64  # pairs whose tokens tell one tokenizer from another
_LISTED = 20  # pairs that an error lists


def tokenize_pairs(
    pairs: Iterable[Record | Mapping[str, Any]],
    preprocessor: object,
    *,
    max_length: int = 1024,
    template: str | ChatTemplate | None = None,
    overlength: Overlength = "truncate",
    min_prompt_tokens: int | None = None,
    cache: str | os.PathLike[str] | None = None,
) -> TokenizedPairs:
    r"""Tokenize preference pairs with the model's own tokenizer.

    Prompt and response are tokenized separately and joined as ids, so that no token crosses the
    boundary (a prompt that ends in a space keeps it) and both responses follow the same prompt ids.
    `TextEncoder` describes how start and end tokens are placed.

    A pair longer than `max_length` is cut. First the prompt loses tokens from its left, to make
    room for the longer response, until `min_prompt_tokens` are left, its start token among them.
    Then both responses are cut from the right to the same room, **their end token too**: the text
    did not end there. The report warns where more than 5 % of the pairs are cut.

    Args:
        pairs: `PreferencePair`s, or `RatedResponse`s, each of which is laid out beside a response
            to another prompt; or mappings as `read_preferences` takes them. Pairs of a built
            directory (`StoredPreferences`) are tokenized once, and their tokens stay on disk.
        preprocessor: the model's KerasHub preprocessor (`policy.preprocessor`), its tokenizer, or
            anything that `TextEncoder` takes.
        max_length: maximum number of tokens of prompt and response together, >= 4.
        template: how chat messages become text: a name (see `available_templates()`), the path of a
            Jinja file or of a Hugging Face checkpoint directory, or a `ChatTemplate`. None leaves
            strings as they are and refuses messages. With a template, a string prompt is one user
            turn and a string response one assistant turn.
        overlength: what happens to a pair that is too long: "truncate", "drop" or "error". The
            report lists dropped pairs.
        min_prompt_tokens: tokens that truncation leaves of a prompt at least, 1 to max_length - 2.
            None leaves a quarter of `max_length`. A shorter prompt stays whole.
        cache: folder for the tokens of a built directory. None takes `tokens/` inside it.

    Returns:
        The remaining pairs, with a report of the others.

    Raises:
        InputError: a wrong argument; pairs too long with `overlength="error"`; no pair left.

    Example:
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [list(map(ord, t)) for t in texts])
        >>> from dpo_keras.preferences import PreferencePair
        >>> pair = PreferencePair("ab", "yes", "n")
        >>> tokens = tokenize_pairs([pair], Letters(), max_length=6)
        >>> [part[0].tolist() for part in (tokens.prompt, tokens.chosen, tokens.rejected)]
        [[1, 98], [121, 101, 115, 2], [110, 2]]
        >>> tokens.report.truncated_prompts
        1
    """
    problems = _length_problems(max_length, overlength, min_prompt_tokens)
    if cache is not None and not isinstance(pairs, StoredPreferences):
        rule = f"is for pairs of a built directory, got {type(pairs).__name__}"
        problems.append(InputProblem("cache", rule))
    if problems:
        raise InputError(problems)
    encoder = TextEncoder(preprocessor)
    least = prompt_share(max_length) if min_prompt_tokens is None else min_prompt_tokens
    settings = encoder, get_template(template), max_length, overlength, least
    tokenizer = PairTokenizer(*settings, preprocessor)
    if isinstance(pairs, StoredPreferences):
        count = len(pairs)
        tokens = cached_tokens(
            pairs,
            key=tokenizer.key(pairs),
            chunks=lambda done: tokenizer.chunks(pairs, done),
            cache=cache,
            pad=encoder.pad,
            max_length=max_length,
        )
        if pairs.report.with_images:
            images = PairImages.stored(pairs, tokens.source, tokens.prompt, tokenizer.image_family)
            tokens = replace(tokens, images=images)
    else:
        records: list[Any] = list(pairs)
        if any(isinstance(pair, Mapping) for pair in records):
            records = list(read_preferences(records, on_error="fail"))
        count = len(records)
        tokens, uncut = tokenizer.tokenize(records)
        tokens.report.warn_of_truncation(tokens.prompt.lengths, uncut, max_length)
        tokens.report.warn_of_special_tokens()
    if not len(tokens):
        dropped = [str(pair) for pair in tokens.report.dropped[:_LISTED]]
        raise InputError([f"None of the {count} pairs is left after tokenization.", *dropped])
    return tokens


@dataclass(frozen=True)
class PairTokenizer:
    """Turns pairs into tokens by one set of rules, whatever part of a data set they are."""

    encoder: TextEncoder
    template: ChatTemplate | None
    max_length: int
    overlength: Overlength
    min_prompt_tokens: int
    preprocessor: object = None

    @cached_property
    def image_family(self) -> ImagePreprocessor:
        """How the model reads images."""
        return image_preprocessor(self.preprocessor)

    def tokenize(self, records: Sequence[Record], first: int = 0) -> Chunk:
        """Tokenize some of the pairs of a larger set, the first of which has number `first`."""
        rated = check_one_kind(records)
        _check_order(records, first)
        prompt, responses, report = self._encode(records, first)
        kept, dropped = self._sort_out(records, prompt, responses, first)
        whole = [part.take(kept) for part in (prompt, *responses)]
        prompt, chosen, *others = truncate(
            *whole,
            max_length=self.max_length,
            start=self.encoder.start,
            min_prompt_tokens=self.min_prompt_tokens,
        )
        uncut = np.zeros(len(kept), UNCUT)
        uncut["prompt"] = whole[0].lengths
        uncut["response"] = longest_of(whole[1:])
        left = [records[int(i)] for i in kept]
        hashes = np.array([hash64(prompt_bytes(record)) for record in left], np.uint64)
        if rated:
            others = [mismatched(prompt, chosen, hashes, self.max_length)]
        rejected, *others = others
        for i in () if rated else np.flatnonzero(chosen.lengths == rejected.lengths):
            uncut["identical"][i] = np.array_equal(chosen[int(i)], rejected[int(i)])
        preference = [
            record.desirable if isinstance(record, RatedResponse) else record.preference
            for record in left
        ]
        margin = [getattr(record, "margin", None) for record in left]
        margins = [value or 0.0 for value in margin]
        any_margin = any(value is not None for value in margin)
        names = tuple(sorted({pair.group for pair in left if pair.group is not None}))
        numbers: dict[str | None, int] = {name: i for i, name in enumerate(names)}
        tokens = TokenizedPairs(
            prompt=prompt,
            chosen=chosen,
            rejected=rejected,
            others=tuple(others),
            preference=np.array(preference, np.float32),
            weight=np.array([pair.weight for pair in left], np.float32),
            pad=self.encoder.pad,
            group=np.array([numbers.get(p.group, -1) for p in left], np.int32) if names else None,
            margin=np.array(margins, np.float32) if any_margin else None,
            rated=np.ones(len(left), np.float32) if rated else None,
            group_names=names,
            source=first + kept,
            prompt_hash=hashes,
            max_length=self.max_length,
            images=PairImages.of(left, self.image_family) if any_images(left) else None,
        )
        report.pairs, report.dropped = len(records), dropped
        report.count(prompt.lengths, [part.lengths for part in tokens.responses], uncut)
        return replace(tokens, report=report), uncut

    def chunks(self, pairs: StoredPreferences, done: int) -> Iterator[Chunk]:
        """Tokenize the pairs of a built directory from number `done` on, some at a time."""
        records = itertools.islice(pairs.whole.read(done), pairs.extent - done)
        while chunk := list(itertools.islice(records, PAIRS_AT_ONCE)):
            yield self.tokenize(chunk, done)
            done += len(chunk)

    def key(self, pairs: StoredPreferences) -> dict[str, JSON]:
        """Return everything that the tokens of a built directory depend on."""
        template = self.template
        # Tokens of the first pairs tell tokenizers apart that no attribute tells apart.
        # A pair that is too long must not raise here, where a few pairs stand for all.
        lenient = replace(self, overlength="truncate", min_prompt_tokens=1)
        tokens, _ = lenient.tokenize(list(itertools.islice(pairs.whole, PROBE)))
        probe = hashlib.sha256()
        for part in tokens.parts:
            probe.update(json.dumps(part.tolist()).encode())
        return {
            "format": FORMAT,
            "records": pairs.checksum,
            "pairs": pairs.extent,
            "tokenizer": tokenizer_key(self.encoder),
            "probe": probe.hexdigest(),
            "template": None if template is None else [template.name, text_digest(template.source)],
            "max_length": self.max_length,
            "overlength": self.overlength,
            "min_prompt_tokens": self.min_prompt_tokens,
            # Directories without images keep the key that they had.
            **({"images": self.image_family.key} if pairs.report.with_images else {}),
            "kept": [] if template is None else sorted(kept_tokens(self.encoder, template)),
        }

    def _encode(
        self, records: Sequence[Record], first: int
    ) -> tuple[Ragged, list[Ragged], TokenizationReport]:
        family = self.image_family if any_images(records) else None
        if family is not None:
            records = family.with_slots(records, first)
        if self.template is not None:
            return encode_conversations(records, self.encoder, self.template, first, family)
        messages = [
            number
            for number, pair in enumerate(records, first)
            if not all(isinstance(text, str) for text in (pair.prompt, *pair.responses))
        ]
        if messages:
            rule = (
                f"is needed to turn chat messages into text: {len(messages)} pairs hold messages "
                f"(the first is pair {messages[0]})."
            )
            hint = "Give a name such as 'chatml', a Jinja file, or a Hugging Face checkpoint."
            raise InputError(InputProblem("template", rule, hint=hint))
        prompts = self.encoder.prompts([expanded(pair, family) for pair in records])
        texts = [[str(text) for text in pair.responses] for pair in records]
        return prompts, self._columns(texts), TokenizationReport()

    def _columns(self, responses: list[list[str]]) -> list[Ragged]:
        """Encode responses, column by column; a record with fewer has empty rows."""
        columns = []
        for column in range(max(map(len, responses), default=2)):
            having = [row for row, texts in enumerate(responses) if len(texts) > column]
            found = self.encoder.responses([responses[row][column] for row in having])
            if len(having) < len(responses):
                rows = dict(zip(having, found.tolist(), strict=True))
                found = Ragged.from_lists([rows.get(row, []) for row in range(len(responses))])
            columns.append(found)
        return columns

    def _sort_out(
        self,
        records: Sequence[Record],
        prompt: Ragged,
        responses: list[Ragged],
        first: int,
    ) -> tuple[np.ndarray, list[DroppedPair]]:
        """Return the numbers of the pairs that stay, and the pairs that do not."""
        total = prompt.lengths + longest_of(responses)
        over = total > self.max_length
        if self.overlength == "error" and over.any():
            raise InputError(self._too_long(records, np.flatnonzero(over), total, first))
        rule = np.full(len(records), "", object)
        # A response of the end token alone says nothing.
        counts = np.array([len(record.responses) for record in records])
        for column, response in enumerate(responses):
            rule[self._blank(response) & (counts > column)] = "empty_response"
        rule[(prompt.lengths == 0) & (rule == "")] = "empty_prompt"
        if any_images(records):
            rule[over & self.image_family.held(records, prompt, first) & (rule == "")] = (
                "images_cut"
            )
        if self.overlength == "drop":
            rule[over & (rule == "")] = "overlength"
        dropped = [
            DroppedPair(
                first + int(i),
                records[int(i)].id,
                str(rule[i]),
                self._lengths(prompt, responses, int(i)),
            )
            for i in np.flatnonzero(rule != "")
        ]
        return np.flatnonzero(rule == ""), dropped

    @staticmethod
    def _lengths(prompt: Ragged, responses: list[Ragged], row: int) -> str:
        names = ["chosen", "rejected", *(f"response {n + 1}" for n in range(2, len(responses)))]
        if len(responses) == 1:  # a rated one
            names = ["response"]
        found = zip(names, responses, strict=True)
        listed = ", ".join(f"{name} {response.lengths[row]}" for name, response in found)
        return f"prompt {prompt.lengths[row]}, {listed} tokens"

    def _blank(self, responses: Ragged) -> np.ndarray:
        is_end = np.isin(first_tokens(responses), list(self.encoder.ends))
        return (responses.lengths == 0) | ((responses.lengths == 1) & is_end)

    def _too_long(
        self, records: Sequence[Record], rows: np.ndarray, total: np.ndarray, first: int
    ) -> list[str]:
        rule = (
            f"is 'error', and {len(rows)} of {len(records)} pairs are longer than "
            f"max_length={self.max_length} tokens."
        )
        hint = "Raise max_length, or choose 'truncate' or 'drop'."
        problems: list[str] = [InputProblem("overlength", rule, hint=hint)]
        for i in rows[:_LISTED].tolist():
            name = f" (id {records[i].id!r})" if records[i].id is not None else ""
            problems.append(f"pair {first + i}{name}: {total[i]} tokens")
        if len(rows) > _LISTED:
            problems.append(f"… and {len(rows) - _LISTED} more.")
        return problems


def _check_order(records: Sequence[Record], first: int) -> None:
    """Refuse rankings with ties, of which there is no order to be likely."""
    tied = [
        number
        for number, record in enumerate(records, first)
        if isinstance(record, RankedResponses) and record.has_ties
    ]
    if tied:
        rule = (
            f"must be rankings without ties to train on as a whole; {len(tied)} of "
            f"{len(records)} have ties (the first is ranking {tied[0]})"
        )
        hint = "Train on their pairs: rankings.as_pairs(), in a configuration another loss.type."
        raise InputError(InputProblem("pairs", rule, hint=hint))


def _length_problems(
    max_length: int, overlength: str, min_prompt_tokens: int | None
) -> list[InputProblem]:
    problems, least = [], min_prompt_tokens
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 4:
        problems.append(InputProblem("max_length", "must be an integer >= 4", max_length))
    if overlength not in get_args(Overlength):
        names = ", ".join(map(repr, get_args(Overlength)))
        problems.append(InputProblem("overlength", f"must be one of {names}", overlength))
    if problems or least is None:
        return problems
    if isinstance(least, bool) or not isinstance(least, int) or not 1 <= least <= max_length - 2:
        rule = f"must be an integer from 1 to {max_length - 2} (max_length - 2)"
        problems.append(InputProblem("min_prompt_tokens", rule, least))
    elif overlength != "truncate":
        rule = f"has no effect with overlength={overlength!r}"
        problems.append(InputProblem("min_prompt_tokens", rule, least, "Leave it out."))
    return problems
