"""The comparison that decides whether an export is kept."""

import numpy as np
import pytest
import tensorflow as tf
from serving_tiny import llama as tiny_llama

from dpo_keras.losses import DPOLoss
from dpo_keras.serving.answer_comparison import EMPTY, Comparison, calls
from dpo_keras.serving.graph_encoder import GraphEncoder
from dpo_keras.serving.signatures import Decoding, Server
from dpo_keras.training import DPOModel

EXAMPLES = (
    ("Hello, how are you?", "I am fine, thanks.", "No."),
    ("a", "x", "The quick brown fox jumps over the lazy dog"),
    ("12345 " * 40, "naïve café", "y"),
)


@pytest.fixture(scope="module")
def trained():
    """A policy and a reference that differ."""
    policy = tiny_llama()
    model = DPOModel(policy)
    for variable in policy.trainable_variables:
        variable.assign(variable * 1.1)
    return model


def serve(model, **decoding):
    preprocessor = model.policy.preprocessor
    special = tuple(preprocessor.tokenizer.special_token_ids)
    server = Server(model, GraphEncoder(preprocessor, 48), Decoding(8, **decoding), special)
    return server, Comparison(server, preprocessor, None)


def answers(server, name, examples=EXAMPLES):
    ((_, inputs),) = calls([name], examples)
    found = getattr(server, name)(*(tf.constant(texts) for texts in inputs.values()))
    plain = {key: value.numpy().tolist() for key, value in found.items()}
    return {
        key: [v.decode() if isinstance(v, bytes) else v for v in values]
        for key, values in plain.items()
    }


@pytest.mark.parametrize(
    "loss",
    [
        DPOLoss("sigmoid", beta=0.3),
        DPOLoss("sigmoid", ld_alpha=0.5),
        DPOLoss("sigmoid", margin=True),
        DPOLoss("sigmoid", divergence="forward_kl"),
        DPOLoss("ipo"),
        DPOLoss("simpo"),
        DPOLoss("bco_pair"),
    ],
    ids=["sigmoid", "ld", "margin", "forward_kl", "ipo", "simpo", "bco_pair"],
)
def test_rewards_and_preferences_are_those_that_the_loss_compares(trained, loss):
    trained.compile(optimizer="sgd", loss=loss)
    server, comparison = serve(trained)
    for name in ("score", "prefer"):
        found = comparison.check(name, answers(server, name), EXAMPLES)
        assert max(found.values()) < 1e-4
    assert np.abs(answers(server, "prefer")["llr"]).min() > 1e-6


def test_a_wrong_number_and_a_wrong_text_are_refused(trained):
    trained.compile(optimizer="sgd", loss=DPOLoss("sigmoid"))
    server, comparison = serve(trained)
    scored = answers(server, "score")
    scored["reward"][1] += 2e-4
    with pytest.raises(RuntimeError, match="score.reward differs by 2.0"):
        comparison.check("score", scored, EXAMPLES)
    generated = answers(server, "generate")
    assert comparison.check("generate", generated, EXAMPLES) == {
        "generate.text": 0.0,
        "generate.tokens": 0.0,
        "generate.finished": 0.0,
    }
    with pytest.raises(RuntimeError, match="generate.text differs"):
        comparison.check("generate", {**generated, "text": ["", *generated["text"][1:]]}, EXAMPLES)


def test_a_cache_that_disagrees_with_the_forward_pass_is_refused(trained, monkeypatch):
    trained.compile(optimizer="sgd", loss=DPOLoss("sigmoid"))
    server, comparison = serve(trained)
    wrong = tf.ragged.constant([[7, 8], [9], [10, 11]], dtype=tf.int32)
    monkeypatch.setattr(server, "continue_ids", lambda ids: wrong)
    with pytest.raises(RuntimeError, match="does not agree with its forward pass"):
        comparison.check("generate", {"text": ["", "", ""]}, EXAMPLES)


def test_where_rounding_decides_the_text_is_not_compared(trained, monkeypatch):
    server, comparison = serve(trained)
    comparison.tolerance = 1e9
    wrong = {"text": ["", "", ""], "tokens": [0, 0, 0], "finished": [True, True, True]}
    assert set(comparison.check("generate", wrong, EXAMPLES).values()) == {0.0}


def test_sampled_text_is_not_compared(trained):
    server, comparison = serve(trained, temperature=1.0)
    assert comparison.check("generate", {"text": ["a", "b", "c"]}, EXAMPLES) == {}


def test_answers_to_empty_texts_must_be_finite(trained):
    trained.compile(optimizer="sgd", loss=DPOLoss("sigmoid"))
    server, comparison = serve(trained)
    for name in ("score", "prefer", "generate"):
        comparison.check_finite(name, answers(server, name, EMPTY))
    with pytest.raises(RuntimeError, match="reward="):
        comparison.check_finite("score", {"reward": [0.0, float("nan")]})


def test_half_precision_is_given_more_room(trained):
    server, comparison = serve(trained)
    assert comparison.tolerance == 1e-4
    trained.policy.backbone.dtype_policy = "mixed_bfloat16"
    try:
        assert serve(trained)[1].tolerance > 1e-2
    finally:
        trained.policy.backbone.dtype_policy = "float32"
