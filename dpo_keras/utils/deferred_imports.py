"""Modules and names that are imported when they are first used, and quietly.

TensorFlow takes seconds to import. `dpo-keras validate` needs the names of objectives and of chat
templates, which stand beside code that computes with it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any


class Deferred:
    """Stand in for a module and import it at the first use of an attribute.

    Example:
        >>> ops = Deferred("keras.ops")
        >>> float(ops.sum([1.0, 2.0]))
        3.0
    """

    def __init__(self, name: str):
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        """Return the module's attribute as it is now."""
        return getattr(importlib.import_module(self._name), attribute)


ops: Any = Deferred("keras.ops")


def deferred_function(module: str, name: str) -> Callable[..., Any]:
    """Stand in for a function and import its module at the first call.

    Example:
        >>> sqrt = deferred_function("math", "sqrt")
        >>> sqrt(9.0)
        3.0
    """

    def call(*args: Any, **options: Any) -> Any:
        return getattr(importlib.import_module(module), name)(*args, **options)

    return call


def deferred_names(package: str, homes: Mapping[str, str]) -> Callable[[str], Any]:
    """Return a `__getattr__` for a package, which imports a name from its module in `homes`."""

    def get(name: str) -> Any:
        if name not in homes:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        return getattr(importlib.import_module(f"{package}.{homes[name]}"), name)

    return get


def missing_package(name: str, extra: str) -> str:
    """Say which command installs a package; an empty string where it is installed.

    Example:
        >>> missing_package("numpy", extra="plots")
        ''
    """
    if importlib.util.find_spec(name) is not None:
        return ""
    return f"needs the package {name}, which is not installed: pip install 'dpo-keras[{extra}]'."


@contextlib.contextmanager
def quiet_tensorflow() -> Iterator[None]:
    """Import TensorFlow without its start-up notices, those of a block that imports it included.

    Its C++ side writes them before `TF_CPP_MIN_LOG_LEVEL` is in force, so they are held back where
    they are written. A level of 0 or 1 that is set already asks for them. If the import fails, what
    was printed is the best explanation there is, and is shown.
    """
    level = os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # errors are exceptions too
    if "tensorflow" in sys.modules or level in ("0", "1"):
        yield
        return
    sys.stderr.flush()
    try:
        original = os.dup(2)
    except OSError:  # a program without stderr
        yield
        return
    with tempfile.TemporaryFile() as held:
        os.dup2(held.fileno(), 2)
        try:
            tensorflow = importlib.import_module("tensorflow")
            tensorflow.config.list_physical_devices()  # looks for accelerators, and tells of them
            yield
        except BaseException:
            held.seek(0)
            os.write(original, held.read())
            raise
        finally:
            os.dup2(original, 2)
            os.close(original)
