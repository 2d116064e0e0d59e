"""Private names of Keras: they are there, and a release without them is named clearly."""

import contextlib
import re
import resource
from types import SimpleNamespace

import h5py
import keras
import numpy as np
import pytest
import tensorflow as tf

from dpo_keras.training.tensorflow_trainer import TensorflowTrainer
from dpo_keras.utils import keras_internals
from dpo_keras.utils.keras_hub_internals import KERAS, KERAS_HUB, private
from dpo_keras.utils.keras_internals import raise_failed_writes

WRITTEN_FOR = "which dpo_keras was written for"


def variable(values=(1.0, -2.0, 3.0)):
    return keras.Variable(np.array(values, np.float32))


def adam(**options):
    optimizer = keras.optimizers.Adam(0.1, **options)
    optimizer.build([variable()])
    return optimizer


def adapted_dense():
    layer = keras.layers.Dense(2)
    layer.build((None, 3))
    layer.enable_lora(1)
    return layer


def one_update(optimizer):
    optimizer.apply([tf.ones(3)], [optimizer._trainable_variables[0]])


# What each function reads, and an object to read it from.
NAMES = {
    "_all_reduce_sum_gradients": (keras_internals.leave_gradient_sums_to_caller, adam),
    "_apply_weight_decay": (keras_internals.skip_zero_weight_decay, adam),
    "_get_variable_index": (keras_internals.use_adam_kernel, adam),
    "_iterations": (keras_internals.micro_steps, adam),
    "_backend_apply_gradients": (
        keras_internals.WeighedAccumulation,
        lambda: adam(gradient_accumulation_steps=2),
    ),
    "_clip_gradients": (
        keras_internals.WeighedAccumulation,
        lambda: adam(gradient_accumulation_steps=2),
    ),
    "_tracker": (lambda layer: keras_internals.forget_layer(layer, layer), adapted_dense),
    "_flatten_layers": (keras_internals.all_layers, adapted_dense),
    "_kernel": (keras_internals.base_kernel, adapted_dense),
}


@pytest.mark.parametrize("name", NAMES)
def test_a_release_without_a_private_name_is_named(name, monkeypatch):
    function, make = NAMES[name]
    owner = make()
    function(make())  # The installed release has it.
    for kind in type(owner).__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)
    if name in vars(owner):
        object.__delattr__(owner, name)
    message = rf"Keras {re.escape(keras.__version__)} has no \w+\.{name}.* Install keras 3\.15"
    with pytest.raises(RuntimeError, match=message):
        function(owner)


@pytest.mark.parametrize("name", ["_momentums", "_velocities"])
def test_a_release_without_adams_moments_is_named_at_the_first_update(name):
    optimizer = adam()
    keras_internals.use_adam_kernel(optimizer)
    object.__delattr__(optimizer, name)
    with pytest.raises(RuntimeError, match=rf"has no Adam\.{name}.* Install keras 3\.15"):
        one_update(optimizer)


@pytest.mark.parametrize("name", TensorflowTrainer.hooks)
def test_a_release_without_a_hook_of_fit_is_named(name, monkeypatch):
    keras_internals.check_trainer_hooks(TensorflowTrainer.hooks)
    for kind in keras.Model.__mro__:
        if name in vars(kind):
            monkeypatch.delattr(kind, name)
    with pytest.raises(RuntimeError, match=rf"has no Model\.{name}.* Install keras 3\.15"):
        keras_internals.check_trainer_hooks(TensorflowTrainer.hooks)


def test_a_tf_keras_without_its_private_name_is_named():
    assert (
        keras_internals.tf_keras_steps_per_execution(
            SimpleNamespace(_steps_per_execution=tf.constant(3))
        )
        == 3
    )
    with pytest.raises(RuntimeError, match=r"_steps_per_execution.* Install tf-keras 2\.21"):
        keras_internals.tf_keras_steps_per_execution(SimpleNamespace())


@pytest.mark.parametrize(
    "make",
    [
        lambda: keras.optimizers.Adam(0.1),
        lambda: keras.optimizers.AdamW(0.1, weight_decay=0.0),
        lambda: keras.optimizers.AdamW(0.1, weight_decay=0.3, global_clipnorm=0.5),
    ],
)
def test_the_adam_kernel_takes_the_steps_of_keras(make):
    weights = []
    for fast in (False, True):
        optimizer, weight = make(), variable()
        optimizer.build([weight])
        if fast:
            keras_internals.skip_zero_weight_decay(optimizer)
            keras_internals.use_adam_kernel(optimizer)
            assert "update_step" in vars(optimizer)
        for step in range(4):
            optimizer.apply([tf.constant([1.0, -0.5, 0.1 * step])], [weight])
        weights.append(weight.numpy())
    np.testing.assert_allclose(*weights, rtol=1e-5)


def test_a_forgotten_layer_is_neither_saved_nor_counted():
    owner = keras.layers.Layer()
    owner.kept, owner.extra = adapted_dense(), adapted_dense()
    count = len(owner.weights)
    keras_internals.forget_layer(owner, owner.extra)
    assert len(owner.weights) == count - len(owner.extra.weights)


def test_unmerged_weights_have_the_names_of_keras():
    names = ["_kernel", "lora_kernel_a", "lora_kernel_b"]
    assert list(keras_internals.unmerged_weights(adapted_dense())) == names


def test_a_missing_name_is_told_with_library_and_release():
    message = rf"KerasHub [\d.]+ has no int\._gone, .* Install keras-hub 0\.32, {WRITTEN_FOR}"
    with pytest.raises(RuntimeError, match=message):
        private(3, "_gone", KERAS_HUB)
    with pytest.raises(RuntimeError, match=rf"Keras {keras.__version__} has no int\._gone"):
        private(3, "_gone", KERAS)


def adapted():
    layer = keras.layers.Dense(2)
    model = keras.Sequential([keras.Input((3,)), layer])
    layer.enable_lora(1)
    return model, layer


def test_layers_and_weights_of_keras_are_found():
    model, layer = adapted()
    assert layer in keras_internals.all_layers(model) and model in keras_internals.all_layers(model)
    assert keras_internals.base_kernel(layer) is layer.weights[0]
    names = ["_kernel", "lora_kernel_a", "lora_kernel_b"]
    assert list(keras_internals.unmerged_weights(layer)) == names
    assert layer.lora_enabled and (layer.lora_rank, layer.lora_alpha) == (1, 1)
    embedding = keras.layers.Embedding(4, 2)
    embedding.build()
    embedding.enable_lora(1)
    names = ["_embeddings", "lora_embeddings_a", "lora_embeddings_b"]
    assert list(keras_internals.unmerged_weights(embedding)) == names


@pytest.mark.parametrize("read", [keras_internals.base_kernel, keras_internals.unmerged_weights])
def test_a_layer_without_its_kernel_is_told(read):
    _, layer = adapted()
    del layer._kernel
    with pytest.raises(RuntimeError, match=rf"Keras [\d.]+ has no Dense\._kernel, .*{WRITTEN_FOR}"):
        read(layer)


def test_a_model_without_flat_layers_is_told():
    with pytest.raises(RuntimeError, match=r"Keras [\d.]+ has no object\._flatten_layers"):
        keras_internals.all_layers(object())


def test_a_barrier_gives_back_its_values():
    function = tf.function(
        lambda x: keras_internals.optimization_barrier([x, x + 1.0]), jit_compile=True
    )
    assert [float(value) for value in function(tf.constant(1.0))] == [1.0, 2.0]


@pytest.fixture
def dense():
    model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64), keras.layers.Dense(64)])
    for weight in model.weights:
        weight.assign(tf.random.normal(weight.shape))
    return model


@contextlib.contextmanager
def room(size):
    """A disk on which no file can be larger."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("options", [{}, {"max_shard_size": 0.00002}], ids=["one file", "shards"])
def test_weights_are_written_as_without_the_guard(dense, tmp_path, options):
    name = "a.weights.json" if options else "a.weights.h5"
    with raise_failed_writes():
        dense.save_weights(tmp_path / name, **options)
    copy = keras.models.clone_model(dense)
    copy.load_weights(tmp_path / name)
    for one, other in zip(copy.weights, dense.weights, strict=True):
        np.testing.assert_array_equal(one, other)
    assert not options or len(list(tmp_path.glob("*.h5"))) > 1


@pytest.mark.parametrize("size", [0, 100, 3_000, 20_000])
def test_weights_that_cannot_be_written_raise_and_leave_no_file_open(dense, tmp_path, size):
    """HDF5 crashes the process at its end over a file that it could not close."""
    with room(size), pytest.raises(OSError, match=r"File too large.*a\.weights\.h5"):  # noqa: SIM117
        with raise_failed_writes():
            dense.save_weights(tmp_path / "a.weights.h5")
    assert h5py.h5f.get_obj_count(h5py.h5f.OBJ_ALL, h5py.h5f.OBJ_FILE) == 0


def test_other_errors_and_other_files_pass_the_guard_by(dense, tmp_path):
    original = h5py.File
    with pytest.raises(ZeroDivisionError), raise_failed_writes():
        1 / 0  # noqa: B018
    dense.save_weights(tmp_path / "a.weights.h5")
    with raise_failed_writes():
        dense.load_weights(tmp_path / "a.weights.h5")
    assert h5py.File is original
