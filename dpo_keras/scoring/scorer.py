"""From a batch to the log-probability of each response under a model."""

from typing import TypeAlias, cast

import keras
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.auxiliary_loss import auxiliary_overrides
from dpo_keras.scoring.chunked_log_probs import log_probs_of
from dpo_keras.scoring.language_model_head import split_backbone_and_head
from dpo_keras.scoring.layer_overrides import (
    FUSED_FROM,
    Override,
    can_fuse,
    fused_overrides,
    overridden_methods,
    remat_overrides,
    window_overrides,
)
from dpo_keras.scoring.lora import low_rank_overrides
from dpo_keras.scoring.model_inputs import (
    TextRows,
    check_inputs,
    declared_inputs,
    image_inputs,
    image_overrides,
    model_inputs,
    response_mask,
    text_overrides,
)
from dpo_keras.scoring.recurrences import recurrence_overrides
from dpo_keras.scoring.tree_attention import TreeLayout, make_biases, tree_overrides
from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import on_own_rows, uses_jax
from dpo_keras.utils.keras_hub_internals import transformer_blocks

Scores: TypeAlias = dict[str, Tensor]
"""What a scorer finds, by name; see `ResponseScorer.__call__`."""


class PreparedBatch(Batch, total=False):
    """A batch with what several passes over it share."""

    layout: TreeLayout


class ResponseScorer:
    """Compute response log-probs under one model: log pi(y | x), summed over response tokens.

    Where the model is a KerasHub causal language model, hidden states are gathered at the places
    that predict response tokens, and the head is applied to those alone, in chunks. Any other Keras
    model from `{"token_ids", "padding_mask"}` to logits `[batch, length, vocabulary]` takes the
    plain path: full logits, then the same gather. Further inputs are those of `model_inputs`.

    Args:
        policy: the model, or a callable in place of one, such as `legacy.PolicyCall`.
        plain: True forces the plain path.
        chunk: rows of logits at a time on the chunked path.
        static: True where every shape must be static (XLA, TPUs).
        remat: whether the backward pass recomputes transformer blocks (gradient checkpointing).

    Raises:
        InputError: the model takes inputs that `model_inputs` cannot make.
    """

    def __init__(
        self,
        policy: keras.Model,
        plain: bool = False,
        chunk: int | None = None,
        static: bool = False,
        remat: bool = False,
    ):
        check_inputs(policy)
        self.policy = policy
        self.chunk = chunk
        self.static = static
        self.remat = remat
        self._fused: list[Override] | None = None
        self.parts = None if plain else split_backbone_and_head(policy)
        self._body: keras.Model = policy if self.parts is None else self.parts[0]
        if remat and not transformer_blocks(self._body):
            name = type(self._body).__name__
            rule = f"needs a model made of transformer blocks, which {name} does not show"
            raise InputError(InputProblem("remat", rule, hint="Use remat=False."))

    @property
    def body(self) -> keras.Model:
        """The model that takes the inputs: the policy's backbone, or the policy itself."""
        return self._body

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables that scoring reads."""
        return list(getattr(self.policy, "variables", ()))

    def prepared(self, batch: Batch) -> PreparedBatch:
        """Add to a packed batch what several passes over it can share, its `TreeLayout`."""
        if "reach" not in batch or "layout" in batch:
            return cast(PreparedBatch, batch)
        if self.parts is None:
            raise InputError(
                "packed batches need a KerasHub causal language model, whose attention can be "
                f"confined to trees; {type(self.policy).__name__} goes the plain path. Use "
                "batching='buckets'."
            )
        reach, positions = batch["reach"][:, 0], batch["positions"][:, 0]
        return {**batch, "layout": tree_layout(positions, reach, self.static)}

    def __call__(
        self,
        batch: Batch,
        training: bool = False,
        statistics: tuple[str, ...] = (),
        shared: bool = False,
        collected: list[Tensor] | None = None,
    ) -> Scores:
        """Score every response of a batch.

        Args:
            batch: by the contract of `dpo_keras.batching.Batch`.
            training: whether layers such as dropout are active.
            statistics: further figures of each token, from `chunked_log_probs.STATISTICS`.
            shared: whether to sum over the length that both responses of a pair have, too.
            collected: a list that takes what the model's layers add to the loss, for
                `auxiliary_loss`.

        Returns:
            `logps` `[rows * pairs, 2]` float32, `lengths` `[rows * pairs, 2]` int32,
            `token_logps` `[rows, slots]` float32 (0 in empty slots), each statistic
            `[rows, slots]`, and with `shared` the sums `shared_logps` `[rows * pairs, 2]` over the
            first min(n+, n-) tokens of each response.
        """
        prepared = self.prepared(batch)
        values = self._token_values(prepared, training, statistics, collected)
        filled = prepared["owner"] >= 0
        token_logps = ops.where(filled, values[..., 0], 0.0)
        compared = compared_tokens(prepared)
        columns = response_columns(prepared)
        results = {
            "logps": sum_by_response(token_logps, compared, columns),
            "lengths": ops.reshape(ops.sum(ops.cast(compared, "int32"), axis=1), (-1, columns)),
            "token_logps": token_logps,
        }
        if shared:
            results["shared_logps"] = sum_by_response(token_logps, within_shorter(compared))
        for column, name in enumerate(statistics, start=1):
            results[name] = ops.stop_gradient(ops.where(filled, values[..., column], 0.0))
        return results

    def _overrides(
        self, batch: PreparedBatch, collected: list[Tensor] | None = None
    ) -> list[Override]:
        """Collect what the model's layers do differently while this batch runs."""
        overrides = low_rank_overrides(self._body) + text_overrides(self._body, batch)
        overrides += image_overrides(self._body, batch)
        overrides += recurrence_overrides(self._body) + window_overrides(self._body)
        if "layout" in batch:
            overrides += tree_overrides(self._body, batch["layout"])
            if self.remat:
                # Now: what is made in one block's recomputation is not there in another's.
                make_biases(self._body, batch["layout"])
            if self._fuses(batch):
                self._fused = self._fused or fused_overrides(self._body)
                overrides += self._fused
        if collected is not None:
            overrides += auxiliary_overrides(self._body, batch, collected)
        if self.remat:
            inner = list(overrides)
            overrides += remat_overrides(self._body, inner, self.static, collected)
        return overrides

    def _fuses(self, batch: PreparedBatch) -> bool:
        # Where shapes are static XLA compiles the whole step.
        if batch["layout"].dense or not can_fuse():
            return False
        assert self.parts is not None
        rows, _, length = batch["token_ids"].shape
        numbers: int = rows * length * self.parts[0].hidden_dim
        return numbers >= FUSED_FROM

    def _inputs(self, batch: PreparedBatch) -> dict[str, Tensor]:
        """Return what the model takes: one row for each sequence of the batch."""
        rows, sequences, length = ops.shape(batch["token_ids"])

        def flat(values: Tensor) -> Tensor:
            return ops.reshape(values, (rows * sequences, length))

        positions = flat(batch["positions"]) if "positions" in batch else None
        response = None
        if "response_mask" in declared_inputs(self._body):
            response = response_mask(batch["source"], batch["owner"], batch["padding_mask"])
        text = TextRows(flat(batch["token_ids"]), flat(batch["padding_mask"]), positions, response)
        return model_inputs(self._body, text, image_inputs(self._body, batch))

    def hidden_states(
        self,
        batch: PreparedBatch,
        training: bool = False,
        collected: list[Tensor] | None = None,
    ) -> Tensor:
        """Run the body: its states (on the plain path, logits) `[rows * sequences, length, d]`."""
        inputs = self._inputs(batch)
        with overridden_methods(self._overrides(batch, collected)):
            states = self._body(inputs, training=training)
        if self.parts is not None and self.parts[1].image_states:
            states = states[:, self.parts[1].image_states :]
        return states

    def _token_values(
        self,
        batch: PreparedBatch,
        training: bool,
        statistics: tuple[str, ...],
        collected: list[Tensor] | None,
    ) -> Tensor:
        rows, sequences, length = ops.shape(batch["token_ids"])
        states = self.hidden_states(batch, training, collected)
        if len(states.shape) != 3:
            rule = "must return logits of shape [batch, length, vocabulary]"
            raise InputError(InputProblem("policy", rule, tuple(states.shape)))
        states = ops.reshape(states, (rows, sequences * length, states.shape[-1]))

        def values_of(states: Tensor, source: Tensor, target: Tensor, owner: Tensor) -> Tensor:
            return self._values_of_rows(states, source, target, owner, statistics)

        tensors = (
            states,
            *(ops.convert_to_tensor(batch[n]) for n in ("source", "target", "owner")),
        )
        head = None if self.parts is None else self.parts[1].layer
        return on_own_rows(values_of, tensors, [] if head is None else head.variables)

    def _values_of_rows(
        self,
        states: Tensor,
        source: Tensor,
        target: Tensor,
        owner: Tensor,
        statistics: tuple[str, ...],
    ) -> Tensor:
        """Return the figures `[rows, slots, …]` of tokens, from states `[rows, places, d]`."""
        rows, slots = ops.shape(owner)
        length = ops.shape(states)[1]
        states = ops.reshape(states, (rows * length, states.shape[-1]))
        first = ops.arange(rows, dtype="int32")[:, None] * length
        places = ops.reshape(first + source, (rows * slots,))
        targets = ops.reshape(target, (rows * slots,))
        columns = 1 + len(statistics)
        if self.parts is None:
            values = log_probs_of(ops.take(states, places, axis=0), targets, statistics)
            return ops.reshape(values, (rows, slots, columns))
        # Filled slots first, so that chunks of nothing but empty slots are never computed.
        filled = ops.cast(ops.reshape(owner, (rows * slots,)) >= 0, "int32")
        count = ops.sum(filled)
        place = ops.where(filled == 1, ops.cumsum(filled) - 1, count + ops.cumsum(1 - filled) - 1)
        order = ops.argsort(place)
        head = self.parts[1]
        values = head(
            ops.take(states, ops.take(places, order), axis=0),
            ops.take(targets, order),
            count,
            statistics,
            self.chunk,
        )
        return ops.reshape(ops.take(values, place, axis=0), (rows, slots, columns))


def tree_layout(positions: Tensor, reach: Tensor, static: bool = False) -> TreeLayout:
    """Return the layout of packed rows `[rows, length]` that is fast on this backend."""
    # Without static shapes the number of pieces is not known while tracing.
    if static or uses_jax() or None in reach.shape:
        return TreeLayout(positions, reach)
    from dpo_keras.scoring.tree_segments import SegmentedTreeLayout

    return SegmentedTreeLayout(positions, reach)


def response_columns(batch: Batch) -> int:
    """Return how many responses each pair of a batch has: 2, or K of rankings."""
    if "responses" in batch:
        return int(batch["responses"].shape[2])
    sequences = batch["token_ids"].shape[1] if "token_ids" in batch else None
    return max(sequences or 2, 2)  # batches of unknown shape are of pairs


def compared_tokens(batch: Batch) -> Tensor:
    """Tell which tokens are of which response of which pair: bool `[rows, slots, 2 * pairs]`.

    A response that stands in several pairs is in the row once and compared several times.
    """
    owner = batch["owner"][..., None]
    columns = response_columns(batch) * batch["weight"].shape[1]
    if "responses" in batch:
        responses = ops.reshape(batch["responses"], (-1, 1, columns))
    else:
        responses = ops.arange(columns, dtype="int32")
    return ops.logical_and(owner >= 0, owner == responses)


def sum_by_response(values: Tensor, compared: Tensor, columns: int = 2) -> Tensor:
    """Sum values of tokens `[rows, slots]` over each pair's responses: `[rows * pairs, 2]`."""
    sums = ops.sum(ops.where(compared, values[..., None], 0.0), axis=1)
    return ops.reshape(sums, (-1, columns))


def within_shorter(compared: Tensor) -> Tensor:
    """Keep of `compared_tokens` those before the end of their pair's shorter response."""
    counts = ops.cast(compared, "int32")
    lengths = ops.reshape(ops.sum(counts, axis=1), (-1, compared.shape[2] // 2, 2))
    shorter = ops.repeat(ops.min(lengths, axis=-1), 2, axis=-1)
    # The tokens of a response are in order.
    return ops.logical_and(compared, ops.cumsum(counts, axis=1) <= shorter[:, None, :])
