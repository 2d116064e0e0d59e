"""The backend of Keras, which is chosen before Keras is imported."""

from __future__ import annotations

import os
import sys

from dpo_keras.errors import InputError, InputProblem
from dpo_keras.utils.deferred_imports import missing_package

BACKENDS = ("tensorflow", "jax")


def choose_backend(wanted: str = "auto", mesh: bool = False) -> None:
    """Let Keras run on a backend, unless it does already.

    Args:
        wanted: `tensorflow`, `jax`, or `auto`: JAX for a mesh, else what the environment variable
            KERAS_BACKEND names, else TensorFlow.
        mesh: whether there is one.

    Raises:
        InputError: Keras runs on another one, the package is missing, or KERAS_BACKEND names
            another than the two.
    """
    running, given = _running(), chosen_backend()
    backend = wanted if wanted != "auto" else "jax" if mesh else given
    if backend not in BACKENDS:
        hint = "Unset it, or set it to one of them."
        raise InputError(InputProblem("KERAS_BACKEND", "must be tensorflow or jax", backend, hint))
    if running not in (None, backend):
        key = "training.mesh" if wanted == "auto" else "training.backend"
        rule = f"needs Keras on {backend}, and it runs on {running} already"
        hint = f"Set KERAS_BACKEND={backend} before Keras is imported."
        raise InputError(InputProblem(key, rule, hint=hint))
    if backend == "jax" and (problem := missing_package("jax", extra="jax")):
        raise InputError(InputProblem("training.backend", problem))
    os.environ["KERAS_BACKEND"] = backend


def chosen_backend() -> str:
    """Return the backend that Keras runs on, or will run on."""
    return _running() or os.environ.get("KERAS_BACKEND") or "tensorflow"


def _running() -> str | None:
    keras = sys.modules.get("keras")
    # Another thread may be importing it.
    backend = getattr(keras, "backend", None)
    return None if backend is None else str(backend.backend())
