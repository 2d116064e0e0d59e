"""What tokenization did to the pairs: counts, and every dropped pair by name."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from dpo_keras.batching.ragged import Ragged
from dpo_keras.errors import InputError

RULES = {
    "empty_response": "no token of a response is left",
    "empty_prompt": "no prompt token and no start token to predict the response's first token from",
    "overlength": "longer than max_length, and overlength='drop'",
}


@dataclass(frozen=True)
class DroppedPair:
    """One pair that did not survive tokenization.

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
        """One line for people."""
        name = f" (id {self.id!r})" if self.id is not None else ""
        return f"pair {self.index}{name}: {RULES[self.rule]} ({self.detail})"


@dataclass
class TokenizationReport:
    """Counts of what was kept, cut and dropped.

    Args:
        pairs: pairs given.
        kept: pairs that survived.
        dropped: those that did not, in order; of pairs on disk only the first are named, and the
            others show in `pairs - kept`.
        truncated_prompts: kept pairs whose prompt was cut, from its left.
        truncated_responses: kept pairs of which a response was cut, from its right; such a
            response has no end token.
        identical_responses: kept pairs whose two responses have the same tokens, so that they
            teach nothing (truncation can make them so).
        prompt_tokens: tokens of all kept prompts.
        response_tokens: tokens of all kept responses.
        longest: tokens of the longest kept sequence, prompt and response together.
        warnings: other things to know, one sentence each.

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
    truncated_prompts: int = 0
    truncated_responses: int = 0
    identical_responses: int = 0
    prompt_tokens: int = 0
    response_tokens: int = 0
    longest: int = 0
    warnings: list[str] = field(default_factory=list)

    def summary(self, limit: int = 5) -> str:
        """Describes the report in a few lines.

        Args:
            limit: how many dropped pairs are named; the rest are counted.

        Returns:
            Text for a terminal.
        """
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

    def as_dict(self) -> dict[str, Any]:
        """The report as plain JSON values.

        Returns:
            Every field, `dropped` as a list of dicts, and `dropped_by_rule`.
        """
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values["warnings"] = list(self.warnings)
        values["dropped"] = [
            {name: getattr(pair, name) for name in pair.__dataclass_fields__}
            for pair in self.dropped
        ]
        values["dropped_by_rule"] = self._by_rule()
        return values

    def _by_rule(self) -> dict[str, int]:
        rules = Counter(pair.rule for pair in self.dropped)
        rules["not named here"] = max(self.pairs - self.kept - len(self.dropped), 0)
        return dict(+rules)


@dataclass(frozen=True)
class TokenizedPairs:
    """Pairs as token ids, ready to be batched in any order.

    Args:
        prompt: N rows; each begins with the start token where the model has one. The same ids
            serve both responses.
        chosen: N rows of response ids; each ends with the end token unless it was cut.
        rejected: the same for the other response.
        preference: float32 `[N]`, probability that chosen is better.
        weight: float32 `[N]`, >= 0.
        pad: id that fills sequences up.
        reference: float32 `[N, 2]` log-probs of a reference model (chosen, rejected), or None.
        group: int32 `[N]`, numbers into `group_names`, -1 without a group; or None.
        margin: float32 `[N]`, or None.
        group_names: the names that `group` numbers.
        source: int64 `[N]`, each pair's place among the pairs that were given.
        max_length: the limit that the pairs were cut to; buckets never reach beyond it.
        report: what tokenization did.
        identity: stands for the tokens in `fingerprint` where these are on disk: whoever made them
            says what they are, so that nobody has to read all of them.
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
    group_names: tuple[str, ...] = ()
    source: np.ndarray | None = None
    max_length: int | None = None
    report: TokenizationReport = field(default_factory=TokenizationReport)
    identity: str | None = None

    def __len__(self) -> int:
        """Number of pairs."""
        return len(self.prompt)

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
        """Tokens of prompt and both responses, each once, int64 `[N]`: a pair's places in a row."""
        return self.prompt.lengths + self.response_tokens

    @property
    def fingerprint(self) -> str:
        """SHA-256 over every token of every pair, in order.

        Tokenizer, template and truncation all show in the tokens, so two sets of equal fingerprint
        have the same log-probs under the same model: the key of a cache of reference log-probs.
        Preferences and weights do not enter. Pairs on disk have the digest of what their tokens
        were made from instead.
        """
        if self.identity is not None:
            return self.identity
        digest = hashlib.sha256(b"dpo_keras tokens 1")
        for part in (self.prompt, self.chosen, self.rejected):
            digest.update(np.ascontiguousarray(part.row_splits, "<i8").tobytes())
            digest.update(np.ascontiguousarray(part.flat_values, "<i4").tobytes())
        return digest.hexdigest()

    def expect(self, rows: np.ndarray) -> None:
        """Announces pairs that will be read soon, so that a disk can begin; nothing waits for it.

        Args:
            rows: int `[n]` row numbers.
        """
        for part in (self.prompt, self.chosen, self.rejected):
            part.expect(rows)

    def with_reference(self, reference: np.ndarray) -> TokenizedPairs:
        """Returns the same pairs carrying reference log-probs into every batch.

        Args:
            reference: float `[N, 2]` log-probs (chosen, rejected), all finite.

        Returns:
            A copy that shares the tokens.

        Raises:
            InputError: wrong shape, or values that are not finite.
        """
        values = np.asarray(reference, np.float32)
        if values.shape != (len(self), 2) or not np.isfinite(values).all():
            raise InputError(
                f"reference must be finite log-probs of shape ({len(self)}, 2), one row per "
                f"tokenized pair; got shape {values.shape}, "
                f"{int((~np.isfinite(values)).sum())} values not finite."
            )
        return replace(self, reference=values)

    def take(self, rows: np.ndarray) -> TokenizedPairs:
        """Returns some of the pairs, in the order given; tokens on disk stay there.

        Args:
            rows: int `[n]` row numbers.

        Returns:
            A new set of n pairs; the report stays that of the whole.
        """
        rows = np.asarray(rows, np.int64)
        identity = self.identity
        if identity is not None:
            chosen = np.ascontiguousarray(rows, "<i8").tobytes()
            identity = hashlib.sha256(identity.encode() + chosen).hexdigest()

        def pick(values: Any) -> Any:
            return None if values is None else values[rows]

        return replace(
            self,
            prompt=self.prompt.select(rows),
            chosen=self.chosen.select(rows),
            rejected=self.rejected.select(rows),
            preference=self.preference[rows],
            weight=self.weight[rows],
            reference=pick(self.reference),
            group=pick(self.group),
            margin=pick(self.margin),
            source=pick(self.source),
            identity=identity,
        )


def truncate(
    prompt: Ragged, chosen: Ragged, rejected: Ragged, max_length: int, start: int | None = None
) -> tuple[Ragged, Ragged, Ragged]:
    """Cuts pairs to `max_length`: prompts from the left, then responses from the right.

    Args:
        prompt: N rows of prompt ids.
        chosen: N rows of response ids.
        rejected: N rows of response ids.
        max_length: most tokens of prompt and response together.
        start: id of the start token, kept at the front of a cut prompt that began with it.

    Returns:
        The three, cut; a prompt keeps at least one token besides its start token.

    Example:
        >>> rows = [[[1, 5, 6, 7]], [[8, 9, 2]], [[8, 2]]]
        >>> cut = truncate(*(Ragged.from_lists(r) for r in rows), max_length=5, start=1)
        >>> [part.tolist() for part in cut]
        [[[1, 7]], [[8, 9, 2]], [[8, 2]]]
    """
    lengths = prompt.lengths
    starts = np.zeros(len(prompt), np.int64)
    if start is not None and len(prompt.flat_values):
        first = prompt.flat_values[np.minimum(prompt.row_splits[:-1], len(prompt.flat_values) - 1)]
        starts = ((lengths > 0) & (first == start)).astype(np.int64)
    room = max_length - np.maximum(chosen.lengths, rejected.lengths)
    kept = np.minimum(lengths, np.maximum(room, np.minimum(starts + 1, lengths)))
    # The start token leads, the last kept - 1 tokens follow.
    tail = prompt.slice(lengths - kept + starts, lengths)
    if start is not None and starts.any():
        splits = np.zeros(len(prompt) + 1, np.int64)
        np.cumsum(kept, out=splits[1:])
        flat = np.empty(int(splits[-1]), np.int32)
        leads = splits[:-1][starts == 1]
        mask = np.ones(len(flat), bool)
        mask[leads] = False
        flat[leads] = start
        flat[mask] = tail.flat_values
        tail = Ragged(flat, splits)
    room = max_length - kept
    zeros = np.zeros(len(prompt), np.int64)
    return (
        tail,
        chosen.slice(zeros, np.minimum(chosen.lengths, room)),
        rejected.slice(zeros, np.minimum(rejected.lengths, room)),
    )
