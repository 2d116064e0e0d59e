"""Held-out pairs under policy and reference: one pass, then figures that anyone can check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import tensorflow as tf
from keras import ops

from dpo_keras.batching import TokenizedPairs, collate, epoch_order, plan_buckets
from dpo_keras.errors import InputError
from dpo_keras.evaluation.pair_figures import HeldOut
from dpo_keras.losses import OBJECTIVES, kl_to_reference
from dpo_keras.training import DPOModel
from dpo_keras.training.measures import outputs_of

_FREE = {"token_ids": 2, "padding_mask": 2, "source": 1, "target": 1, "owner": 1}


def evaluate_preferences(
    model: DPOModel,
    tokenized: TokenizedPairs,
    *,
    batch_size: int = 16,
    on_batch: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """Measures a policy on preference pairs, pair by pair.

    `HeldOut.metrics` hold what `model.evaluate` gives on the same pairs; beside them come further
    means, intervals, the breakdown by group and by length, calibration, and every pair's own row.

    Args:
        model: a compiled `DPOModel`; nothing in it is changed.
        tokenized: the pairs, N >= 1.
        batch_size: pairs at a time.
        on_batch: called with (pairs done, N) after each batch.

    Returns:
        The figures.

    Raises:
        InputError: the model is not compiled (its loss says what the scores are), or there are no
            pairs.

    Example:
        >>> import keras_hub, dpo_keras
        >>> class Letters:
        ...     start_token_id, end_token_id, pad_token_id = 1, 2, 0
        ...     tokenize = staticmethod(lambda texts: [[ord(c) - 90 for c in t] for t in texts])
        >>> backbone = keras_hub.models.GPT2Backbone(
        ...     vocabulary_size=64, num_layers=1, num_heads=2, hidden_dim=8,
        ...     intermediate_dim=16, max_sequence_length=32)
        >>> model = DPOModel(keras_hub.models.GPT2CausalLM(backbone))
        >>> model.compile(loss=dpo_keras.DPOLoss("sigmoid", beta=0.1))
        >>> pairs = [dpo_keras.PreferencePair(prompt, "bc", "d") for prompt in "ae"]
        >>> held_out = evaluate_preferences(model, dpo_keras.tokenize_pairs(pairs, Letters()))
        >>> round(held_out.metrics["loss"], 4)  # policy = reference: log 2
        0.6931
        >>> print(held_out.figures["reward_accuracy"])  # every pair is a tie in score
        0.500 (0.095 to 0.905)
    """
    problems = []
    if getattr(model, "preference_loss", None) is None:
        problems.append(
            "model must be a compiled DPOModel: call model.compile(loss=dpo_keras.DPOLoss(…)) "
            f"first, got {type(model).__name__}."
        )
    if not len(tokenized):
        problems.append("tokenized must hold at least one pair, got none.")
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        problems.append(f"batch_size must be an integer >= 1, got {batch_size!r}.")
    if problems:
        raise InputError(problems)
    measured: dict[str, np.ndarray] = {}
    entropy = tokens = 0.0
    done = 0
    for rows, batch, values in _passes(model, tokenized, batch_size):
        real = rows >= 0
        count = float((batch["owner"] >= 0).sum())
        entropy += float(values.pop("entropy")) * count
        tokens += count
        for name, value in values.items():
            if name not in measured:
                measured[name] = np.zeros(len(tokenized), value.dtype)
            measured[name][rows[real]] = value[real]
        done += int(real.sum())
        if on_batch is not None:
            on_batch(done, len(tokenized))
    pairs = {**_given(tokenized), **measured}
    return HeldOut(
        pairs,
        group_names=tokenized.group_names,
        entropy=entropy / max(tokens, 1.0),
        note=_note(model),
        fingerprint=tokenized.fingerprint,
    )


def _given(tokenized: TokenizedPairs) -> dict[str, np.ndarray]:
    """The columns that are known without a model."""
    count = len(tokenized)
    source = np.arange(count) if tokenized.source is None else tokenized.source
    group = np.full(count, -1, np.int32) if tokenized.group is None else tokenized.group
    number: dict[bytes, int] = {}
    prompt = [
        number.setdefault(tokenized.prompt[row].tobytes(), len(number)) for row in range(count)
    ]
    return {
        "source": np.asarray(source, np.int64),
        "prompt": np.array(prompt, np.int64),
        "group": group,
        "preference": tokenized.preference,
        "weight": tokenized.weight,
    }


def _passes(
    model: DPOModel, tokenized: TokenizedPairs, batch_size: int
) -> Iterator[tuple[np.ndarray, dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """Every batch with its pairs' numbers and measurements, in `preference_dataset`'s order."""
    plan = plan_buckets(tokenized, batch_size)
    order = epoch_order(plan, batch_size, shuffle=False)
    run: Any = None
    for shape, rows in zip(order.bucket, order.rows, strict=True):
        batch = collate(tokenized, rows, plan.lengths[shape], plan.slots[shape], batch_size)
        if run is None:
            run = tf.function(
                lambda given: _measure(model, given),
                input_signature=[_signature(batch)],
                autograph=False,
            )
        values = {name: value.numpy() for name, value in run(batch).items()}
        yield rows, batch, values


def _signature(batch: dict[str, np.ndarray]) -> dict[str, tf.TensorSpec]:
    # Lengths stay open: one trace serves all buckets.
    signature = {}
    for name, value in batch.items():
        shape: list[int | None] = list(value.shape)
        if name in _FREE:
            shape[_FREE[name]] = None
        signature[name] = tf.TensorSpec(shape, value.dtype)
    return signature


def _measure(model: DPOModel, batch: dict[str, Any]) -> dict[str, Any]:
    """Per pair what `DPOModel.measure` sums."""
    loss = model.preference_loss
    assert loss is not None
    outputs = outputs_of(model, batch)
    terms = loss.terms(ops.reshape(batch["preference"], (-1,)), outputs)
    scores = loss.scores(outputs)
    found = {
        "loss": sum(terms.values()),
        **terms,
        "chosen_reward": scores[:, 0],
        "rejected_reward": scores[:, 1],
        "chosen_logps": outputs["policy"][:, 0],
        "rejected_logps": outputs["policy"][:, 1],
        "chosen_tokens": outputs["lengths"][:, 0],
        "rejected_tokens": outputs["lengths"][:, 1],
        "entropy": outputs["entropy"],
    }
    if loss.needs_reference:
        found["chosen_reference_logps"] = outputs["reference"][:, 0]
        found["rejected_reference_logps"] = outputs["reference"][:, 1]
        found["kl"] = kl_to_reference(None, scores, outputs)
    return found


def _note(model: DPOModel) -> str:
    assert model.preference_loss is not None
    types = model.preference_loss.loss_type
    names = [types] if isinstance(types, str) else list(types)
    if any(OBJECTIVES[name].probabilistic for name in names):
        return ""
    return (
        f"The loss {', '.join(names)} states no probabilities: softmax of its scores orders pairs "
        "and is not meant to be calibrated."
    )
