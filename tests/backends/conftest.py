"""What Keras' other backend must do as TensorFlow does: these tests run with KERAS_BACKEND=jax.

Eight devices are made of one CPU. Without JAX as the backend, nothing here is collected.
"""

import os
import shutil
import tempfile
from pathlib import Path

import pytest

# Tests compile the same steps again and again, in several processes.
RUN = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))

if os.environ.get("KERAS_BACKEND") == "jax":
    flags = os.environ.get("XLA_FLAGS", "")
    os.environ["XLA_FLAGS"] = f"{flags} --xla_force_host_platform_device_count=8".strip()
    cache = Path(tempfile.gettempdir()) / f"dpo-keras-tests-{RUN}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(cache)
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.2"
else:
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture(autouse=True)
def no_distribution():
    """Leaves no mesh behind."""
    import keras

    yield
    keras.distribution.set_distribution(None)


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # the process that started the others
        uid = session.config.pluginmanager.get_plugin("dsession")
        name = RUN if uid is None else uid.nodemanager.testrunuid
        shutil.rmtree(Path(tempfile.gettempdir()) / f"dpo-keras-tests-{name}", ignore_errors=True)
