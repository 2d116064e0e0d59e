"""From a batch to the log-probability of each response under a model."""

from typing import Any

import keras
import tensorflow as tf
from keras import ops

from dpo_keras.errors import InputError
from dpo_keras.scoring.chunked_log_probs import log_probs_of
from dpo_keras.scoring.head import LanguageModelHead
from dpo_keras.scoring.layer_overrides import (
    FUSED_FROM,
    Swap,
    blocks_of,
    fused_calls,
    recomputed_calls,
    swapped,
)
from dpo_keras.scoring.lora import low_rank_calls
from dpo_keras.scoring.tree_attention import tree_calls
from dpo_keras.scoring.tree_layout import TreeLayout

_INPUTS = {"token_ids", "padding_mask"}


def split_backbone_and_head(policy: Any) -> tuple[Any, LanguageModelHead] | None:
    """A policy's backbone and its head, where logits are exactly head(backbone(inputs)).

    Args:
        policy: a Keras model. KerasHub's causal language models are functional models of two
            steps, backbone and reversed embedding; anything beside those two steps (a scaling of
            the logits, a quantized head) is not taken apart.

    Returns:
        `(backbone, head)`, or None where the plain path through full logits must be used.
    """
    backbone = getattr(policy, "backbone", None)
    operations = getattr(policy, "operations", None)
    if not isinstance(backbone, keras.Model) or operations is None:
        return None
    steps = [
        operation
        for operation in operations
        if operation is not backbone and not isinstance(operation, keras.layers.InputLayer)
    ]
    if len(steps) != 1 or not LanguageModelHead.supports(steps[0]):
        return None
    return backbone, LanguageModelHead(steps[0])


class ResponseScorer:
    """Response log-probs under one model: log pi(y | x), summed over the response's tokens.

    Where the model is a KerasHub causal language model, hidden states are gathered at the places
    that predict response tokens and the head is applied to those alone, in chunks. Any other Keras
    model from `{"token_ids", "padding_mask"}` to logits `[batch, length, vocabulary]` goes the
    plain path: full logits, then the same gather.

    Args:
        policy: the model.
        plain: True forces the plain path.
        chunk: rows of logits at a time on the chunked path.
        static: True where every shape must be static (XLA, TPUs).
        remat: whether transformer blocks are computed anew in the backward pass, not kept.

    Raises:
        InputError: the model takes other inputs than `token_ids` and `padding_mask`.

    Example:
        See `dpo_keras.response_log_probs`, which goes from strings to log-probs.
    """

    def __init__(
        self,
        policy: Any,
        plain: bool = False,
        chunk: int | None = None,
        static: bool = False,
        remat: bool = False,
    ):
        self.policy = policy
        self.chunk = chunk
        self.static = static
        self.remat = remat
        self._fused: list[Swap] | None = None
        self.parts = None if plain else split_backbone_and_head(policy)
        if remat:
            blocks_of(policy if self.parts is None else self.parts[0])
        # A subclassed model shows its inputs only when it is called.
        structure = getattr(policy, "input", None) if getattr(policy, "inputs", None) else None
        if structure is not None and (not isinstance(structure, dict) or set(structure) != _INPUTS):
            taken = (
                sorted(structure)
                if isinstance(structure, dict)
                else [tensor.name for tensor in keras.tree.flatten(structure)]
            )
            raise InputError(
                "policy must take a dict of 'token_ids' and 'padding_mask' and return logits; this "
                f"{type(policy).__name__} takes {taken}. Wrap it in a keras.Model with that dict "
                "of inputs."
            )

    def prepared(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch with all that several passes over it can share.

        Args:
            batch: the batch contract.

        Returns:
            The batch; of packed rows with `layout` (a `TreeLayout`) beside the tensors.
        """
        if "tree" not in batch or "layout" in batch:
            return batch
        if self.parts is None:
            raise InputError(
                "packed batches need a KerasHub causal language model, whose attention can be "
                f"confined to trees; {type(self.policy).__name__} goes the plain path. Use "
                "batching='buckets'."
            )
        tree, positions = batch["tree"][:, 0], batch["positions"][:, 0]
        return {**batch, "layout": TreeLayout(positions, tree, dense=self.static)}

    def __call__(
        self,
        batch: dict[str, Any],
        training: bool = False,
        statistics: tuple[str, ...] = (),
        shared: bool = False,
    ) -> dict[str, Any]:
        """Scores every response of a batch.

        Args:
            batch: the batch contract: `token_ids`, `padding_mask` `[rows, sequences, length]`;
                `source`, `target`, `owner` `[rows, slots]`; `weight` `[rows, pairs]`; of packed
                rows `positions`, `tree` `[rows, 1, length]`, too.
            training: whether layers such as dropout are active.
            statistics: extra per-token figures from `scoring.chunked.STATISTICS`.
            shared: whether to sum over the length that both responses of a pair have, too.

        Returns:
            `logps` `[rows * pairs, 2]` float32, `lengths` `[rows * pairs, 2]` int32,
            `token_logps` `[rows, slots]` float32 (0 in empty slots), each statistic
            `[rows, slots]`, and with `shared` the sums `shared_logps` `[rows * pairs, 2]` over the
            first min(n+, n-) tokens of each response.
        """
        batch = self.prepared(batch)
        owner = batch["owner"]
        pairs = batch["weight"].shape[1]
        values = self._token_values(batch, training, statistics)
        filled = owner >= 0
        token_logps = ops.where(filled, values[..., 0], 0.0)
        results = {
            "logps": sum_by_owner(token_logps, owner, pairs),
            "lengths": ops.cast(sum_by_owner(ops.ones_like(token_logps), owner, pairs), "int32"),
            "token_logps": token_logps,
        }
        if shared:
            inside = ops.where(shared_length(owner, pairs), token_logps, 0.0)
            results["shared_logps"] = sum_by_owner(inside, owner, pairs)
        for column, name in enumerate(statistics, start=1):
            results[name] = ops.stop_gradient(ops.where(filled, values[..., column], 0.0))
        return results

    def _swaps(self, batch: dict[str, Any]) -> list[Swap]:
        """What the model's layers do otherwise while this batch runs."""
        backbone = self.policy if self.parts is None else self.parts[0]
        swaps = low_rank_calls(backbone)
        if "layout" in batch:
            swaps += tree_calls(backbone, batch["layout"])
            if self._fuses(batch):
                self._fused = self._fused or fused_calls(backbone)
                swaps += self._fused
        if self.remat:
            swaps += recomputed_calls(backbone, list(swaps), self.static)
        return swaps

    def _fuses(self, batch: dict[str, Any]) -> bool:
        # Where shapes are static XLA compiles the whole step; within a replica it is not safe.
        if batch["layout"].dense or tf.distribute.get_strategy().num_replicas_in_sync > 1:
            return False
        rows, _, length = batch["token_ids"].shape
        assert self.parts is not None
        return rows * length * self.parts[0].hidden_dim >= FUSED_FROM

    def _token_values(
        self, batch: dict[str, Any], training: bool, statistics: tuple[str, ...]
    ) -> Any:
        token_ids, padding_mask = batch["token_ids"], batch["padding_mask"]
        rows, sequences, length = ops.shape(token_ids)
        slots = ops.shape(batch["owner"])[1]
        inputs = {
            "token_ids": ops.reshape(token_ids, (rows * sequences, length)),
            "padding_mask": ops.reshape(padding_mask, (rows * sequences, length)),
        }
        model = self.policy if self.parts is None else self.parts[0]
        with swapped(self._swaps(batch)):
            states = model(inputs, training=training)
        if len(states.shape) != 3:
            raise InputError(
                "policy must return logits of shape [batch, length, vocabulary]; got "
                f"{tuple(states.shape)}."
            )
        states = ops.reshape(states, (rows * sequences * length, states.shape[-1]))
        first = ops.arange(rows, dtype="int32")[:, None] * (sequences * length)
        places = ops.reshape(first + batch["source"], (rows * slots,))
        targets = ops.reshape(batch["target"], (rows * slots,))
        columns = 1 + len(statistics)
        if self.parts is None:
            values = log_probs_of(ops.take(states, places, axis=0), targets, statistics)
            return ops.reshape(values, (rows, slots, columns))
        # Filled slots first, so that chunks of nothing but empty slots are never computed.
        filled = ops.cast(ops.reshape(batch["owner"], (rows * slots,)) >= 0, "int32")
        count = ops.sum(filled)
        place = ops.where(filled == 1, ops.cumsum(filled) - 1, count + ops.cumsum(1 - filled) - 1)
        order = ops.argsort(place)
        values = self.parts[1](
            ops.take(states, ops.take(places, order), axis=0),
            ops.take(targets, order),
            count,
            statistics,
            self.chunk,
        )
        return ops.reshape(ops.take(values, place, axis=0), (rows, slots, columns))


def sum_by_owner(values: Any, owner: Any, pairs: int) -> Any:
    """Sums per-token values over each response.

    Args:
        values: `[rows, slots]`.
        owner: `[rows, slots]` int32, 2 * (pair slot) + (0 chosen, 1 rejected); -1 for no one.
        pairs: pair slots of a row.

    Returns:
        `[rows * pairs, 2]`.

    Example:
        >>> values, owner = ops.array([[1.0, 2.0, 4.0, 8.0]]), ops.array([[0, 1, 1, -1]])
        >>> sums = sum_by_owner(values, owner, pairs=1)
        >>> print(float(sums[0, 0]), float(sums[0, 1]))
        1.0 6.0
    """
    belongs = owner[..., None] == ops.arange(2 * pairs, dtype="int32")
    sums = ops.sum(ops.where(belongs, values[..., None], 0.0), axis=1)
    return ops.reshape(sums, (-1, 2))


def shared_length(owner: Any, pairs: int) -> Any:
    """Which response tokens stand before the end of the shorter response of their pair.

    Args:
        owner: `[rows, slots]` int32; the tokens of a response are in order.
        pairs: pair slots of a row.

    Returns:
        `[rows, slots]` bool.

    Example:
        >>> owner = ops.array([[0, 0, 0, 1, 1, -1]])
        >>> [bool(inside) for inside in shared_length(owner, pairs=1)[0]]
        [True, True, False, True, True, False]
    """
    belongs = ops.cast(owner[..., None] == ops.arange(2 * pairs, dtype="int32"), "int32")
    lengths = ops.reshape(ops.sum(belongs, axis=1), (-1, pairs, 2))
    shorter = ops.repeat(ops.min(lengths, axis=-1), 2, axis=-1)
    place = ops.sum(belongs * ops.cumsum(belongs, axis=1), axis=-1)
    limit = ops.sum(belongs * shorter[:, None, :], axis=-1)
    return ops.logical_and(place > 0, place <= limit)
