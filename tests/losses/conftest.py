"""Backend-agnostic help: these tests run under KERAS_BACKEND=tensorflow and =jax alike."""

import importlib.util
import sys
from pathlib import Path

import keras
import numpy as np
import pytest

if keras.backend.backend() == "jax":
    import jax

    # The proofs against closed forms are in float64, which JAX leaves off by default.
    jax.config.update("jax_enable_x64", True)


def value_and_gradient(function, values):
    """Give f(x) (summed if it is not a scalar) and df/dx as NumPy arrays."""
    values = np.asarray(values)
    if keras.backend.backend() == "jax":
        value, gradient = jax.value_and_grad(lambda x: keras.ops.sum(function(x)))(values)
        return np.asarray(value), np.asarray(gradient)
    import tensorflow as tf

    variable = tf.constant(values)
    with tf.GradientTape() as tape:
        tape.watch(variable)
        value = tf.reduce_sum(function(variable))
    gradient = tape.gradient(value, variable, unconnected_gradients="zero")
    return value.numpy(), gradient.numpy()


@pytest.fixture(scope="session")
def gradient_of():
    """Return `f, x -> (f(x) summed, df/dx)` for the active backend."""
    return value_and_gradient


@pytest.fixture
def float64():
    """Say that a test computes in float64 (both backends are set up for it)."""
    return "float64"


@pytest.fixture(scope="session")
def frontier():
    """Load scripts/bench/frontier.py: the tabular policies and their training to convergence."""
    path = Path(__file__).parents[2] / "scripts" / "bench" / "frontier.py"
    spec = importlib.util.spec_from_file_location("frontier", path)
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules["frontier"] = module
    spec.loader.exec_module(module)
    return module
