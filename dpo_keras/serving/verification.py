"""Checks of an exported model: its graph holds only what a server runs, and its answers are right.

`check_graph` reads the graph, and `Comparison` holds the answers of a process without Keras
(`standalone_process`) against those of the model in Python, computed by other code.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.protobuf import saved_model_pb2

from dpo_keras.batching import Batch, ChatTemplate, TextEncoder, collate, tokenize_pairs
from dpo_keras.errors import InputError, InputProblem
from dpo_keras.losses import log_likelihood_ratio, preference_probabilities
from dpo_keras.preferences import PreferencePair
from dpo_keras.scoring.model_inputs import TextRows, full_logits
from dpo_keras.serving.graph_encoder import neutral_columns
from dpo_keras.serving.signatures import INPUTS, ServedModel, missing_reference, scores_of
from dpo_keras.training import outputs_of
from dpo_keras.training.generation import detokenized
from dpo_keras.utils import JSON, Tensor

Call: TypeAlias = tuple[str, Mapping[str, Sequence[str]]]  # signature, texts by input name
Examples: TypeAlias = Sequence[tuple[str, str, str]]  # prompts with two responses each
Answers: TypeAlias = Mapping[str, Sequence[JSON]]  # by output name, one entry per example
Expected: TypeAlias = tuple[Mapping[str, Sequence[JSON]], Sequence[int]]  # and of which examples

EXAMPLES: Examples = (
    ("How do I reset my password?", "Open Settings and choose Reset.", "No idea, sorry."),
    ("Hi", "Hello! How can I help you today?", "What?"),
    ("Summarize: it rained in 2024,   naïve café 東京\n", "It rained.", "It was dry (I think)."),
)
"""Prompts with two responses each, on which an export is compared with its model in Python."""
# A server must answer these, too.
EMPTY: Examples = (("", "", "word"), ("word", "", ""), ("", "", ""))
_PYTHON = ("PyFunc", "PyFuncStateless", "EagerPyFunc")
_GROWING = ("LookupTableInsert", "LookupTableInsertV2")


@dataclass(frozen=True)
class GraphFindings:
    """What a SavedModel's graph holds.

    Args:
        operations: the names of all ops in it, sorted.
        faults: one sentence for each thing that a server could not run, or should not.
    """

    operations: tuple[str, ...]
    faults: tuple[str, ...]


def inspect_graph(path: str | Path) -> GraphFindings:
    """Read a SavedModel's graph, without running it.

    A model that loads in Python may still fail in a server: functions marked `_XlaMustCompile`
    need XLA, which TensorFlow Serving leaves out (tensorflow/serving#2214), and Python functions
    need Python. A table that takes in new words grows as long as the server runs.

    Args:
        path: the SavedModel's directory.

    Returns:
        The ops and the faults.

    Raises:
        InputError: there is no SavedModel.
    """
    file = Path(path) / "saved_model.pb"
    if not file.is_file():
        rule = f"must be the directory of a SavedModel, {file} does not exist"
        raise InputError(InputProblem("path", rule))
    saved = saved_model_pb2.SavedModel.FromString(file.read_bytes())
    operations: set[str] = set()
    faults = []
    for graph in (meta.graph_def for meta in saved.meta_graphs):
        nodes = list(graph.node)
        for function in graph.library.function:
            nodes += function.node_def
            if function.attr["_XlaMustCompile"].b:
                faults.append(f"function {function.signature.name} must be compiled by XLA")
        operations |= {node.op for node in nodes}
        faults += [
            f"node {node.name} ({node.op}) must be compiled by XLA"
            for node in nodes
            if "_XlaMustCompile" in node.attr and node.attr["_XlaMustCompile"].b
        ]
    for operation in sorted(operations):
        if operation in _PYTHON:
            faults.append(f"op {operation} calls Python")
        elif operation.startswith("Xla"):
            faults.append(f"op {operation} needs XLA")
        elif operation in _GROWING:
            faults.append(f"op {operation} fills a table that grows with every new word served")
    return GraphFindings(tuple(sorted(operations)), tuple(faults))


def check_graph(path: str | Path) -> GraphFindings:
    """Inspect a graph; raise RuntimeError, with its faults, where it cannot be served."""
    found = inspect_graph(path)
    if found.faults:
        shown = "\n".join(f"  {fault}" for fault in found.faults[:20])
        raise RuntimeError(
            f"the exported graph cannot be served, {len(found.faults)} faults:\n{shown}\n"
            "Take jit_compile, tf.py_function and numpy_function out of the policy's layers."
        )
    return found


def calls(names: Sequence[str], examples: Examples) -> list[Call]:
    """Make one request to each signature, with all examples."""
    prompts, first, second = zip(*examples, strict=True)
    columns = {"prompt": prompts, "response": first, "response_a": first, "response_b": second}
    return [(name, {key: list(columns[key]) for key in INPUTS[name]}) for name in names]


class Comparison:
    """Compares answers of an exported model with the model in Python, up to `tolerance`.

    The Python side tokenizes by `tokenize_pairs`, lays out by `collate`, and runs op by op.
    Generated text must be that of the tokens that the model generates in Python, and each of these
    the most likely one in a forward pass over the whole text, without key-value cache.
    """

    def __init__(self, served: ServedModel, preprocessor: object, template: ChatTemplate | None):
        self.served = served
        self.preprocessor = preprocessor
        self.template = template
        backbone = getattr(served.policy, "backbone", served.policy)
        # Relative to values above 1. In half precision the order of sums shows in the third digit.
        self.tolerance = 1e-4 if backbone.compute_dtype == "float32" else 3e-2

    def expected(self, name: str, examples: Examples) -> Expected:
        """Return what the model in Python answers, by output, and which examples that is for."""
        expected: Expected = getattr(self, f"_{name}")(examples)
        return expected

    def check(self, name: str, answers: Answers, expected: Expected) -> dict[str, float]:
        """Return the largest difference of each output; refuse one above the tolerance."""
        differences = {}
        for output, values in expected[0].items():
            found = [answers[output][row] for row in expected[1]]
            difference = differences[f"{name}.{output}"] = largest_difference(found, values)
            if not difference <= self.tolerance:
                raise RuntimeError(
                    "the exported model answers otherwise than the model in Python: "
                    f"{name}.{output} differs by {difference:.2e} (at most {self.tolerance:.0e} "
                    f"allowed). Exported: {found}; in Python: {list(values)}."
                )
        return differences

    def check_finite(self, name: str, answers: Answers) -> None:
        """Raise RuntimeError where an answer to empty texts is NaN or infinite."""
        for key, values in answers.items():
            numbers = [value for value in values if not isinstance(value, str)]
            if not np.isfinite(np.asarray(numbers, np.float64)).all():
                raise RuntimeError(
                    f"the exported model answers empty texts with {key}={list(values)}; the policy "
                    "or its reference gives no finite log-probs for them."
                )

    def _score(self, examples: Examples) -> tuple[dict[str, list[float]], list[int]]:
        # Beside the shortest response there is, so that it does not shorten the prompt.
        rows = [(prompt, one, "x" if one != "x" else "y") for prompt, one, _ in examples]
        batch, kept = self._batch(rows)
        model = self.served.model
        if missing_reference(model) is not None:
            scored = self.served.scorer(batch)
            return _log_probs(scored["logps"], scored["lengths"]), kept
        outputs = outputs_of(model, batch)
        # On its own, a response is shared with nothing shorter (LD-DPO).
        if "policy_shared" in outputs:
            outputs["policy_shared"] = outputs["policy"]
            outputs["reference_shared"] = outputs["reference"]
        reward = _column(scores_of(model.preference_loss, outputs))
        return {**_log_probs(outputs["policy"], outputs["lengths"]), "reward": reward}, kept

    def _prefer(self, examples: Examples) -> tuple[dict[str, list[float]], list[int]]:
        batch, kept = self._batch(examples)
        model = self.served.model
        scores = scores_of(model.preference_loss, outputs_of(model, batch))
        probabilities = preference_probabilities(scores)
        return {
            "probability_a": _column(probabilities),
            "probability_b": _column(probabilities, 1),
            "llr": _column(log_likelihood_ratio(scores)[:, None]),
        }, kept

    def _generate(self, examples: Examples) -> tuple[dict[str, list[JSON]], list[int]]:
        served = self.served
        if served.decoding.temperature > 0:
            return {}, []  # every request samples anew: there is nothing to compare
        before = served.prompt_ids(tf.constant([prompt for prompt, *_ in examples]))
        continued = served.continue_ids(before)
        # Where two tokens are as good as equal, rounding decides, and either text is right.
        decided = self._check_most_likely(before, continued)
        new = continued.to_list()
        shown = [[token for token in row if token not in served.special_ids] for row in new]
        texts = detokenized(TextEncoder(self.preprocessor), shown)
        return {
            "text": [texts[row] for row in decided],
            "tokens": [len(new[row]) for row in decided],
            "finished": [len(new[row]) < served.decoding.max_new_tokens for row in decided],
        }, decided

    def _batch(self, rows: Examples) -> tuple[Batch, list[int]]:
        tokens = tokenize_pairs(
            [PreferencePair(*row) for row in rows],
            self.preprocessor,
            max_length=self.served.encoder.max_length,
            template=self.template,
        )
        kept = list(range(len(rows))) if tokens.source is None else tokens.source.tolist()
        batch = collate(tokens, np.arange(len(tokens)))
        return {**batch, **neutral_columns(len(tokens))}, kept

    def _check_most_likely(self, before: tf.RaggedTensor, new: tf.RaggedTensor) -> list[int]:
        """Check generated tokens against a forward pass; return the rows that leave no doubt."""
        decided = []
        encoder, longest = self.served.encoder, self.served.decoding.max_new_tokens
        ids = tf.concat([before, new], axis=1)
        mask = tf.sequence_mask(ids.row_lengths(), dtype=tf.int32)
        response = mask - tf.sequence_mask(before.row_lengths(), tf.shape(mask)[1], tf.int32)
        text = TextRows(ids.to_tensor(encoder.pad), mask, response=response)
        logits = full_logits(self.served.policy, text)
        logits = keras.ops.convert_to_numpy(keras.ops.cast(logits, "float32"))
        starts = before.row_lengths().numpy()
        for number, row in enumerate(new.to_list()):
            taken = [[token] for token in row] + [encoder.stops] * (len(row) < longest)
            narrowest = np.inf
            for step, tokens in enumerate(taken):
                at = logits[number, starts[number] + step - 1]
                at = at / max(1.0, abs(at.max()))
                lead = at[tokens].max() - np.delete(at, tokens).max()
                narrowest = min(narrowest, lead)
                if not lead >= -10 * self.tolerance:
                    raise RuntimeError(
                        f"greedy generation in the graph took token {tokens} at step {step} of "
                        f"example {number}, whose logit is {-lead:.2e} below the largest one of a "
                        "forward pass: the policy's key-value cache does not agree with its "
                        "forward pass."
                    )
            if narrowest > 10 * self.tolerance:
                decided.append(number)
        return decided


def largest_difference(found: Sequence[JSON], expected: Sequence[JSON]) -> float:
    """Return max |found - expected| / max(1, |expected|); infinite where texts differ."""
    if len(found) != len(expected):
        return float("inf")
    if any(isinstance(value, str) for value in [*found, *expected]):
        return 0.0 if list(found) == list(expected) else float("inf")
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    gaps = np.abs(a - b) / np.maximum(1.0, np.abs(b))
    # NaN must not pass for a small difference.
    return float(np.where(np.isfinite(gaps), gaps, np.inf).max(initial=0.0))


def _log_probs(logps: Tensor, lengths: Tensor) -> dict[str, list[float]]:
    return {"log_prob": _column(logps), "tokens": _column(lengths)}


def _column(values: Tensor, column: int = 0) -> list[float]:
    return keras.ops.convert_to_numpy(values)[:, column].tolist()
