"""The variables of a training on JAX, written to disk device by device while it goes on (Orbax).

No device and no file has all of a model that a mesh splits. What is read goes to the devices that
need it, which may be those of another mesh.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import keras

from dpo_keras.errors import InputError
from dpo_keras.utils.backends import state_variables
from dpo_keras.utils.deferred_imports import missing_package
from dpo_keras.utils.keras_internals import set_values


def start_writing(model: keras.Model, path: pathlib.Path) -> Callable[[], None]:
    """Copy a model's state off its devices; return what waits until all of it is in `path`."""
    checkpointer = _checkpointer()
    state = {name: variable.value for name, variable in _state(model).items()}
    checkpointer.save(path.absolute(), state, force=True)

    def wait() -> None:
        checkpointer.wait_until_finished()
        checkpointer.close()

    return wait


def read(model: keras.Model, path: pathlib.Path) -> None:
    """Read a model's state to the devices on which it is now.

    Raises:
        ValueError: it is the state of another model.
    """
    import jax

    state = _state(model)
    described: Any = jax.ShapeDtypeStruct
    wanted = {
        name: described(v.shape, v.value.dtype, sharding=v.value.sharding)
        for name, v in state.items()
    }
    checkpointer = _checkpointer()
    shapes = {
        name: tuple(found.shape) for name, found in _metadata(checkpointer, path.absolute()).items()
    }
    expected = {name: tuple(v.shape) for name, v in state.items()}
    if shapes != expected:
        raise ValueError(f"it has {len(shapes)} variables, not {len(state)}, or of other shapes")
    found = checkpointer.restore(path.absolute(), wanted)
    checkpointer.close()
    set_values(list(state.values()), [found[name] for name in state])


def size_of(path: pathlib.Path) -> int:
    """Return the bytes of a file, or of all files of a directory."""
    return sum(file.stat().st_size for file in files_of(path))


def files_of(path: pathlib.Path) -> list[pathlib.Path]:
    """Return a file, or all files of a directory, in order."""
    return sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]


def _state(model: keras.Model) -> dict[str, keras.Variable]:
    return {f"{number:05d}": v for number, v in enumerate(state_variables(model))}


def _metadata(checkpointer: Any, path: pathlib.Path) -> dict[str, Any]:
    found: Any = checkpointer.metadata(path)
    return dict(getattr(found, "item_metadata", found))


def _checkpointer() -> Any:
    if problem := missing_package("orbax", extra="jax"):
        raise InputError(f"checkpoints on JAX: {problem}")
    import orbax.checkpoint

    return orbax.checkpoint.StandardCheckpointer()
