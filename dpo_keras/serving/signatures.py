"""What a served model can be asked: score, prefer, generate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import keras
import tensorflow as tf

from dpo_keras.losses import DPOLoss, log_likelihood_ratio, preference_probabilities
from dpo_keras.scoring import ResponseScorer
from dpo_keras.serving.decoding import generate_ids, prompt_ids
from dpo_keras.serving.graph_encoder import GraphEncoder, neutral_columns
from dpo_keras.training import outputs_of

Outputs = dict[str, tf.Tensor]
INPUTS = {
    "score": ("prompt", "response"),
    "prefer": ("prompt", "response_a", "response_b"),
    "generate": ("prompt",),
}


@dataclass(frozen=True)
class Decoding:
    """How the `generate` signature chooses tokens; fixed at export.

    Args:
        max_new_tokens: longest response, in tokens.
        temperature: 0 takes the likeliest token; above 0 samples, fresh in every request.
        top_p: share of the probability that is sampled from.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0


class Server:
    """A policy, its reference and its tokenizer as one object whose methods are signatures.

    Not a `tf.Module`: what it holds would be saved as Keras layers, training functions and all.

    Args:
        model: a compiled `DPOModel`, or a policy alone.
        encoder: tokenizes in the graph.
        decoding: how `generate` works.
        special_ids: ids that are left out of generated text.
    """

    def __init__(
        self,
        model: keras.Model,
        encoder: GraphEncoder,
        decoding: Decoding,
        special_ids: tuple[int, ...] = (),
    ):
        self.model = model
        self.scorer = getattr(model, "scorer", None) or ResponseScorer(model)
        # As the scorer calls it: with a dict of ids and mask, whatever the model itself takes.
        self.policy = self.scorer.policy
        self.encoder = encoder
        self.decoding = decoding
        self.special_ids = special_ids

    def score(self, prompt: tf.Tensor, response: tf.Tensor) -> Outputs:
        """Gives log pi(response | prompt), and the implicit reward where there is a reference."""
        _same_length(prompt, response)
        model = self.model
        batch = self.encoder.batch(prompt, [response])
        scored = self.scorer(batch)
        found = {"log_prob": scored["logps"][:, 0], "tokens": scored["lengths"][:, 0]}
        loss = loss_of(model)
        if loss is not None and missing_reference(model) is None:
            columns = {"policy": scored["logps"], "lengths": scored["lengths"]}
            if loss.needs_reference:
                columns["reference"] = model.reference_logps(batch)
            # Scores want two columns: the response beside itself, so that all of it is shared.
            twice = {name: tf.repeat(value[:, :1], 2, axis=1) for name, value in columns.items()}
            shared = {f"{name}_shared": value for name, value in twice.items()}
            found["reward"] = scores_of(loss, {**shared, **twice})[:, 0]
        return found

    def prefer(self, prompt: tf.Tensor, response_a: tf.Tensor, response_b: tf.Tensor) -> Outputs:
        """P(a is preferred) and P(b is preferred), from the scores that training compares."""
        _same_length(prompt, response_a, response_b)
        outputs = outputs_of(self.model, self.encoder.batch(prompt, [response_a, response_b]))
        scores = scores_of(self.model.preference_loss, outputs)
        probabilities = preference_probabilities(scores)
        return {
            "probability_a": probabilities[:, 0],
            "probability_b": probabilities[:, 1],
            "llr": log_likelihood_ratio(scores),
        }

    def generate(self, prompt: tf.Tensor) -> Outputs:
        """A response to each prompt, its number of tokens, and whether it came to its end."""
        new = self.continue_ids(self.prompt_ids(prompt))
        special = tf.constant(self.special_ids or (-1,), tf.int32)
        kept = tf.reduce_all(new.values[:, None] != special[None, :], axis=1)
        shown = tf.ragged.boolean_mask(new, new.with_values(kept))
        count = tf.cast(new.row_lengths(), tf.int32)
        # More than one output also keeps its name over REST; a single one would lose it.
        return {
            "text": self.encoder.tokenizer.detokenize(shown),
            "tokens": count,
            "finished": count < self.decoding.max_new_tokens,
        }

    def prompt_ids(self, prompt: tf.Tensor) -> tf.RaggedTensor:
        """Ids that generation goes on from, int32 `[batch, (tokens)]`."""
        return prompt_ids(self.encoder, prompt, self.decoding.max_new_tokens)

    def continue_ids(self, ids: tf.RaggedTensor) -> tf.RaggedTensor:
        """New tokens after each prompt, int32 `[batch, (tokens)]`."""
        return generate_ids(
            self.policy,
            ids,
            stops=self.encoder.stops,
            pad=self.encoder.pad,
            max_new_tokens=self.decoding.max_new_tokens,
            temperature=self.decoding.temperature,
            top_p=self.decoding.top_p,
        )


def loss_of(model: Any) -> DPOLoss | None:
    """The loss that a model was compiled with, or None for a policy alone."""
    return getattr(model, "preference_loss", None)


def scores_of(loss: DPOLoss, outputs: Mapping[str, tf.Tensor]) -> tf.Tensor:
    """Scores of both responses.

    Args:
        loss: whose scores.
        outputs: `policy`, `reference`, `lengths` `[N, 2]` and whatever else there is.

    Returns:
        `[N, 2]`, in nats.
    """
    # No score depends on these, though some losses want them.
    rows = tf.shape(outputs["policy"])[0]
    columns = {name: column[:, 0] for name, column in neutral_columns(rows).items()}
    weights = {"wpo_log_weight": tf.zeros_like(outputs["policy"])}
    return loss.scores({**columns, **weights, **outputs})


def missing_reference(model: Any) -> str | None:
    """Why rewards cannot be computed from strings alone, or None where they can.

    Args:
        model: a `DPOModel` or a policy.

    Returns:
        One clause for people.
    """
    if not hasattr(model, "preference_loss"):
        return "a policy alone has no reference and no beta; export the DPOModel around it"
    loss = model.preference_loss
    if loss is None:
        return "the DPOModel is not compiled, so beta is unknown; call compile(loss=DPOLoss(...))"
    if loss.needs_reference and model.reference.mode in ("cached", "none"):
        return (
            f"its reference is {model.reference.mode!r}, which has no log-probs of new texts; "
            "give the reference model: DPOModel(policy, reference=<model>)"
        )
    return None


def trace(server: Server, names: Sequence[str]) -> tuple[tf.Module, dict[str, Any]]:
    """Traces signatures.

    Args:
        server: see `Server`.
        names: of signatures, from `INPUTS`.

    Returns:
        What must be saved with them (tables and weights), and the concrete functions by name, with
        string inputs `[None]`.
    """
    functions = {}
    for name in names:
        inputs = [tf.TensorSpec([None], tf.string, name=key) for key in INPUTS[name]]
        function = tf.function(getattr(server, name), input_signature=inputs, autograph=False)
        functions[name] = function.get_concrete_function()
    keeper = tf.Module()
    keeper.encoder = server.encoder
    # Whatever the reference is made of (a copy, another model), its weights are captured here.
    captured = {id(v): v for f in functions.values() for v in f.graph.variables}
    keeper.variables_read = list(captured.values())
    return keeper, functions


def _same_length(prompt: tf.Tensor, *others: tf.Tensor) -> None:
    for other in others:
        tf.debugging.assert_equal(
            tf.shape(prompt), tf.shape(other), "prompt and responses must be as many"
        )
