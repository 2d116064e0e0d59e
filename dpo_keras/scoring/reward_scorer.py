"""From a batch to the reward of each response: a scalar where a policy has a log-probability."""

from __future__ import annotations

import keras
from keras import ops

from dpo_keras.batching import Batch
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.language_model_head import LanguageModelHead
from dpo_keras.scoring.scorer import (
    ResponseScorer,
    Scores,
    compared_tokens,
    sum_by_response,
)
from dpo_keras.utils import Tensor


class RewardScorer(ResponseScorer):
    """Compute rewards r(x, y) with a linear head on what a language model has read.

    The head reads the state that predicts a response's last token: by then the model has read all
    of the response's text, and the layout of batches is that of log-probs.

    Without a head the model itself is the reward: it maps `{"token_ids", "padding_mask"}` of whole
    texts to one number for each, `[batch]` or `[batch, 1]`.

    Args:
        policy: a KerasHub causal language model, whose own head is not used; or such a model.
        head: a linear layer of one unit, `[..., D]` to `[..., 1]`; or None.
        remat: as `ResponseScorer` takes it.
    """

    def __init__(
        self, policy: keras.Model, head: keras.layers.Dense | None = None, remat: bool = False
    ):
        super().__init__(policy, plain=head is None, remat=remat)
        self._head = head
        if head is not None:
            assert self.parts is not None
            self.parts = (self.parts[0], _ScalarHead(head, self.parts[1].image_states))

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables that scoring reads, the head's, too."""
        return [*super().variables, *([] if self._head is None else self._head.variables)]

    def __call__(
        self,
        batch: Batch,
        training: bool = False,
        statistics: tuple[str, ...] = (),
        shared: bool = False,
        collected: list[Tensor] | None = None,
    ) -> Scores:
        """Score every response of a batch; `logps` are the rewards, and statistics are zeros."""
        if self.parts is None:
            return self._scored_whole(batch, training, statistics)
        scored = super().__call__(batch, training, statistics, collected=collected)
        compared = compared_tokens(batch)
        scored["logps"] = sum_by_response(scored["token_logps"], last_tokens(compared))
        return scored

    def _scored_whole(self, batch: Batch, training: bool, statistics: tuple[str, ...]) -> Scores:
        batch = self.prepared(batch)  # refuses packed rows
        rows, sequences, _ = ops.shape(batch["token_ids"])
        rewards = ops.convert_to_tensor(self.body(self._inputs(batch), training=training))
        if len(rewards.shape) > 2 or (len(rewards.shape) == 2 and rewards.shape[-1] != 1):
            rule = "must return one number for each text, [batch] or [batch, 1]"
            hint = "Or give a KerasHub causal language model, which gets a head of its own."
            raise InputError(InputProblem("policy", rule, tuple(rewards.shape), hint))
        rewards = ops.cast(ops.reshape(rewards, (rows, sequences)), "float32")
        compared = compared_tokens(batch)
        lengths = ops.reshape(ops.sum(ops.cast(compared, "int32"), axis=1), (-1, 2))
        zeros = ops.zeros(ops.shape(batch["owner"]), "float32")
        rewards = ops.pad(rewards, ((0, 0), (0, 2 - sequences)))
        return {
            "logps": ops.where(lengths > 0, rewards, 0.0),
            "lengths": lengths,
            "token_logps": zeros,
            **dict.fromkeys(statistics, zeros),
        }


class _ScalarHead(LanguageModelHead):
    """A linear head of one unit in the place of the language model's."""

    def __call__(
        self,
        hidden: Tensor,
        targets: Tensor,
        count: Tensor | None = None,
        statistics: tuple[str, ...] = (),
        chunk: int | None = None,
    ) -> Tensor:
        """Return `[N, 1 + statistics]`: the reward after each token's state, then zeros."""
        return ops.pad(self.layer(hidden), ((0, 0), (0, len(statistics))))


def last_tokens(compared: Tensor) -> Tensor:
    """Keep of `compared_tokens` the last of each response; the tokens of one are in order."""
    from_end = ops.flip(ops.cumsum(ops.flip(ops.cast(compared, "int32"), axis=1), axis=1), axis=1)
    return ops.logical_and(compared, from_end == 1)
