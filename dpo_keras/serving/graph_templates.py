"""A chat template inside a graph: the fixed text and tokens around the words of a request."""

from __future__ import annotations

import re
from dataclasses import dataclass

import tensorflow as tf

from dpo_keras.batching import ChatTemplate, TextEncoder
from dpo_keras.batching.conversations import kept_tokens, special_texts, variables_of
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.serving.graph_tokenizers import GraphTokenizer
from dpo_keras.serving.word_patterns import CUT, literal, split_at
from dpo_keras.utils import Tensor

# Private use characters: they stand for the words of a message while the template is read.
_PROMPT, _RESPONSE = "\ue000", "\ue001"
# `dpo_keras.batching` removes this noncharacter from messages.
_NONCHARACTER = "\ufdd0"
# What str.strip(), and with it Jinja's trim, removes.
_BLANK = r"[\t-\r\x{1c}-\x{1f} \x{85}\p{Z}]+"


@dataclass(frozen=True)
class Turn:
    """One turn of a conversation as a template writes it, around words that are not known yet."""

    before: tuple[int, ...]  # ids of what comes first
    prefix: str  # text directly before the words, tokenized together with them
    suffix: str  # text directly after the words, tokenized together with them
    after: tuple[int, ...]  # ids of what comes last
    exact: bool  # whether the words are tokenized behind the encoder's anchor
    trimmed: bool  # whether the template strips white space from the words
    # Patterns of special tokens, which words must not forge: they are cut between groups 1 and 2.
    guards: tuple[str, ...]
    kept: dict[str, int]  # special tokens in the words that stay one token, with their ids

    def tokenize(
        self, texts: Tensor, tokenizer: GraphTokenizer, anchor: str, anchor_length: int
    ) -> tf.RaggedTensor:
        """Tokenize the turn around valid UTF-8 `[batch]`; `TextEncoder` explains the anchor."""
        texts = tf.strings.regex_replace(texts, _NONCHARACTER, "")
        for guard in self.guards:
            texts = tf.strings.regex_replace(texts, guard, b"\\1" + CUT + b"\\2")
        if self.trimmed:
            texts = tf.strings.regex_replace(texts, f"^{_BLANK}|{_BLANK}$", "")
        if self.kept:
            kept = "|".join(map(literal, self.kept))
            texts = tf.strings.regex_replace(texts, f"({kept})", CUT + b"\\1" + CUT)
        pieces = split_at(tf.strings.join([self.prefix, texts, self.suffix]), CUT)
        place = tf.ragged.range(pieces.row_lengths()).values
        anchored = tf.ones_like(place, tf.bool) if self.exact else place > 0
        words, alone = self._kept_apart(pieces.values)
        ids = tokenizer.tokenize(tf.strings.join([tf.where(anchored, anchor, ""), words]))
        starts = ids.row_starts() + tf.where(anchored, tf.constant(anchor_length, tf.int64), 0)
        places = tf.ragged.range(starts, ids.row_limits())
        ids = places.with_values(tf.gather(ids.values, places.values))
        ids = tf.concat([ids, alone], axis=1)
        ids = pieces.with_values(ids).merge_dims(1, 2)
        rows = tf.shape(texts)[0]
        around = [
            tf.tile(tf.constant([fixed], tf.int32, shape=(1, len(fixed))), [rows, 1])
            for fixed in (self.before, self.after)
        ]
        return tf.concat([around[0], ids, around[1]], axis=1)

    def _kept_apart(self, pieces: Tensor) -> tuple[Tensor, tf.RaggedTensor]:
        """Return pieces `[n]` without those that are a kept token, and the ids of these."""
        # No piece is a mark of a cut, so nothing matches the last one.
        texts = [*(token.encode() for token in self.kept), CUT]
        matches = pieces[:, None] == tf.constant(texts)[None, :]
        is_kept = tf.reduce_any(matches, axis=1)
        number = tf.argmax(tf.cast(tf.boolean_mask(matches, is_kept), tf.int32), axis=1)
        ids = tf.gather(tf.constant([*self.kept.values(), 0], tf.int32), number)
        alone = tf.RaggedTensor.from_row_lengths(ids, tf.cast(is_kept, tf.int64), validate=False)
        return tf.where(is_kept, "", pieces), alone


def read_turns(encoder: TextEncoder, template: ChatTemplate) -> tuple[Turn, Turn]:
    """Return the user's turn, with what announces the answer, and the assistant's."""
    special = special_texts(encoder, template)
    ids = {text: token for text in special if (token := encoder.token_id(text)) is not None}
    variables = variables_of(encoder)

    def render(prompt: str, response: str) -> tuple[str, str]:
        messages = [{"role": "user", "content": prompt}]
        asked = template.render(messages, add_generation_prompt=True, **variables)
        messages.append({"role": "assistant", "content": response})
        whole = template.render(messages, **variables)
        if not whole.startswith(asked):
            raise _not_served(
                template, "the rendered conversation must begin with the rendered prompt"
            )
        answer = whole[len(asked) :]
        return asked, answer.rstrip() if answer.rstrip().endswith(tuple(special)) else answer

    tight = render(_PROMPT, _RESPONSE)
    loose = render(f" {_PROMPT} ", f" {_RESPONSE} ")
    turns = []
    for place, words in enumerate((_PROMPT, _RESPONSE)):
        before, _, after = tight[place].partition(words)
        trimmed = loose[place] == tight[place]
        if words in after or not (trimmed or loose[place] == f"{before} {words} {after}"):
            raise _not_served(
                template,
                "it does more with a message than put text around it",
                "Render prompts before sending them, and export with template=None.",
            )
        front, prefix = _fixed(before, ids, encoder, first=place == 0)
        back, suffix = _fixed(after, ids, encoder, last=True)
        exact = place == 1 or bool(front)
        kept = kept_tokens(encoder, template) if place == 1 else {}
        guards = _guards([text for text in special if text not in kept])
        turns.append(Turn(front, prefix, suffix, back, exact, trimmed, guards, kept))
    return turns[0], turns[1]


def _guards(texts: list[str]) -> tuple[str, ...]:
    """Return a pattern for each first letter of the texts."""
    return tuple(
        f"({literal(first)})({'|'.join(literal(text[1:]) for text in texts if text[0] == first)})"
        for first in dict.fromkeys(text[0] for text in texts)
    )


def _not_served(template: ChatTemplate, reason: str, hint: str = "") -> InputError:
    rule = f"{template.name!r} cannot be served: {reason}"
    return InputError(InputProblem("template", rule, hint=hint))


def _fixed(
    text: str, ids: dict[str, int], encoder: TextEncoder, first: bool = False, last: bool = False
) -> tuple[tuple[int, ...], str]:
    """Return the ids of text that never changes, and the plain text that touches the words."""
    pieces = [text]
    if ids:
        pieces = re.split("(" + "|".join(map(re.escape, ids)) + ")", text)
    touching = pieces.pop(0) if last else pieces.pop()
    found: list[int] = []
    for number, piece in enumerate(piece for piece in pieces if piece):
        if piece in ids:
            found.append(ids[piece])
        elif first and not number:
            found += encoder.tokenize([piece])[0]
        else:
            found += encoder.tokenize([encoder.anchor + piece])[0][encoder.anchor_length :]
    return tuple(found), touching
