"""What a server could not run is found before it is deployed."""

import keras
import pytest
import tensorflow as tf

from dpo_keras.errors import InputError
from dpo_keras.serving import inspect_graph, run_standalone
from dpo_keras.serving.verification import check_graph, largest_difference


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
        values = tf.py_function(lambda t: tf.strings.length(t), [texts], tf.int32)
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
