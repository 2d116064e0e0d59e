"""What tokenization did to the pairs: counts, and every dropped pair by name."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

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
