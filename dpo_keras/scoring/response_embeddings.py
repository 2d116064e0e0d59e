"""What a model makes of responses: the mean of its last hidden states over their tokens."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np
from keras import ops

from dpo_keras.batching import Batch, BatchingChoice, TokenizedPairs, one_pass, pass_signature
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.scoring.batch_layout import scoring_layout
from dpo_keras.scoring.model_inputs import check_images
from dpo_keras.scoring.scorer import ResponseScorer, compared_tokens
from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import compiled


def response_embeddings(
    model: keras.Model,
    tokenized: TokenizedPairs,
    *,
    batch_size: int = 16,
    batching: BatchingChoice = "auto",
    on_batch: Callable[[int, int], None] | None = None,
) -> np.ndarray:
    """Compute an embedding of both responses of every pair.

        e(x, y) = mean over the tokens y_t of the last hidden state that predicts y_t

    Args:
        model: a KerasHub causal language model.
        tokenized: N pairs.
        batch_size: pairs at a time; on average, where packed.
        batching: as in `score_pairs`.
        on_batch: called with (pairs done, N) after each batch.

    Returns:
        `[N, 2, d]` float32: of chosen and of rejected.

    Raises:
        InputError: the model shows no hidden states, or cannot run on packed rows.
    """
    scorer = ResponseScorer(model)
    if scorer.parts is None:
        rule = f"must be a KerasHub causal language model; {type(model).__name__} shows no states"
        raise InputError(InputProblem("model", rule))
    batching = scoring_layout(scorer, [model], tokenized, batching)
    run: Callable[[Batch], dict[str, np.ndarray]] | None = None
    found: np.ndarray | None = None
    done = 0
    for part in one_pass(tokenized, batch_size, batching):
        if run is None:
            check_images(scorer.body, part.batch)
            run = compiled(
                lambda batch: {"means": _means(scorer, batch)},
                scorer.variables,
                pass_signature(part.batch),
            )
        means = run(part.batch)["means"]
        if found is None:
            found = np.zeros((len(tokenized), 2, means.shape[-1]), np.float32)
        done += part.put(means, found)
        if on_batch is not None:
            on_batch(done, len(tokenized))
    return np.zeros((0, 2, 0), np.float32) if found is None else found


def _means(scorer: ResponseScorer, batch: Batch) -> Tensor:
    """Return the mean states of each pair's responses: `[rows * pairs, 2, d]`."""
    prepared = scorer.prepared(batch)
    states = ops.cast(scorer.hidden_states(prepared), "float32")
    rows, width = ops.shape(batch["token_ids"])[0], states.shape[-1]
    states = ops.reshape(states, (rows, -1, width))  # all sequences of a row, one after the other
    predicting = ops.take_along_axis(states, batch["source"][..., None], axis=1)
    owned = ops.cast(compared_tokens(prepared), "float32")  # [rows, slots, 2 * pairs]
    counts = ops.maximum(ops.sum(owned, axis=1), 1.0)
    means = ops.einsum("rsc,rsd->rcd", owned, predicting) / counts[..., None]
    return ops.reshape(means, (-1, 2, width))
