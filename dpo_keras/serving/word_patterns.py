"""How a byte-pair tokenizer cuts text into words, rewritten for RE2, the patterns of TensorFlow."""

from __future__ import annotations

import re
import unicodedata
from dataclasses import dataclass

import tensorflow as tf

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils import JSON, Tensor
from dpo_keras.utils.keras_hub_tokenizers import GPT2

# RE2's \s is ASCII only; the tokenizers library follows Unicode's White_Space.
_SPACE = r"\t-\r \x{85}\p{Z}"
_SPACE_NO_NEWLINE = r"\t\x{0b}\f \x{85}\p{Z}"
_LAST_SPACE = f"([{_SPACE}])([{_SPACE}][^{_SPACE}])"
# For patterns that match all spaces up to a line end together, whatever follows.
_LAST_SPACE_OF_LINE = f"([{_SPACE_NO_NEWLINE}])([{_SPACE_NO_NEWLINE}][^{_SPACE}])"
_LOOKAHEAD, _TO_LINE_END = r"\s+(?!\S)|", r"\s*[\r\n]+|"
# No valid UTF-8 text holds this byte, so it marks a cut and never occurs in a text.
CUT = b"\xff"


def _byte_characters() -> list[str]:
    """Return the printable character that stands for each byte in GPT-2's vocabulary."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    stand_ins = iter(range(256, 512))
    return [chr(byte if byte in printable else next(stand_ins)) for byte in range(256)]


BYTE_CHARACTERS = _byte_characters()


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
    # Not tf.ragged.boolean_mask, nor tf.boolean_mask, which take ten times as many operations.
    places = kept_places(pieces.values != "")
    return tf.RaggedTensor.from_value_rowids(
        tf.gather(pieces.values, places),
        tf.gather(pieces.value_rowids(), places),
        nrows=tf.size(texts, tf.int64),
        validate=False,
    )


def kept_places(mask: Tensor) -> Tensor:
    """Return the places at which a mask `[n]` is True: int64 `[kept]`."""
    return tf.where(mask)[:, 0]


def literal(text: str) -> str:
    """Write text as a pattern for itself; RE2 allows a backslash before ASCII punctuation only."""
    return re.sub(r"([!-/:-@\[-^`{-~])", r"\\\1", text)


@dataclass(frozen=True)
class WordRules:
    """How a byte-level tokenizer cuts text into words.

    Args:
        steps: word patterns in their order; None stands for a space in front of each word so far
            that begins without one.
        composes: whether text is normalized to NFC first.
        whole_words: whether a word that is a token stays one, whatever the merges make of it.
    """

    steps: tuple[WordPattern | None, ...]
    composes: bool
    whole_words: bool


def read_rules(specification: dict[str, JSON]) -> WordRules:
    """Read a tokenizer's rules from `json.loads(tokenizer.to_str())` of the tokenizers library.

    Raises InputError, with all reasons, for a tokenizer that TensorFlow's ops cannot follow.
    """
    model = specification["model"]
    steps, problems = _read_steps(specification["pre_tokenizer"])
    composes = _composes(specification["normalizer"])
    problems = [*_model_problems(model), *_token_problems(specification), *problems]
    if composes is None:
        problems.append(f"its normalizer {_kinds(specification['normalizer'])} is not NFC")
    if problems:
        rule = f"has a byte-pair tokenizer that cannot run in a graph: {'; '.join(problems)}"
        hint = "Export a policy with a SentencePiece or plain byte-level BPE tokenizer."
        raise InputError(InputProblem("policy", rule, hint=hint))
    return WordRules(tuple(steps), bool(composes), bool(model.get("ignore_merges")))


def _read_steps(
    pre_tokenizer: dict[str, JSON] | None,
) -> tuple[list[WordPattern | None], list[str]]:
    """Return the steps of a pre-tokenizer, and what cannot be followed in it."""
    steps: list[WordPattern | None] = []
    problems: list[str] = []
    byte_level = False
    for step in _parts(pre_tokenizer, "pretokenizers"):
        pattern: dict[str, str] | None = None
        if step["type"] == "ByteLevel":
            byte_level = True
            steps += [None] if step["add_prefix_space"] else []
            pattern = {"Regex": GPT2} if step.get("use_regex", True) else None
        elif step["type"] == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
            pattern = step["pattern"]
        elif step["type"] == "Digits":
            pattern = {"Regex": r"\p{N}" if step["individual_digits"] else r"\p{N}+"}
        else:
            problems.append(f"its pre-tokenizer step {step['type']} is not known here")
        if pattern is not None:
            words = WordPattern.read(pattern)
            steps += [] if words is None else [words]
            problems += [f"RE2 has no equal of its word pattern {pattern}"] if words is None else []
    return steps, problems if byte_level else [*problems, "it is not byte-level"]


def _parts(item: dict[str, JSON] | None, name: str) -> list[dict[str, JSON]]:
    """Return the parts of a `Sequence` of the tokenizers library, or the item itself."""
    if item is None:
        return []
    nested = [_parts(part, name) for part in item[name]] if name in item else [[item]]
    return [part for parts in nested for part in parts]


def _kinds(normalizer: dict[str, JSON] | None) -> str:
    return ", ".join(part["type"] for part in _parts(normalizer, "normalizers"))


def _composes(normalizer: dict[str, JSON] | None) -> bool | None:
    """Tell whether a normalizer is NFC; None for any other."""
    kinds = {part["type"] for part in _parts(normalizer, "normalizers")}
    return bool(kinds) if kinds <= {"NFC"} else None


def _model_problems(model: dict[str, JSON]) -> list[str]:
    options = ["dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"]
    # A byte-level vocabulary with all bytes knows every text.
    if not set(BYTE_CHARACTERS) <= model["vocab"].keys():
        options.append("unk_token")
    used = [name for name in options if model.get(name)]
    if model["type"] == "BPE" and not used:
        return []
    return [f"its model is {model['type']} with {', '.join(used) or 'no options'}"]


def _token_problems(specification: dict[str, JSON]) -> list[str]:
    problems = []
    for token in specification["added_tokens"]:
        text = token["content"]
        if any(token[name] for name in ("single_word", "lstrip", "rstrip")):
            problems.append(f"its added token {text!r} has matching options")
        elif token["normalized"] and unicodedata.normalize("NFC", text) != text:
            problems.append(f"its added token {text!r} is not in the form NFC")
    return problems


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
