"""Evaluation on held-out pairs: one pass under policy and reference, one row per pair."""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from keras import ops

from dpo_keras.batching import Batch, BatchingChoice, Part, TokenizedPairs, one_pass, pass_signature
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.evaluation.held_out_figures import HeldOut
from dpo_keras.evaluation.rated_figures import held_out_of
from dpo_keras.losses import OBJECTIVES, Outputs, kl_to_reference, preference_probabilities
from dpo_keras.losses.dpo_loss import DPOLoss
from dpo_keras.scoring.batch_layout import scoring_layout, scoring_models
from dpo_keras.training import DPOModel, outputs_of
from dpo_keras.utils import Tensor
from dpo_keras.utils.backends import compiled

_functions: weakref.WeakKeyDictionary[object, dict[object, Callable[[Batch], dict[str, Any]]]] = (
    weakref.WeakKeyDictionary()
)


def evaluate_preferences(
    model: DPOModel,
    tokenized: TokenizedPairs,
    *,
    batch_size: int = 16,
    batching: BatchingChoice = "auto",
    on_batch: Callable[[int, int], None] | None = None,
) -> HeldOut:
    """Measure a policy on preference pairs, pair by pair.

    `HeldOut.metrics` equals what `model.evaluate` returns on the same pairs; of rated responses, up
    to KTO's reference point, which is here that of all of them, not of a batch. `HeldOut` adds
    intervals, accuracy by group and by length, calibration, and a row for every pair.

    Args:
        model: a compiled `DPOModel`. It is not changed.
        tokenized: the pairs, N >= 1.
        batch_size: pairs per batch; on average, if packed.
        batching: "packed" for models without a packing obstacle, else "buckets"; "auto" chooses.
        on_batch: called with (pairs done, N) after each batch.

    Returns:
        The figures.

    Raises:
        InputError: the model is not compiled (its loss defines the scores), there are no pairs,
            or the model cannot be packed.

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
        hint = "Call model.compile(loss=dpo_keras.DPOLoss(…)) first."
        rule = "must be a compiled DPOModel"
        problems.append(InputProblem("model", rule, type(model).__name__, hint))
    if not len(tokenized):
        problems.append(InputProblem("tokenized", "must hold at least one pair, got none"))
    if tokenized.others:
        hint = "Tokenize their pairs: rankings.as_pairs()."
        rule = "must be pairs, which the figures are of, and not rankings."
        problems.append(InputProblem("tokenized", rule, hint=hint))
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        problems.append(InputProblem("batch_size", "must be an integer >= 1", batch_size))
    if problems:
        raise InputError(problems)
    batching = scoring_layout(model.scorer, scoring_models(model), tokenized, batching)
    measured: dict[str, np.ndarray] = {}
    entropy = tokens = 0.0
    done = 0
    for part, values in _measured(model, one_pass(tokenized, batch_size, batching)):
        count = float(values["chosen_tokens"].sum() + values["rejected_tokens"].sum())
        entropy += float(values.pop("entropy")) * count
        tokens += count
        for name, value in values.items():
            column = measured.setdefault(name, np.zeros(len(tokenized), value.dtype))
            part.put(value, column)
        done += int((part.pairs >= 0).sum())
        if on_batch is not None:
            on_batch(done, len(tokenized))
    if model.preference_loss.unpaired:
        measured |= _over_all(model.preference_loss, tokenized, measured)
    return held_out_of(
        {**_known_columns(tokenized), **measured},
        group_names=tokenized.group_names,
        entropy=entropy / max(tokens, 1.0) if model.preference_loss.of_policies else None,
        note=_note(model),
        fingerprint=tokenized.fingerprint,
    )


def _known_columns(tokenized: TokenizedPairs) -> dict[str, np.ndarray]:
    count = len(tokenized)
    source = np.arange(count) if tokenized.source is None else tokenized.source
    group = np.full(count, -1, np.int32) if tokenized.group is None else tokenized.group
    if tokenized.prompt_hash is not None:
        # By their text: truncation may leave equal tokens of different prompts.
        prompts = tokenized.prompt_hash.tolist()
    else:
        # By digest: the prompts themselves may not fit into memory.
        rows = (tokenized.prompt[row].tobytes() for row in range(count))
        prompts = [hashlib.blake2b(row).digest() for row in rows]
    number: dict[bytes | int, int] = {}
    prompt = [number.setdefault(one, len(number)) for one in prompts]
    return {
        "source": np.asarray(source, np.int64),
        "prompt": np.array(prompt, np.int64),
        "group": group,
        "preference": tokenized.preference,
        "weight": tokenized.weight,
        **({} if tokenized.rated is None else {"rated": tokenized.rated}),
    }


def _over_all(
    loss: DPOLoss, tokenized: TokenizedPairs, measured: Mapping[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """Compute the loss of rated responses, with the reference point of all of them."""
    names = {"policy": "logps", "reference": "reference_logps", "lengths": "tokens"}
    outputs: Outputs = {
        name: np.stack([measured[f"{side}_{column}"] for side in ("chosen", "rejected")], axis=1)
        for name, column in names.items()
    }  # type: ignore[assignment]
    outputs["weight"] = tokenized.weight
    terms = loss.terms(ops.convert_to_tensor(tokenized.preference), outputs)
    found = {name: ops.convert_to_numpy(term) for name, term in terms.items()}
    return {**found, "loss": sum(found.values())}


def _measured(
    model: DPOModel, parts: Iterable[Part]
) -> Iterator[tuple[Part, dict[str, np.ndarray]]]:
    run = None
    for part in parts:
        run = run or _measuring(model, pass_signature(part.batch))
        yield part, run(part.batch)


def _measuring(model: DPOModel, signature: dict[str, Any]) -> Callable[[Batch], dict[str, Any]]:
    """Return the compiled `_measure`, traced once for the measurements before and after training.

    The signature leaves sizes open, so that all batches share one trace.
    """
    known = _functions.setdefault(model, {})
    key = (model.preference_loss, model.reference, str(signature))
    if key not in known:
        # The values of a dictionary with weak keys must not hold the keys.
        borrowed = weakref.ref(model)

        def measure(batch: Batch) -> dict[str, Tensor]:
            found = borrowed()
            assert found is not None
            return _measure(found, batch)

        known[key] = compiled(measure, model.variables, signature)
    return known[key]


def _measure(model: DPOModel, batch: Batch) -> dict[str, Tensor]:
    """Compute per pair what `DPOModel` averages over an evaluation."""
    loss = model.preference_loss
    assert loss is not None
    loss.check_kind("rated" in batch)
    outputs = outputs_of(model, batch)
    terms = loss.terms(ops.reshape(batch["preference"], (-1,)), outputs)
    scores = loss.scores(outputs)
    found = {
        "loss": sum(terms.values()),
        **terms,
        "chosen_probability": preference_probabilities(scores)[:, 0],
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
        found["kl"] = kl_to_reference(outputs)
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
