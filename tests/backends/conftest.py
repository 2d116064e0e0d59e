"""What Keras' other backend must do as TensorFlow does: these tests run with KERAS_BACKEND=jax.

Eight devices are made of one CPU. Without JAX as the backend, nothing here is collected.
"""

import os

import pytest

if os.environ.get("KERAS_BACKEND") == "jax":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(scope="session", autouse=True)
def compiled_steps_are_kept(tmp_path_factory):
    """Lets tests share what they compile again and again, in several processes."""
    import jax

    place = tmp_path_factory.getbasetemp()
    place = place.parent if "PYTEST_XDIST_WORKER" in os.environ else place
    jax.config.update("jax_compilation_cache_dir", str(place / "jax"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


@pytest.fixture(autouse=True)
def no_distribution():
    """Leaves no mesh behind."""
    import keras

    yield
    keras.distribution.set_distribution(None)
