"""Decode many prompts of different lengths: each sequence leaves its slot as soon as it ends.

Prompts are read in groups of similar length, longest first, so that next to nothing is padding, and
each is read once for all its responses. A decoding step gives one token to every slot, each at its
own position (continuous batching; Yu et al., Orca, OSDI 2022). After a few steps finished sequences
make room for the next prompts, and caches are cut to what the longest sequence needs.

All of it is one graph of plain TensorFlow operations, whose shapes may all be unknown: it is traced
once for all prompts, and a model server can run it.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeAlias

import keras
import tensorflow as tf

from dpo_keras.scoring.chunked_log_probs import made
from dpo_keras.scoring.language_model_head import LanguageModelHead, split_backbone_and_head
from dpo_keras.scoring.layer_overrides import overridden_methods
from dpo_keras.scoring.lora import low_rank_overrides
from dpo_keras.scoring.model_inputs import TextRows, model_inputs, text_overrides
from dpo_keras.scoring.packing_check import packing_obstacle
from dpo_keras.scoring.tree_attention import tree_overrides
from dpo_keras.training.cached_attention import CachedAttention, PromptAttention
from dpo_keras.utils import Tensor

Choose: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Chooses tokens, int32 `[rows]`, by logits `[rows, vocabulary]` and uniform numbers `[rows]`."""

Report: TypeAlias = Callable[[Tensor, Tensor], Tensor]
"""Hears of rows and their new tokens, both int32 `[n]`, and returns the tokens.

Rows that the result does not have belong to nobody. What follows a row's stop is undefined.
"""

# Decoding steps between two looks at what has ended.
STEPS = 16
# Tokens, padding included, that are read together: products do not become faster with more.
_TOKENS_TOGETHER = 1024
# Lengths are rounded up to this, since oneDNN keeps a kernel for each shape; so are slots.
_GRID, _SLOTS_GRID = 32, 8


class Slots(NamedTuple):
    """The sequences that are being decoded, one in each slot; all int32 `[slots]` but `done`."""

    row: Tensor  # the row of the result; that behind the last one for a slot without a sequence
    token: Tensor  # its last token, which the cache does not hold yet
    length: Tensor  # the number of tokens before that one
    count: Tensor  # the number of new tokens
    done: Tensor  # bool


def decodes_continuously(policy: object) -> bool:
    """Tell whether `decode_continuously` runs a policy: those that run on packed rows."""
    return packing_obstacle(policy) is None


def decode_continuously(  # noqa: PLR0913 - the one decoder's settings
    policy: keras.Model,
    prompts: tf.RaggedTensor,
    uniforms: Tensor,
    *,
    stops: Sequence[int],
    choose: Choose,
    slots: int | Tensor,
    report: Report | None = None,
) -> tf.RaggedTensor:
    """Generate the responses to prompts; leave out the stop that ends them.

    Args:
        policy: one that `decodes_continuously`.
        prompts: int32 `[N, (tokens)]`, each of at least one token.
        uniforms: float32 `[N, C, T]` in [0, 1): what `choose` draws each token of C responses to
            each prompt by. T is the longest response.
        stops: the tokens that end a response.
        choose: the rule that chooses tokens.
        slots: the number of sequences that are decoded together; at least C of them are.
        report: hears of every token as it is chosen.

    Returns:
        int32 `[N * C, (tokens)]`.
    """
    parts = split_backbone_and_head(policy)
    assert parts is not None
    decoder = _Decoder(parts[0], parts[1], prompts, uniforms, stops, choose, report)
    return decoder.run(tf.convert_to_tensor(slots))


class _Decoder:
    """What does not change while prompts are decoded."""

    def __init__(
        self,
        backbone: keras.Model,
        head: LanguageModelHead,
        prompts: tf.RaggedTensor,
        uniforms: Tensor,
        stops: Sequence[int],
        choose: Choose,
        report: Report | None,
    ):
        self.backbone, self.head, self.choose, self.report = backbone, head, choose, report
        # Once, and not at each step: it may be a transposed copy.
        self.kernel = made(head.kernel())
        self.stops = tf.constant(list(stops), tf.int32)
        shape = tf.shape(uniforms)
        self.copies, self.longest = shape[1], shape[2]
        self.rows = shape[0] * shape[1]
        # The row behind the last one belongs to slots without a sequence; the last column to those
        # that have finished.
        self.uniforms = tf.pad(tf.reshape(uniforms, (self.rows, shape[2])), [[0, 1], [0, 1]])
        self.order = tf.argsort(prompts.row_lengths(), direction="DESCENDING", stable=True)
        ordered = tf.gather(prompts, self.order)
        self.lengths = tf.cast(ordered.row_lengths(), tf.int32)
        ids = ordered.to_tensor()
        self.prompts = tf.pad(ids, [[0, 0], [0, -tf.shape(ids)[1] % _GRID]])

    def run(self, slots: Tensor) -> tf.RaggedTensor:
        """Decode all prompts."""
        slots = tf.maximum(slots, self.copies)
        count = tf.shape(self.order)[0]
        result = tf.fill([self.rows + 1, self.longest + 1], self.stops[0])
        state, caches = self._spare(0), self._empty_caches()

        def unfinished(first: Tensor, result: Tensor, state: Slots, caches: object) -> Tensor:
            return (first < count) | ~tf.reduce_all(state.done)

        def turn(
            first: Tensor, result: Tensor, state: Slots, caches: list[Tensor]
        ) -> tuple[Tensor, Tensor, Slots, list[Tensor]]:
            kept = tf.cast(tf.where(~state.done)[:, 0], tf.int32)
            state = Slots(*(tf.gather(values, kept) for values in state))
            group = self._group(first, slots - tf.shape(kept)[0])
            new, states = self._read(first, group, caches)
            result = self._written(result, new)
            first += group
            missing = -tf.shape(kept)[0] - tf.shape(new.row)[0]
            missing %= _SLOTS_GRID  # spare ones, so that there are few different numbers
            parts = zip(state, new, self._spare(missing), strict=True)
            state = Slots(*(tf.concat(values, 0) for values in parts))
            room = tf.reduce_max(state.length) + STEPS
            room = -(-room // _GRID) * _GRID
            caches = [
                _recomposed(old, kept, one, room, missing)
                for old, one in zip(caches, states, strict=True)
            ]
            # More prompts first, if there is room for them.
            full = self._group(first, slots - tf.shape(state.row)[0] + missing) == 0
            steps = tf.where(full, STEPS, 0)
            return (first, *self._decode(result, state, caches, steps))

        loop = (tf.constant(0), result, state, caches)
        shapes = (
            tf.TensorShape([]),
            tf.TensorShape([None, None]),
            Slots(*(tf.TensorShape([None]) for _ in state)),
            [tf.TensorShape([None, cache.shape[1], None, cache.shape[3]]) for cache in caches],
        )
        result = tf.while_loop(unfinished, turn, loop, shape_invariants=shapes)[1][:-1, :-1]
        return until_stop(result, self.stops)

    def _group(self, first: Tensor, room: Tensor) -> Tensor:
        """Return how many prompts from the sorted `first` on are read together into free slots."""
        left = tf.shape(self.lengths)[0] - first
        longest = self.lengths[tf.minimum(first, tf.shape(self.lengths)[0] - 1)]
        together = tf.maximum(_TOKENS_TOGETHER // longest, 1)
        return tf.minimum(tf.minimum(left, together), room // self.copies)

    def _read(
        self, first: Tensor, group: Tensor, caches: list[Tensor]
    ) -> tuple[Slots, list[Tensor]]:
        """Run prompts through the policy: new slots, and keys and values for the caches."""

        def read() -> tuple[Slots, list[Tensor]]:
            lengths = self.lengths[first : first + group]
            columns = -(-lengths[0] // _GRID) * _GRID
            ids = self.prompts[first : first + group, :columns]
            hidden, found = self._prompt_states(ids, lengths)
            logits = self.head.logits(tf.gather(hidden, lengths - 1, batch_dims=1), self.kernel)
            prompts = tf.cast(self.order[first : first + group], tf.int32)
            rows = tf.reshape(prompts[:, None] * self.copies + tf.range(self.copies), [-1])
            states = [_repeated(one, self.copies) for one in found]
            nothing = tf.zeros_like(rows)
            lengths = _repeated(lengths, self.copies)
            before = Slots(rows, nothing, lengths - 1, nothing, tf.zeros_like(rows, tf.bool))
            return self._chosen(before, _repeated(logits, self.copies)), states

        def nothing() -> tuple[Slots, list[Tensor]]:
            return self._spare(0), [cache[:0] for cache in caches]

        found: tuple[Slots, list[Tensor]] = tf.cond(group > 0, read, nothing)
        return found

    def _prompt_states(self, ids: Tensor, lengths: Tensor) -> tuple[Tensor, list[Tensor]]:
        columns = tf.range(tf.shape(ids)[1])
        # Nothing that matters looks at padding, which is behind it; it has positions all the same.
        positions = tf.minimum(columns, lengths[:, None] - 1)
        mask = tf.cast(columns < lengths[:, None], tf.int32)
        reading = PromptAttention(positions)
        return self._run(ids, mask, reading), reading.found

    def _run(
        self, ids: Tensor, mask: Tensor, attention: PromptAttention | CachedAttention
    ) -> Tensor:
        inputs = model_inputs(self.backbone, TextRows(ids, mask, attention.positions))
        overrides = low_rank_overrides(self.backbone) + text_overrides(self.backbone)
        overrides += tree_overrides(self.backbone, attention)
        with overridden_methods(overrides):
            return self.backbone(inputs, training=False)

    def _empty_caches(self) -> list[Tensor]:
        """Return the caches of no slots, whose shapes a reading of one token tells."""
        one = tf.ones([1, 1], tf.int32)
        found = self._prompt_states(one, one[0])[1]
        return [tf.zeros([0, state.shape[1], 0, state.shape[3]], state.dtype) for state in found]

    def _chosen(self, state: Slots, logits: Tensor) -> Slots:
        """Choose the next token of each slot."""
        drawn = tf.gather_nd(self.uniforms, tf.stack([state.row, state.count], axis=1))
        token = self.choose(logits, drawn)
        ended = tf.reduce_any(token[:, None] == self.stops, axis=1)
        count = state.count + 1
        return Slots(state.row, token, state.length + 1, count, ended | (count >= self.longest))

    def _written(self, result: Tensor, state: Slots) -> Tensor:
        places = tf.stack([state.row, state.count - 1], axis=1)
        token = state.token if self.report is None else self.report(state.row, state.token)
        return tf.tensor_scatter_nd_update(result, places, token)

    def _spare(self, count: int | Tensor) -> Slots:
        """Return finished slots without a sequence."""
        nothing = tf.zeros([count], tf.int32)
        row, done = tf.fill([count], self.rows), tf.ones([count], tf.bool)
        return Slots(row, nothing, nothing, nothing, done)

    def _decode(
        self, result: Tensor, state: Slots, caches: list[Tensor], steps: Tensor
    ) -> tuple[Tensor, Slots, list[Tensor]]:
        """Give each unfinished slot up to `steps` tokens."""

        def unfinished(result: Tensor, state: Slots, caches: list[Tensor]) -> Tensor:
            return ~tf.reduce_all(state.done)

        def step(
            result: Tensor, state: Slots, caches: list[Tensor]
        ) -> tuple[Tensor, Slots, list[Tensor]]:
            positions = state.length[:, None]
            cached = CachedAttention(positions, caches)
            token = state.token[:, None]
            hidden = self._run(token, tf.ones_like(token), cached)
            found = self._chosen(state, self.head.logits(hidden[:, 0], self.kernel))
            # A finished slot stays as it is until the next turn.
            after = Slots(
                *(tf.where(state.done, old, new) for old, new in zip(state, found, strict=True))
            )
            row = tf.where(state.done, self.rows, state.row)
            return self._written(result, found._replace(row=row)), after, cached.caches

        start = (result, state, caches)
        found: tuple[Tensor, Slots, list[Tensor]] = tf.while_loop(
            unfinished, step, start, maximum_iterations=steps
        )
        return found


def until_stop(tokens: Tensor, stops: Tensor) -> tf.RaggedTensor:
    """Cut rows of tokens off at their first stop."""
    stopped = tf.reduce_any(tokens[..., None] == stops, axis=-1)
    return tf.ragged.boolean_mask(tokens, tf.cumsum(tf.cast(stopped, tf.int32), axis=1) == 0)


def _repeated(values: Tensor, copies: Tensor) -> Tensor:
    return tf.repeat(values, copies, axis=0)


def _recomposed(cache: Tensor, kept: Tensor, new: Tensor, room: Tensor, missing: Tensor) -> Tensor:
    """Keep some slots of a cache, add new and `missing` empty ones, all with `room` places."""

    def resized(states: Tensor, spare: Tensor | int) -> Tensor:
        states = states[:, :, :room]
        return tf.pad(states, [[0, spare], [0, 0], [0, room - tf.shape(states)[2]], [0, 0]])

    return tf.concat([resized(tf.gather(cache, kept), 0), resized(new, missing)], axis=0)
