"""The exported model's answers beside those of the model in Python, by other code on each side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np
import tensorflow as tf

from dpo_keras.batching import ChatTemplate, TextEncoder, collate, tokenize_pairs
from dpo_keras.losses import log_likelihood_ratio, preference_probabilities
from dpo_keras.preferences import PreferencePair
from dpo_keras.serving.graph_encoder import neutral_columns
from dpo_keras.serving.signatures import INPUTS, Server, missing_reference, scores_of
from dpo_keras.serving.verification import Call, largest_difference
from dpo_keras.training import outputs_of

Examples = Sequence[tuple[str, str, str]]
Answers = Mapping[str, Sequence[Any]]

EXAMPLES: Examples = (
    ("How do I reset my password?", "Open Settings and choose Reset.", "No idea, sorry."),
    ("Hi", "Hello! How can I help you today?", "What?"),
    ("Summarize: it rained in 2024,   naïve café 東京\n", "It rained.", "It was dry (I think)."),
)
# Whatever comes in a request, a server answers.
EMPTY: Examples = (("", "", "word"), ("word", "", ""), ("", "", ""))


def calls(names: Sequence[str], examples: Examples) -> list[Call]:
    """One request for each signature.

    Args:
        names: of the signatures.
        examples: prompts with two responses each.

    Returns:
        Signature and inputs of each request.

    Example:
        >>> calls(["score"], [("p", "a", "b")])
        [('score', {'prompt': ['p'], 'response': ['a']})]
    """
    prompts, first, second = zip(*examples, strict=True)
    columns = {"prompt": prompts, "response": first, "response_a": first, "response_b": second}
    return [(name, {key: list(columns[key]) for key in INPUTS[name]}) for name in names]


class Comparison:
    """Compares answers of an exported model with the model in Python.

    The Python side tokenizes by `tokenize_pairs`, lays out by `collate`, and runs op by op.
    Generated text is checked in two steps: it is the text of the tokens that the model generates
    in Python, and each of those tokens is the likeliest in one plain forward pass over the whole
    text (no key-value cache).

    Args:
        server: what was exported.
        preprocessor: tokenizes.
        template: the chat template, or None.

    Attributes:
        tolerance: largest difference allowed, relative to values above 1.
    """

    def __init__(self, server: Server, preprocessor: Any, template: ChatTemplate | None):
        self.server = server
        self.preprocessor = preprocessor
        self.template = template
        backbone = getattr(server.policy, "backbone", server.policy)
        # In half precision the order of sums shows in the third digit.
        self.tolerance = 1e-4 if backbone.compute_dtype == "float32" else 3e-2

    def check(self, name: str, answers: Answers, examples: Examples) -> dict[str, float]:
        """Compares one signature's answers.

        Args:
            name: of the signature.
            answers: lists by output name, one entry per example.
            examples: what was asked.

        Returns:
            The largest difference of each output.

        Raises:
            RuntimeError: a difference above the tolerance.
        """
        expected, kept = getattr(self, f"_{name}")(examples)
        differences = {
            f"{name}.{key}": largest_difference([answers[key][row] for row in kept], values)
            for key, values in expected.items()
        }
        for key, difference in differences.items():
            if not difference <= self.tolerance:
                output = key.partition(".")[2]
                raise RuntimeError(
                    f"the exported model answers otherwise than the model in Python: {key} differs "
                    f"by {difference:.2e} (at most {self.tolerance:.0e} allowed). Exported: "
                    f"{[answers[output][row] for row in kept]}; in Python: "
                    f"{list(expected[output])}."
                )
        return differences

    def check_finite(self, name: str, answers: Answers) -> None:
        """Makes sure that answers to empty texts are numbers.

        Args:
            name: of the signature.
            answers: lists by output name.

        Raises:
            RuntimeError: NaN or infinity.
        """
        for key, values in answers.items():
            numbers = [value for value in values if not isinstance(value, str)]
            if not np.isfinite(np.asarray(numbers, np.float64)).all():
                raise RuntimeError(
                    f"the exported model answers empty texts with {key}={list(values)}; the policy "
                    "or its reference gives no finite log-probs for them."
                )

    def _batch(self, rows: Sequence[tuple[str, str, str]]) -> tuple[dict[str, Any], list[int]]:
        tokens = tokenize_pairs(
            [PreferencePair(*row) for row in rows],
            self.preprocessor,
            max_length=self.server.encoder.max_length,
            template=self.template,
        )
        kept = list(range(len(rows))) if tokens.source is None else tokens.source.tolist()
        batch = collate(tokens, np.arange(len(tokens)))
        return {**batch, **neutral_columns(len(tokens))}, kept

    def _score(self, examples: Examples) -> tuple[dict[str, Any], list[int]]:
        # Beside the shortest response there is, so that it does not shorten the prompt.
        rows = [(prompt, one, "x" if one != "x" else "y") for prompt, one, _ in examples]
        batch, kept = self._batch(rows)
        scored = self.server.scorer(batch)
        expected = {"log_prob": _column(scored["logps"]), "tokens": _column(scored["lengths"])}
        if missing_reference(self.server.model) is None:
            model = self.server.model
            outputs = dict(outputs_of(model, batch))
            # On its own, a response is shared with nothing shorter (LD-DPO).
            for name in ("policy", "reference"):
                if f"{name}_shared" in outputs:
                    outputs[f"{name}_shared"] = outputs[name]
            expected["reward"] = _column(scores_of(model.preference_loss, outputs))
        return expected, kept

    def _prefer(self, examples: Examples) -> tuple[dict[str, Any], list[int]]:
        batch, kept = self._batch(list(examples))
        model = self.server.model
        scores = scores_of(model.preference_loss, outputs_of(model, batch))
        probabilities = preference_probabilities(scores)
        return {
            "probability_a": _column(probabilities),
            "probability_b": _column(probabilities, 1),
            "llr": keras.ops.convert_to_numpy(log_likelihood_ratio(scores)).tolist(),
        }, kept

    def _generate(self, examples: Examples) -> tuple[dict[str, Any], list[int]]:
        server = self.server
        if server.decoding.temperature > 0:
            return {}, []  # drawn afresh each time: there is nothing to compare
        before = server.prompt_ids(tf.constant([prompt for prompt, *_ in examples]))
        new = server.continue_ids(before).to_list()
        decided = self._check_likeliest(before.to_list(), new)
        tokenizer = TextEncoder(self.preprocessor).tokenizer
        texts = []
        for row in new:
            row = [token for token in row if token not in server.special_ids]
            texts.append(_text(tokenizer.detokenize([row])) if row else "")
        # Where two tokens are as good as equal, rounding decides, and either text is right.
        columns: dict[str, list[Any]] = {
            "text": texts,
            "tokens": [len(row) for row in new],
            "finished": [len(row) < server.decoding.max_new_tokens for row in new],
        }
        return {key: [values[row] for row in decided] for key, values in columns.items()}, decided

    def _check_likeliest(self, before: list[list[int]], new: list[list[int]]) -> list[int]:
        """Makes sure that generation by the graph's key-value cache agrees with a forward pass.

        Returns the rows in which the likeliest token was never in doubt.
        """
        decided = []
        encoder, longest = self.server.encoder, self.server.decoding.max_new_tokens
        rows = [prompt + row for prompt, row in zip(before, new, strict=True)]
        length = max(map(len, rows))
        token_ids = np.array([row + [encoder.pad] * (length - len(row)) for row in rows], np.int32)
        mask = np.array([[1] * len(row) + [0] * (length - len(row)) for row in rows], np.int32)
        logits = self.server.policy({"token_ids": token_ids, "padding_mask": mask}, training=False)
        logits = keras.ops.convert_to_numpy(keras.ops.cast(logits, "float32"))
        for number, (prompt, row) in enumerate(zip(before, new, strict=True)):
            taken = [[token] for token in row] + [encoder.stops] * (len(row) < longest)
            narrowest = np.inf
            for step, tokens in enumerate(taken):
                at = logits[number, len(prompt) + step - 1]
                at = at / max(1.0, abs(at.max()))
                lead = at[tokens].max() - np.delete(at, tokens).max()
                narrowest = min(narrowest, lead)
                if not lead >= -10 * self.tolerance:
                    raise RuntimeError(
                        f"greedy generation in the graph took token {tokens} at step {step} of "
                        f"example {number}, whose logit is {-lead:.2e} below the largest one of a "
                        "plain forward pass: the policy's key-value cache does not agree with its "
                        "forward pass."
                    )
            if narrowest > 10 * self.tolerance:
                decided.append(number)
        return decided


def _column(values: Any, column: int = 0) -> list[float]:
    return keras.ops.convert_to_numpy(values)[:, column].tolist()


def _text(value: Any) -> str:
    while not isinstance(value, str | bytes):
        value = value.numpy() if isinstance(value, tf.Tensor) else value[0]
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else value
