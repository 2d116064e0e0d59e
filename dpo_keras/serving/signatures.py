"""What a served model can be asked, as graphs that need neither XLA nor Python."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import keras
import tensorflow as tf

from dpo_keras.errors import InputProblem
from dpo_keras.losses import DPOLoss, Outputs, log_likelihood_ratio, preference_probabilities
from dpo_keras.scoring import ResponseScorer
from dpo_keras.serving.graph_encoder import GraphEncoder, rows_of
from dpo_keras.training import outputs_of
from dpo_keras.training.decoding import generate_tokens, token_choice
from dpo_keras.training.generation import decoding_problems
from dpo_keras.utils import Tensor
from dpo_keras.utils.keras_internals import native_slice_update

INPUTS = {
    "score": ("prompt", "response"),
    "prefer": ("prompt", "response_a", "response_b"),
    "generate": ("prompt",),
}
SIGNATURES = tuple(INPUTS)
"""Names of the signatures of a served model."""

# Prompts of one request that are answered together; further ones take the slots of the first.
_SLOTS = 32


@dataclass(frozen=True)
class Decoding:
    """How the `generate` signature chooses tokens; fixed at export."""

    max_new_tokens: int = 64
    temperature: float = 0.0  # 0 takes the most likely token; above 0 every request samples anew
    top_p: float = 1.0  # share of the probability to sample from

    def problems(self, max_length: int) -> list[InputProblem]:
        """Name the values that are out of range for sequences of `max_length` tokens."""
        problems = decoding_problems(self.max_new_tokens, self.temperature, self.top_p)
        if self.max_new_tokens > max_length - 2:
            rule = f"must leave room for a prompt of 2 tokens within max_length={max_length}"
            problems.append(InputProblem("max_new_tokens", rule, self.max_new_tokens))
        if 0 < self.top_p < 1 and self.temperature == 0:
            rule = f"{self.top_p} has no effect at temperature=0"
            hint = "Give a temperature, or leave top_p out."
            problems.append(InputProblem("top_p", rule, hint=hint))
        return problems


class ServedModel:
    """A policy, its reference and its tokenizer; the methods named in `INPUTS` are signatures.

    It is no `tf.Module`, because TensorFlow would then save the models as Keras layers, with their
    training functions. `special_ids` are left out of generated text.
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
        # The scorer's view takes a dict of ids and mask, whatever the policy itself takes.
        self.policy = self.scorer.policy
        self.encoder = encoder
        self.decoding = decoding
        self.special_ids = special_ids

    def score(self, prompt: Tensor, response: Tensor) -> dict[str, Tensor]:
        """Return log pi(response | prompt), and the implicit reward where there is a reference."""
        _check_same_length(prompt, response)
        model = self.model
        batch = self.encoder.batch(prompt, [response])
        scored = self.scorer(batch)
        answer = {"log_prob": scored["logps"][:, 0], "tokens": scored["lengths"][:, 0]}
        loss = getattr(model, "preference_loss", None)
        if loss is not None and missing_reference(model) is None:
            # Scores need two columns: the response beside itself, so that all of it is shared.
            policy = _twice(scored["logps"])
            outputs: Outputs = {"policy": policy, "lengths": _twice(scored["lengths"])}
            outputs["policy_shared"] = policy
            if loss.needs_reference:
                outputs["reference"] = _twice(model.reference_logps(batch))
                outputs["reference_shared"] = outputs["reference"]
            answer["reward"] = scores_of(loss, outputs)[:, 0]
        return answer

    def prefer(self, prompt: Tensor, response_a: Tensor, response_b: Tensor) -> dict[str, Tensor]:
        """Return P(a), P(b) and their log-ratio, from the scores that training compares."""
        _check_same_length(prompt, response_a, response_b)
        outputs = outputs_of(self.model, self.encoder.batch(prompt, [response_a, response_b]))
        scores = scores_of(self.model.preference_loss, outputs)
        probabilities = preference_probabilities(scores)
        return {
            "probability_a": probabilities[:, 0],
            "probability_b": probabilities[:, 1],
            "llr": log_likelihood_ratio(scores),
        }

    def generate(self, prompt: Tensor) -> dict[str, Tensor]:
        """Return a response to each prompt, its tokens' number, and whether it ended by itself."""
        new = self.continue_ids(self.prompt_ids(prompt))
        special = tf.constant(self.special_ids or (-1,), tf.int32)
        kept = tf.reduce_all(new.values[:, None] != special[None, :], axis=1)
        shown = tf.ragged.boolean_mask(new, new.with_values(kept))
        count = tf.cast(new.row_lengths(), tf.int32)
        # REST drops the name of a single output; with several, each keeps its name.
        return {
            "text": self.encoder.tokenizer.detokenize(shown),
            "tokens": count,
            "finished": count < self.decoding.max_new_tokens,
        }

    def prompt_ids(self, prompt: Tensor) -> tf.RaggedTensor:
        """Tokenize prompts, int32 `[batch, (tokens)]`, with room left for the responses."""
        encoder = self.encoder
        room = tf.constant(encoder.max_length - self.decoding.max_new_tokens, tf.int64)
        ids = encoder.truncate_prompts(encoder.prompts(prompt), room)
        # Something must predict the first token. GPT-2's training texts followed an end token, too.
        return tf.concat([rows_of(encoder.end, ids.row_lengths() == 0), ids], axis=1)

    def continue_ids(self, ids: tf.RaggedTensor) -> tf.RaggedTensor:
        """Generate the tokens after each prompt, int32 `[batch, (tokens)]`."""
        encoder = self.encoder
        return continue_prompts(self.policy, ids, self.decoding, encoder.stops, encoder.pad)


def continue_prompts(
    policy: keras.Model, ids: tf.RaggedTensor, decoding: Decoding, stops: Sequence[int], pad: int
) -> tf.RaggedTensor:
    """Generate the tokens after each prompt, without XLA; leave out the stop that ends them.

    Prompts and new tokens are int32 `[batch, (tokens)]`; a prompt has at least one token.
    """
    count, longest = ids.nrows(tf.int32), decoding.max_new_tokens
    choose = token_choice(decoding.temperature, decoding.top_p)
    uniforms = tf.zeros if decoding.temperature == 0 else drawn_anew
    with native_slice_update():
        return generate_tokens(
            policy,
            ids,
            uniforms((count, 1, longest)),
            stops=stops,
            choose=choose,
            slots=_SLOTS,
            pad=pad,
        )


def drawn_anew(shape: Sequence[int | Tensor]) -> Tensor:
    """Draw uniform numbers in [0, 1), other ones in every request."""
    # Both seeds 0 make the kernel choose a seed; tf.random would write the exporter's seed down.
    return tf.raw_ops.RandomUniform(shape=tf.stack(shape), dtype=tf.float32, seed=0, seed2=0)


def scores_of(loss: DPOLoss, outputs: Outputs) -> Tensor:
    """Return the scores `[N, 2]`, in nats, of outputs that have no columns of pairs."""
    # Some losses ask for these, but no score depends on them.
    zeros = tf.zeros_like(outputs["policy"])
    unused: Outputs = {
        "margin": zeros[:, 0],
        "group": tf.cast(zeros[:, 0], tf.int32),
        "wpo_log_weight": zeros,
    }
    return loss.scores({**unused, **outputs})


def missing_reference(model: keras.Model) -> str | None:
    """Say in one clause why rewards cannot be computed from strings; None where they can."""
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


def trace(
    served: ServedModel, names: Sequence[str]
) -> tuple[tf.Module, dict[str, tf.types.experimental.ConcreteFunction]]:
    """Trace signatures: return the tables and weights to save, and the functions by name."""
    functions = {}
    for name in names:
        inputs = [tf.TensorSpec([None], tf.string, name=key) for key in INPUTS[name]]
        function = tf.function(getattr(served, name), input_signature=inputs, autograph=False)
        functions[name] = function.get_concrete_function()
    keeper = tf.Module()
    keeper.encoder = served.encoder
    # Whatever the reference is made of (a copy, another model), its weights are captured here.
    captured = {id(v): v for f in functions.values() for v in f.graph.variables}
    keeper.variables_read = list(captured.values())
    return keeper, functions


def _check_same_length(prompt: Tensor, *others: Tensor) -> None:
    for other in others:
        tf.debugging.assert_equal(
            tf.shape(prompt), tf.shape(other), "prompt and responses must be as many"
        )


def _twice(column: Tensor) -> Tensor:
    return tf.repeat(column[:, :1], 2, axis=1)
