"""What a server could not run, or would answer wrongly, is found before it is deployed."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from serving_tiny import llama as tiny_llama

from dpo_keras.errors import InputError
from dpo_keras.losses import OBJECTIVES, DPOLoss
from dpo_keras.serving import inspect_graph, run_standalone
from dpo_keras.serving.graph_encoder import GraphEncoder
from dpo_keras.serving.signatures import Decoding, ServedModel
from dpo_keras.serving.verification import (
    EMPTY,
    Comparison,
    calls,
    check_graph,
    largest_difference,
)
from dpo_keras.training import DPOModel


def saved(tmp_path, function, **attributes):
    module = tf.Module()
    for name, value in attributes.items():
        setattr(module, name, value)
    texts = tf.TensorSpec([None], tf.string, name="prompt")
    concrete = tf.function(function, input_signature=[texts]).get_concrete_function()
    tf.saved_model.save(module, str(tmp_path), signatures={"score": concrete})
    return tmp_path


def lengths(texts):
    return {"log_prob": tf.cast(tf.strings.length(texts), tf.float32)}


def test_a_plain_graph_has_no_faults(tmp_path):
    found = check_graph(saved(tmp_path, lengths))
    assert found.faults == () and "StringLength" in found.operations


def test_functions_that_must_be_compiled_by_xla_are_found(tmp_path):
    @tf.function(jit_compile=True)
    def doubled(values):
        return values * 2.0

    path = saved(tmp_path, lambda texts: {"log_prob": doubled(lengths(texts)["log_prob"])})
    assert any("compiled by XLA" in fault for fault in inspect_graph(path).faults)
    with pytest.raises(RuntimeError, match="cannot be served"):
        check_graph(path)


def test_python_functions_are_found(tmp_path):
    def python(texts):
        values = tf.py_function(tf.strings.length, [texts], tf.int32)
        return {"log_prob": tf.cast(values, tf.float32)}

    assert any(
        "EagerPyFunc calls Python" in f for f in inspect_graph(saved(tmp_path, python)).faults
    )


def test_kerashubs_cache_update_is_found(tmp_path):
    def update(texts):
        values = lengths(texts)["log_prob"]
        return {"log_prob": keras.ops.slice_update(values, [0], values[:1])}

    faults = inspect_graph(saved(tmp_path, update)).faults
    assert any("XlaDynamicUpdateSlice needs XLA" in fault for fault in faults)


def test_a_table_that_grows_is_found(tmp_path):
    table = tf.lookup.experimental.MutableHashTable(tf.string, tf.int64, -1)

    def remember(texts):
        table.insert(texts, tf.ones_like(texts, tf.int64))
        return lengths(texts)

    faults = inspect_graph(saved(tmp_path, remember, table=table)).faults
    assert any("grows with every new word" in fault for fault in faults)


def test_no_saved_model_is_an_input_error(tmp_path):
    with pytest.raises(InputError, match="saved_model.pb does not exist"):
        inspect_graph(tmp_path)


def test_a_model_that_fails_outside_keras_says_how(tmp_path):
    def fails(texts):
        with tf.control_dependencies([tf.debugging.assert_less(tf.size(texts), 0, "broken here")]):
            return lengths(texts)

    with pytest.raises(RuntimeError, match="(?s)does not run outside Keras.*broken here"):
        run_standalone(saved(tmp_path, fails), [("score", {"prompt": ["a"]})])


@pytest.mark.parametrize(
    ("found", "expected", "difference"),
    [
        ([1.0, 2.0], [1.0, 2.0], 0.0),
        ([0.5], [0.25], 0.25),
        ([1001.0], [1000.0], 0.001),
        ([float("nan")], [1.0], float("inf")),
        ([1.0], [1.0, 2.0], float("inf")),
        (["a"], ["a"], 0.0),
        (["a"], ["b"], float("inf")),
        ([], [], 0.0),
    ],
)
def test_differences_are_relative_above_one_and_never_hide_nan(found, expected, difference):
    assert largest_difference(found, expected) == pytest.approx(difference)


# -- the comparison that decides whether an export is kept -----------------------------------------

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
    served = ServedModel(model, GraphEncoder(preprocessor, 48), Decoding(8, **decoding), special)
    return served, Comparison(served, preprocessor, None)


def check(comparison, name, found):
    return comparison.check(name, found, comparison.expected(name, EXAMPLES))


def answers(served, name, examples=EXAMPLES):
    ((_, inputs),) = calls([name], examples)
    found = getattr(served, name)(*(tf.constant(texts) for texts in inputs.values()))
    plain = {key: value.numpy().tolist() for key, value in found.items()}
    return {
        key: [v.decode() if isinstance(v, bytes) else v for v in values]
        for key, values in plain.items()
    }


@pytest.mark.parametrize(
    "loss",
    [
        *(
            DPOLoss(name, label_smoothing=0.1 if name in ("robust", "exo_pair") else 0.0)
            for name, objective in OBJECTIVES.items()
            if objective.of_policies
        ),
        DPOLoss("sigmoid", beta=0.3, name="beta"),
        DPOLoss("sigmoid", ld_alpha=0.5, name="ld_alpha"),
        DPOLoss("sigmoid", margin=True, name="margin"),
        DPOLoss("sigmoid", divergence="forward_kl", name="forward_kl"),
    ],
    ids=lambda loss: f"{loss.loss_type} {loss.name}",
)
def test_rewards_and_preferences_are_those_that_the_loss_compares(trained, loss):
    trained.compile(optimizer="sgd", loss=loss)
    served, comparison = serve(trained)
    for name in ("score", "prefer"):
        found = check(comparison, name, answers(served, name))
        assert max(found.values()) < 1e-4
    assert np.abs(answers(served, "prefer")["llr"]).min() > 1e-6


@pytest.mark.slow
def test_a_wrong_number_and_a_wrong_text_are_refused(trained):
    trained.compile(optimizer="sgd", loss=DPOLoss("sigmoid"))
    served, comparison = serve(trained)
    scored = answers(served, "score")
    scored["reward"][1] += 2e-4
    with pytest.raises(RuntimeError, match="score.reward differs by 2.0"):
        check(comparison, "score", scored)
    generated = answers(served, "generate")
    assert check(comparison, "generate", generated) == {
        "generate.text": 0.0,
        "generate.tokens": 0.0,
        "generate.finished": 0.0,
    }
    with pytest.raises(RuntimeError, match="generate.text differs"):
        check(comparison, "generate", {**generated, "text": ["", *generated["text"][1:]]})


def test_a_cache_that_disagrees_with_the_forward_pass_is_refused(trained, monkeypatch):
    trained.compile(optimizer="sgd", loss=DPOLoss("sigmoid"))
    served, comparison = serve(trained)
    wrong = tf.ragged.constant([[7, 8], [9], [10, 11]], dtype=tf.int32)
    monkeypatch.setattr(served, "continue_ids", lambda ids: wrong)
    with pytest.raises(RuntimeError, match="does not agree with its forward pass"):
        check(comparison, "generate", {"text": ["", "", ""]})


def test_where_rounding_decides_the_text_is_not_compared(trained, monkeypatch):
    served, comparison = serve(trained)
    comparison.tolerance = 1e9
    wrong = {"text": ["", "", ""], "tokens": [0, 0, 0], "finished": [True, True, True]}
    assert set(check(comparison, "generate", wrong).values()) == {0.0}


def test_sampled_text_is_not_compared(trained):
    served, comparison = serve(trained, temperature=1.0)
    assert check(comparison, "generate", {"text": ["a", "b", "c"]}) == {}


def test_answers_to_empty_texts_must_be_finite(trained):
    trained.compile(optimizer="sgd", loss=DPOLoss("sigmoid"))
    served, comparison = serve(trained)
    for name in ("score", "prefer", "generate"):
        comparison.check_finite(name, answers(served, name, EMPTY))
    with pytest.raises(RuntimeError, match="reward="):
        comparison.check_finite("score", {"reward": [0.0, float("nan")]})


def test_half_precision_is_given_more_room(trained):
    served, comparison = serve(trained)
    assert comparison.tolerance == 1e-4
    trained.policy.backbone.dtype_policy = "mixed_bfloat16"
    try:
        assert serve(trained)[1].tolerance > 1e-2
    finally:
        trained.policy.backbone.dtype_policy = "float32"


def test_a_request_to_each_signature_holds_all_examples():
    assert calls(["score", "generate"], [("p", "a", "b"), ("q", "c", "d")]) == [
        ("score", {"prompt": ["p", "q"], "response": ["a", "c"]}),
        ("generate", {"prompt": ["p", "q"]}),
    ]
