"""Pairs as token ids, and the report of what tokenization kept, cut and dropped."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from dpo_keras.batching.image_preprocessing import PairImages
from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON

RULES = {
    "empty_response": "no token of a response is left",
    "empty_prompt": "no prompt token and no start token to predict the response's first token from",
    "overlength": "longer than max_length, and overlength='drop'",
    "images_cut": "longer than max_length, and cutting its prompt would cut its images",
}
# The fields of `TokenizedPairs` with a value per pair.
_LABELS = ("preference", "weight", "reference", "group", "margin", "rated")
COLUMNS = (*_LABELS, "source", "prompt_hash", "images")
# A pair before truncation: tokens of its prompt and longer response; same responses after it.
UNCUT = np.dtype([("prompt", "<i4"), ("response", "<i4"), ("identical", "?")])
WHOLE_SHARE = 0.95  # of the pairs, that truncation may leave whole without a warning


@dataclass(frozen=True)
class DroppedPair:
    """One pair that tokenization dropped.

    Args:
        index: its place among the pairs given, from 0.
        id: the pair's own id, if it has one.
        rule: a key of `RULES`.
        detail: what was found, for instance the lengths in tokens.
    """

    index: int
    id: str | None
    rule: str
    detail: str

    def __str__(self) -> str:
        name = f" (id {self.id!r})" if self.id is not None else ""
        return f"pair {self.index}{name}: {RULES[self.rule]} ({self.detail})"


@dataclass
class TokenizationReport:
    """Counts of what tokenization kept, cut and dropped.

    Args:
        pairs: pairs given.
        kept: pairs that remain.
        dropped: pairs that do not, in order. Of pairs on disk only the first are listed; the
            number of all is `pairs - kept`.
        truncated_pairs: kept pairs of which anything was cut.
        truncated_prompts: kept pairs whose prompt was cut, from the left.
        truncated_responses: kept pairs with a response that was cut, from the right. Such a
            response has no end token.
        identical_responses: kept pairs whose two responses have the same tokens, possibly after
            truncation. They teach nothing.
        prompt_tokens: tokens of all kept prompts.
        response_tokens: tokens of all kept responses.
        longest: tokens of the longest kept sequence, prompt and response together.
        special_kept: special tokens in assistants' messages that stay one token, and how often.
        special_cut: special tokens in messages that were cut into ordinary tokens.
        warnings: other findings, one sentence each.

    Example:
        >>> report = TokenizationReport(pairs=2, kept=1, prompt_tokens=4, response_tokens=6)
        >>> report.dropped.append(DroppedPair(1, "b7", "empty_response", "chosen is ''"))
        >>> print(report.summary())
        2 pairs, 1 kept (4 prompt tokens, 6 response tokens, longest sequence 0).
        Dropped 1: empty_response 1.
          pair 1 (id 'b7'): no token of a response is left (chosen is '')
    """

    pairs: int = 0
    kept: int = 0
    dropped: list[DroppedPair] = field(default_factory=list)
    truncated_pairs: int = 0
    truncated_prompts: int = 0
    truncated_responses: int = 0
    identical_responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    special_kept: dict[str, int] = field(default_factory=dict)
    special_cut: dict[str, int] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)

    @classmethod
    def from_dict(cls, values: Mapping[str, JSON]) -> TokenizationReport:
        """Rebuild a report from the fields that `dataclasses.asdict` makes of it."""
        dropped = [DroppedPair(**entry) for entry in values["dropped"]]
        return cls(**{**values, "dropped": dropped})

    def count(
        self, prompt: np.ndarray, responses: tuple[np.ndarray, np.ndarray], uncut: np.ndarray
    ) -> None:
        """Count the kept pairs by their lengths, int `[kept]`, and by `UNCUT` `[kept]`."""
        longer = np.maximum(*responses)
        cut_prompt, cut_response = prompt < uncut["prompt"], longer < uncut["response"]
        self.kept = len(prompt)
        self.truncated_pairs = int((cut_prompt | cut_response).sum())
        self.truncated_prompts = int(cut_prompt.sum())
        self.truncated_responses = int(cut_response.sum())
        self.identical_responses = int(uncut["identical"].sum())
        self.prompt_tokens = int(prompt.sum(dtype=np.int64))
        self.response_tokens = sum(int(part.sum(dtype=np.int64)) for part in responses)
        self.longest = int((prompt + longer).max(initial=0))

    def warn_of_truncation(self, prompt: np.ndarray, uncut: np.ndarray, limit: int) -> None:
        """Add a warning where truncation to `limit` tokens cuts more than a few of the pairs."""
        whole = self.kept - self.truncated_pairs
        if whole >= WHOLE_SHARE * self.kept:
            return
        lengths = np.sort(uncut["prompt"].astype(np.int64) + uncut["response"])
        enough = lengths[math.ceil(WHOLE_SHARE * len(lengths)) - 1]
        cut = prompt < uncut["prompt"]
        prompts = f"{self.truncated_prompts:,} prompts"
        if cut.any():
            left, before = prompt[cut].mean(), uncut["prompt"][cut].mean()
            prompts += f" ({left:.0f} of {before:.0f} tokens are left on average)"
        self.warnings.append(
            f"max_length={limit} cuts {self.truncated_pairs:,} of {self.kept:,} pairs: {prompts}, "
            f"and the responses of {self.truncated_responses:,} pairs. "
            f"max_length={enough} would leave {WHOLE_SHARE:.0%} of the pairs whole."
        )

    def warn_of_special_tokens(self) -> None:
        """Add a warning where messages hold special tokens in their own words."""
        for found, what in (
            (self.special_kept, "Assistants' messages hold special tokens, which stay one token"),
            (self.special_cut, "Messages hold special tokens, which are cut into ordinary tokens"),
        ):
            if found:
                counts = ", ".join(f"{text} {found[text]:,} times" for text in sorted(found))
                self.warnings.append(f"{what}: {counts}.")

    def summary(self, limit: int = 5) -> str:
        """Describe the report in a few lines, with at most `limit` of the dropped pairs."""
        lines = [
            f"{self.pairs} pairs, {self.kept} kept ({self.prompt_tokens} prompt tokens, "
            f"{self.response_tokens} response tokens, longest sequence {self.longest})."
        ]
        if self.truncated_prompts or self.truncated_responses:
            lines.append(
                f"Truncated: {self.truncated_prompts} prompts (from the left), "
                f"{self.truncated_responses} pairs with a response cut (from the right)."
            )
        if self.identical_responses:
            lines.append(f"Identical responses (they teach nothing): {self.identical_responses}.")
        if count := max(self.pairs - self.kept, len(self.dropped)):
            rules = ", ".join(f"{rule} {n}" for rule, n in sorted(self._by_rule().items()))
            lines.append(f"Dropped {count}: {rules}.")
            lines += [f"  {pair}" for pair in self.dropped[:limit]]
            if count > limit:
                lines.append(f"  … and {count - min(limit, len(self.dropped))} more.")
        return "\n".join(lines + [f"Warning: {warning}" for warning in self.warnings])

    def notices(self) -> list[str]:
        """Return what a user must hear of: pairs that were dropped, and the warnings."""
        count = max(self.pairs - self.kept, len(self.dropped))
        rules = ", ".join(f"{rule} {n:,}" for rule, n in sorted(self._by_rule().items()))
        dropped = f"Dropped {count:,} of {self.pairs:,} pairs: {rules}."
        return [*([dropped] if count else []), *self.warnings]

    def as_dict(self) -> dict[str, JSON]:
        """Return every field as JSON values, with counts `dropped_by_rule`."""
        return {**asdict(self), "dropped_by_rule": self._by_rule()}

    def _by_rule(self) -> dict[str, int]:
        rules = Counter(pair.rule for pair in self.dropped)
        rules["not named here"] = max(self.pairs - self.kept - len(self.dropped), 0)
        return dict(+rules)


@dataclass(frozen=True)
class TokenizedPairs:
    """Pairs as token ids, ready to be batched in any order.

    Args:
        prompt: N rows of prompt ids, with the start token where the model has one.
        chosen: N rows of response ids, each with the end token unless it was cut.
        rejected: the same for the other response.
        preference: float32 `[N]`, probability that chosen is better.
        weight: float32 `[N]`, >= 0.
        pad: id that fills sequences up.
        reference: float32 `[N, 2]`, log-probs of a reference model (chosen, rejected), or None.
        group: int32 `[N]`, numbers into `group_names`, -1 without a group; or None.
        margin: float32 `[N]`, or None.
        rated: float32 `[N]` of ones where these are rated responses: `chosen` is then the response,
            `rejected` a response to another prompt, `preference` P(good). None for pairs.
        group_names: the names that `group` numbers.
        source: int64 `[N]`, place of each pair among the pairs that were given.
        prompt_hash: uint64 `[N]`, equal for pairs whose prompts are the same text (messages).
            Different prompts may have equal tokens where they were cut.
        max_length: the limit that the pairs were cut to. Buckets are never longer.
        report: what tokenization did.
        identity: the `fingerprint` of tokens on disk, which need not be read for it.
        images: the images of the prompts, opened when a batch is made; None without any.
    """

    prompt: Ragged
    chosen: Ragged
    rejected: Ragged
    preference: np.ndarray
    weight: np.ndarray
    pad: int = 0
    reference: np.ndarray | None = None
    group: np.ndarray | None = None
    margin: np.ndarray | None = None
    rated: np.ndarray | None = None
    group_names: tuple[str, ...] = ()
    source: np.ndarray | None = None
    prompt_hash: np.ndarray | None = None
    max_length: int | None = None
    report: TokenizationReport = field(default_factory=TokenizationReport)
    identity: str | None = None
    images: PairImages | None = None

    def __len__(self) -> int:
        return len(self.prompt)

    @property
    def parts(self) -> tuple[Ragged, Ragged, Ragged]:
        """The rows of `prompt`, `chosen` and `rejected`."""
        return self.prompt, self.chosen, self.rejected

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of the longer of the two sequences (prompt + response), int64 `[N]`."""
        return self.prompt.lengths + np.maximum(self.chosen.lengths, self.rejected.lengths)

    @property
    def response_tokens(self) -> np.ndarray:
        """Tokens of both responses together, int64 `[N]`: the slots that a pair needs."""
        return self.chosen.lengths + self.rejected.lengths

    @property
    def tree_tokens(self) -> np.ndarray:
        """Tokens of prompt and both responses, each once, int64 `[N]`: a pair's part of a row."""
        return self.prompt.lengths + self.response_tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every token of every pair; on disk, of what the tokens were made from.

        Sets of equal fingerprint have equal log-probs under the same model, so that a cache of
        reference log-probs uses it as its key. Preferences and weights do not enter.
        """
        if self.identity is not None:
            return self.identity
        digest = hashlib.sha256(b"dpo_keras tokens 1")
        for part in self.parts:
            digest.update(np.ascontiguousarray(part.row_splits, "<i8").tobytes())
            digest.update(np.ascontiguousarray(part.flat_values, "<i4").tobytes())
        if self.images is not None:
            digest.update(self.images.digest_text.encode())
        return digest.hexdigest()

    def expect(self, rows: np.ndarray) -> None:
        """Announce the pairs of some rows, so that a disk can begin to read. Does not block."""
        for part in self.parts:
            part.expect(rows)

    def with_reference(self, reference: np.ndarray) -> TokenizedPairs:
        """Return the same pairs with log-probs (chosen, rejected), float `[N, 2]`, all finite."""
        values = np.asarray(reference, np.float32)
        if values.shape != (len(self), 2) or not np.isfinite(values).all():
            rule = (
                f"must be finite log-probs of shape ({len(self)}, 2), one row per tokenized pair; "
                f"got shape {values.shape}, {int((~np.isfinite(values)).sum())} values not finite"
            )
            raise InputError(InputProblem("reference", rule))
        return replace(self, reference=values)

    def take(self, rows: np.ndarray) -> TokenizedPairs:
        """Return the pairs of some rows, with the report of all. Tokens on disk are not read."""
        rows = np.asarray(rows, np.int64)
        prompt, chosen, rejected = (part.select(rows) for part in self.parts)
        taken: dict[str, Any] = {}
        for name in COLUMNS:
            column = getattr(self, name)
            taken[name] = None if column is None else column[rows]
        identity = None if self.identity is None else identity_of_rows(self.identity, rows)
        return replace(
            self, prompt=prompt, chosen=chosen, rejected=rejected, identity=identity, **taken
        )


def prompt_share(max_length: int) -> int:
    """Return how many prompt tokens truncation leaves by default: a quarter of `max_length`."""
    return max_length // 4


def truncate(
    prompt: Ragged,
    chosen: Ragged,
    rejected: Ragged,
    max_length: int,
    start: int | None = None,
    min_prompt_tokens: int | None = None,
) -> tuple[Ragged, Ragged, Ragged]:
    """Cut prompts from the left to `min_prompt_tokens`, then both responses from the right.

    A prompt's start token and one more token stay in any case.
    """
    least = prompt_share(max_length) if min_prompt_tokens is None else min_prompt_tokens
    lengths = prompt.lengths
    starts = np.zeros(len(prompt), bool)
    if start is not None:
        starts = (lengths > 0) & (first_tokens(prompt) == start)
    room = max_length - np.maximum(chosen.lengths, rejected.lengths)
    kept = np.minimum(lengths, np.maximum(room, np.maximum(starts + 1, least)))
    tail = prompt.slice(lengths - kept, lengths)
    if start is not None:
        # The start token takes the place of the first token kept.
        tail.flat_values[tail.row_splits[:-1][starts]] = start
    room = max_length - kept
    zeros = np.zeros(len(prompt), np.int64)
    return (
        tail,
        chosen.slice(zeros, np.minimum(chosen.lengths, room)),
        rejected.slice(zeros, np.minimum(rejected.lengths, room)),
    )


def first_tokens(rows: Ragged) -> np.ndarray:
    """Return each row's first token; any token where a row is empty."""
    if not len(rows.flat_values):
        return np.full(len(rows), -1, np.int32)
    return rows.flat_values[np.minimum(rows.row_splits[:-1], len(rows.flat_values) - 1)]


def identity_of_rows(identity: str, rows: np.ndarray) -> str:
    """Return the identity of some rows of a set."""
    chosen = np.ascontiguousarray(rows, "<i8").tobytes()
    return hashlib.sha256(identity.encode() + chosen).hexdigest()
