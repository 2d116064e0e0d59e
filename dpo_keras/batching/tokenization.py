"""From preference pairs to token ids: tokenized once, cut to length, the unusable ones named."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, get_args

import numpy as np

from dpo_keras.batching.chat_templates import ChatTemplate, get_template
from dpo_keras.batching.encoders import TextEncoder, encode_conversations
from dpo_keras.batching.ragged import Ragged
from dpo_keras.batching.tokenized_pairs import (
    DroppedPair,
    TokenizationReport,
    TokenizedPairs,
    truncate,
)
from dpo_keras.errors import InputError
from dpo_keras.preferences.stored_preferences import StoredPreferences

if TYPE_CHECKING:
    from dpo_keras.preferences import PreferencePair

Overlength = Literal["truncate", "drop", "error"]
_NAMED = 20  # pairs that an error names one by one


def tokenize_pairs(
    pairs: Iterable[PreferencePair | Mapping[str, Any]],
    preprocessor: Any,
    *,
    max_length: int = 1024,
    template: str | ChatTemplate | None = None,
    overlength: Overlength = "truncate",
    cache: str | os.PathLike[str] | None = None,
) -> TokenizedPairs:
    r"""Tokenizes preference pairs through the model's own tokenizer.

    Prompt and response are tokenized apart and joined as ids, so that no token straddles the
    boundary (a prompt that ends in a space stays as it is) and both responses follow the same
    prompt ids. `TextEncoder` tells how start and end tokens are placed.

    A pair longer than `max_length` is cut, prompt first: from its left, keeping the start token
    and at least one more token, to make room for the longer response; then each response that is
    still too long, from its right. **A response that was cut has no end token**, because the text
    did not end there.

    Args:
        pairs: `PreferencePair`s, or mappings as `read_preferences` takes them. Those of a built
            directory (`StoredPreferences`) are tokenized once, and their tokens stay on disk.
        preprocessor: the model's KerasHub preprocessor (`policy.preprocessor`), its tokenizer, or
            anything that `TextEncoder` takes.
        max_length: most tokens of prompt and response together, >= 4.
        template: how chat messages become text: a name (see `available_templates()`), a path to a
            Jinja file or to a Hugging Face checkpoint directory, or a `ChatTemplate`. None leaves
            strings as they are, and refuses messages. With a template, a string prompt is one user
            turn and a string response one assistant turn.
        overlength: what happens to a pair that is too long: "truncate", "drop" or "error". Dropped
            pairs are named in the report.
        cache: where tokens of a built directory are kept; None: in `tokens/` in it.

    Returns:
        The surviving pairs, with a report of the others.

    Raises:
        InputError: a wrong argument; pairs too long where `overlength="error"`; nothing left.

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
    problems = []
    if isinstance(max_length, bool) or not isinstance(max_length, int) or max_length < 4:
        problems.append(f"max_length must be an integer >= 4, got {max_length!r}.")
    if overlength not in get_args(Overlength):
        names = ", ".join(map(repr, get_args(Overlength)))
        problems.append(f"overlength must be one of {names}, got {overlength!r}.")
    stored = isinstance(pairs, StoredPreferences)
    if cache is not None and not stored:
        problems.append(f"cache is for pairs of a built directory, got {type(pairs).__name__}.")
    if problems:
        raise InputError(problems)
    rules = Rules(TextEncoder(preprocessor), get_template(template), max_length, overlength)
    if isinstance(pairs, StoredPreferences):
        from dpo_keras.batching.token_cache import tokenize_stored

        return tokenize_stored(pairs, rules, cache)
    records = _records(pairs)
    tokens, _ = tokenize_chunk(records, rules)
    if not len(tokens):
        raise InputError(
            [f"None of the {len(records)} pairs is left after tokenization."]
            + [str(pair) for pair in tokens.report.dropped[:_NAMED]]
        )
    return tokens


class Rules(NamedTuple):
    """How text becomes tokens.

    Args:
        encoder: the tokenizer.
        template: the chat template, or None.
        max_length: most tokens of prompt and response together.
        overlength: what happens to a pair that is too long.
    """

    encoder: TextEncoder
    template: ChatTemplate | None
    max_length: int
    overlength: Overlength


def tokenize_chunk(
    records: list[PreferencePair], rules: Rules, first: int = 0
) -> tuple[TokenizedPairs, np.ndarray]:
    """Tokenizes some of the pairs of a larger set, without complaint where none is left.

    Args:
        records: the pairs.
        rules: how.
        first: the number of the first one in the larger set, for `source`, report and messages.

    Returns:
        The surviving pairs with their report, and bool `[n, 3]`: whether the prompt was cut, a
        response was cut, both responses have the same tokens.

    Raises:
        InputError: as `tokenize_pairs`.
    """
    encoder, template, max_length, overlength = rules
    prompt, chosen, rejected, warnings = _encode(records, encoder, template, first)
    tokens, cuts = _cut(records, encoder, prompt, chosen, rejected, max_length, overlength, first)
    tokens.report.warnings.extend(warnings)
    return tokens, cuts


def _records(pairs: Iterable[Any]) -> list[PreferencePair]:
    records = list(pairs)
    if any(isinstance(pair, Mapping) for pair in records):
        from dpo_keras.preferences import read_preferences

        return list(read_preferences(records, on_error="fail"))
    return records


def _encode(
    records: list[PreferencePair],
    encoder: TextEncoder,
    template: ChatTemplate | None,
    first: int,
) -> tuple[Ragged, Ragged, Ragged, list[str]]:
    if template is not None:
        return encode_conversations(records, encoder, template, first)
    columns: list[list[str]] = [[], [], []]
    messages = []
    for number, pair in enumerate(records, first):
        for column, text in zip(columns, (pair.prompt, pair.chosen, pair.rejected), strict=True):
            if isinstance(text, str):
                column.append(text)
            else:
                messages.append(number)
    if messages:
        raise InputError(
            f"{len(set(messages))} pairs hold chat messages (the first is pair {messages[0]}), "
            "which need a template to become text: pass template='chatml' or another name, the "
            "path of a Jinja file, or a Hugging Face checkpoint directory."
        )
    prompt, chosen, rejected = columns
    return encoder.prompts(prompt), encoder.responses(chosen), encoder.responses(rejected), []


def _cut(
    records: list[PreferencePair],
    encoder: TextEncoder,
    prompt: Ragged,
    chosen: Ragged,
    rejected: Ragged,
    max_length: int,
    overlength: str,
    first: int,
) -> tuple[TokenizedPairs, np.ndarray]:
    longer = np.maximum(chosen.lengths, rejected.lengths)
    total = prompt.lengths + longer
    over = total > max_length
    if overlength == "error" and over.any():
        raise InputError(_too_long(records, np.flatnonzero(over), total, max_length, first))

    # Which rule drops a pair, if any. A response of the end token alone says nothing.
    rule = np.full(len(records), "", object)
    rule[_blank(chosen, encoder) | _blank(rejected, encoder)] = "empty_response"
    rule[(prompt.lengths == 0) & (rule == "")] = "empty_prompt"
    if overlength == "drop":
        rule[over & (rule == "")] = "overlength"
    dropped = [
        DroppedPair(
            first + int(i),
            records[i].id,
            str(rule[i]),
            f"prompt {prompt.lengths[i]}, chosen {chosen.lengths[i]}, "
            f"rejected {rejected.lengths[i]} tokens",
        )
        for i in np.flatnonzero(rule != "")
    ]
    keep = np.flatnonzero(rule == "")
    records = [records[i] for i in keep]
    prompt, chosen, rejected = prompt.take(keep), chosen.take(keep), rejected.take(keep)
    cut_prompt, cut_chosen, cut_rejected = truncate(
        prompt, chosen, rejected, max_length, encoder.start
    )
    identical = np.zeros(len(keep), bool)
    for i in np.flatnonzero(cut_chosen.lengths == cut_rejected.lengths):
        identical[i] = np.array_equal(cut_chosen[int(i)], cut_rejected[int(i)])
    cuts = np.stack(
        [
            cut_prompt.lengths < prompt.lengths,
            (cut_chosen.lengths < chosen.lengths) | (cut_rejected.lengths < rejected.lengths),
            identical,
        ],
        axis=1,
    )
    lengths = cut_prompt.lengths + np.maximum(cut_chosen.lengths, cut_rejected.lengths)
    report = TokenizationReport(
        pairs=len(rule),
        kept=len(keep),
        dropped=dropped,
        truncated_prompts=int(cuts[:, 0].sum()),
        truncated_responses=int(cuts[:, 1].sum()),
        identical_responses=int(identical.sum()),
        prompt_tokens=len(cut_prompt.flat_values),
        response_tokens=len(cut_chosen.flat_values) + len(cut_rejected.flat_values),
        longest=int(lengths.max(initial=0)),
    )
    groups = [pair.group for pair in records]
    names = tuple(sorted({name for name in groups if name is not None}))
    margins = [pair.margin for pair in records]
    tokens = TokenizedPairs(
        prompt=cut_prompt,
        chosen=cut_chosen,
        rejected=cut_rejected,
        preference=np.array([pair.preference for pair in records], np.float32),
        weight=np.array([pair.weight for pair in records], np.float32),
        pad=encoder.pad,
        group=_numbered(groups, names) if names else None,
        margin=_margins(margins),
        group_names=names,
        source=first + keep,
        max_length=max_length,
        report=report,
    )
    return tokens, cuts


def _blank(responses: Ragged, encoder: TextEncoder) -> np.ndarray:
    lengths = responses.lengths
    first = responses.flat_values[
        np.minimum(responses.row_splits[:-1], max(len(responses.flat_values) - 1, 0))
    ]
    return (lengths == 0) | ((lengths == 1) & np.isin(first, list(encoder.ends)))


def _numbered(groups: list[str | None], names: tuple[str, ...]) -> np.ndarray:
    number: dict[str | None, int] = {name: i for i, name in enumerate(names)}
    return np.array([number.get(name, -1) for name in groups], np.int32)


def _margins(margins: list[float | None]) -> np.ndarray | None:
    if all(margin is None for margin in margins):
        return None
    # Without a margin of its own a pair asks for none.
    return np.array([margin or 0.0 for margin in margins], np.float32)


def _too_long(
    records: list[PreferencePair],
    rows: np.ndarray,
    total: np.ndarray,
    max_length: int,
    first: int,
) -> list[str]:
    problems = [
        f"{len(rows)} of {len(records)} pairs are longer than max_length={max_length} tokens. "
        "Raise max_length, or pass overlength='truncate' or 'drop'."
    ]
    for i in rows[:_NAMED]:
        name = f" (id {records[i].id!r})" if records[i].id is not None else ""
        problems.append(f"pair {first + i}{name}: {total[i]} tokens")
    if len(rows) > _NAMED:
        problems.append(f"… and {len(rows) - _NAMED} more.")
    return problems
