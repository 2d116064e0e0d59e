"""How a byte-pair tokenizer cuts text into words, rewritten for RE2, the patterns of TensorFlow."""

from __future__ import annotations

import re
from dataclasses import dataclass

import tensorflow as tf

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON, Tensor

# RE2's \s is ASCII only; the tokenizers library follows Unicode's White_Space.
_SPACE = r"\t-\r \x{85}\p{Z}"
_SPACE_NO_NEWLINE = r"\t\x{0b}\f \x{85}\p{Z}"
_LAST_SPACE = f"([{_SPACE}])([{_SPACE}][^{_SPACE}])"
# For patterns that match all spaces up to a line end together, whatever follows.
_LAST_SPACE_OF_LINE = f"([{_SPACE_NO_NEWLINE}])([{_SPACE_NO_NEWLINE}][^{_SPACE}])"
_LOOKAHEAD, _TO_LINE_END = r"\s+(?!\S)|", r"\s*[\r\n]+|"
# No valid UTF-8 text holds this byte, so it marks a cut and never occurs in a text.
CUT = b"\xff"


@dataclass(frozen=True)
class WordPattern:
    """A pattern of RE2 whose matches, and what lies between them, are words."""

    pattern: str
    # For the last of several spaces before a word, which belongs to that word. Most models write
    # this as \s+(?!\S); RE2 has no lookahead, so the text is cut between groups 1 and 2 first.
    last_space: str | None = None

    @classmethod
    def read(cls, pattern: dict[str, str]) -> WordPattern | None:
        """Read the `pattern` of a `Split` step of the tokenizers library; None where RE2 fails."""
        ((kind, text),) = pattern.items()
        found = cls(literal(text)) if kind == "String" else cls(*_re2(text))
        try:
            tf.strings.regex_full_match("", found.pattern)
        except tf.errors.InvalidArgumentError:
            return None
        return found

    def split(self, texts: Tensor) -> tf.RaggedTensor:
        """Cut valid UTF-8 texts `[n]` into words `[n, (words)]`, none of them empty."""
        if self.last_space is not None:
            texts = tf.strings.regex_replace(texts, self.last_space, b"\\1" + CUT + b"\\2")
        return split(texts, self.pattern)


def split(texts: Tensor, pattern: str) -> tf.RaggedTensor:
    """Cut texts `[n]` into the matches of an RE2 pattern and what lies between them."""
    # Not tf_text.regex_split, which drops the rest of a text from its first NUL character on.
    marked = tf.strings.regex_replace(texts, f"({pattern})", CUT + b"\\1" + CUT)
    return split_at(marked, CUT)


def split_at(texts: Tensor, separator: bytes) -> tf.RaggedTensor:
    """Cut texts `[n]` at a separator; drop the separators and empty pieces."""
    pieces = tf.strings.split(texts, separator)
    return tf.ragged.boolean_mask(pieces, pieces != "")


def literal(text: str) -> str:
    """Write text as a pattern for itself; RE2 allows a backslash before ASCII punctuation only."""
    return re.sub(r"([!-/:-@\[-^`{-~])", r"\\\1", text)


def read_pre_tokenizer(specification: dict[str, JSON]) -> tuple[list[WordPattern], bool]:
    """Return a tokenizer's word patterns, and whether each word gets a space in front.

    The specification is that of the tokenizers library, `json.loads(tokenizer.to_str())`.
    """
    problems = []
    model = specification["model"]
    options = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix")
    used = [name for name in (*options, "byte_fallback", "ignore_merges") if model.get(name)]
    if model["type"] != "BPE" or used:
        problems.append(f"its model is {model['type']} with {', '.join(used) or 'no options'}")
    if specification["normalizer"] is not None:
        problems.append("it normalizes text")
    for token in specification["added_tokens"]:
        if any(token[name] for name in ("single_word", "lstrip", "rstrip", "normalized")):
            problems.append(f"its added token {token['content']!r} has matching options")
    steps = specification["pre_tokenizer"] or {"type": "none"}
    patterns: list[WordPattern] = []
    byte_level, prefix_space = False, False
    for step in steps.get("pretokenizers", [steps]):
        if step["type"] == "ByteLevel" and not step["use_regex"]:
            byte_level, prefix_space = True, step["add_prefix_space"]
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = WordPattern.read(step["pattern"])
            if pattern is None:
                problems.append(f"RE2 has no equal of its word pattern {step['pattern']}")
            else:
                patterns.append(pattern)
        else:
            problems.append(f"its pre-tokenizer step {step['type']} is not known here")
    if not byte_level:
        problems.append("it is not byte-level")
    if problems:
        rule = f"has a byte-pair tokenizer that cannot run in a graph: {'; '.join(problems)}"
        hint = "Export a policy with a SentencePiece or plain byte-level BPE tokenizer."
        raise InputError(InputProblem("policy", rule, hint=hint))
    return patterns, prefix_space


def _re2(pattern: str) -> tuple[str, str | None]:
    """Return `WordPattern`'s pattern and `last_space` for a pattern of the tokenizers library."""
    last_space = None
    if _LOOKAHEAD in pattern:
        last_space = _LAST_SPACE_OF_LINE if _TO_LINE_END in pattern else _LAST_SPACE
    pattern = pattern.replace(_LOOKAHEAD, "")
    written, inside, place = "", False, 0
    while place < len(pattern):
        step = pattern[place : place + 2] if pattern[place] == "\\" else pattern[place]
        place += len(step)
        inside = (inside or step == "[") and step != "]"
        if step == r"\s":
            step = _SPACE if inside else f"[{_SPACE}]"
        elif step == r"\S" and not inside:
            step = f"[^{_SPACE}]"
        elif step in (r"\S", r"\w", r"\W", r"\d", r"\D", r"\b", r"\B"):
            return "(?!)", None  # Unicode there, ASCII here: let RE2 refuse it
        written += step
    return written, last_space
